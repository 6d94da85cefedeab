// Vectors of 256 bits: what avx2.cpp and avxvnni.cpp share. They define signed_bytes before and the dot products after.
#include <immintrin.h>
#include <string.h>

namespace edgeq {
namespace {

constexpr int lanes = 8;
constexpr int row_vectors = 2, tile_tokens = 4;  // 8 integer sums in 16 registers; the float sums wait in the cache

// Four rows in turns: one row's sums would wait for themselves.
constexpr int gemv_tokens = 4;
constexpr int gemv_block_rows(int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }
constexpr int prefetch_locality = 3;

using F = __m256;
using I = __m256i;
using B = __m256i;

F f_zero() { return _mm256_setzero_ps(); }
F f_set(float x) { return _mm256_set1_ps(x); }
F f_load(const float* p) { return _mm256_loadu_ps(p); }
void f_store(float* p, F v) { _mm256_storeu_ps(p, v); }
F f_add(F a, F b) { return _mm256_add_ps(a, b); }
F f_mul(F a, F b) { return _mm256_mul_ps(a, b); }
F f_max(F a, F b) { return _mm256_max_ps(a, b); }
F f_abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
F f_fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

float f_sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// The same additions, of two vectors at a time.
F f_sums(const F* v) {
    F a[4];
    for (int i = 0; i < 4; i++)
        a[i] =
            _mm256_add_ps(_mm256_permute2f128_ps(v[i], v[i + 4], 0x20), _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
    for (int i = 0; i < 4; i += 2)
        a[i] = _mm256_add_ps(_mm256_shuffle_ps(a[i], a[i + 1], 0x44), _mm256_shuffle_ps(a[i], a[i + 1], 0xee));
    return _mm256_add_ps(_mm256_shuffle_ps(a[0], a[2], 0x88), _mm256_shuffle_ps(a[0], a[2], 0xdd));
}

float f_max_lane(F v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

__m256i first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
F f_load_some(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
void f_store_some(float* p, F v, int n) { _mm256_maskstore_ps(p, first(n), v); }

__m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
__m128i load8(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }

// E4M3 as float16, whose exponents begin 8 lower, and whose NaN has more bits set.
__m256i halves_of_e4m3(__m128i bytes) {
    const __m256i v = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), magnitude = _mm256_set1_epi16(0x3f80);
    const __m256i nan = _mm256_srli_epi16(_mm256_cmpeq_epi16(_mm256_and_si256(v, magnitude), magnitude), 1);
    return _mm256_or_si256(_mm256_and_si256(v, _mm256_set1_epi16(int16_t(0xbfff))), nan);
}

void f_e4m3(const uint8_t* p, F* v) {
    const __m256i halves = halves_of_e4m3(load16(p));
    v[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    v[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}

F f_widen(const void* p, Type type, int64_t i) {
    if (type == Type::f32) return _mm256_loadu_ps(static_cast<const float*>(p) + i);
    const uint8_t* bytes = static_cast<const uint8_t*>(p) + i;
    if (type == Type::e4m3) {
        const F v = _mm256_cvtph_ps(_mm256_castsi256_si128(halves_of_e4m3(load8(bytes))));
        return _mm256_mul_ps(v, _mm256_set1_ps(256));
    }
    if (type == Type::e8m0) {  // 2^-127 is half of the smallest normal number
        __m256i v = _mm256_slli_epi32(_mm256_cvtepu8_epi32(load8(bytes)), 23);
        return _mm256_castsi256_ps(_mm256_max_epi32(v, _mm256_set1_epi32(1 << 22)));
    }
    if (type == Type::u4 || type == Type::u4_high) {
        __m256i v = _mm256_cvtepu8_epi32(load8(bytes));
        v = type == Type::u4 ? _mm256_and_si256(v, _mm256_set1_epi32(15)) : _mm256_srli_epi32(v, 4);
        return _mm256_cvtepi32_ps(v);
    }
    if (type == Type::i8)
        return _mm256_cvtepi32_ps(
            _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const int8_t*>(p) + i))));
    __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + i));
    if (type == Type::f16) return _mm256_cvtph_ps(v);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

F f_widen_some(const void* p, Type type, int64_t i, int n) {
    if (n >= lanes) return f_widen(p, type, i);
    if (n <= 0) return f_zero();
    const int size = type == Type::f32 ? 4 : type == Type::f16 || type == Type::bf16 ? 2 : 1;
    uint32_t some[lanes] = {};
    memcpy(some, static_cast<const char*>(p) + i * size, n * size);
    return f_widen(some, type, 0);
}

F f_units(const uint16_t* p, int shift, int n) {
    __m128 low = _mm_set1_ps(_cvtsh_ss(p[0])), high = shift == 2 && n > 4 ? _mm_set1_ps(_cvtsh_ss(p[1])) : low;
    return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
}

void f_store_int8(int8_t* p, F v) {
    __m256i n = _mm256_cvtps_epi32(v);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

I i_zero() { return _mm256_setzero_si256(); }
I i_set(int n) { return _mm256_set1_epi32(n); }
F i_float(I v) { return _mm256_cvtepi32_ps(v); }

template <int n>
I i_start(const int32_t* p) {
    static_assert(n == 1 || n == 2);
    __m128i low = _mm_cvtsi32_si128(128 * p[0]);
    return n == 1 ? _mm256_zextsi128_si256(low) : _mm256_set_m128i(_mm_cvtsi32_si128(128 * p[n - 1]), low);
}

B b_load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void b_store(void* p, B v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

using Codes = B;
Codes load_codes(const int8_t* p) { return b_load(p); }

using Codes16 = const int8_t*;
Codes16 load_codes16(const int8_t* p) { return p; }

inline B broadcast_four(const int8_t* p) {
    int codes;
    memcpy(&codes, p, 4);
    return _mm256_set1_epi32(codes);
}

// Codes of 3, 5 or 6 bits, 16 in each half. A 16-bit lane gets the two bytes that its code lies in; a multiplication
// moves the code to the lane's top (AVX2 has no shift of 16-bit lanes by different counts), a shift down again.
template <int bits>
B unpack_stream(const uint8_t* p) {
    constexpr int loaded = bits == 3 ? 8 : 16;
    constexpr int upper = 4 * bits - loaded;  // where the upper half is loaded, to end with the codes
    struct Tables {
        alignas(32) int8_t even[32] = {}, odd[32] = {};  // of the first and of the second 8 codes of a half
        alignas(32) uint16_t factor[16] = {};
        constexpr Tables() {
            for (int i = 0; i < 16; i++) {
                int byte = i % 8 * bits / 8 + (i < 8 ? 0 : 2 * bits - upper);
                for (int j = 0; j < 2; j++) {
                    even[2 * i + j] = int8_t(byte + j);
                    odd[2 * i + j] = int8_t(byte + bits + j);
                }
                factor[i] = uint16_t(1 << (16 - bits - i % 8 * bits % 8));
            }
        }
    };
    static constexpr Tables tables;
    __m128i low = bits == 3 ? load8(p) : load16(p), high = bits == 3 ? load8(p + upper) : load16(p + upper);
    __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    __m256i factor = b_load(tables.factor);
    __m256i a = _mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, b_load(tables.even)), factor);
    __m256i b = _mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, b_load(tables.odd)), factor);
    return _mm256_packus_epi16(_mm256_srli_epi16(a, 16 - bits), _mm256_srli_epi16(b, 16 - bits));
}

