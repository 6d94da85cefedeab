// Vectors of 256 bits: what avx2.cpp and avxvnni.cpp share; they define dot_codes after it.
#pragma once

#include "layers/isa/avx2-inl.h"

namespace edgeq {
namespace {

using Code = int16_t;
using I = __m256i;
constexpr int step = 2, vectors = 2;  // 12 sums, 2 weights, 1 activation and a product: all 16 registers

inline I i_zero() { return _mm256_setzero_si256(); }
inline I i_add(I x, I y) { return _mm256_add_epi32(x, y); }
inline V i_float(I x) { return _mm256_cvtepi32_ps(x); }
inline I load_codes(const Code* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline I spread_codes(const Code* p) {
    int pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm256_set1_epi32(pair);
}
inline I store_codes(Code* p, V x) {
    const I codes = _mm256_cvtps_epi32(x);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
    return codes;
}
inline void store_steps(Code* p, const V* x) {
    const __m256i low = _mm256_cvtps_epi32(x[0]), high = _mm256_slli_epi32(_mm256_cvtps_epi32(x[1]), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(low, high, 0xaa));
}
inline V fraction(V x) { return sub(x, _mm256_floor_ps(x)); }
inline V scale2(V x, V exponent) { return mul(x, pow2(_mm256_floor_ps(max_of(set1(-126.0f), exponent)))); }

// 8 x 8 of 32 bits: pairs of rows, pairs of pairs, then halves of vectors.
void transpose_steps(const Code* from, Index stride, Code* to, Index to_stride) {
    __m256i r[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = load_codes(from + i * stride);
    for (int i = 0; i < 8; i += 4) {
        __m256i a = _mm256_unpacklo_epi32(r[i], r[i + 1]), b = _mm256_unpackhi_epi32(r[i], r[i + 1]);
        __m256i c = _mm256_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm256_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm256_unpacklo_epi64(a, c), t[i + 1] = _mm256_unpackhi_epi64(a, c);
        t[i + 2] = _mm256_unpacklo_epi64(b, d), t[i + 3] = _mm256_unpackhi_epi64(b, d);
    }
    for (int j = 0; j < 4; j++) {
        r[j] = _mm256_permute2x128_si256(t[j], t[4 + j], 0x20);
        r[4 + j] = _mm256_permute2x128_si256(t[j], t[4 + j], 0x31);
    }
    for (int i = 0; i < 8; i++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * to_stride), r[i]);
}

}  // namespace
}  // namespace edgeq
