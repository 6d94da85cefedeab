// No vectors: one float at a time, in plain C++. The reference for the other files.
#pragma once

#include "layers/half.h"
#include "layers/layers.h"

namespace edgeq {
namespace {

using V = float;
constexpr int W = 1;

inline V load(const float* p) { return *p; }
inline V load_n(const float* p, int) { return *p; }
inline void store(float* p, V x) { *p = x; }
inline void store_n(float* p, V x, int) { *p = x; }
inline void stream(float* p, V x) { *p = x; }
inline void stream_end() {}
inline V held(V x) { return x; }
inline V set1(float x) { return x; }
inline V add(V x, V y) { return x + y; }
inline V sub(V x, V y) { return x - y; }
inline V mul(V x, V y) { return x * y; }
inline V div(V x, V y) { return x / y; }
inline V fma(V x, V y, V z) { return x * y + z; }
inline V max_of(V x, V y) { return x > y ? x : y; }
inline float sum(V x) { return x; }
inline float peak_of(V x) { return x; }
inline V round_(V x) { return x < 0 ? float(int(x - 0.5f)) : float(int(x + 0.5f)); }
inline V pow2(V x) { return float_of(uint32_t(int(x) + 127) << 23); }

inline void sum4(V a, V b, V c, V d, float* out) { out[0] = a, out[1] = b, out[2] = c, out[3] = d; }
inline void load4(const float* p, V* out) {
    for (int i = 0; i < 4; i++) out[i] = p[i];
}

inline V load_f16(const uint16_t* p) { return from_f16(*p); }
inline V load_bf16(const uint16_t* p) { return from_bf16(*p); }
inline V load_i8(const int8_t* p) { return float(*p); }
inline void load_i4(const uint8_t* p, V& low, V& high) { low = float(*p & 15) - 8.0f, high = float(*p >> 4) - 8.0f; }
inline void store_f16(uint16_t* p, V x) { *p = edgeq::to_f16_bits(x); }

}  // namespace
}  // namespace edgeq