template <int bits>
B unpack(const uint8_t* p) {
    if constexpr (bits == 8) {
        return signed_bytes ? _mm256_xor_si256(b_load(p), _mm256_set1_epi8(-128)) : b_load(p);
    } else if constexpr (bits == 4) {
        __m256i v = _mm256_cvtepu8_epi16(load16(p));
        return _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi16(v, 4)), _mm256_set1_epi8(15));
    } else if constexpr (bits == 2) {
        __m256i v = _mm256_cvtepu8_epi32(load8(p));
        v = _mm256_or_si256(v, _mm256_slli_epi32(v, 12));
        return _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi32(v, 6)), _mm256_set1_epi8(3));
    } else {
        return unpack_stream<bits>(p);
    }
}

void nibbles(const uint8_t* p, B* low, B* high) {
    __m256i v = b_load(p), mask = _mm256_set1_epi8(15);
    *low = _mm256_and_si256(v, mask);
    *high = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
}

void quarters(const uint8_t* p, B* v) {
    const __m256i codes = b_load(p), mask = _mm256_set1_epi8(3);
    v[0] = _mm256_and_si256(codes, mask);
    v[1] = _mm256_and_si256(_mm256_srli_epi16(codes, 2), mask);
    v[2] = _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask);
    v[3] = _mm256_and_si256(_mm256_srli_epi16(codes, 6), mask);
}

template <Mode mode>
B look_up(B v) {
    __m128i table = load16(table_codes<mode>);
    if (signed_bytes && mode == Mode::iq4) table = _mm_xor_si128(table, _mm_set1_epi8(-128));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), v);
}

template <int n>
F f_spread(const float* p, int g) {
    static_assert(n == 1 || n == 2 || n == 4 || n == 8);
    if constexpr (n == 1) return _mm256_set1_ps(p[g]);
    if constexpr (n == 8) return _mm256_load_ps(p + g);
    if constexpr (n == 4) {
        const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p + g));
        return _mm256_permutevar_ps(four, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    }
    return _mm256_insertf128_ps(_mm256_set1_ps(p[g]), _mm_set1_ps(p[g + n - 1]), 1);
}

// 8 x 8 of 32 bits: pairs of rows, pairs of pairs, then halves of vectors.
void transpose_vectors(__m256i* r) {
    __m256i t[8];
    for (int i = 0; i < 8; i += 4) {
        __m256i a = _mm256_unpacklo_epi32(r[i], r[i + 1]), b = _mm256_unpackhi_epi32(r[i], r[i + 1]);
        __m256i c = _mm256_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm256_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm256_unpacklo_epi64(a, c);
        t[i + 1] = _mm256_unpackhi_epi64(a, c);
        t[i + 2] = _mm256_unpacklo_epi64(b, d);
        t[i + 3] = _mm256_unpackhi_epi64(b, d);
    }
    for (int j = 0; j < 4; j++) {
        r[j] = _mm256_permute2x128_si256(t[j], t[4 + j], 0x20);
        r[4 + j] = _mm256_permute2x128_si256(t[j], t[4 + j], 0x31);
    }
}

void transpose(const uint8_t* p, int64_t n, uint8_t* out) {
    __m256i r[8];
    for (int i = 0; i < 8; i++) r[i] = b_load(p + i * n);
    transpose_vectors(r);
    for (int i = 0; i < 8; i++) b_store(out + 32 * i, r[i]);
}

constexpr bool transposes_nibbles = false;
template <int>
void transpose_nibbles(const uint8_t*, int64_t, uint8_t*);

void f_transpose(const float* p, int n, F* out) {
    __m256i r[8];
    for (int i = 0; i < 8; i++) r[i] = b_load(p + i * n);
    transpose_vectors(r);
    for (int i = 0; i < 8; i++) out[i] = _mm256_castsi256_ps(r[i]);
}

}  // namespace
}  // namespace edgeq
