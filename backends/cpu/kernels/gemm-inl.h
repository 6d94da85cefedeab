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

// Scales and biases of n groups from `at` on, counted through all rows, into column `r` of the tile.
void unpack_scales(const Matrix& w, int64_t at, int n, int r, Tile& tile) {
    for (int i = 0; i < n; i += sixteen) {
        const int some = n - i < sixteen ? n - i : sixteen;
        alignas(64) float scales[sixteen], biases[sixteen];
        any_scales_and_biases(w, at + i, some, scales, biases);
        for (int j = 0; j < some; j++) {
            tile.scales[i + j][r] = scales[j];
            tile.biases[i + j][r] = biases[j];
        }
    }
}

// Codes [c, c + n) of the tile's rows from `row`; rows beyond row1 become zero.
void unpack_tile(const Matrix& w, int64_t row, int64_t row1, int64_t c, int n, Tile& tile) {
    alignas(64) uint8_t rows[lanes * tile_depth];
    const int64_t row_bytes = w.in * w.bits / 8, groups = w.in / w.group;
    for (int v = 0; v < row_vectors; v++) {
        for (int r = 0; r < lanes; r++) {
            int64_t at = row + v * lanes + r;
            int column = v * lanes + r;
            if (at < row1) {
                const uint8_t* src = static_cast<const uint8_t*>(w.data) + at * row_bytes + c * w.bits / 8;
                unpack_any(w, src, n, rows + r * tile_depth);
                unpack_scales(w, at * groups + c / w.group, n / w.group, column, tile);
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
        dot_group<bits, tokens>(tile.codes + g * group * lanes, lanes * tile_depth, q + g * group, a.stride, group, d);
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
            const int bits = w.bits == 8 || w.mode == Mode::iq4 ? 8 : w.bits == 6 ? 6 : 5;
            auto tokens = bits == 8 ? multiply_tokens<8> : bits == 6 ? multiply_tokens<6> : multiply_tokens<5>;
            tokens(tile, a, w.group, c, n, t0, t1, rows, y + row, stride);
        }
    }
}

}  // namespace
}  // namespace edgeq
