// 16-bit floats in plain C++.
#pragma once

#include <cstdint>
#include <cstring>

namespace edgeq {

static inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float from_bf16(uint16_t h) { return float_of(uint32_t(h) << 16); }

// To nearest, ties to even; NaN stays NaN.
static inline uint16_t to_bf16_bits(float x) {
    const uint32_t bits = bits_of(x);
    if (x != x) return 0x7fc0;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float from_f16(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity, NaN
    if (rest < 0x0400) {                                                            // rest times 2^-24
        const float tiny = float(rest) * (1.0f / 16777216.0f);
        return sign ? -tiny : tiny;
    }
    return float_of(sign | ((rest << 13) + (112u << 23)));
}

// To nearest, ties to even; too large becomes infinity, NaN stays NaN.
static inline uint16_t to_f16_bits(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 65536 or beyond
    if (rest < 0x38800000) {  // subnormal: let the addition of 0.5 align the last bit to 2^-24, and round
        return uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));
    }
    return uint16_t(sign | ((rest - (112u << 23) + 0x0fff + (rest >> 13 & 1)) >> 13));
}

}  // namespace edgeq
