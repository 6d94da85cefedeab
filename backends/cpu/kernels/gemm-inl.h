// Products with many tokens: tiles of the matrix are unpacked and meet blocks of tokens.
#pragma once

#include "kernels/numbers.h"
#include "kernels/scales-inl.h"

namespace edgeq {
namespace {

constexpr int tile_rows = row_vectors * lanes;
constexpr int tile_depth = 512;        // codes of a row unpacked at a time: the tile stays in the first-level cache
constexpr int plain_tile_depth = 128;  // the same for floats

// A block of weights made ready: codes as [row vector][depth / 4][lane][4] (or as the set's transpose leaves them),
// scales and biases as [group][row].
struct Tile {
    alignas(64) uint8_t codes[tile_rows * tile_depth];
    alignas(64) float scales[tile_depth / 16][tile_rows];
    alignas(64) float biases[tile_depth / 16][tile_rows];
};

template <int n>
struct Constant {
    constexpr int operator()() const { return n; }
};

// Natural codes [c, c + n) of a row; n is a multiple of 16, the output has room for whole vectors.
template <int bits, Mode mode = Mode::affine>
void unpack_row(const uint8_t* src, int n, uint8_t* out) {
    constexpr int codes = 4 * lanes, nbytes = codes * bits / 8;
    for (int i = 0; i < n; i += codes, src += nbytes) {
        uint8_t rest[nbytes] = {};
        const bool whole = n - i >= codes;
        if (!whole) memcpy(rest, src, (n - i) * bits / 8);
        B v = unpack<bits>(whole ? src : rest);
        if constexpr (mode != Mode::affine) v = look_up<mode>(v);
        b_store(out + i, v);
    }
}

void unpack_any(const Matrix& w, const uint8_t* src, int n, uint8_t* out) {
    if (w.mode == Mode::iq4) return unpack_row<4, Mode::iq4>(src, n, out);
    if (w.mode == Mode::fp4) return unpack_row<4, Mode::fp4>(src, n, out);
    switch (w.bits) {
        case 2: return unpack_row<2>(src, n, out);
        case 3: return unpack_row<3>(src, n, out);
        case 4: return unpack_row<4>(src, n, out);
        case 5: return unpack_row<5>(src, n, out);
        case 6: return unpack_row<6>(src, n, out);
        case 8: return unpack_row<8>(src, n, out);
    }
}

// Of at most sixteen groups of any matrix.
void any_scales_and_biases(const Matrix& w, int64_t at, int n, float* scales, float* biases) {
    if (w.mode != Mode::fp4) return scales_and_biases(w, at, n, scales, biases);
    w.group == 16 ? fp4_scales<Type::e4m3>(w, at, n, scales, biases) : fp4_scales<Type::e8m0>(w, at, n, scales, biases);
}

// Of n groups of `lanes` rows, from group `at` of the first row on, into the tile's vector v of rows. Groups are
// counted through all rows, `groups` in each; rows from `last` on stand for it.
void unpack_scales(const Matrix& w, int64_t at, int64_t groups, int last, int n, int v, Tile& tile) {
    for (int i = 0; i < n; i += sixteen) {
        alignas(64) float scales[lanes][sixteen], biases[lanes][sixteen];
        const int some = n - i < sixteen ? n - i : sixteen;
        for (int r = 0; r < lanes; r++)
            any_scales_and_biases(w, at + (r < last ? r : last) * groups + i, some, scales[r], biases[r]);
        for (int j = 0; j < some; j += lanes) {
            F columns[lanes];
            f_transpose(scales[0] + j, sixteen, columns);
            for (int k = 0; k < lanes; k++) f_store(tile.scales[i + j + k] + v * lanes, columns[k]);
            f_transpose(biases[0] + j, sixteen, columns);
            for (int k = 0; k < lanes; k++) f_store(tile.biases[i + j + k] + v * lanes, columns[k]);
        }
    }
}

// The same for codes [c, c + n): src is the first row's at c, the next row's is row_bytes on.
void unpack_codes(const Matrix& w, const uint8_t* src, int64_t row_bytes, int last, int n, uint8_t* out) {
    const bool plain = w.mode == Mode::affine && last == lanes - 1;
    if (plain && w.bits == 8 && !signed_bytes && n % (4 * lanes) == 0) {
        for (int i = 0; i < n; i += 4 * lanes) transpose(src + i, row_bytes, out + i * lanes);
        return;
    }
    if constexpr (transposes_nibbles) {
        if (plain && w.bits == 4 && n % (8 * lanes) == 0) {
            for (int i = 0; i < n; i += 8 * lanes) transpose_nibbles<4>(src + i / 2, row_bytes, out + i * lanes);
            return;
        }
    }
    alignas(64) uint8_t rows[lanes * tile_depth];
    for (int r = 0; r < lanes; r++) unpack_any(w, src + (r < last ? r : last) * row_bytes, n, rows + r * tile_depth);
    for (int i = 0; i < n; i += 4 * lanes) transpose(rows + i, tile_depth, out + i * lanes);
}

// Codes [c, c + n) of the tile's rows from `row`; rows from row1 on are like the one before.
void unpack_tile(const Matrix& w, int64_t row, int64_t row1, int64_t c, int n, Tile& tile) {
    const int64_t row_bytes = w.in * w.bits / 8, groups = w.in / w.group;
    for (int v = 0; v < row_vectors; v++) {
        const int64_t at = row + v * lanes < row1 ? row + v * lanes : row1 - 1;
        const int last = row1 - at < lanes ? int(row1 - at) - 1 : lanes - 1;
        const auto* src = static_cast<const uint8_t*>(w.data) + at * row_bytes + c * w.bits / 8;
        unpack_codes(w, src, row_bytes, last, n, tile.codes + v * lanes * tile_depth);
        unpack_scales(w, at * groups + c / w.group, groups, last, n / w.group, v, tile);
    }
}

// Asks for the codes of the tile after this one, in rows that are too short and too far apart for the hardware to see
// them coming. It may belong to the next piece of work.
EDGEQ_INLINE void prefetch_codes(const Matrix& w, int64_t row, int64_t c) {
    const int64_t row_bytes = w.in * w.bits / 8, depth = w.in - c < tile_depth ? w.in - c : tile_depth;
    const auto* p = static_cast<const char*>(w.data) + c * w.bits / 8;
    for (int64_t r = row; r < row + tile_rows && r < w.out; r++)
        for (int64_t i = 0; i < depth * w.bits / 8; i += 64) __builtin_prefetch(p + r * row_bytes + i);
}

// One register block: acc[v][t] over the groups of a tile, added to y (or stored, for the first tile of a row). Nothing
// may keep it from staying in registers: a store takes as long as two products, and without the pragmas GCC 12 stores
// all of it with every group.
template <int tokens, int bits>
void multiply(const Tile& tile, const Activations& a, int group, int64_t c, int n, int64_t t0, bool first, float* y,
              int64_t stride) {
    F acc[row_vectors][tokens];
#pragma GCC unroll 8
    for (int v = 0; v < row_vectors; v++)
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) acc[v][t] = first ? f_zero() : f_load(y + t * stride + v * lanes);
    const int8_t* q = a.codes + t0 * a.stride + c;
    const int64_t at = t0 * a.groups + c / group;
    for (int g = 0; g < n / group; g++) {
        I d[row_vectors][tokens];
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) {
            I start = signed_bytes && bits == 8 ? i_set(128 * a.totals[at + t * a.groups + g]) : i_zero();
#pragma GCC unroll 8
            for (int v = 0; v < row_vectors; v++) d[v][t] = start;
        }
        dot_group<bits, tokens>(tile.codes + g * group * lanes, lanes * tile_depth, q + g * group, a.stride, group, d);
#pragma GCC unroll 8
        for (int v = 0; v < row_vectors; v++) {
            F s = f_load(tile.scales[g] + v * lanes), b = f_load(tile.biases[g] + v * lanes);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) {
                int64_t i = at + t * a.groups + g;
                F product = f_mul(s, f_set(a.scales[i]));
                acc[v][t] = f_fma(i_float(d[v][t]), product, acc[v][t]);
                acc[v][t] = f_fma(b, f_set(a.sums[i]), acc[v][t]);
            }
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < row_vectors; v++)
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) f_store(y + t * stride + v * lanes, acc[v][t]);
}

