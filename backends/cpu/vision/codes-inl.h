// Rows of numbers as codes and scales.
#pragma once

#include "vision/kernels.h"
#include "vision/rows-inl.h"

namespace edgeq {
namespace {

constexpr int tile = vectors * W;
constexpr bool floats = sizeof(Code) == sizeof(float);  // codes are the numbers themselves
constexpr float least_peak = 1e-30f;                    // less is zero: the reciprocal would overflow

// The length of n numbers, of which the sum of squares and the largest magnitude are known; NaN where one is none.
// Where squares are no floats, the longest that it can be.
INLINE float length_of(float squares, float peak, Index n) {
    if (squares < 1e-20f || squares > 1e30f) return peak * __builtin_sqrtf(float(n));
    return __builtin_sqrtf(squares);
}

// The scale that makes numbers codes of at most `wanted` length.
INLINE float scale_of(float length, float peak, float wanted) {
    const float by_length = length / wanted, by_peak = peak / largest_code;
    return by_length < by_peak ? by_peak : by_length;
}

INLINE float reciprocal(float scale) { return scale < least_peak ? 0.0f : 1.0f / scale; }

// n <= group_depth numbers times `factor`: codes, zeros up to the end of a vector, and the scale.
INLINE float encode_group(const float* x, Index n, float factor, float length, Code* codes) {
    if (floats) {
        for (Index i = 0; i < n; i += W) store_codes(codes + i, mul(load_upto(x + i, n - i), set1(factor)));
        return 1.0f;
    }
    V squares = set1(0.0f), most = set1(0.0f);
    for (Index i = 0; i < n; i += W) {
        const V value = load_upto(x + i, n - i);
        squares = fma(value, value, squares), most = max_of(most, abs_of(value));
    }
    const float peak = peak_of(most), scale = scale_of(length_of(sum(squares), peak, n), peak, length);
    const V inverse = set1(reciprocal(scale));
    for (Index i = 0; i < n; i += W) store_codes(codes + i, mul(load_upto(x + i, n - i), inverse));
    return scale * factor;
}

// Codes [from, to) of a row, which are beyond its numbers.
INLINE void clear(Code* codes, Index from, Index to) {
    for (Index i = from; i < to; i++) codes[i] = 0;
}

void encode(const float* x, Index n, float factor, float length, const Codes& to, Index row) {
    Code* codes = static_cast<Code*>(to.codes) + row * to.stride;
    for (Index c = 0; c < n; c += group_depth)
        to.scales[row * to.groups + c / group_depth] =
            encode_group(x + c, smaller(group_depth, n - c), factor, length, codes + c);
    clear(codes, padded(n, W), to.stride);
}

// W weights from index `at` on, of which `some` are there; the others are zero.
template <Type type>
INLINE V widen(const void* data, Index at, Index some) {
    constexpr Index size = type == Type::f32 ? 4 : 2;
    const char* p = static_cast<const char*>(data) + at * size;
    uint32_t rest[W];
    if (some < W) {
        for (uint32_t& bits : rest) bits = 0;
        __builtin_memcpy(rest, p, some * size);
        p = reinterpret_cast<const char*>(rest);
    }
    if (type == Type::f32) return load(reinterpret_cast<const float*>(p));
    const uint16_t* half = reinterpret_cast<const uint16_t*>(p);
    return type == Type::f16 ? load_f16(half) : load_bf16(half);
}

// The largest power of two times which numbers of this length are shorter than weight_length, and its reciprocal.
INLINE void weight_scale(float length, float& scale, float& inverse) {
    uint32_t bits;
    __builtin_memcpy(&bits, &length, sizeof bits);
    const uint32_t exponent = (bits >> 23) - 14, one = exponent << 23, other = (254 - exponent) << 23;
    __builtin_memcpy(&scale, &one, sizeof scale);
    __builtin_memcpy(&inverse, &other, sizeof inverse);
}

// The same as encode_group for weights from index `at` on. The scale is a power of two: weights of 16 bits are exact
// but for those that are far smaller than the group's others.
template <Type type>
INLINE float encode_weights(const void* data, Index at, Index n, Code* codes) {
    if (floats) {
        for (Index i = 0; i < n; i += W) store_codes(codes + i, widen<type>(data, at + i, n - i));
        return 1.0f;
    }
    V squares = set1(0.0f), most = set1(0.0f);
    auto look = [&](Index i, Index some) {
        const V value = widen<type>(data, at + i, some);
        squares = fma(value, value, squares), most = max_of(most, abs_of(value));
    };
    const Index whole = n / W * W;
    for (Index i = 0; i < whole; i += W) look(i, W);
    if (whole < n) look(whole, n - whole);
    const float peak = peak_of(most), length = length_of(sum(squares), peak, n);
    float scale = length, inverse = 0.0f;  // none, infinite, or nothing
    if (least_peak <= length && length <= 1e30f) weight_scale(length, scale, inverse);
    for (Index i = 0; i < whole; i += W) store_codes(codes + i, mul(widen<type>(data, at + i, W), set1(inverse)));
    if (whole < n) store_codes(codes + whole, mul(widen<type>(data, at + whole, n - whole), set1(inverse)));
    return scale;
}

// W rows of codes, `steps` of them, as steps of a tile whose first row of these is at `to`.
INLINE void to_tile(const Code* rows, Index stride, Index steps, Code* to) {
    for (Index i = 0; i < steps; i += W) transpose_steps(rows + i * step, stride, to + i * tile * step, tile * step);
}

}  // namespace
}  // namespace edgeq
