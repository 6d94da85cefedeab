// AVX-512 with VNNI: two products for each of 16 sums at a time.
#include "layers/isa/avx512vnni-inl.h"

namespace edgeq {
namespace {

using Code = int16_t;
using I = __m512i;
constexpr int step = 2, vectors = 4;  // 24 sums, 4 weights, 1 activation: 29 of 32 registers

inline I i_zero() { return _mm512_setzero_si512(); }
inline I i_add(I x, I y) { return _mm512_add_epi32(x, y); }
inline V i_float(I x) { return _mm512_cvtepi32_ps(x); }
inline I load_codes(const Code* p) { return _mm512_loadu_si512(p); }
inline I spread_codes(const Code* p) {
    int pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
}
// Written out because GCC 12 copies the accumulator before and after the intrinsic.
inline I dot_codes(I sum, I x, I y) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
    return sum;
}
inline I store_codes(Code* p, V x) {
    const I codes = _mm512_cvtps_epi32(x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(codes));
    return codes;
}
inline void store_steps(Code* p, const V* x) {
    const __m512i low = _mm512_cvtps_epi32(x[0]), high = _mm512_slli_epi32(_mm512_cvtps_epi32(x[1]), 16);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, low, high));
}
inline V fraction(V x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline V scale2(V x, V exponent) { return _mm512_scalef_ps(x, exponent); }

// 16 x 16 of 32 bits: pairs of rows, pairs of pairs, then quarters of vectors.
void transpose_steps(const Code* from, Index stride, Code* to, Index to_stride) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = load_codes(from + i * stride);
    for (int i = 0; i < 16; i += 4) {
        __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int j = 0; j < 4; j++) {
        __m512i a = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88), b = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88);
        __m512i d = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
        r[j] = _mm512_shuffle_i32x4(a, c, 0x88), r[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd), r[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * to_stride, r[i]);
}

}  // namespace
}  // namespace edgeq

#define VISION vision_avx512vnni
#include "vision/vision-inl.h"
