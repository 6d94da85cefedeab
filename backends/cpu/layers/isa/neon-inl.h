// NEON, as every aarch64 has it: 4 floats.
#pragma once

#include <arm_neon.h>

#include "layers/layers.h"

namespace edgeq {
namespace {

using V = float32x4_t;
constexpr int W = 4;

inline V load(const float* p) { return vld1q_f32(p); }
inline V load_n(const float* p, int n) {
    float entries[4] = {};
    for (int i = 0; i < W && i < n; i++) entries[i] = p[i];
    return vld1q_f32(entries);
}
inline void store(float* p, V x) { vst1q_f32(p, x); }
inline void store_n(float* p, V x, int n) {
    float entries[4];
    vst1q_f32(entries, x);
    for (int i = 0; i < n; i++) p[i] = entries[i];
}
inline void stream(float* p, V x) { vst1q_f32(p, x); }
inline void stream_end() {}
inline V held(V x) {
    __asm__("" : "+w"(x));
    return x;
}
inline V set1(float x) { return vdupq_n_f32(x); }
inline V add(V x, V y) { return vaddq_f32(x, y); }
inline V sub(V x, V y) { return vsubq_f32(x, y); }
inline V mul(V x, V y) { return vmulq_f32(x, y); }
inline V div(V x, V y) { return vdivq_f32(x, y); }
inline V fma(V x, V y, V z) { return vfmaq_f32(z, x, y); }
inline V max_of(V x, V y) { return vmaxq_f32(x, y); }
inline float sum(V x) { return vaddvq_f32(x); }
inline float peak_of(V x) { return vmaxvq_f32(x); }
inline V round_(V x) { return vrndnq_f32(x); }
inline V pow2(V x) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(x), vdupq_n_s32(127)), 23)); }

inline void sum4(V a, V b, V c, V d, float* out) { vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))); }

inline void load4(const float* p, V* out) {
    float32x4x4_t all = vld4q_f32(p);
    for (int i = 0; i < 4; i++) out[i] = all.val[i];
}

inline V load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline V load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline V widened(int8x8_t x) { return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(x)))); }
inline int8x8_t load_four(const void* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return vreinterpret_s8_s32(vdup_n_s32(four));
}
inline V load_i8(const int8_t* p) { return widened(load_four(p)); }
inline void load_i4(const uint8_t* p, V& low, V& high) {
    const uint8x8_t pairs = vreinterpret_u8_s8(load_four(p));
    low = widened(vsub_s8(vreinterpret_s8_u8(vand_u8(pairs, vdup_n_u8(15))), vdup_n_s8(8)));
    high = widened(vsub_s8(vreinterpret_s8_u8(vshr_n_u8(pairs, 4)), vdup_n_s8(8)));
}
inline void store_f16(uint16_t* p, V x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }

}  // namespace
}  // namespace edgeq
