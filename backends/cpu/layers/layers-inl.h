// The kernels of layers.h, over the vector operations of the file that includes this one:
//
//     V, W                      a vector of floats and how many it has
//     load, store, load_n, store_n (n <= W entries, the others zero / untouched), set1
//     stream, stream_end        an aligned store past the caches, where there is one; before others may read those
//     held                      the same, in a register: the compiler likes to load again what several sums need
//     add, sub, mul, div, fma (x * y + z), max_of
//     sum, peak_of              across the vector
//     sum4(a, b, c, d, out)     four sums at once
//     round_, pow2              to the nearest integer; 2^x of an integer, |x| <= 127
//     load4                     4 W entries as 4 vectors, entry i going to vector i % 4
//     load_f16, load_bf16, load_i8  W entries of 16 or 8 bits, widened
//     load_i4(p, low, high)     W bytes as two vectors: the lower and the upper four bits of each, minus 8
//     store_f16                 rounded to nearest even
//
// and LAYERS, the name of the table. What the files below define has internal linkage.
#pragma once

#include "layers/attention-inl.h"
#include "layers/convolution-inl.h"
#include "layers/delta-inl.h"
#include "layers/rows-inl.h"

namespace edgeq {

extern const LayerKernels LAYERS;
const LayerKernels LAYERS = {add_rows,  silu_mul, sigmoid_mul, rms_norm, l2_norm, dot,    rope,
                             conv_silu, delta,    delta_steps, attend,   merge,   rotate, to_f16};

}  // namespace edgeq
