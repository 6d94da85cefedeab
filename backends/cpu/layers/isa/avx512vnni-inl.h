// AVX-512: 16 floats. Of the set that this file is compiled for only F, BW, DQ and VL are used.
#pragma once

#include <immintrin.h>

#include "layers/layers.h"

namespace edgeq {
namespace {

using V = __m512;
constexpr int W = 16;

inline __mmask16 first(int n) { return __mmask16((1u << n) - 1); }

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline V load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline void store_n(float* p, V x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
inline void stream(float* p, V x) { _mm512_stream_ps(p, x); }
inline void stream_end() { _mm_sfence(); }
inline V held(V x) {
    __asm__("" : "+v"(x));
    return x;
}
inline V set1(float x) { return _mm512_set1_ps(x); }
inline V add(V x, V y) { return _mm512_add_ps(x, y); }
inline V sub(V x, V y) { return _mm512_sub_ps(x, y); }
inline V mul(V x, V y) { return _mm512_mul_ps(x, y); }
inline V div(V x, V y) { return _mm512_div_ps(x, y); }
inline V fma(V x, V y, V z) { return _mm512_fmadd_ps(x, y, z); }
inline V max_of(V x, V y) { return _mm512_max_ps(x, y); }
inline float sum(V x) { return _mm512_reduce_add_ps(x); }
inline float peak_of(V x) { return _mm512_reduce_max_ps(x); }
inline V round_(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V pow2(V x) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), x); }

inline void sum4(V a, V b, V c, V d, float* out) {
    V ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));  // a b a b in every quarter
    V cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    V all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));  // a b c d
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

inline void load4(const float* p, V* out) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    V a = load(p), b = load(p + 16), c = load(p + 32), d = load(p + 48);
    V e0 = _mm512_permutex2var_ps(a, even, b), e1 = _mm512_permutex2var_ps(c, even, d);
    V o0 = _mm512_permutex2var_ps(a, odd, b), o1 = _mm512_permutex2var_ps(c, odd, d);
    out[0] = _mm512_permutex2var_ps(e0, even, e1);
    out[1] = _mm512_permutex2var_ps(o0, even, o1);
    out[2] = _mm512_permutex2var_ps(e0, odd, e1);
    out[3] = _mm512_permutex2var_ps(o0, odd, o1);
}

inline __m256i load_half(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline V load_f16(const uint16_t* p) { return _mm512_cvtph_ps(load_half(p)); }
inline V load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(p)), 16));
}
inline V load_i8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void load_i4(const uint8_t* p, V& low, V& high) {
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
    auto widened = [&](__m128i x) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_sub_epi8(_mm_and_si128(x, mask), _mm_set1_epi8(8))));
    };
    low = widened(pairs), high = widened(_mm_srli_epi16(pairs, 4));
}
inline void store_f16(uint16_t* p, V x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace edgeq
