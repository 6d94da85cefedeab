// Products with matrices, quantized or not: what the rest of the backend calls.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"

namespace edgeq {

// A call of up to so many tokens takes them one as the other: nothing about a token's result depends on how many there
// are, so that a token which is verified with others gives the bits that it gives alone. More go through other kernels,
// whose sums have another order (among themselves the tokens of such a call are equal, too).
constexpr int64_t few_tokens = 16;

size_t type_size(Type type);

// Bytes of a row of codes or values.
size_t row_nbytes(const Matrix& w);

// ys[i] [tokens, ws[i].out] = x [tokens, in] @ ws[i]^T; all matrices have x's width. One quantization of x and one
// call of the thread pool for all of them.
void linears(const float* x, int64_t tokens, const Matrix* ws, int count, float* const* ys);

// y [tokens, w.out] = x [tokens, in] @ w^T; whether all of it is finite.
bool read_out(const float* x, int64_t tokens, const Matrix& w, float* y);

// y [count, in]: rows `ids` of the matrix as float32 (see dequantize_group). Every id is below table.out.
void embed(const Matrix& table, const int32_t* ids, int64_t count, float* y);

// Frees the calling thread's scratch memory.
void release_linear_scratch();

// The active instruction set's table.
const LinearKernels& linear_kernels();

}  // namespace edgeq
