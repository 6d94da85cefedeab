// AVX-512 with VNNI and VBMI: Ice Lake, Sapphire Rapids, Zen 4 and later.
#include <immintrin.h>
#include <string.h>

#include "kernels/kernels.h"

namespace edgeq {
namespace {

constexpr int lanes = 16;
constexpr int row_vectors = 3, tile_tokens = 4;  // 12 integer and 12 float sums, 3 weights, 1 activation: 28 of 32
constexpr bool signed_bytes = false;

// One row after the other, as memory has them: 32 registers take the sums of eight tokens, and one token's steps do not
// wait for one another long enough to be worth leaving that order. Lines go past the second-level cache.
constexpr int gemv_tokens = 8;
constexpr int gemv_block_rows(int) { return 1; }
constexpr int prefetch_locality = 0;

using F = __m512;
using I = __m512i;
using B = __m512i;

F f_zero() { return _mm512_setzero_ps(); }
F f_set(float x) { return _mm512_set1_ps(x); }
F f_load(const float* p) { return _mm512_loadu_ps(p); }
void f_store(float* p, F v) { _mm512_storeu_ps(p, v); }
F f_add(F a, F b) { return _mm512_add_ps(a, b); }
F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
F f_max(F a, F b) { return _mm512_max_ps(a, b); }
F f_abs(F a) { return _mm512_abs_ps(a); }
F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
float f_sum(F v) { return _mm512_reduce_add_ps(v); }  // halves, then halves of these, ...

// The same additions, of two vectors at a time: a[i] has the sums of halves of two, then of quarters of four, ...
F f_sums(const F* v) {
    F a[8];
    for (int i = 0; i < 8; i++) {
        const F x = v[i < 4 ? i : i + 4], y = v[i < 4 ? i + 4 : i + 8];
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    }
    for (int i = 0; i < 4; i++)
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
    for (int i = 0; i < 4; i += 2)
        a[i] = _mm512_add_ps(_mm512_shuffle_ps(a[i], a[i + 1], 0x44), _mm512_shuffle_ps(a[i], a[i + 1], 0xee));
    return _mm512_add_ps(_mm512_shuffle_ps(a[0], a[2], 0x88), _mm512_shuffle_ps(a[0], a[2], 0xdd));
}

float f_max_lane(F v) { return _mm512_reduce_max_ps(v); }

__mmask16 first(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : __mmask16((1u << n) - 1); }
F f_load_some(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
// Whole vectors without a mask: a masked store of one takes long on Zen 5 when it meets the one before.
void f_store_some(float* p, F v, int n) { n >= lanes ? _mm512_storeu_ps(p, v) : _mm512_mask_storeu_ps(p, first(n), v); }

// E4M3 as float16, whose exponents begin 8 lower, and whose NaN has more bits set.
inline __m512i halves_of_e4m3(__m256i bytes) {
    const __m512i v =
        _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7), _mm512_set1_epi16(int16_t(0xbfff)));
    const __mmask32 nan = _mm256_cmpeq_epi8_mask(_mm256_and_si256(bytes, _mm256_set1_epi8(127)), _mm256_set1_epi8(127));
    return _mm512_mask_mov_epi16(v, nan, _mm512_set1_epi16(0x7fff));
}

inline void f_e4m3(const uint8_t* p, F* v) {
    const __m512i halves = halves_of_e4m3(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    v[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    v[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}

// Of the types of one unsigned byte.
inline F f_from_bytes(__m128i bytes, Type type) {
    if (type == Type::e4m3) {
        const __m256i halves = _mm512_castsi512_si256(halves_of_e4m3(_mm256_castsi128_si256(bytes)));
        return _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(256));
    }
    __m512i v = _mm512_cvtepu8_epi32(bytes);
    if (type == Type::e8m0)  // 2^-127 is half of the smallest normal number
        return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(v, 23), _mm512_set1_epi32(1 << 22)));
    return _mm512_cvtepi32_ps(type == Type::u4 ? _mm512_and_si512(v, _mm512_set1_epi32(15)) : _mm512_srli_epi32(v, 4));
}

inline F f_widen_some(const void* p, Type type, int64_t i, int n) {
    if (type == Type::f32) return _mm512_maskz_loadu_ps(first(n), static_cast<const float*>(p) + i);
    if (type != Type::i8 && type != Type::f16 && type != Type::bf16)
        return f_from_bytes(_mm_maskz_loadu_epi8(first(n), static_cast<const uint8_t*>(p) + i), type);
    if (type == Type::i8)
        return _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), static_cast<const int8_t*>(p) + i)));
    __m256i v = _mm256_maskz_loadu_epi16(first(n), static_cast<const uint16_t*>(p) + i);
    if (type == Type::f16) return _mm512_cvtph_ps(v);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

inline F f_widen(const void* p, Type type, int64_t i) { return f_widen_some(p, type, i, lanes); }

F f_units(const uint16_t* p, int shift, int n) {
    int last = ((n < lanes ? n : lanes) - 1) >> shift;
    __m128 units = _mm_cvtph_ps(_mm_maskz_loadu_epi16(__mmask8((2 << last) - 1), p));
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_srl_epi32(lane, _mm_cvtsi32_si128(shift)), _mm512_castps128_ps512(units));
}

void f_store_int8(int8_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}

I i_zero() { return _mm512_setzero_si512(); }
I i_set(int n) { return _mm512_set1_epi32(n); }
template <int>
I i_start(const int32_t*);  // of signed_bytes only
F i_float(I v) { return _mm512_cvtepi32_ps(v); }

B b_load(const void* p) { return _mm512_loadu_si512(p); }
void b_store(void* p, B v) { _mm512_storeu_si512(p, v); }

