// Products with a matrix: a tile of it is encoded, and meets blocks of rows.
#pragma once

#include "vision/codes-inl.h"

namespace edgeq {
namespace {

constexpr int tile_depth = 2 * group_depth;  // of a tile: it stays in the first-level cache

struct Tile {
    alignas(64) Code codes[tile * tile_depth];  // [step of the depth][row][codes of a step]
    alignas(64) float scales[tile_depth / group_depth][tile];
};

// The sums of a tile's rows and block_rows rows of codes over `steps` steps: each(row, vector, sum).
template <class Each>
INLINE void products(const Code* tile_codes, const Code* rows, Index stride, Index steps, Each&& each) {
    I sums[block_rows][vectors];
    for (int r = 0; r < block_rows; r++)
        for (int v = 0; v < vectors; v++) sums[r][v] = i_zero();
    for (Index k = 0; k < steps; k++) {
        decltype(load_codes(tile_codes)) codes[vectors];
        for (int v = 0; v < vectors; v++) codes[v] = load_codes(tile_codes + (k * tile + v * W) * step);
        for (int r = 0; r < block_rows; r++) {
            const auto row = spread_codes(rows + r * stride + k * step);
            for (int v = 0; v < vectors; v++) sums[r][v] = dot_codes(sums[r][v], codes[v], row);
        }
    }
    for (int r = 0; r < block_rows; r++)
        for (int v = 0; v < vectors; v++) each(r, v, i_float(sums[r][v]));
}

// Columns [c, c + n) of the matrix's rows from `row` on; rows beyond row1 are zero.
void unpack(const Matrix& w, Index row, Index row1, Index c, Index n, Tile& to) {
    alignas(64) Code rows[W * tile_depth];
    const Index stride = padded(n, W * step);
    for (int v = 0; v < vectors; v++) {
        for (int r = 0; r < W; r++) {
            const Index at = row + v * W + r;
            Code* codes = rows + r * stride;
            for (Index g = 0; g < code_groups(n); g++) {
                float& scale = to.scales[g][v * W + r];
                const Index from = g * group_depth;
                scale = at < row1
                            ? encode_weights(w, at * w.in + c + from, smaller(group_depth, n - from), codes + from)
                            : 0.0f;
            }
            clear(codes, at < row1 ? padded(n, W) : 0, stride);
        }
        to_tile(rows, stride, stride / step, to.codes + v * W * step);
    }
}

// Columns [c, c + n) of a tile's `rows` rows times rows [t, t + count) of codes, added to y; the first of a row's
// products begins with what `finish` adds, the last ends with its GELU.
void multiply_block(const Tile& w, const Codes& a, Index c, Index n, bool last, Index t, Index count, Index rows,
                    const Finish& finish, float* y, Index stride) {
    alignas(64) float sums[block_rows][tile];
    for (Index r = 0; r < count; r++)
        for (int v = 0; v < vectors && v * W < rows; v++) {
            const Index left = rows - v * W;
            V start = set1(0.0f);
            if (c > 0 || finish.add) start = load_upto(y + r * stride + v * W, left);
            if (c == 0 && finish.bias) start = add(start, load_upto(finish.bias + v * W, left));
            store(sums[r] + v * W, start);
        }
    const float* scales = a.scales + t * a.groups + c / group_depth;
    for (Index g = 0; g < code_groups(n); g++) {
        const Index from = g * group_depth, steps = padded(smaller(group_depth, n - from), step) / step;
        const Code* codes = static_cast<const Code*>(a.codes) + t * a.stride + c + from;
        products(w.codes + from * tile, codes, a.stride, steps, [&](int r, int v, V x) {
            const V scale = mul(load(w.scales[g] + v * W), set1(scales[r * a.groups + g]));
            store(sums[r] + v * W, fma(x, scale, load(sums[r] + v * W)));
        });
    }
    for (Index r = 0; r < count; r++)
        for (int v = 0; v < vectors && v * W < rows; v++) {
            const V x = load(sums[r] + v * W);
            store_upto(y + r * stride + v * W, last && finish.gelu ? gelu_tanh(x) : x, rows - v * W);
        }
}

void multiply(const Matrix& w, Index row0, Index row1, const Codes& a, Index t0, Index t1, const Finish& finish,
              float* y, Index stride) {
    Tile made;
    for (Index row = row0; row < row1; row += tile)
        for (Index c = 0; c < w.in; c += tile_depth) {
            const Index n = smaller(tile_depth, w.in - c), rows = smaller(tile, row1 - row);
            unpack(w, row, row1, c, n, made);
            Finish here = finish;
            if (here.bias) here.bias += row;
            for (Index t = t0; t < t1; t += block_rows)
                multiply_block(made, a, c, n, c + n == w.in, t, smaller(block_rows, t1 - t), rows, here,
                               y + t * stride + row, stride);
        }
}

}  // namespace
}  // namespace edgeq
