// One number of a matrix at a time: what the reference kernels and the embedding read.
#pragma once

#include "kernels/kernels.h"

namespace edgeq {

float value_at(const void* p, Type type, int64_t i);

// Code c of a row of codes: `bits` bits from bit c * bits on, looked up where the mode has a table.
int code_at(const Matrix& w, const uint8_t* row, int64_t c);

// The scale and the bias of a group, counted through all rows.
float scale_at(const Matrix& w, int64_t group);
float bias_at(const Matrix& w, int64_t group);

// y [group]: the weights of group g of a row whose codes are `row`, group `at` of all: scale * code + bias in float32,
// rounded twice, as edgeq.formats.affine.dequantize computes it.
void dequantize_group(const Matrix& w, const uint8_t* row, int64_t g, int64_t at, float* y);

}  // namespace edgeq
