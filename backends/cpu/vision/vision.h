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

// Rows as codes; the memory is kept from product to product.
struct CodeMemory {
    ScratchVector<char> codes;
    Floats scales, product;
};

// y [T, out] from x [T, in]; what `finish` says comes after the bias. y may not be x.
void affine(const float* x, Index T, const Affine& w, Finish finish, float* y, CodeMemory& memory);

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
// Besides x it holds the keys and values of all tokens, packed, and a band of at most vision_band tokens between two
// projections.
bool run_vision(const VisionTower& tower, float* x, const std::function<bool()>& go_on);

constexpr Index vision_band = 6 * key_block;  // a multiple of block_rows, too


}  // namespace edgeq
