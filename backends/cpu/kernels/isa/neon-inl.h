// Vectors of 128 bits: what the three NEON files share. They define signed_bytes and row_bytes (the bytes of a row that
// one product takes) before, and the dot products after.
#include <arm_neon.h>
#include <string.h>

namespace edgeq {
namespace {

constexpr int lanes = 4;
constexpr int row_vectors = 4, tile_tokens = 4;  // 16 integer sums, 4 weights, 1 activation of 32 registers

// Four rows in turns: one row's sums would wait for themselves.
constexpr int gemv_tokens = 4;
constexpr int gemv_block_rows(int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }
constexpr int prefetch_locality = 3;

using F = float32x4_t;
using I = int32x4_t;
using B = int8x16_t;

F f_zero() { return vdupq_n_f32(0); }
F f_set(float x) { return vdupq_n_f32(x); }
F f_load(const float* p) { return vld1q_f32(p); }
void f_store(float* p, F v) { vst1q_f32(p, v); }
F f_add(F a, F b) { return vaddq_f32(a, b); }
F f_mul(F a, F b) { return vmulq_f32(a, b); }
F f_max(F a, F b) { return vmaxq_f32(a, b); }
F f_abs(F a) { return vabsq_f32(a); }
F f_fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
float f_sum(F v) { return vaddvq_f32(v); }
F f_sums(const F* v) { return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])); }
float f_max_lane(F v) { return vmaxvq_f32(v); }

F f_load_some(const float* p, int n) {
    if (n >= lanes) return vld1q_f32(p);
    float some[lanes] = {};
    for (int i = 0; i < n; i++) some[i] = p[i];
    return vld1q_f32(some);
}

void f_store_some(float* p, F v, int n) {
    if (n >= lanes) return vst1q_f32(p, v);
    float some[lanes];
    vst1q_f32(some, v);
    for (int i = 0; i < n; i++) p[i] = some[i];
}

// Four bytes, in the lower half.
int8x8_t load4(const void* p) {
    uint32_t four;
    memcpy(&four, p, 4);
    return vreinterpret_s8_u32(vdup_n_u32(four));
}

// E4M3 as float16, whose exponents begin 8 lower, and whose NaN has more bits set.
uint16x8_t halves_of_e4m3(int8x8_t bytes) {
    const uint16x8_t v = vreinterpretq_u16_s16(vshll_n_s8(bytes, 7)), magnitude = vdupq_n_u16(0x3f80);
    const uint16x8_t nan = vshrq_n_u16(vceqq_u16(vandq_u16(v, magnitude), magnitude), 1);
    return vorrq_u16(vandq_u16(v, vdupq_n_u16(0xbfff)), nan);
}

void f_e4m3(const uint8_t* p, F* v) {
    const float16x8_t halves = vreinterpretq_f16_u16(halves_of_e4m3(vld1_s8(reinterpret_cast<const int8_t*>(p))));
    v[0] = vcvt_f32_f16(vget_low_f16(halves));
    v[1] = vcvt_high_f32_f16(halves);
}

F f_widen(const void* p, Type type, int64_t i) {
    if (type == Type::f32) return vld1q_f32(static_cast<const float*>(p) + i);
    const uint8_t* bytes = static_cast<const uint8_t*>(p) + i;
    if (type == Type::i8) return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(load4(bytes)))));
    if (type == Type::e4m3) {
        const float16x8_t halves = vreinterpretq_f16_u16(halves_of_e4m3(load4(bytes)));
        return vmulq_n_f32(vcvt_f32_f16(vget_low_f16(halves)), 256);
    }
    if (type != Type::f16 && type != Type::bf16) {
        uint32x4_t v = vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_s8(load4(bytes)))));
        if (type == Type::e8m0)  // 2^-127 is half of the smallest normal number
            return vreinterpretq_f32_u32(vmaxq_u32(vshlq_n_u32(v, 23), vdupq_n_u32(1 << 22)));
        return vcvtq_f32_u32(type == Type::u4 ? vandq_u32(v, vdupq_n_u32(15)) : vshrq_n_u32(v, 4));
    }
    uint16x4_t v = vld1_u16(static_cast<const uint16_t*>(p) + i);
    if (type == Type::f16) return vcvt_f32_f16(vreinterpret_f16_u16(v));
    return vreinterpretq_f32_u32(vshll_n_u16(v, 16));
}

F f_widen_some(const void* p, Type type, int64_t i, int n) {
    if (n >= lanes) return f_widen(p, type, i);
    if (n <= 0) return f_zero();
    const int size = type == Type::f32 ? 4 : type == Type::f16 || type == Type::bf16 ? 2 : 1;
    uint32_t some[lanes] = {};
    memcpy(some, static_cast<const char*>(p) + i * size, n * size);
    return f_widen(some, type, 0);
}

F f_units(const uint16_t* p, int, int) {
    __fp16 unit;  // no block is smaller than a vector
    memcpy(&unit, p, 2);
    return vdupq_n_f32(unit);
}

void f_store_int8(int8_t* p, F v) {
    int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(v));
    int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    memcpy(p, &bytes, lanes);
}

