// The matrix kernels, written once on top of a few vector operations and compiled for every instruction set but scalar.
//
// Before including this, a file of kernels/isa/ defines in an unnamed namespace inside edgeq:
//
//   lanes                     32-bit lanes of a vector
//   row_vectors, tile_tokens  the register block of gemm: row_vectors * lanes rows by tile_tokens tokens
//   signed_bytes              whether dot8 takes codes - 128 (there is no unsigned by signed product of full range)
//   F, I, B                   vectors of float, int32, bytes
//   f_zero f_set f_load f_store f_add f_mul f_max f_abs f_fma(a, b, c) = a * b + c, f_sum, f_max_lane
//   f_load_some, f_store_some(p, v, n)  the first n lanes only, the others zero (n may be negative or too large)
//   f_widen(p, type, i)       lanes values from index i of an array of `type`, as float
//   f_units(p, shift, n)      float16 p[i >> shift] in lane i, for the first n lanes (n positive); shift 2, 3 or 4
//   f_widen_some(p, type, i, n)  the first n of them, the others zero (n may be negative or too large)
//   f_store_int8(p, v)        lanes bytes: v rounded to nearest even
//   i_zero i_set i_float
//   i_start<n>(p)             128 p[0] in the first of lanes / n lanes, then 128 p[1] ...; the others zero
//   b_load(p)                 4 * lanes bytes
//   Codes16, load_codes16(p)  16 activation codes of one token, as dot_rows likes to have them
//   unpack<bits>(p)           4 * lanes codes (minus 128 for 8 bits and signed_bytes); reads no byte beyond theirs
//   nibbles(p, low, high)     4 * lanes bytes of 4-bit codes: the even ones, the odd ones
//   look_up(v)                4-bit codes -> iq4_codes[code] (minus 128 for signed_bytes)
//   dot(acc, w, a)            acc + sums of 4 (or, where signed_bytes, any) neighbouring products; codes below 64
//   dot8(acc, w, a)           the same for 8-bit codes
//   dot_rows<bits>(acc, w, a) acc + every lane's own 4 bytes of w[0], ..., w[3] times the 16 of a; codes of 8 bits,
//                             of 6, or (bits = 5) of fewer
//   f_spread<n>(p)            lanes / n times p[0], then p[1], ...
//   transpose(p, n, out)      lanes rows of 4 * lanes bytes, n bytes apart: out[i] = the i-th 4 bytes of every row
//   f_transpose(p, n, out)    lanes rows of lanes floats, n floats apart, transposed
#define EDGEQ_INLINE inline __attribute__((always_inline))

