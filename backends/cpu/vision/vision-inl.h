// The kernels of vision/kernels.h, over the vectors of layers/isa/ and what the file that includes this one adds:
//
//     Code, step                a code, and how many of a row meet at a time
//     I, vectors                a vector of W sums; a tile of the right operand has vectors * W rows
//     i_zero, i_add, i_float
//     load_codes, spread_codes  `step` codes for each of W sums; the same `step` codes for all of them
//     dot_codes(sum, x, y)      sum + the products of x and y
//     store_codes(p, x)         W codes, rounded to nearest even; returns them as I
//     store_steps(p, x)         the entries of x[0], ..., x[step - 1] in turn, rounded likewise
//     transpose_steps(from, stride, to, to_stride)  W rows of W steps each, `stride` codes apart, transposed
//     fraction(x), scale2(y, x)  x - floor(x); y * 2^floor(x) for x <= 0, where nothing is left below 2^-126
//
// and VISION, the name of the table. What the files below define has internal linkage.
#pragma once

#include "vision/rows-inl.h"

#include "vision/codes-inl.h"

#include "vision/multiply-inl.h"

#include "vision/attend-inl.h"

namespace edgeq {

extern const VisionKernels VISION;
const VisionKernels VISION = {sizeof(Code), step,     tile,      layer_norm,  gelu,  encode,
                              encode_tile,  multiply, pack_keys, pack_values, attend};

}  // namespace edgeq