// The same where the matrix has not as many rows.
template <int tokens, int bits>
void multiply_some(const Tile& tile, const Activations& a, int group, int64_t c, int n, int64_t t0, bool first,
                   int rows, float* y, int64_t stride) {
    alignas(64) float whole[tokens][tile_rows];
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < tile_rows; i += lanes) f_store(whole[t] + i, f_load_some(y + t * stride + i, rows - i));
    multiply<tokens, bits>(tile, a, group, c, n, t0, first, whole[0], tile_rows);
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < rows; i += lanes) f_store_some(y + t * stride + i, f_load(whole[t] + i), rows - i);
}

template <int bits>
void multiply_tokens(const Tile& tile, const Activations& a, int group, int64_t c, int n, int64_t t0, int64_t t1,
                     int rows, float* y, int64_t stride) {
    auto block = [&](auto tokens, int64_t t) {
        if (rows == tile_rows)
            multiply<tokens(), bits>(tile, a, group, c, n, t, c == 0, y + t * stride, stride);
        else
            multiply_some<tokens(), bits>(tile, a, group, c, n, t, c == 0, rows, y + t * stride, stride);
    };
    int64_t t = t0;
    for (; t + tile_tokens <= t1; t += tile_tokens) block(Constant<tile_tokens>(), t);
    for (; t + 2 <= t1; t += 2) block(Constant<2>(), t);
    for (; t < t1; t++) block(Constant<1>(), t);
}

