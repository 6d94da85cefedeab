// AVX2 with FMA and F16C: 8 floats.
#pragma once

#include <immintrin.h>

#include "layers/layers.h"

namespace edgeq {
namespace {

using V = __m256;
constexpr int W = 8;

inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}

inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline V load_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
inline void store(float* p, V x) { _mm256_storeu_ps(p, x); }
inline void store_n(float* p, V x, int n) { _mm256_maskstore_ps(p, first(n), x); }
inline void stream(float* p, V x) { _mm256_stream_ps(p, x); }
inline void stream_end() { _mm_sfence(); }
inline V held(V x) {
    __asm__("" : "+x"(x));
    return x;
}
inline V set1(float x) { return _mm256_set1_ps(x); }
inline V add(V x, V y) { return _mm256_add_ps(x, y); }
inline V sub(V x, V y) { return _mm256_sub_ps(x, y); }
inline V mul(V x, V y) { return _mm256_mul_ps(x, y); }
inline V div(V x, V y) { return _mm256_div_ps(x, y); }
inline V fma(V x, V y, V z) { return _mm256_fmadd_ps(x, y, z); }
inline V max_of(V x, V y) { return _mm256_max_ps(x, y); }
inline V round_(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V pow2(V x) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

inline void sum4(V a, V b, V c, V d, float* out) {
    V all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));  // a b c d in both halves
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

inline float sum(V x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline float peak_of(V x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

inline void load4(const float* p, V* out) {
    // Quarters of the inputs that hold entries 4 i ... 4 i + 3, transposed within each half.
    auto pair = [p](int low, int high) {
        return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 4 * low)), _mm_loadu_ps(p + 4 * high), 1);
    };
    V a = pair(0, 4), b = pair(1, 5), c = pair(2, 6), d = pair(3, 7);
    V ab_low = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b);
    V cd_low = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
    out[0] = _mm256_shuffle_ps(ab_low, cd_low, 0x44);
    out[1] = _mm256_shuffle_ps(ab_low, cd_low, 0xee);
    out[2] = _mm256_shuffle_ps(ab_high, cd_high, 0x44);
    out[3] = _mm256_shuffle_ps(ab_high, cd_high, 0xee);
}

inline __m128i load_half(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline V load_f16(const uint16_t* p) { return _mm256_cvtph_ps(load_half(p)); }
inline V load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16));
}
inline V load_i8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void load_i4(const uint8_t* p, V& low, V& high) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
    auto widened = [&](__m128i x) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_sub_epi8(_mm_and_si128(x, mask), _mm_set1_epi8(8))));
    };
    low = widened(pairs), high = widened(_mm_srli_epi16(pairs, 4));
}
inline void store_f16(uint16_t* p, V x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace edgeq