// The product's own instruction loads, and broadcasts.
using Codes = const int8_t*;
Codes load_codes(const int8_t* p) { return p; }

// Codes of 3, 5 or 6 bits: every 64-bit lane gets the `bits` bytes of its 8 codes, then every byte of it the 8 bits
// that begin with its code.
template <int bits>
B unpack_stream(const uint8_t* p) {
    alignas(64) static constexpr struct Tables {
        uint8_t gather[64] = {}, shift[64] = {};
        constexpr Tables() {
            for (int i = 0; i < 64; i++) {
                gather[i] = uint8_t(i / 8 * bits + i % 8);
                shift[i] = uint8_t(i % 8 * bits);
            }
        }
    } tables;
    __m512i bytes = _mm512_maskz_loadu_epi8((1ull << (8 * bits)) - 1, p);
    __m512i spread = _mm512_permutexvar_epi8(_mm512_load_si512(tables.gather), bytes);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_load_si512(tables.shift), spread),
                            _mm512_set1_epi8((1 << bits) - 1));
}

template <int bits>
B unpack(const uint8_t* p) {
    if constexpr (bits == 8) {
        return b_load(p);
    } else if constexpr (bits == 4) {
        __m512i v = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi16(v, 4)), _mm512_set1_epi8(15));
    } else if constexpr (bits == 2) {
        __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        v = _mm512_or_si512(v, _mm512_slli_epi32(v, 12));
        return _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 6)), _mm512_set1_epi8(3));
    } else {
        return unpack_stream<bits>(p);
    }
}

void nibbles(const uint8_t* p, B* low, B* high) {
    __m512i v = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
    *low = _mm512_and_si512(v, mask);
    *high = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
}

void quarters(const uint8_t* p, B* v) {
    const __m512i codes = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(3);
    v[0] = _mm512_and_si512(codes, mask);
    v[1] = _mm512_and_si512(_mm512_srli_epi16(codes, 2), mask);
    v[2] = _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask);
    v[3] = _mm512_and_si512(_mm512_srli_epi16(codes, 6), mask);
}

template <Mode mode>
B look_up(B v) {
    __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table_codes<mode>));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), v);
}

// Written out because GCC 12 copies the accumulator before and after the intrinsic: 24 moves beside 12 products.
inline I dot(I acc, B w, Codes a) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<const __m512i_u*>(a)));
    return acc;
}

inline I dot8(I acc, B w, Codes a) { return dot(acc, w, a); }
inline I dot_apart(I acc, B w, Codes a) { return dot(acc, w, a); }

// Four codes of a token are spread over a register once for all rows: as the product's memory operand they would be
// read for every one, and a core reads no more vectors in a cycle than it multiplies.
template <int bits, int tokens>
EDGEQ_INLINE void dot_group(const uint8_t* codes, int distance, const int8_t* q, int64_t stride, int group,
                            I (*d)[tokens]) {
    for (int k = 0; k < group; k += 16) {
        for (int i = k; i < k + 16; i += 4) {
            B w[row_vectors];
            for (int v = 0; v < row_vectors; v++) w[v] = b_load(codes + v * distance + i * lanes);
            for (int t = 0; t < tokens; t++) {
                B x;
                __asm__("vpbroadcastd %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const int32_t*>(q + t * stride + i)));
                for (int v = 0; v < row_vectors; v++)
                    __asm__("vpdpbusd %2, %1, %0" : "+v"(d[v][t]) : "v"(w[v]), "v"(x));
            }
        }
    }
}

// One number from memory costs no shuffle, which GCC would make of it where it has p in a register.
template <int n>
inline F f_spread(const float* p, int g) {
    static_assert(n == 1 || n == 2 || n == 4 || n == 8 || n == 16);
    if constexpr (n == 16) return _mm512_load_ps(p);
    if constexpr (n == 1) {
        F v;
        __asm__("vbroadcastss %1, %0" : "=v"(v) : "m"(p[g]));
        return v;
    }
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i from = _mm512_add_epi32(_mm512_srli_epi32(lane, n == 2 ? 3 : n == 4 ? 2 : 1), _mm512_set1_epi32(g));
    return _mm512_permutexvar_ps(from, _mm512_load_ps(p));
}

// 16 x 16 of 32 bits: pairs of rows, pairs of pairs, then quarters of vectors.
void transpose_vectors(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int j = 0; j < 4; j++) {
        __m512i a = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88), b = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88);
        __m512i d = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
        r[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        r[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        r[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

void transpose(const uint8_t* p, int64_t n, uint8_t* out) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(p + i * n);
    transpose_vectors(r);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + 64 * i, r[i]);
}

// Fours of codes lie where shifts of a 64-bit lane, which has eight of each of two rows, bring them.
constexpr bool transposes_nibbles = true;
template <int>
void transpose_nibbles(const uint8_t* p, int64_t n, uint8_t* out) {
    const __m512i low = _mm512_set1_epi64(0x2c2824200c080400), high = _mm512_set1_epi64(0x3c3834301c181410);
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(p + i * n);
    transpose_vectors(r);
    for (int i = 0; i < 16; i++) {
        _mm512_store_si512(out + 128 * i, _mm512_and_si512(_mm512_multishift_epi64_epi8(low, r[i]), mask));
        _mm512_store_si512(out + 128 * i + 64, _mm512_and_si512(_mm512_multishift_epi64_epi8(high, r[i]), mask));
    }
}

void f_transpose(const float* p, int n, F* out) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(p + i * n);
    transpose_vectors(r);
    for (int i = 0; i < 16; i++) out[i] = _mm512_castsi512_ps(r[i]);
}

}  // namespace
}  // namespace edgeq

#include "kernels/linear-inl.h"

const edgeq::LinearKernels edgeq::linear_avx512vnni = {quantize, gemv, gemm, tile_rows};
