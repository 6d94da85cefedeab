// Rows of numbers as codes and scales.
#pragma once

#include "vision/rows-inl.h"
#include "vision/kernels.h"

namespace edgeq {
namespace {

constexpr int tile = vectors * W;
constexpr bool floats = sizeof(Code) == sizeof(float);  // codes are the numbers themselves
constexpr float least_peak = 1e-30f;                    // less is zero: the reciprocal would overflow

// What a group of numbers needs to know of itself: its largest magnitude, and 0, or NaN where some are no numbers.
struct Extent {
    V most = set1(0.0f), none = set1(0.0f);
    void take(V x) {
        most = max_of(most, abs_of(x));
        none = fma(x, set1(0.0f), none);
    }
};

// n <= group_depth numbers times `factor`: codes, zeros up to the end of a vector, and the scale.
INLINE float encode_group(const float* x, Index n, float factor, Code* codes) {
    if (floats) {
        for (Index i = 0; i < n; i += W) store_codes(codes + i, mul(load_upto(x + i, n - i), set1(factor)));
        return 1.0f;
    }
    Extent extent;
    for (Index i = 0; i < n; i += W) extent.take(load_upto(x + i, n - i));
    const float peak = peak_of(extent.most), limit = code_limit(n);
    const V inverse = set1(peak < least_peak ? 0.0f : limit / peak);
    for (Index i = 0; i < n; i += W) store_codes(codes + i, mul(load_upto(x + i, n - i), inverse));
    return (peak < least_peak ? 0.0f : peak / limit) * factor + sum(extent.none);
}

// Codes [from, to) of a row, which are beyond its numbers.
INLINE void clear(Code* codes, Index from, Index to) {
    for (Index i = from; i < to; i++) codes[i] = 0;
}

void encode(const float* x, Index n, float factor, const Codes& to, Index row) {
    Code* codes = static_cast<Code*>(to.codes) + row * to.stride;
    for (Index c = 0; c < n; c += group_depth)
        to.scales[row * to.groups + c / group_depth] =
            encode_group(x + c, smaller(group_depth, n - c), factor, codes + c);
    clear(codes, padded(n, W), to.stride);
}

// W weights from index `at` on, of which `some` are there; the others are zero.
INLINE V widen(const Matrix& w, Index at, Index some) {
    const Index size = w.type == Type::f32 ? 4 : 2;
    const char* p = static_cast<const char*>(w.data) + at * size;
    uint32_t rest[W] = {};
    if (some < W) {
        __builtin_memcpy(rest, p, some * size);
        p = reinterpret_cast<const char*>(rest);
    }
    if (w.type == Type::f32) return load(reinterpret_cast<const float*>(p));
    const uint16_t* half = reinterpret_cast<const uint16_t*>(p);
    return w.type == Type::f16 ? load_f16(half) : load_bf16(half);
}

// The same as encode_group for weights from index `at` on. The scale is a power of two, and a code up to 4096: weights of
// 16 bits are exact but for those that are far smaller than the group's largest.
INLINE float encode_weights(const Matrix& w, Index at, Index n, Code* codes) {
    if (floats) {
        for (Index i = 0; i < n; i += W) store_codes(codes + i, widen(w, at + i, n - i));
        return 1.0f;
    }
    Extent extent;
    for (Index i = 0; i < n; i += W) extent.take(widen(w, at + i, n - i));
    float peak = peak_of(extent.most), scale = 0.0f, inverse = 0.0f;
    if (peak >= least_peak) {
        uint32_t bits, one;
        __builtin_memcpy(&bits, &peak, sizeof bits);
        const uint32_t exponent = (bits >> 23) - 11;  // of the scale: a code is below 2^12
        one = exponent << 23;
        __builtin_memcpy(&scale, &one, sizeof scale);
        one = (254 - exponent) << 23;
        __builtin_memcpy(&inverse, &one, sizeof inverse);
    }
    for (Index i = 0; i < n; i += W) store_codes(codes + i, mul(widen(w, at + i, n - i), set1(inverse)));
    return scale + sum(extent.none);
}

// W rows of codes, `steps` of them, as steps of a tile whose first row of these is at `to`.
INLINE void to_tile(const Code* rows, Index stride, Index steps, Code* to) {
    for (Index i = 0; i < steps; i += W) transpose_steps(rows + i * step, stride, to + i * tile * step, tile * step);
}

}  // namespace
}  // namespace edgeq
