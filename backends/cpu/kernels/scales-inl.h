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

// Both, of at most sixteen groups, where they are of the usual types.
inline void scales_and_biases(const Matrix& w, int64_t at, int n, float* scales, float* biases) {
    numbers(w, w.scales, w.block_scales, at, n, scales);
    if (w.biases) return numbers(w, w.biases, w.block_biases, at, n, biases);
    for (int i = 0; i < sixteen; i += lanes) f_store(biases + i, f_mul(f_load(scales + i), f_set(float(-w.zero))));
}

// The two halves of bytes, in units.
EDGEQ_INLINE void halves(const Matrix& w, int64_t at, int n, float* scales, float* biases) {
    widen_sixteen<Type::u4>(w.scales, at, n, scales);
    widen_sixteen<Type::u4_high>(w.scales, at, n, biases);
    for (int i = 0; i < n; i += lanes) {
        const int64_t block = (at + i) >> w.block_shift;
        const F unit = f_units(w.block_scales + block, w.block_shift, n - i);
        const F bias_unit = f_mul(f_units(w.block_biases + block, w.block_shift, n - i), f_set(-1));
        f_store(scales + i, f_mul(f_load(scales + i), unit));
        f_store(biases + i, f_mul(f_load(biases + i), bias_unit));
    }
}

// Of one byte, for fp4: its codes stand for twice the numbers, plus their zero.
template <Type type>
EDGEQ_INLINE void fp4_scales(const Matrix& w, int64_t at, int n, float* scales, float* biases) {
    widen_sixteen<type>(w.scales, at, n, scales);
    for (int i = 0; i < sixteen; i += lanes) {
        const F half = f_mul(f_load(scales + i), f_set(0.5f));
        f_store(scales + i, half);
        f_store(biases + i, f_mul(half, f_set(float(-table_zero(Mode::fp4)))));
    }
}

// Both, of matrices that are of so many bits, this mode and this group size: what cannot be is not asked for.
template <int bits, Mode mode, int group>
EDGEQ_INLINE void scales_and_biases_of(const Matrix& w, int64_t at, int n, float* scales, float* biases) {
    if constexpr (mode == Mode::fp4) return fp4_scales<group == 16 ? Type::e4m3 : Type::e8m0>(w, at, n, scales, biases);
    if constexpr (bits == 2 && group == 16)
        if (w.type == Type::u4) return halves(w, at, n, scales, biases);
    scales_and_biases(w, at, n, scales, biases);
}

}  // namespace
}  // namespace edgeq