I i_zero() { return vdupq_n_s32(0); }
I i_set(int n) { return vdupq_n_s32(n); }
F i_float(I v) { return vcvtq_f32_s32(v); }

template <int n>
I i_start(const int32_t* p) {
    static_assert(n == 1);
    return vsetq_lane_s32(128 * p[0], vdupq_n_s32(0), 0);
}

B b_load(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
using Codes = B;
Codes load_codes(const int8_t* p) { return b_load(p); }
void b_store(void* p, B v) { vst1q_s8(static_cast<int8_t*>(p), v); }

// 16 codes of 2, 3, 5 or 6 bits. A 16-bit lane gets the two bytes that its code lies in and is shifted down.
template <int bits>
B unpack_stream(const uint8_t* p) {
    constexpr int loaded = bits <= 3 ? 4 : 8;  // bytes at a time, twice: from the first, and up to the last
    constexpr int upper = 2 * bits - loaded;   // where the second load begins
    struct Tables {
        uint8_t even[16] = {}, odd[16] = {};  // of the first and of the last 8 codes
        int16_t shift[8] = {};
        constexpr Tables() {
            for (int i = 0; i < 8; i++) {
                for (int j = 0; j < 2; j++) {
                    even[2 * i + j] = place(i * bits / 8 + j);
                    odd[2 * i + j] = place(bits + i * bits / 8 + j);
                }
                shift[i] = int16_t(-(i * bits % 8));
            }
        }
        static constexpr uint8_t place(int byte) {
            return uint8_t(byte < loaded ? byte : byte < 2 * bits ? loaded + byte - upper : 255);  // 255: zero
        }
    };
    static constexpr Tables tables;
    uint8_t both[16] = {};
    memcpy(both, p, loaded);
    memcpy(both + loaded, p + upper, loaded);
    uint8x16_t bytes = vld1q_u8(both);
    int16x8_t shift = vld1q_s16(tables.shift);
    uint16x8_t a = vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(bytes, vld1q_u8(tables.even))), shift);
    uint16x8_t b = vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(bytes, vld1q_u8(tables.odd))), shift);
    uint8x16_t codes = vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));
    return vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8((1 << bits) - 1)));
}

template <int bits>
B unpack(const uint8_t* p) {
    if constexpr (bits == 8) {
        return signed_bytes ? veorq_s8(b_load(p), vdupq_n_s8(-128)) : b_load(p);
    } else if constexpr (bits == 4) {
        uint8x8_t v = vld1_u8(p), low = vand_u8(v, vdup_n_u8(15)), high = vshr_n_u8(v, 4);
        return vreinterpretq_s8_u8(vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high)));
    } else {
        return unpack_stream<bits>(p);
    }
}

void nibbles(const uint8_t* p, B* low, B* high) {
    uint8x16_t v = vld1q_u8(p);
    *low = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15)));
    *high = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
}

void quarters(const uint8_t* p, B* v) {
    const uint8x16_t codes = vld1q_u8(p), mask = vdupq_n_u8(3);
    v[0] = vreinterpretq_s8_u8(vandq_u8(codes, mask));
    v[1] = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(codes, 2), mask));
    v[2] = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(codes, 4), mask));
    v[3] = vreinterpretq_s8_u8(vshrq_n_u8(codes, 6));
}

template <Mode mode>
B look_up(B v) {
    int8x16_t table = vreinterpretq_s8_u8(vld1q_u8(table_codes<mode>));
    if (signed_bytes && mode == Mode::iq4) table = veorq_s8(table, vdupq_n_s8(-128));
    return vqtbl1q_s8(table, vreinterpretq_u8_s8(v));
}

template <int n>
F f_spread(const float* p, int g) {
    static_assert(n == 1 || n == 2 || n == 4);
    if constexpr (n == 4) return vld1q_f32(p + g);
    if constexpr (n == 2) return vcombine_f32(vdup_n_f32(p[g]), vdup_n_f32(p[g + 1]));
    return vdupq_n_f32(p[g]);
}

void transpose(const uint8_t* p, int64_t n, uint8_t* out) {
    if constexpr (row_bytes == 8) {
        uint64x2x4_t rows;
        for (int i = 0; i < 4; i++) rows.val[i] = vreinterpretq_u64_u8(vld1q_u8(p + i * n));
        vst4q_u64(reinterpret_cast<uint64_t*>(out), rows);
    } else {
        uint32x4x4_t rows;
        for (int i = 0; i < 4; i++) rows.val[i] = vreinterpretq_u32_u8(vld1q_u8(p + i * n));
        vst4q_u32(reinterpret_cast<uint32_t*>(out), rows);
    }
}

constexpr bool transposes_nibbles = false;
template <int>
void transpose_nibbles(const uint8_t*, int64_t, uint8_t*);

void f_transpose(const float* p, int n, F* out) {
    float columns[16];
    float32x4x4_t rows;
    for (int i = 0; i < 4; i++) rows.val[i] = vld1q_f32(p + i * n);
    vst4q_f32(columns, rows);
    for (int i = 0; i < 4; i++) out[i] = vld1q_f32(columns + 4 * i);
}

}  // namespace
}  // namespace edgeq