// The tile of a plain or fp8 matrix: [depth][row] as float.
struct PlainTile {
    alignas(64) float values[plain_tile_depth][tile_rows];
};

// Values [c, c + n) of a row, whole groups of fp8.
void unpack_fp8(const Matrix& w, int64_t row, int64_t c, int n, float* out) {
    for (int i = 0; i < n; i += 32) {
        const int64_t at = row * w.in + c + i;
        const F scale = f_set(256 * scale_at(w, at / 32));
        for (int j = 0; j < 32; j += 2 * lanes) {
            F v[2];
            f_e4m3(static_cast<const uint8_t*>(w.data) + at + j, v);
            f_store(out + i + j, f_mul(v[0], scale));
            f_store(out + i + j + lanes, f_mul(v[1], scale));
        }
    }
}

void unpack_plain(const Matrix& w, int64_t row, int64_t row1, int64_t c, int n, PlainTile& tile) {
    alignas(64) float rows[lanes][plain_tile_depth];
    for (int v = 0; v < row_vectors; v++) {
        for (int r = 0; r < lanes; r++) {
            int64_t at = row + v * lanes + r;
            if (w.mode == Mode::fp8 && at < row1) {
                unpack_fp8(w, at, c, n, rows[r]);
                continue;
            }
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
    if (!multiplies_codes(w)) return gemm_plain(w, a, row0, row1, t0, t1, y, stride);
    Tile tile;
    for (int64_t row = row0; row < row1; row += tile_rows) {
        int rows = row1 - row < tile_rows ? int(row1 - row) : tile_rows;
        for (int64_t c = 0; c < w.in; c += tile_depth) {
            int n = w.in - c < tile_depth ? int(w.in - c) : tile_depth;
            unpack_tile(w, row, row1, c, n, tile);
            prefetch_codes(w, c + n < w.in ? row : row + tile_rows, c + n < w.in ? c + n : 0);
            const int bits = w.bits == 8 || w.mode == Mode::iq4 ? 8 : w.bits == 6 ? 6 : 5;
            auto tokens = bits == 8 ? multiply_tokens<8> : bits == 6 ? multiply_tokens<6> : multiply_tokens<5>;
            tokens(tile, a, w.group, c, n, t0, t1, rows, y + row, stride);
        }
    }
}

}  // namespace
}  // namespace edgeq
