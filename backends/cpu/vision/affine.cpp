// Products with the tower's matrices.
#include <algorithm>

#include "kernels/linear.h"
#include "kernels/threads.h"
#include "layers/rows.h"
#include "vision/vision.h"

namespace edgeq {
namespace {

constexpr Index least_rows = 8 * block_rows;  // of a piece
constexpr Index slab = 1024;                  // rows of a matrix that are encoded at a time where each is used once

Index tiles_of(Index out) { return (out + vision_kernels().tile - 1) / vision_kernels().tile; }

// Rows of a piece: fewer where there are so few pieces that the threads would not end together.
Index piece_rows(Index T, Index tiles) {
    Index rows = std::min(padded(T, block_rows), vision_band);
    while (rows >= 2 * least_rows && tiles * ((T + rows - 1) / rows) < 8 * thread_count())
        rows = padded((rows + 1) / 2, block_rows);
    return rows;
}

}  // namespace

Affine rows_of(const Affine& w, Index row, Index count) {
    Affine some = w;
    Matrix& m = some.weight;
    auto moved = [](const void* p, Index nbytes) { return p ? static_cast<const char*>(p) + nbytes : nullptr; };
    m.out = count;
    m.data = moved(m.data, row * Index(row_nbytes(m)));
    if (m.bits) {
        const Index groups = m.in / m.group, size = type_size(m.type), blocks = groups >> m.block_shift;
        m.scales = moved(m.scales, row * groups * size), m.biases = moved(m.biases, row * groups * size);
        if (m.block_scales) m.block_scales += row * blocks;
        if (m.block_biases) m.block_biases += row * blocks;
    }
    some.bias += row;
    return some;
}

void Projection::prepare(const Affine& w) {
    w_ = w;
    if (w.weight.bits) return;
    const VisionKernels& kernels = vision_kernels();
    const Index rows = padded(w.weight.out, kernels.tile);
    make_room(codes_, rows * code_stride(w.weight.in) * kernels.code_nbytes);
    make_room(scales_, rows * code_groups(w.weight.in));
    parallel_for(tiles_of(w.weight.out), [&](int i) { kernels.encode_tile(w_.weight, i * kernels.tile, tile(i)); });
}

Tile Projection::tile(Index i) const {
    const VisionKernels& kernels = vision_kernels();
    const Index in = w_.weight.in, row = i * kernels.tile;
    return {const_cast<char*>(codes_.data()) + row * code_stride(in) * kernels.code_nbytes,
            const_cast<float*>(scales_.data()) + row * code_groups(in),
            std::min<Index>(kernels.tile, w_.weight.out - row), in};
}

void Projection::multiply(const float* x, Index T, Finish finish, float* y, Index stride, Memory& memory) const {
    finish.bias = w_.bias;
    w_.weight.bits ? multiply_quantized(x, T, finish, y, stride, memory)
                   : multiply_plain(x, T, finish, y, stride, memory);
}

void Projection::multiply_plain(const float* x, Index T, const Finish& finish, float* y, Index stride,
                                Memory& memory) const {
    const VisionKernels& kernels = vision_kernels();
    const Index in = w_.weight.in, rows = padded(T, block_rows);
    Codes codes{nullptr, nullptr, code_stride(in), code_groups(in)};
    make_room(memory.codes, rows * codes.stride * kernels.code_nbytes);
    make_room(memory.scales, rows * codes.groups);
    codes.codes = memory.codes.data(), codes.scales = memory.scales.data();
    each_row(T, in, [&](Index t) { kernels.encode(x + t * in, in, 1.0f, row_length, codes, t); });
    const Index tiles = tiles_of(w_.weight.out), some = piece_rows(T, tiles), row_pieces = (T + some - 1) / some;
    parallel_for(tiles * row_pieces, [&](int piece) {
        const Index i = piece % tiles, t = piece / tiles * some, row = i * kernels.tile;
        Finish here = finish;
        here.bias += row;
        kernels.multiply(tile(i), codes, t, std::min(T, t + some), here, y + row, stride);
    });
}

// Integer products of 8 bits.
void Projection::multiply_quantized(const float* x, Index T, const Finish& finish, float* y, Index stride,
                                    Memory& memory) const {
    const LayerKernels& kernels = layer_kernels();
    const Index out = w_.weight.out;
    const bool apart = finish.add || stride != out;
    if (apart) make_room(memory.product, T * out);
    float* product = apart ? memory.product.data() : y;
    linears(x, T, &w_.weight, 1, &product);
    each_row(T, out, [&](Index t) {
        float *row = product + t * out, *to = y + t * stride;
        kernels.add(row, row, finish.bias, out);
        if (finish.gelu) vision_kernels().gelu(row, row, out, false);
        if (finish.add) kernels.add(to, to, row, out);
        if (apart && !finish.add) std::copy(row, row + out, to);
    });
}

void affine(const float* x, Index T, const Affine& w, float* y) {
    Projection projection;
    Projection::Memory memory;
    const Index out = w.weight.out, some = w.weight.bits ? out : slab;
    for (Index row = 0; row < out; row += some) {
        projection.prepare(rows_of(w, row, std::min(some, out - row)));
        projection.multiply(x, T, {}, y + row, out, memory);
    }
}

}  // namespace edgeq
