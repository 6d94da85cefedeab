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

// Scales or biases, of `type`, of n groups of a row from group `at` on, counted through all rows. `blocks` are their
// units.
inline void numbers(const Matrix& w, Type type, const void* p, const uint16_t* blocks, int64_t at, int n, float* out) {
    if (type == Type::bf16) return widen_sixteen<Type::bf16>(p, at, n, out);
    if (type == Type::f16) return widen_sixteen<Type::f16>(p, at, n, out);
    if (type == Type::f32) return widen_sixteen<Type::f32>(p, at, n, out);
    if (type == Type::i8)
        widen_sixteen<Type::i8>(p, at, n, out);
    else if (type == Type::u4)
        widen_sixteen<Type::u4>(p, at, n, out);
    else
        widen_sixteen<Type::u4_high>(p, at, n, out);
    for (int i = 0; i < n; i += lanes)  // rows are whole blocks
        f_store(out + i, f_mul(f_load(out + i), f_units(blocks + ((at + i) >> w.block_shift), w.block_shift, n - i)));
}

// Without biases: those of the zero.
EDGEQ_INLINE void biases_of_zero(const Matrix& w, const float* scales, float* biases) {
    for (int i = 0; i < sixteen; i += lanes) f_store(biases + i, f_mul(f_load(scales + i), f_set(float(-w.zero))));
}

// Both, of at most sixteen groups, of any matrix but those of fp4.
__attribute__((noinline)) inline void scales_and_biases(const Matrix& w, int64_t at, int n, float* scales,
                                                        float* biases) {
    numbers(w, w.type, w.scales, w.block_scales, at, n, scales);
    if (!w.biases) return biases_of_zero(w, scales, biases);
    numbers(w, w.type == Type::u4 ? Type::u4_high : w.type, w.biases, w.block_biases, at, n, biases);
    if (w.type == Type::u4)
        for (int i = 0; i < sixteen; i += lanes) f_store(biases + i, f_mul(f_load(biases + i), f_set(-1)));
}

// Whether scales_of_blocks knows them: groups of 16 in two levels, as GGUF's types have them, sixteen at a time.
inline bool in_blocks(const Matrix& w) {
    return w.in % 256 == 0 && (w.bits == 2 ? w.type == Type::u4 : w.type == Type::i8 && !w.biases);
}

// Both, of sixteen groups of such a matrix.
template <int bits>
EDGEQ_INLINE void scales_of_blocks(const Matrix& w, int64_t at, float* scales, float* biases) {
    constexpr bool halves = bits == 2;
    for (int i = 0; i < sixteen; i += lanes) {
        const int64_t block = (at + i) >> w.block_shift;
        const F unit = f_units(w.block_scales + block, w.block_shift, sixteen - i);
        const F scale = f_mul(f_widen(w.scales, halves ? Type::u4 : Type::i8, at + i), unit);
        f_store(scales + i, scale);
        if constexpr (halves) {
            const F negative = f_mul(f_units(w.block_biases + block, w.block_shift, sixteen - i), f_set(-1));
            f_store(biases + i, f_mul(f_widen(w.scales, Type::u4_high, at + i), negative));
        } else if (w.biases) {
            const F block_unit = f_units(w.block_biases + block, w.block_shift, sixteen - i);
            f_store(biases + i, f_mul(f_widen(w.biases, Type::i8, at + i), block_unit));
        } else {
            f_store(biases + i, f_mul(scale, f_set(float(-w.zero))));
        }
    }
}

template <Type type>
EDGEQ_INLINE void widen_both(const Matrix& w, int64_t at, int n, float* scales, float* biases) {
    widen_sixteen<type>(w.scales, at, n, scales);
    if (!w.biases) return biases_of_zero(w, scales, biases);
    widen_sixteen<type>(w.biases, at, n, biases);
}

// scales_and_biases, inline for what most files have: a call sends the sums of those around it to memory and back.
// Groups of 32 may be those of GGUF's Q4_K and Q5_K.
template <int group>
EDGEQ_INLINE void scales_and_biases_inline(const Matrix& w, int64_t at, int n, float* scales, float* biases) {
    if (w.type == Type::bf16) return widen_both<Type::bf16>(w, at, n, scales, biases);
    if (w.type == Type::f16) return widen_both<Type::f16>(w, at, n, scales, biases);
    if constexpr (group == 32)
        if (w.type == Type::i8 && n == sixteen) return scales_of_blocks<4>(w, at, scales, biases);
    scales_and_biases(w, at, n, scales, biases);
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

}  // namespace
}  // namespace edgeq
