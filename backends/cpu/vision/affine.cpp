// Products with the tower's matrices.
#include <algorithm>

#include "kernels/linear.h"
#include "kernels/threads.h"
#include "layers/rows.h"
#include "vision/vision.h"

namespace edgeq {
namespace {

constexpr Index least_rows = 16 * block_rows;  // of a piece: fewer do not pay for encoding its weights

// Rows of a piece: fewer where there are so few pieces that the threads would not end together.
Index piece_rows(Index T, Index tiles) {
    Index rows = padded(T, block_rows);
    while (rows >= 2 * least_rows && tiles * ((T + rows - 1) / rows) < 8 * thread_count())
        rows = padded((rows + 1) / 2, block_rows);
    return std::min(rows, vision_band);
}

// A matrix of 16 or 32 bits.
void multiply_plain(const float* x, Index T, const Affine& w, const Finish& finish, float* y, CodeMemory& memory) {
    const VisionKernels& kernels = vision_kernels();
    const Index in = w.weight.in, out = w.weight.out, rows = padded(T, block_rows);
    Codes codes{nullptr, nullptr, code_stride(in), code_groups(in)};
    make_room(memory.codes, rows * codes.stride * kernels.code_nbytes);
    make_room(memory.scales, rows * codes.groups);
    codes.codes = memory.codes.data(), codes.scales = memory.scales.data();
    each_row(T, in, [&](Index t) { kernels.encode(x + t * in, in, 1.0f, row_length, codes, t); });
    const Index tiles = (out + kernels.tile - 1) / kernels.tile, some = piece_rows(T, tiles);
    const Index row_pieces = (T + some - 1) / some;
    parallel_for(tiles * row_pieces, [&](int piece) {
        const Index row = piece % tiles * kernels.tile, t = piece / tiles * some;
        kernels.multiply(w.weight, row, std::min<Index>(out, row + kernels.tile), codes, t, std::min(T, t + some),
                         finish, y, out);
    });
}

// A quantized one: integer products of 8 bits.
void multiply_quantized(const float* x, Index T, const Affine& w, const Finish& finish, float* y, CodeMemory& memory) {
    const LayerKernels& kernels = layer_kernels();
    const Index out = w.weight.out;
    if (finish.add) make_room(memory.product, T * out);
    float* product = finish.add ? memory.product.data() : y;
    linears(x, T, &w.weight, 1, &product);
    each_row(T, out, [&](Index t) {
        float* row = product + t * out;
        if (finish.bias) kernels.add(row, row, finish.bias, out);
        if (finish.gelu) vision_kernels().gelu(row, row, out, false);
        if (finish.add) kernels.add(y + t * out, y + t * out, row, out);
    });
}

}  // namespace

void affine(const float* x, Index T, const Affine& w, Finish finish, float* y, CodeMemory& memory) {
    finish.bias = w.bias;
    (w.weight.bits ? multiply_quantized : multiply_plain)(x, T, w, finish, y, memory);
}

}  // namespace edgeq
