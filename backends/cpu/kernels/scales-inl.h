// Scales and biases as float32, whatever the matrix holds.
#pragma once

#include "kernels/kernels.h"

namespace edgeq {
namespace {

constexpr int sixteen = 16;  // groups whose scales are treated together; rows of scales are padded to this

// p[at], ..., p[at + n - 1] as float, n <= sixteen; the rest of the sixteen are zero. The type is known here, not asked
// for at every vector.
template <Type type>
EDGEQ_INLINE void widen_sixteen(const void* p, int64_t at, int n, float* out) {
    for (int i = 0; i < sixteen; i += lanes)
        f_store(out + i, n - i >= lanes ? f_widen(p, type, at + i) : f_widen_some(p, type, at + i, n - i));
}

// Scales or biases of n groups of a row from group `at` on, counted through all rows. `blocks` are their units.
inline void numbers(const Matrix& w, Type type, const void* p, const uint16_t* blocks, int64_t at, int n, float* out) {
    switch (type) {
        case Type::bf16: return widen_sixteen<Type::bf16>(p, at, n, out);
        case Type::f16: return widen_sixteen<Type::f16>(p, at, n, out);
        case Type::f32: return widen_sixteen<Type::f32>(p, at, n, out);
        case Type::e8m0: return widen_sixteen<Type::e8m0>(p, at, n, out);
        case Type::e4m3: return widen_sixteen<Type::e4m3>(p, at, n, out);
        case Type::i8: widen_sixteen<Type::i8>(p, at, n, out); break;
        case Type::u4: widen_sixteen<Type::u4>(p, at, n, out); break;
        case Type::u4_high: widen_sixteen<Type::u4_high>(p, at, n, out); break;
    }
    for (int i = 0; i < n; i += lanes)  // rows are whole blocks
        f_store(out + i, f_mul(f_load(out + i), f_units(blocks + ((at + i) >> w.block_shift), w.block_shift, n - i)));
}

// to[i] = from[i] * factor, of sixteen.
EDGEQ_INLINE void multiplied(const float* from, float factor, float* to) {
    for (int i = 0; i < sixteen; i += lanes) f_store(to + i, f_mul(f_load(from + i), f_set(factor)));
}

// Both, of at most sixteen groups.
inline void scales_and_biases(const Matrix& w, int64_t at, int n, float* scales, float* biases) {
    numbers(w, w.type, w.scales, w.block_scales, at, n, scales);
    if (w.mode == Mode::fp4) multiplied(scales, 0.5f, scales);
    if (!w.biases) return multiplied(scales, float(-w.zero), biases);
    const bool halves = w.type == Type::u4;
    numbers(w, halves ? Type::u4_high : w.type, w.biases, w.block_biases, at, n, biases);
    if (halves) multiplied(biases, -1, biases);
}

}  // namespace
}  // namespace edgeq
