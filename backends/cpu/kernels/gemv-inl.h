// Products with few tokens: up to gemv_tokens of them share one reading of the matrix.
#pragma once

#include "kernels/scales-inl.h"

namespace edgeq {
namespace {

constexpr int prefetch_nbytes = 4096;

// The codes that gemv takes at a time.
template <int bits>
constexpr int unit = bits == 2   ? 16 * lanes
                     : bits == 4 ? 8 * lanes
                                 : 4 * lanes;

// The product that groups need: where a unit has several, their sums have to be in lanes of their own.
template <bool wide, bool apart>
EDGEQ_INLINE I dot_codes(I acc, B w, Codes a) {
    if constexpr (wide) return dot8(acc, w, a);
    if constexpr (apart) return dot_apart(acc, w, a);
    return dot(acc, w, a);
}

// d[t] += codes of one unit at `src` times those of every token at `q`, from code `c`.
template <int bits, Mode mode, int group, int tokens>
EDGEQ_INLINE void dot_unit(const uint8_t* src, const int8_t* q, int64_t stride, int64_t c, I* d) {
    constexpr bool wide = bits == 8 || mode == Mode::iq4, apart = group < unit<bits>;
    if constexpr (bits == 4) {
        B low, high;
        nibbles(src, &low, &high);
        if constexpr (mode != Mode::affine) low = look_up<mode>(low), high = look_up<mode>(high);
        const int8_t* even = q + (c & -even_odd_block) + (c & (even_odd_block - 1)) / 2;
        for (int t = 0; t < tokens; t++) {
            const Codes a = load_codes(even + t * stride), b = load_codes(even + t * stride + even_odd_block / 2);
            d[t] = dot_codes<wide, apart>(d[t], low, a);
            d[t] = dot_codes<wide, apart>(d[t], high, b);
        }
    } else if constexpr (bits == 2) {
        B w[4];
        quarters(src, w);
        const int8_t* first = q + (c & -quarters_block) + (c & (quarters_block - 1)) / 4;
        for (int t = 0; t < tokens; t++)
            for (int i = 0; i < 4; i++)
                d[t] = dot_codes<wide, apart>(d[t], w[i], load_codes(first + t * stride + i * (quarters_block / 4)));
    } else {
        B w = unpack<bits>(src);
        for (int t = 0; t < tokens; t++) {
            const Codes a = load_codes(q + t * stride + c);
            d[t] = dot_codes<wide, apart>(d[t], w, a);
        }
    }
}

// How far ahead of a block of rows to prefetch. The order is that of memory, not that in which rows are used in turns:
// the hardware prefetches along with it, and only with it ("Matrices" in docs/speed.md). So these are whole blocks.
EDGEQ_INLINE int64_t prefetch_distance(int rows, int64_t row_nbytes) {
    const int64_t block = rows * row_nbytes;
    return rows == 1 ? prefetch_nbytes : (prefetch_nbytes + block - 1) / block * block;
}

// A block of rows: they share the loads of the activations, and one's sums do not wait for the other's. Vectors whose
// lanes add up to the results go to sums[t][r]. blocks: see in_blocks.
template <int bits, Mode mode, int group, bool blocks, int tokens, int rows>
EDGEQ_INLINE void gemv_block(const Matrix& w, const Activations& a, int64_t row, F (*sums)[lanes]) {
    constexpr int codes = unit<bits>;
    constexpr int step = group > codes ? group : codes;  // codes for one floating-point multiply-add
    constexpr int step_nbytes = step * bits / 8;
    const int64_t groups = w.in / group, row_bytes = w.in * bits / 8;
    const uint8_t* src = static_cast<const uint8_t*>(w.data) + row * row_bytes;
    const uint8_t* next = src + prefetch_distance(rows, row_bytes);
    F acc[rows][tokens];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) acc[r][t] = f_zero();
    for (int64_t g0 = 0; g0 < groups; g0 += sixteen) {
        const int some = groups - g0 < sixteen ? int(groups - g0) : sixteen;
        alignas(64) float products[rows][tokens][sixteen];  // scale of the weight times scale of the activation
        for (int r = 0; r < rows; r++) {
            alignas(64) float scales[sixteen], biases[sixteen];
            const int64_t at = (row + r) * groups + g0;
            if constexpr (mode == Mode::fp4)
                fp4_scales<group == 16 ? Type::e4m3 : Type::e8m0>(w, at, some, scales, biases);
            else if constexpr (blocks)
                scales_of_blocks<bits>(w, at, scales, biases);
            else
                scales_and_biases_inline<group>(w, at, some, scales, biases);
            for (int i = 0; i < sixteen; i += lanes) {
                for (int t = 0; t < tokens; t++) {
                    int64_t at = t * a.groups + g0 + i;
                    f_store(products[r][t] + i, f_mul(f_load(scales + i), f_load(a.scales + at)));
                    acc[r][t] = f_fma(f_load(biases + i), f_load(a.sums + at), acc[r][t]);
                }
            }
        }
        // One floating-point step: the codes from c, of group g0 + g on, those of row r from `from + r * distance`.
        auto take = [&](const uint8_t* from, int64_t distance, int64_t c, int g) __attribute__((always_inline)) {
            for (int r = 0; r < rows; r++) {
                I d[tokens];
                for (int t = 0; t < tokens; t++) d[t] = i_zero();
                if constexpr (signed_bytes && (bits == 8 || mode == Mode::iq4))
                    for (int t = 0; t < tokens; t++) d[t] = i_start<step / group>(a.totals + t * a.groups + g0 + g);
                for (int u = 0; u < step; u += codes)
                    dot_unit<bits, mode, group, tokens>(from + r * distance + u * bits / 8, a.codes, a.stride, c + u,
                                                        d);
                for (int t = 0; t < tokens; t++)
                    acc[r][t] = f_fma(i_float(d[t]), f_spread<step / group>(products[r][t], g), acc[r][t]);
            }
        };
        auto take_step = [&](int64_t c, int g) __attribute__((always_inline)) {
            for (int i = 0; i < rows * step_nbytes; i += 64) __builtin_prefetch(next + i, 0, prefetch_locality);
            next += rows * step_nbytes;
            take(src, row_bytes, c, g);
            src += step_nbytes;
        };
        const int64_t c0 = g0 * group;
        const int whole = some * group / step * step;
        if (gemv_block_rows(1) == 1 && some == sixteen) {  // the common case, unrolled
#pragma GCC unroll 16
            for (int c = 0; c < sixteen * group; c += step) take_step(c0 + c, c / group);
        } else {
            for (int c = 0; c < whole; c += step) take_step(c0 + c, c / group);
        }
        if (whole < some * group) {  // a row that is no whole number of units
            uint8_t rest[rows][step_nbytes] = {};
            const int left = some * group - whole;
            for (int r = 0; r < rows; r++) memcpy(rest[r], src + r * row_bytes, left * bits / 8);
            take(rest[0], step_nbytes, c0 + whole, whole / group);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) sums[t][r] = acc[r][t];
}

template <int bits, Mode mode, int group, bool blocks, int tokens>
void gemv_rows(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, float* y, int64_t stride) {
    constexpr int rows = gemv_block_rows(tokens);
    F sums[tokens][lanes] = {};
    for (int64_t row = row0; row < row1; row += lanes) {
        const int some = row1 - row < lanes ? int(row1 - row) : lanes;
        int r = 0;
        auto block = [&](int i) { return reinterpret_cast<F(*)[lanes]>(&sums[0][i]); };
        for (; r + rows <= some; r += rows)
            gemv_block<bits, mode, group, blocks, tokens, rows>(w, a, row + r, block(r));
        for (; r < some; r++) gemv_block<bits, mode, group, blocks, tokens, 1>(w, a, row + r, block(r));
        for (int t = 0; t < tokens; t++) f_store_some(y + t * stride + row, f_sums(sums[t]), some);
    }
}

template <int tokens = gemv_tokens>
void gemv_plain(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, float* y, int64_t stride) {
    if constexpr (tokens > 1)
        if (a.tokens < tokens) return gemv_plain<tokens - 1>(w, a, row0, row1, y, stride);
    const int size = w.type == Type::f32 ? 4 : 2;
    for (int64_t row = row0; row < row1; row++) {
        F even[tokens], odd[tokens];  // two sums, since one would wait for itself
        for (int t = 0; t < tokens; t++) even[t] = odd[t] = f_zero();
        int64_t i = 0, at = row * w.in;
        for (; i + 2 * lanes <= w.in; i += 2 * lanes) {
            __builtin_prefetch(static_cast<const char*>(w.data) + (at + i) * size + prefetch_nbytes, 0,
                               prefetch_locality);
            F w0 = f_widen(w.data, w.type, at + i), w1 = f_widen(w.data, w.type, at + i + lanes);
            for (int t = 0; t < tokens; t++) {
                const float* x = a.values + t * w.in + i;
                even[t] = f_fma(w0, f_load(x), even[t]);
                odd[t] = f_fma(w1, f_load(x + lanes), odd[t]);
            }
        }
        for (; i < w.in; i += lanes) {
            int some = w.in - i < lanes ? int(w.in - i) : lanes;
            F w0 = f_widen_some(w.data, w.type, at + i, some);
            for (int t = 0; t < tokens; t++)
                even[t] = f_fma(w0, f_widen_some(a.values + t * w.in, Type::f32, i, some), even[t]);
        }
        for (int t = 0; t < tokens; t++) y[t * stride + row] = f_sum(f_add(even[t], odd[t]));
    }
}

// fp8 with the activations' own values: a sum for every group, then times its scale.
template <int tokens = gemv_tokens>
void gemv_fp8(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, float* y, int64_t stride) {
    if constexpr (tokens > 1)
        if (a.tokens < tokens) return gemv_fp8<tokens - 1>(w, a, row0, row1, y, stride);
    constexpr int group = 32;
    const int64_t groups = w.in / group;
    for (int64_t row = row0; row < row1; row++) {
        const uint8_t* src = static_cast<const uint8_t*>(w.data) + row * w.in;
        F acc[tokens];
        for (int t = 0; t < tokens; t++) acc[t] = f_zero();
        for (int64_t g0 = 0; g0 < groups; g0 += sixteen) {
            const int some = groups - g0 < sixteen ? int(groups - g0) : sixteen;
            alignas(64) float scales[sixteen];
            widen_sixteen<Type::e8m0>(w.scales, row * groups + g0, some, scales);
            for (int g = 0; g < some; g++) {
                const int64_t c = (g0 + g) * group;
                __builtin_prefetch(src + c + prefetch_nbytes, 0, prefetch_locality);
                F d[tokens];
                for (int i = 0; i < group; i += 2 * lanes) {
                    F v[2];
                    f_e4m3(src + c + i, v);
                    for (int t = 0; t < tokens; t++) {
                        const float* x = a.values + t * w.in + c + i;
                        d[t] = i ? f_fma(v[0], f_load(x), d[t]) : f_mul(v[0], f_load(x));
                        d[t] = f_fma(v[1], f_load(x + lanes), d[t]);
                    }
                }
                const F scale = f_set(256 * scales[g]);
                for (int t = 0; t < tokens; t++) acc[t] = f_fma(d[t], scale, acc[t]);
            }
        }
        for (int t = 0; t < tokens; t++) y[t * stride + row] = f_sum(acc[t]);
    }
}

template <int bits, int group, Mode mode = Mode::affine, bool blocks = false, int tokens = gemv_tokens>
void gemv_group(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, float* y, int64_t stride) {
    if constexpr (tokens > 1)
        if (a.tokens < tokens) return gemv_group<bits, group, mode, blocks, tokens - 1>(w, a, row0, row1, y, stride);
    gemv_rows<bits, mode, group, blocks, tokens>(w, a, row0, row1, y, stride);
}

// Some of the tokens of an input.
Activations some_tokens(const Matrix& w, const Activations& a, int64_t t, int64_t count) {
    Activations some = a;
    some.tokens = count;
    some.values += t * a.in;
    if (multiplies_codes(w)) {
        some.codes += t * a.stride;
        some.scales += t * a.groups;
        some.sums += t * a.groups;
        some.totals += t * a.groups;
    }
    return some;
}

// Groups of 16. Those that are not in blocks are rare, and get no kernel for several tokens.
template <int bits>
void gemv_sixteens(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, float* y, int64_t stride) {
    if (in_blocks(w)) return gemv_group<bits, 16, Mode::affine, true>(w, a, row0, row1, y, stride);
    for (int64_t t = 0; t < a.tokens; t++)
        gemv_rows<bits, Mode::affine, 16, false, 1>(w, some_tokens(w, a, t, 1), row0, row1, y + t * stride, stride);
}

template <int bits>
void gemv_bits(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, float* y, int64_t stride) {
    if constexpr (bits == 2 || bits == 3 || bits == 6)
        if (w.group == 16) return gemv_sixteens<bits>(w, a, row0, row1, y, stride);
    if constexpr (bits == 4) {
        if (w.mode == Mode::iq4) return gemv_group<4, 32, Mode::iq4>(w, a, row0, row1, y, stride);
        if (w.mode == Mode::fp4)
            return w.group == 16 ? gemv_group<4, 16, Mode::fp4>(w, a, row0, row1, y, stride)
                                 : gemv_group<4, 32, Mode::fp4>(w, a, row0, row1, y, stride);
    }
    switch (w.group) {
        case 32: return gemv_group<bits, 32>(w, a, row0, row1, y, stride);
        case 64: return gemv_group<bits, 64>(w, a, row0, row1, y, stride);
        default: return gemv_group<bits, 128>(w, a, row0, row1, y, stride);
    }
}

// `a` are the tokens of one pass, at most gemv_tokens.
void gemv_pass(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, float* y, int64_t stride) {
    if (w.mode == Mode::fp8) return gemv_fp8(w, a, row0, row1, y, stride);
    switch (w.bits) {
        case 2: return gemv_bits<2>(w, a, row0, row1, y, stride);
        case 3: return gemv_bits<3>(w, a, row0, row1, y, stride);
        case 4: return gemv_bits<4>(w, a, row0, row1, y, stride);
        case 5: return gemv_bits<5>(w, a, row0, row1, y, stride);
        case 6: return gemv_bits<6>(w, a, row0, row1, y, stride);
        case 8: return gemv_bits<8>(w, a, row0, row1, y, stride);
    }
    gemv_plain(w, a, row0, row1, y, stride);
}

// As many passes as it takes, of as equal a number of tokens as can be.
void gemv(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, int64_t t0, int64_t t1, float* y,
          int64_t stride) {
    int64_t passes = (t1 - t0 + gemv_tokens - 1) / gemv_tokens;
    for (int64_t t = t0, some; t < t1; t += some, passes--) {
        some = (t1 - t + passes - 1) / passes;
        gemv_pass(w, some_tokens(w, a, t, some), row0, row1, y + t * stride, stride);
    }
}

}  // namespace
}  // namespace edgeq
