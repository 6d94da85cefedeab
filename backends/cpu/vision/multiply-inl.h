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
template <Type type>
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
                scale = at < row1 ? encode_weights<type>(w.data, at * w.in + c + from, smaller(group_depth, n - from),
                                                         codes + from)
                                  : 0.0f;
            }
            clear(codes, at < row1 ? padded(n, W) : 0, stride);
        }
        to_tile(rows, stride, stride / step, to.codes + v * W * step);
    }
}

void unpack_any(const Matrix& w, Index row, Index row1, Index c, Index n, Tile& to) {
    if (w.type == Type::bf16) return unpack<Type::bf16>(w, row, row1, c, n, to);
    if (w.type == Type::f16) return unpack<Type::f16>(w, row, row1, c, n, to);
    unpack<Type::f32>(w, row, row1, c, n, to);
}

// A tile of a matrix's columns [c, c + n) and a block of rows of codes: y is what comes of them, see multiply. The
// first of a row's products begins with what `finish` adds, the last ends with its GELU.
struct MultiplyBlock {
    const Codes& a;
    Index c, n, count, rows;  // `count` of block_rows, `rows` of the tile
    bool last;
    Finish finish;
    Index stride;
};

template <bool whole>  // count == block_rows, rows == tile
INLINE void multiply_block(const Tile& w, const MultiplyBlock& b, Index t, float* y) {
    alignas(64) float sums[block_rows][tile];
    auto each_vector = [&](auto&& function) {
        for (int r = 0; r < block_rows; r++)
            for (int v = 0; v < vectors; v++)
                if (whole || (r < b.count && v * W < b.rows))
                    function(y + r * b.stride + v * W, sums[r] + v * W, v * W, whole ? W : b.rows - v * W);
    };
    if (b.c > 0 || b.finish.add)
        each_vector([&](const float* from, float* sum, Index, Index n) { store(sum, load_upto(from, n)); });
    else
        each_vector([&](const float*, float* sum, Index, Index) { store(sum, set1(0.0f)); });
    if (b.c == 0 && b.finish.bias)
        each_vector([&](const float*, float* sum, Index i, Index n) {
            store(sum, add(load(sum), load_upto(b.finish.bias + i, n)));
        });
    const float* scales = b.a.scales + t * b.a.groups + b.c / group_depth;
    for (Index g = 0; g < code_groups(b.n); g++) {
        const Index from = g * group_depth, steps = padded(smaller(group_depth, b.n - from), step) / step;
        const Code* codes = static_cast<const Code*>(b.a.codes) + t * b.a.stride + b.c + from;
        products(w.codes + from * tile, codes, b.a.stride, steps, [&](int r, int v, V x) {
            const V scale = mul(load(w.scales[g] + v * W), set1(scales[r * b.a.groups + g]));
            store(sums[r] + v * W, fma(x, scale, load(sums[r] + v * W)));
        });
    }
    if (b.last && b.finish.gelu)
        each_vector([&](float* to, const float* sum, Index, Index n) { store_upto(to, gelu_tanh(load(sum)), n); });
    else
        each_vector([&](float* to, const float* sum, Index, Index n) { store_upto(to, load(sum), n); });
}

void multiply(const Matrix& w, Index row0, Index row1, const Codes& a, Index t0, Index t1, const Finish& finish,
              float* y, Index stride) {
    Tile made;
    for (Index row = row0; row < row1; row += tile)
        for (Index c = 0; c < w.in; c += tile_depth) {
            const Index n = smaller(tile_depth, w.in - c);
            unpack_any(w, row, row1, c, n, made);
            MultiplyBlock b{a, c, n, block_rows, smaller(tile, row1 - row), c + n == w.in, finish, stride};
            if (b.finish.bias) b.finish.bias += row;
            for (Index t = t0; t < t1; t += block_rows) {
                b.count = smaller(block_rows, t1 - t);
                float* to = y + t * stride + row;
                b.count == block_rows && b.rows == tile ? multiply_block<true>(made, b, t, to)
                                                        : multiply_block<false>(made, b, t, to);
            }
        }
}

}  // namespace
}  // namespace edgeq
