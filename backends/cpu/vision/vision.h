// The vision tower between its patches and its merger, and the operations that it is made of: on all threads.
#pragma once

#include <functional>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/scratch.h"
#include "layers/layers.h"
#include "vision/kernels.h"

namespace edgeq {

// The active instruction set's table.
const VisionKernels& vision_kernels();

// y = x @ weight^T + bias
struct Affine {
    Matrix weight;
    const float* bias;
};

// Rows [row, row + count) of it.
Affine rows_of(const Affine& w, Index row, Index count);

// One made ready for many products: a matrix of 16 or 32 bits is encoded, a quantized one is used as it is.
class Projection {
public:
    // Memory is kept from matrix to matrix.
    void prepare(const Affine& w);

    // y [T, stride] from x [T, in]; what `finish` says comes after the bias. y may not be x. The calling thread's rows
    // of codes are in `memory`, which is kept from product to product.
    struct Memory {
        ScratchVector<char> codes;
        Floats scales, product;
    };
    void multiply(const float* x, Index T, Finish finish, float* y, Index stride, Memory& memory) const;

private:
    Affine w_{};
    ScratchVector<char> codes_;
    Floats scales_;

    Tile tile(Index i) const;
    void multiply_plain(const float* x, Index T, const Finish& finish, float* y, Index stride, Memory& memory) const;
    void multiply_quantized(const float* x, Index T, const Finish& finish, float* y, Index stride,
                            Memory& memory) const;
};

// y [T, out] = x [T, in] @ weight^T + bias
void affine(const float* x, Index T, const Affine& w, float* y);

// Every token attends to all tokens of its span, scale D^-0.5: q, k, v [T, H, D] -> out [T, H, D].
void full_attention(const Heads& q, const Heads& k, const Heads& v, Index H, Index D, const std::vector<Index>& spans,
                    float* out);

struct VisionBlock {
    const float *norm1, *bias1, *norm2, *bias2;  // gains and biases [hidden]
    Affine qkv, proj, fc1, fc2;                  // rows of qkv are [queries | keys | values]
};

struct VisionTower {
    std::vector<VisionBlock> blocks;
    Index hidden, heads;
    float eps;
    const float *cos, *sin;  // [T, pairs]
    Index pairs;
    std::vector<Index> spans;  // tokens of each frame
};

// x [T, hidden] through the blocks, in place: x += proj(attention(norm1(x))), x += fc2(gelu(fc1(norm2(x)))). Every
// now and then `go_on` may stop it; then the result is false and x worth nothing.
//
// Besides x it holds the keys and values of all tokens, packed; a block's weights, encoded; and a band of at most
// vision_band tokens between two projections.
bool run_vision(const VisionTower& tower, float* x, const std::function<bool()>& go_on);

// Bytes of that, for T tokens of one span and a feed-forward `wide` wide.
size_t vision_nbytes(Index T, Index hidden, Index heads, Index wide);

constexpr Index vision_band = 6 * key_block;  // a multiple of block_rows, too

}  // namespace edgeq
