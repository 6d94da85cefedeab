// Group-wise affine quantization with the scale/bias search of edgeq.quant.search.
#pragma once

#include <cstdint>

namespace edgeq {

// How scales and biases are stored; the search works with values rounded to it.
enum class Stored { bfloat16, float16, float32 };

struct QuantizeShape {
    int64_t rows;
    int64_t columns;  // a multiple of group_size
    int bits;         // 2, 3, 4, 5, 6, 8
    int group_size;   // 32, 64, 128
    Stored stored;
};

// x [rows, columns], finite -> words uint32 [rows, columns * bits / 32], scales and biases float32
// [rows, columns / group_size] with values that `stored` represents exactly, and the sum of squared errors of every
// group. Runs on the calling thread: edgeq.quant hands blocks of rows to a pool of its own.
void quantize(const QuantizeShape& shape, const float* x, uint32_t* words, float* scales, float* biases, float* errors);

}  // namespace edgeq
