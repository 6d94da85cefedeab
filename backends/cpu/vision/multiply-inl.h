// Products with a matrix: its tiles are encoded once, and meet blocks of rows.
#pragma once

#include "vision/codes-inl.h"

namespace edgeq {
namespace {

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

template <Type type>
void encode_tile_as(const Matrix& w, Index row, const Tile& to) {
    alignas(64) Code rows[W * group_depth];
    const Index width = code_stride(w.in);
    for (int v = 0; v < vectors; v++)
        for (Index c = 0; c < width; c += group_depth) {
            const Index n = smaller(group_depth, w.in - c), some = smaller(group_depth, width - c);
            for (int r = 0; r < W; r++) {
                const Index i = v * W + r;
                Code* codes = rows + r * some;
                to.scales[c / group_depth * tile + i] =
                    i < to.rows ? encode_weights<type>(w.data, (row + i) * w.in + c, n, codes) : 0.0f;
                clear(codes, i < to.rows ? padded(n, W) : 0, some);
            }
            to_tile(rows, some, some / step, static_cast<Code*>(to.codes) + c * tile + v * W * step);
        }
}

void encode_tile(const Matrix& w, Index row, const Tile& to) {
    if (w.type == Type::bf16) return encode_tile_as<Type::bf16>(w, row, to);
    if (w.type == Type::f16) return encode_tile_as<Type::f16>(w, row, to);
    encode_tile_as<Type::f32>(w, row, to);
}

// A tile and rows [t, t + count) of codes. The sums begin with what `finish` adds, and wait in the cache while a group
// is summed up in registers.
template <bool whole>  // count == block_rows, w.rows == tile
INLINE void multiply_block(const Tile& w, const Codes& a, Index t, Index count, const Finish& finish, float* y,
                           Index stride) {
    alignas(64) float sums[block_rows][tile];
    auto each_vector = [&](auto&& function) {
        for (int r = 0; r < block_rows; r++)
            for (int v = 0; v < vectors; v++)
                if (whole || (r < count && v * W < w.rows))
                    function(y + r * stride + v * W, sums[r] + v * W, v * W, whole ? W : w.rows - v * W);
    };
    each_vector([&](const float* from, float* sum, Index i, Index n) {
        const V start = finish.bias ? load_upto(finish.bias + i, n) : set1(0.0f);
        store(sum, finish.add ? add(start, load_upto(from, n)) : start);
    });
    for (Index g = 0; g < a.groups; g++) {
        const Index c = g * group_depth, steps = padded(smaller(group_depth, w.in - c), step) / step;
        const float *row_scales = a.scales + t * a.groups + g, *weight_scales = w.scales + g * tile;
        products(static_cast<const Code*>(w.codes) + c * tile, static_cast<const Code*>(a.codes) + t * a.stride + c,
                 a.stride, steps, [&](int r, int v, V x) {
                     const V scale = mul(load(weight_scales + v * W), set1(row_scales[r * a.groups]));
                     store(sums[r] + v * W, fma(x, scale, load(sums[r] + v * W)));
                 });
    }
    each_vector([&](float* to, const float* sum, Index, Index n) {
        store_upto(to, finish.gelu ? gelu_tanh(load(sum)) : load(sum), n);
    });
}

void multiply(const Tile& w, const Codes& a, Index t0, Index t1, const Finish& finish, float* y, Index stride) {
    for (Index t = t0; t < t1; t += block_rows) {
        const Index count = smaller(block_rows, t1 - t);
        count == block_rows&& w.rows == tile ? multiply_block<true>(w, a, t, count, finish, y + t * stride, stride)
                                             : multiply_block<false>(w, a, t, count, finish, y + t * stride, stride);
    }
}

}  // namespace
}  // namespace edgeq
