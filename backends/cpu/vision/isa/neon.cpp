// NEON: it multiplies no more integers of 16 bits at a time than floats, so codes are floats.
#include "layers/isa/neon-inl.h"

namespace edgeq {
namespace {

using Code = float;
using I = float32x4_t;
constexpr int step = 1, vectors = 4;  // 24 sums, 4 weights, 1 activation: 29 of 32 registers

inline I i_zero() { return vdupq_n_f32(0.0f); }
inline I i_add(I x, I y) { return vaddq_f32(x, y); }
inline V i_float(I x) { return x; }
inline V load_codes(const Code* p) { return vld1q_f32(p); }
inline V spread_codes(const Code* p) { return vld1q_dup_f32(p); }
inline I dot_codes(I sum, V x, V y) { return vfmaq_f32(sum, x, y); }
inline I store_codes(Code* p, V x) {
    vst1q_f32(p, x);
    return x;
}
inline void store_steps(Code* p, const V* x) { vst1q_f32(p, x[0]); }
inline V fraction(V x) { return sub(x, vrndmq_f32(x)); }
inline V scale2(V x, V exponent) { return mul(x, pow2(vrndmq_f32(max_of(set1(-126.0f), exponent)))); }

void transpose_steps(const Code* from, Index stride, Code* to, Index to_stride) {
    float32x4x4_t rows;
    for (int i = 0; i < 4; i++) rows.val[i] = vld1q_f32(from + i * stride);
    float columns[16];
    vst4q_f32(columns, rows);
    for (int i = 0; i < 4; i++) vst1q_f32(to + i * to_stride, vld1q_f32(columns + 4 * i));
}

}  // namespace
}  // namespace edgeq

#define VISION vision_neon
#include "vision/vision-inl.h"