namespace edgeq {
namespace {

constexpr int gemv_tokens = 4;  // that share one reading of the weights
constexpr int sixteen = 16;  // groups whose scales are treated together; rows of scales are padded to this

// --- activations -----------------------------------------------------------------------------------------------------

// One group: codes to q, the sum of the codes returned, the scale to *scale.
int quantize_group(const float* x, int group, int8_t* q, float* scale) {
    F largest = f_zero();
    for (int i = 0; i < group; i += lanes) largest = f_max(largest, f_abs(f_load(x + i)));
    float amax = f_max_lane(largest);
    if (amax < 1e-30f) {  // its reciprocal would overflow
        *scale = 0;
        for (int i = 0; i < group; i++) q[i] = 0;
        return 0;
    }
    F inverse = f_set(127.0f / amax);
    for (int i = 0; i < group; i += lanes) f_store_int8(q + i, f_mul(f_load(x + i), inverse));
    *scale = amax / 127.0f;
    int total = 0;
    for (int i = 0; i < group; i++) total += q[i];
    return total;
}

void quantize(const float* x, int64_t n, int group, Order order, int8_t* codes, float* scales, float* sums,
              int32_t* totals) {
    for (int64_t g = 0; g < n / group; g++) {
        int8_t q[128];
        totals[g] = quantize_group(x + g * group, group, q, &scales[g]);
        sums[g] = scales[g] * float(totals[g]);
        if (order == Order::natural) {
            for (int i = 0; i < group; i++) codes[g * group + i] = q[i];
        } else {
            int64_t first = g * group;
            int8_t* even = codes + first / order_block * order_block + first % order_block / 2;
            for (int i = 0; i < group / 2; i++) {
                even[i] = q[2 * i];
                even[order_block / 2 + i] = q[2 * i + 1];
            }
        }
    }
}

// --- scales and biases -----------------------------------------------------------------------------------------------

// p[at], ..., p[at + n - 1] as float, n <= sixteen; the rest of the sixteen are zero. The type is known here, not asked
// for at every vector.
template <Type type>
EDGEQ_INLINE void widen_sixteen(const void* p, int64_t at, int n, float* out) {
    for (int i = 0; i < sixteen; i += lanes)
        f_store(out + i, n - i >= lanes ? f_widen(p, type, at + i) : f_widen_some(p, type, at + i, n - i));
}

// Scales or biases of groups [g, g + n) of a row. `blocks` are their units.
inline void numbers(const Matrix& w, const void* p, const uint16_t* blocks, int64_t row, int64_t g, int n, float* out) {
    const int64_t at = row * (w.in / w.group) + g;
    if (w.type == Type::bf16) return widen_sixteen<Type::bf16>(p, at, n, out);
    if (w.type == Type::f16) return widen_sixteen<Type::f16>(p, at, n, out);
    if (w.type == Type::f32) return widen_sixteen<Type::f32>(p, at, n, out);
    widen_sixteen<Type::i8>(p, at, n, out);
    for (int i = 0; i < n; i += lanes)  // rows are whole blocks
        f_store(out + i, f_mul(f_load(out + i), f_units(blocks + ((at + i) >> w.block_shift), w.block_shift, n - i)));
}

// Both, of at most sixteen groups.
inline void scales_and_biases(const Matrix& w, int64_t row, int64_t g, int n, float* scales, float* biases) {
    numbers(w, w.scales, w.block_scales, row, g, n, scales);
    if (w.biases) return numbers(w, w.biases, w.block_biases, row, g, n, biases);
    for (int i = 0; i < sixteen; i += lanes) f_store(biases + i, f_mul(f_load(scales + i), f_set(float(-w.zero))));
}

// --- few tokens ------------------------------------------------------------------------------------------------------

constexpr int prefetch_nbytes = 4096;

// The codes that gemv takes at a time.
template <int bits>
constexpr int unit = bits == 4 ? 8 * lanes : 4 * lanes;

// d[t] += codes of one unit at `src` times those of every token at `q`, from code `c`.
template <int bits, bool iq4, int tokens>
EDGEQ_INLINE void dot_unit(const uint8_t* src, const int8_t* q, int64_t stride, int64_t c, I* d) {
    if constexpr (bits == 4) {
        B low, high;
        nibbles(src, &low, &high);
        if constexpr (iq4) low = look_up(low), high = look_up(high);
        const int8_t* even = q + (c & -order_block) + (c & (order_block - 1)) / 2;
        for (int t = 0; t < tokens; t++) {
            B a = b_load(even + t * stride), b = b_load(even + t * stride + order_block / 2);
            d[t] = iq4 ? dot8(d[t], low, a) : dot(d[t], low, a);
            d[t] = iq4 ? dot8(d[t], high, b) : dot(d[t], high, b);
        }
    } else {
        B w = unpack<bits>(src);
        for (int t = 0; t < tokens; t++) {
            B a = b_load(q + t * stride + c);
            d[t] = bits == 8 ? dot8(d[t], w, a) : dot(d[t], w, a);
        }
    }
}

// How far ahead of a block of rows to prefetch: whole blocks, at least prefetch_nbytes. The order is that of memory, not
// that in which the rows are used in turns: the hardware prefetches along with it, and only with it ("Matrices" in
// docs/speed.md).
EDGEQ_INLINE int64_t prefetch_distance(int64_t block_nbytes) {
    return (prefetch_nbytes + block_nbytes - 1) / block_nbytes * block_nbytes;
}

// A block of rows: they share the loads of the activations, and one's sums do not wait for the other's.
template <int bits, bool iq4, int group, int tokens, int rows>
EDGEQ_INLINE void gemv_block(const Matrix& w, const Activations& a, int64_t row, float* y, int64_t stride) {
    constexpr int codes = unit<bits>;
    constexpr int step = group > codes ? group : codes;  // codes for one floating-point multiply-add
    const int64_t groups = w.in / group, row_bytes = w.in * bits / 8;
    const uint8_t* src = static_cast<const uint8_t*>(w.data) + row * row_bytes;
    const uint8_t* next = src + prefetch_distance(rows * row_bytes);
    F acc[rows][tokens], bias[rows][tokens];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) acc[r][t] = bias[r][t] = f_zero();
    for (int64_t g0 = 0; g0 < groups; g0 += sixteen) {
        const int some = groups - g0 < sixteen ? int(groups - g0) : sixteen;
        alignas(64) float products[rows][tokens][sixteen];  // scale of the weight times scale of the activation
        for (int r = 0; r < rows; r++) {
            alignas(64) float scales[sixteen], biases[sixteen];
            scales_and_biases(w, row + r, g0, some, scales, biases);
            for (int i = 0; i < sixteen; i += lanes) {
                for (int t = 0; t < tokens; t++) {
                    int64_t at = t * a.groups + g0 + i;
                    f_store(products[r][t] + i, f_mul(f_load(scales + i), f_load(a.scales + at)));
                    bias[r][t] = f_fma(f_load(biases + i), f_load(a.sums + at), bias[r][t]);
                }
            }
        }
        // One floating-point step: the codes from c, those of row r from `from + r * distance`.
        auto take = [&](const uint8_t* from, int64_t distance, int64_t c) __attribute__((always_inline)) {
            const int g = int(c / group - g0);
            for (int r = 0; r < rows; r++) {
                I d[tokens];
                for (int t = 0; t < tokens; t++) d[t] = i_zero();
                if constexpr (signed_bytes && (bits == 8 || iq4))
                    for (int t = 0; t < tokens; t++) d[t] = i_start<step / group>(a.totals + t * a.groups + g0 + g);
                for (int u = 0; u < step; u += codes)
                    dot_unit<bits, iq4, tokens>(from + r * distance + u * bits / 8, a.codes, a.stride, c + u, d);
                for (int t = 0; t < tokens; t++)
                    acc[r][t] = f_fma(i_float(d[t]), f_spread<step / group>(products[r][t] + g), acc[r][t]);
            }
        };
        int64_t c = g0 * group;
        const int64_t last = (g0 + some) * group;
        for (; c + step <= last; c += step, src += step * bits / 8) {
            for (int i = 0; i < rows * step * bits / 8; i += 64) __builtin_prefetch(next + i);
            next += rows * step * bits / 8;
            take(src, row_bytes, c);
        }
        if (c < last) {  // a row that is no whole number of units
            uint8_t rest[rows][step * bits / 8] = {};
            for (int r = 0; r < rows; r++) memcpy(rest[r], src + r * row_bytes, (last - c) * bits / 8);
            take(rest[0], sizeof rest[0], c);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) y[t * stride + row + r] = f_sum(f_add(acc[r][t], bias[r][t]));
}

template <int bits, bool iq4, int group, int tokens>
void gemv_rows(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, float* y, int64_t stride) {
    constexpr int rows = tokens == 1 ? 4 : tokens == 2 ? 2 : 1;
    int64_t row = row0;
    for (; row + rows <= row1; row += rows) gemv_block<bits, iq4, group, tokens, rows>(w, a, row, y, stride);
    for (; row < row1; row++) gemv_block<bits, iq4, group, tokens, 1>(w, a, row, y, stride);
}

template <int tokens>
void gemv_plain(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, float* y, int64_t stride) {
    const int size = w.type == Type::f32 ? 4 : 2;
    for (int64_t row = row0; row < row1; row++) {
        F even[tokens], odd[tokens];  // two sums, since one would wait for itself
        for (int t = 0; t < tokens; t++) even[t] = odd[t] = f_zero();
        int64_t i = 0, at = row * w.in;
        for (; i + 2 * lanes <= w.in; i += 2 * lanes) {
            __builtin_prefetch(static_cast<const char*>(w.data) + (at + i) * size + prefetch_nbytes);
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

template <int bits, int group, bool iq4 = false>
void gemv_group(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, float* y, int64_t stride) {
    switch (a.tokens) {
        case 1: return gemv_rows<bits, iq4, group, 1>(w, a, row0, row1, y, stride);
        case 2: return gemv_rows<bits, iq4, group, 2>(w, a, row0, row1, y, stride);
        case 3: return gemv_rows<bits, iq4, group, 3>(w, a, row0, row1, y, stride);
        default: return gemv_rows<bits, iq4, group, 4>(w, a, row0, row1, y, stride);
    }
}

template <int bits>
void gemv_bits(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, float* y, int64_t stride) {
    if constexpr (bits == 6)
        if (w.group == 16) return gemv_group<6, 16>(w, a, row0, row1, y, stride);
    if constexpr (bits == 4)
        if (w.iq4) return gemv_group<4, 32, true>(w, a, row0, row1, y, stride);
    switch (w.group) {
        case 32: return gemv_group<bits, 32>(w, a, row0, row1, y, stride);
        case 64: return gemv_group<bits, 64>(w, a, row0, row1, y, stride);
        default: return gemv_group<bits, 128>(w, a, row0, row1, y, stride);
    }
}

// `a` are the tokens of one pass, at most gemv_tokens.
void gemv_pass(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, float* y, int64_t stride) {
    switch (w.bits) {
        case 2: return gemv_bits<2>(w, a, row0, row1, y, stride);
        case 3: return gemv_bits<3>(w, a, row0, row1, y, stride);
        case 4: return gemv_bits<4>(w, a, row0, row1, y, stride);
        case 5: return gemv_bits<5>(w, a, row0, row1, y, stride);
        case 6: return gemv_bits<6>(w, a, row0, row1, y, stride);
        case 8: return gemv_bits<8>(w, a, row0, row1, y, stride);
    }
    switch (a.tokens) {
        case 1: return gemv_plain<1>(w, a, row0, row1, y, stride);
        case 2: return gemv_plain<2>(w, a, row0, row1, y, stride);
        case 3: return gemv_plain<3>(w, a, row0, row1, y, stride);
        default: return gemv_plain<4>(w, a, row0, row1, y, stride);
    }
}

void gemv(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, int64_t t0, int64_t t1, float* y,
          int64_t stride) {
    for (int64_t t = t0; t < t1; t += gemv_tokens) {
        Activations pass = a;
        pass.tokens = t1 - t < gemv_tokens ? t1 - t : gemv_tokens;
        pass.values += t * a.in;
        if (w.bits) {
            pass.codes += t * a.stride;
            pass.scales += t * a.groups;
            pass.sums += t * a.groups;
            pass.totals += t * a.groups;
        }
        gemv_pass(w, pass, row0, row1, y + t * stride, stride);
    }
}

// --- many tokens -----------------------------------------------------------------------------------------------------

constexpr int tile_rows = row_vectors * lanes;
constexpr int tile_depth = 512;        // codes of a row unpacked at a time: the tile stays in the first-level cache
constexpr int plain_tile_depth = 128;  // the same for floats

// A block of weights made ready: codes as [row vector][depth / 4][lane][4], scales and biases as [group][row].
struct Tile {
    alignas(64) uint8_t codes[tile_rows * tile_depth];
    alignas(64) float scales[tile_depth / 16][tile_rows];
    alignas(64) float biases[tile_depth / 16][tile_rows];
};

// Natural codes [c, c + n) of a row; n is a multiple of 32, the output has room for whole vectors.
template <int bits, bool iq4 = false>
void unpack_row(const uint8_t* src, int n, uint8_t* out) {
    constexpr int codes = 4 * lanes, nbytes = codes * bits / 8;
    for (int i = 0; i < n; i += codes, src += nbytes) {
        uint8_t rest[nbytes] = {};
        const bool whole = n - i >= codes;
        if (!whole) memcpy(rest, src, (n - i) * bits / 8);
        B v = unpack<bits>(whole ? src : rest);
        b_store(out + i, iq4 ? look_up(v) : v);
    }
}

void unpack_any(const Matrix& w, const uint8_t* src, int n, uint8_t* out) {
    switch (w.bits) {
        case 2: return unpack_row<2>(src, n, out);
        case 3: return unpack_row<3>(src, n, out);
        case 4: return w.iq4 ? unpack_row<4, true>(src, n, out) : unpack_row<4>(src, n, out);
        case 5: return unpack_row<5>(src, n, out);
        case 6: return unpack_row<6>(src, n, out);
        case 8: return unpack_row<8>(src, n, out);
    }
}

// Scales and biases of a row's groups [g0, g0 + n) into column `r` of the tile.
void unpack_scales(const Matrix& w, int64_t row, int64_t g0, int n, int r, Tile& tile) {
    for (int i = 0; i < n; i += sixteen) {
        const int some = n - i < sixteen ? n - i : sixteen;
        alignas(64) float scales[sixteen], biases[sixteen];
        scales_and_biases(w, row, g0 + i, some, scales, biases);
        for (int j = 0; j < some; j++) {
            tile.scales[i + j][r] = scales[j];
            tile.biases[i + j][r] = biases[j];
        }
    }
}

// Codes [c, c + n) of the tile's rows from `row`; rows beyond row1 become zero.
void unpack_tile(const Matrix& w, int64_t row, int64_t row1, int64_t c, int n, Tile& tile) {
    alignas(64) uint8_t rows[lanes * tile_depth];
    const int64_t row_bytes = w.in * w.bits / 8;
    for (int v = 0; v < row_vectors; v++) {
        for (int r = 0; r < lanes; r++) {
            int64_t at = row + v * lanes + r;
            int column = v * lanes + r;
            if (at < row1) {
                const uint8_t* src = static_cast<const uint8_t*>(w.data) + at * row_bytes + c * w.bits / 8;
                unpack_any(w, src, n, rows + r * tile_depth);
                unpack_scales(w, at, c / w.group, n / w.group, column, tile);
            } else {
                memset(rows + r * tile_depth, 0, n);
                for (int g = 0; g < n / w.group; g++) tile.scales[g][column] = tile.biases[g][column] = 0;
            }
        }
        uint8_t* out = tile.codes + v * lanes * tile_depth;
        for (int i = 0; i < n; i += 4 * lanes) transpose(rows + i, tile_depth, out + i * lanes);
    }
}

// One register block: acc[v][t] over the groups of a tile, added to y (or stored, for the first tile of a row).
template <int tokens, int bits>
void multiply(const Tile& tile, const Activations& a, int group, int64_t c, int n, int64_t t0, bool first, int rows,
              float* y, int64_t stride) {
    F acc[row_vectors][tokens];
    for (int v = 0; v < row_vectors; v++)
        for (int t = 0; t < tokens; t++)
            acc[v][t] = first ? f_zero() : f_load_some(y + t * stride + v * lanes, rows - v * lanes);
    const int8_t* q = a.codes + t0 * a.stride + c;
    const int64_t at = t0 * a.groups + c / group;
    for (int g = 0; g < n / group; g++) {
        I d[row_vectors][tokens];
        for (int t = 0; t < tokens; t++) {
            I start = signed_bytes && bits == 8 ? i_set(128 * a.totals[at + t * a.groups + g]) : i_zero();
            for (int v = 0; v < row_vectors; v++) d[v][t] = start;
        }
        const uint8_t* codes = tile.codes + g * group * lanes;
        for (int k = 0; k < group; k += 16) {
            Codes16 x[tokens];
            for (int t = 0; t < tokens; t++) x[t] = load_codes16(q + t * a.stride + g * group + k);
            for (int v = 0; v < row_vectors; v++) {
                B w[4];
                for (int i = 0; i < 4; i++) w[i] = b_load(codes + v * lanes * tile_depth + (k + 4 * i) * lanes);
                for (int t = 0; t < tokens; t++) d[v][t] = dot_rows<bits>(d[v][t], w, x[t]);
            }
        }
        for (int v = 0; v < row_vectors; v++) {
            F s = f_load(tile.scales[g] + v * lanes), b = f_load(tile.biases[g] + v * lanes);
            for (int t = 0; t < tokens; t++) {
                int64_t i = at + t * a.groups + g;
                F product = f_mul(s, f_set(a.scales[i]));
                acc[v][t] = f_fma(i_float(d[v][t]), product, acc[v][t]);
                acc[v][t] = f_fma(b, f_set(a.sums[i]), acc[v][t]);
            }
        }
    }
    for (int v = 0; v < row_vectors; v++)
        for (int t = 0; t < tokens; t++) f_store_some(y + t * stride + v * lanes, acc[v][t], rows - v * lanes);
}

template <int bits>
void multiply_tokens(const Tile& tile, const Activations& a, int group, int64_t c, int n, int64_t t0, int64_t t1,
                     int rows, float* y, int64_t stride) {
    bool first = c == 0;
    int64_t t = t0;
    for (; t + tile_tokens <= t1; t += tile_tokens)
        multiply<tile_tokens, bits>(tile, a, group, c, n, t, first, rows, y + t * stride, stride);
    for (; t + 2 <= t1; t += 2) multiply<2, bits>(tile, a, group, c, n, t, first, rows, y + t * stride, stride);
    for (; t < t1; t++) multiply<1, bits>(tile, a, group, c, n, t, first, rows, y + t * stride, stride);
}

// The tile of a plain matrix: [depth][row] as float.
struct PlainTile {
    alignas(64) float values[plain_tile_depth][tile_rows];
};

void unpack_plain(const Matrix& w, int64_t row, int64_t row1, int64_t c, int n, PlainTile& tile) {
    alignas(64) float rows[lanes][plain_tile_depth];
    for (int v = 0; v < row_vectors; v++) {
        for (int r = 0; r < lanes; r++) {
            int64_t at = row + v * lanes + r;
            for (int i = 0; i < n; i += lanes) {
                int some = n - i < lanes ? n - i : lanes;
                f_store(rows[r] + i, at < row1 ? f_widen_some(w.data, w.type, at * w.in + c + i, some) : f_zero());
            }
        }
        for (int i = 0; i < n; i += lanes) {
            F columns[lanes];
            f_transpose(rows[0] + i, plain_tile_depth, columns);
            for (int j = 0; j < lanes; j++) f_store(tile.values[i + j] + v * lanes, columns[j]);
        }
    }
}

template <int tokens>
void multiply_plain(const PlainTile& tile, const Activations& a, int64_t c, int n, int64_t t0, int rows, float* y,
                    int64_t stride) {
    F acc[row_vectors][tokens];
    for (int v = 0; v < row_vectors; v++)
        for (int t = 0; t < tokens; t++)
            acc[v][t] = c == 0 ? f_zero() : f_load_some(y + t * stride + v * lanes, rows - v * lanes);
    const float* x = a.values + t0 * a.in + c;
    for (int k = 0; k < n; k++) {
        F w[row_vectors];
        for (int v = 0; v < row_vectors; v++) w[v] = f_load(tile.values[k] + v * lanes);
        for (int t = 0; t < tokens; t++) {
            F value = f_set(x[t * a.in + k]);
            for (int v = 0; v < row_vectors; v++) acc[v][t] = f_fma(w[v], value, acc[v][t]);
        }
    }
    for (int v = 0; v < row_vectors; v++)
        for (int t = 0; t < tokens; t++) f_store_some(y + t * stride + v * lanes, acc[v][t], rows - v * lanes);
}

void gemm_plain(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, int64_t t0, int64_t t1, float* y,
                int64_t stride) {
    PlainTile tile;
    for (int64_t row = row0; row < row1; row += tile_rows) {
        int rows = row1 - row < tile_rows ? int(row1 - row) : tile_rows;
        for (int64_t c = 0; c < w.in; c += plain_tile_depth) {
            int n = w.in - c < plain_tile_depth ? int(w.in - c) : plain_tile_depth;
            unpack_plain(w, row, row1, c, n, tile);
            int64_t t = t0;
            for (; t + tile_tokens <= t1; t += tile_tokens)
                multiply_plain<tile_tokens>(tile, a, c, n, t, rows, y + t * stride + row, stride);
            for (; t < t1; t++) multiply_plain<1>(tile, a, c, n, t, rows, y + t * stride + row, stride);
        }
    }
}

void gemm(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, int64_t t0, int64_t t1, float* y,
          int64_t stride) {
    if (w.bits == 0) return gemm_plain(w, a, row0, row1, t0, t1, y, stride);
    Tile tile;
    for (int64_t row = row0; row < row1; row += tile_rows) {
        int rows = row1 - row < tile_rows ? int(row1 - row) : tile_rows;
        for (int64_t c = 0; c < w.in; c += tile_depth) {
            int n = w.in - c < tile_depth ? int(w.in - c) : tile_depth;
            unpack_tile(w, row, row1, c, n, tile);
            const int bits = w.bits == 8 || w.iq4 ? 8 : w.bits == 6 ? 6 : 5;
            auto tokens = bits == 8 ? multiply_tokens<8> : bits == 6 ? multiply_tokens<6> : multiply_tokens<5>;
            tokens(tile, a, w.group, c, n, t0, t1, rows, y + row, stride);
        }
    }
}

}  // namespace
}  // namespace edgeq
