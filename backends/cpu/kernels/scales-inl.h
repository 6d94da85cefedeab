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
inline void numbers(const Matrix& w, const void* p, const uint16_t* blocks, int64_t at, int n, float* out) {
    if (w.type == Type::bf16) return widen_sixteen<Type::bf16>(p, at, n, out);
    if (w.type == Type::f16) return widen_sixteen<Type::f16>(p, at, n, out);
    if (w.type == Type::f32) return widen_sixteen<Type::f32>(p, at, n, out);
    widen_sixteen<Type::i8>(p, at, n, out);
    for (int i = 0; i < n; i += lanes)  // rows are whole blocks
        f_store(out + i, f_mul(f_load(out + i), f_units(blocks + ((at + i) >> w.block_shift), w.block_shift, n - i)));
}

// Both, of at most sixteen groups.
inline void scales_and_biases(const Matrix& w, int64_t at, int n, float* scales, float* biases) {
    numbers(w, w.scales, w.block_scales, at, n, scales);
    if (w.biases) return numbers(w, w.biases, w.block_biases, at, n, biases);
    for (int i = 0; i < sixteen; i += lanes) f_store(biases + i, f_mul(f_load(scales + i), f_set(float(-w.zero))));
}

}  // namespace
}  // namespace edgeq
