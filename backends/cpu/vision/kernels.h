// Products of many rows by many on integers of 16 bits, and the attention of the vision tower that is built from them.
//
// An operand is a matrix of codes, int16, with a scale for every `group_depth` of them in a row. A group's scale
// follows from its length as a vector: the sum of products of two groups is at most the product of their lengths
// (Cauchy and Schwarz), and so is every part of it; with lengths whose product is below 2^31 the sum is an exact int32,
// whatever order and instruction it comes from. Machines add two such products to every int32 at a time, where they
// multiply and add one float: twice the speed of float32, at an error (NMSE of an operand) of group_depth / 12
// length^2, 2.5e-9 to 1e-8 whatever the numbers are like, against 1.3e-6 of bfloat16 and 8e-8 of float16. Weights of 16
// bits lose still less, because their scales are powers of two.
//
// Where the machine multiplies such integers no faster than floats (Arm), a code is a float, and every scale is 1.
//
// The sums over groups run in float32, in order of the groups, for every row by itself. So a result depends neither on
// the rows beside it nor on the number of threads; and with -ffp-contract=off all sets but scalar, which has no fused
// multiply-add, and Arm's give the same bits.
//
// Included by files that are compiled for different instruction sets, as kernels/kernels.h.
#pragma once

#include "kernels/kernels.h"
#include "layers/layers.h"

namespace edgeq {

constexpr int group_depth = 128;
constexpr int block_rows = 6;      // rows of the left operand at a time: they are padded to a multiple
constexpr int key_block = 128;     // keys whose weights and values share scales
constexpr int piece_queries = 24;  // queries of a call of attend; a multiple of block_rows

// Rows of codes, [rows, stride], and their scales, [rows, groups]. `stride` has room for whole vectors.
struct Codes {
    void* codes;
    float* scales;
    Index stride, groups;
};

// What becomes of a product before it is stored: y = [y +] product + bias, and then GELU (tanh form).
struct Finish {
    const float* bias;  // [out], or null
    bool add, gelu;
};

// Some rows of a matrix, at most `tile` of them, as codes [step of the width][row][codes of a step] and scales
// [group][row]; up to the tile's end they are zero.
struct Tile {
    void* codes;
    float* scales;
    Index rows, in;
};

// Keys and values of one head and one span, in blocks of key_block keys; the last one is filled up with zeros.
// Codes of keys lie as [block][tile of keys][step of the width][key][codes of a step], of values as [block][tile of the
// width][step of keys][entry][codes of a step], so that a whole vector of keys or entries meets the same codes of a
// row. Sizes are in codes or floats, for one block.
struct PackedHead {
    void *keys, *values;
    float *key_scales, *value_scales;  // [block, groups of the width, key_block], [block, width rounded up to tiles]
    Index keys_size, values_size, key_scales_size, value_scales_size;
};

// Up to piece_queries queries of one head, over all keys of their span.
struct FullAttend {
    Index rows, keys, D;
    Codes q;  // scaled by D^-0.5 log2(e): weights are powers of two
    PackedHead head;
    float* out;  // rows [D], out_stride apart
    Index out_stride;
    float* work;  // attend_work(...) floats
};

struct VisionKernels {
    int code_nbytes, step, tile;  // of a code; codes of a row that meet at a time; rows of the right operand at a time
    // y = (x - mean) / sqrt(variance + eps) * gain + bias
    void (*layer_norm)(float* y, const float* x, const float* gain, const float* bias, Index n, float eps);
    // y = x / 2 (1 + erf(x / sqrt(2))) where exact, else x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    void (*gelu)(float* y, const float* x, Index n, bool exact);
    // A row of n numbers times `factor` -> codes, with zeros up to the stride, in groups of the given length, and
    // scales. Where one of a group's numbers is none, its scale is none, too.
    void (*encode)(const float* x, Index n, float factor, float length, const Codes& to, Index row);
    // Rows of a plain matrix from `row` on.
    void (*encode_tile)(const Matrix& w, Index row, const Tile& to);
    // y[t * stride + row] for the tile's rows and rows [t0, t1) of codes; the bias is the tile's.
    void (*multiply)(const Tile& w, const Codes& a, Index t0, Index t1, const Finish& finish, float* y, Index stride);
    // The keys of one block, rows of D numbers, and likewise its values.
    void (*pack_keys)(const float* k, Index stride, Index keys, Index D, const PackedHead& head, Index block);
    void (*pack_values)(const float* v, Index stride, Index keys, Index D, const PackedHead& head, Index block);
    // out = softmax(q . keys) @ values
    void (*attend)(const FullAttend& a);
};

extern const VisionKernels vision_scalar, vision_avx2, vision_avxvnni, vision_avx512vnni, vision_neon;

// Lengths of groups of codes. Rounding makes a group longer by at most sqrt(group_depth) / 2 = 5.7.
constexpr float row_length = 65500, weight_length = 32768;   // what meets in a product with a matrix
constexpr float key_length = 46300;                          // of queries, too
constexpr float value_length = 65500, share_length = 32760;  // values, and the weights of their keys
constexpr float largest_code = 32767;

static inline Index padded(Index n, Index multiple) { return (n + multiple - 1) / multiple * multiple; }

static inline Index code_groups(Index n) { return (n + group_depth - 1) / group_depth; }

// Codes of a row, padded to the longest vectors.
static inline Index code_stride(Index n) { return padded(n, 32); }

// Floats that attend works in: sums of values, and for every row its peak and total.
static inline Index attend_work(Index D, Index tile) { return piece_queries * (padded(D, tile) + 2); }

}  // namespace edgeq
