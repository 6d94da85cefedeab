// What the matrix kernels work on, and the table that every instruction set fills in (kernels/isa/).
//
// Arithmetic, the same for every set: an activation row is quantized to int8, symmetrically, one scale for every group
// of the weight's group size; with weight = s * code + b and activation = a * q,
//
//     y = sum over groups of  (s a) * sum(code q)  +  b * (a sum(q))
//
// s and b are float32, widened or multiplied out of what the matrix holds (exactly) when they are needed.
//
// The sums over a group are exact integers (int32) and therefore equal on every set. The float sum over groups runs in
// an order of the set's own; test.cpp bounds the difference. No contraction (-ffp-contract=off): a set uses a fused
// multiply-add where it says so, not where the compiler feels like it.
//
// Included by files that are compiled for different instruction sets: nothing here may be an inline function with
// external linkage, or the linker could keep the copy that this machine cannot run.
#pragma once

#include <stdint.h>

#define EDGEQ_INLINE inline __attribute__((always_inline))

namespace edgeq {

// Of numbers in memory. u4 and u4_high: the lower and the upper half of a byte; e8m0 and e4m3: 2^(byte - 127), and
// 8-bit floating point (edgeq/formats/codebooks.py).
enum class Type : int { f32, f16, bf16, i8, u4, u4_high, e8m0, e4m3 };

// What codes are: numbers, places in a table of integers, or (fp8) E4M3 floating point.
enum class Mode : int { affine, iq4, fp4, fp8 };

// A matrix [out, in], rows contiguous. bits = 0: values of `type`. Otherwise group-quantized in the MLX affine
// layout: rows of `bits`-bit codes, one stream, lowest bit first; scales and biases [out, in / group] of `type`.
// in is a multiple of group (32, 64 or 128, and 16 with 2, 3 or 6 bits and with fp4).
//
// What other formats have beyond that (edgeq/formats/qmatrix.py): without biases, bias = -zero * scale. If `type` is
// i8 or u4, scales and biases are in units of their block's: float16 [out, groups >> block_shift], a block being 4, 8
// or 16 groups. u4 is for both: scales and biases are the same bytes, and biases, their upper halves, are subtracted.
//
// iq4 and fp4 have 4-bit codes that are places in table_codes<mode>, where the codes proper are, zero that far above
// what they stand for (those of fp4 twice as large), and groups of 32, or (fp4) 16 or 32. fp8 has groups of 32, and is
// multiplied in floating point. Scales are of type e8m0 or e4m3 with fp4, of e8m0 with fp8.
struct Matrix {
    const void* data;
    const void* scales;
    const void* biases;
    int64_t out, in;
    int bits, group;
    Type type;
    const uint16_t* block_scales = nullptr;
    const uint16_t* block_biases = nullptr;
    int block_shift = 0;
    int zero = 0;
    Mode mode = Mode::affine;
};

// ggml's table of non-linear 4-bit codes, plus 128; and the E2M1 numbers, twice, plus 12.
constexpr uint8_t iq4_codes[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
constexpr uint8_t fp4_codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

template <Mode mode>
constexpr const uint8_t* table_codes = mode == Mode::iq4 ? iq4_codes : fp4_codes;

// What is above the codes proper of a mode's table: a matrix of it has this zero.
constexpr int table_zero(Mode mode) { return mode == Mode::iq4 ? 128 : mode == Mode::fp4 ? 12 : 0; }

// Whether its codes meet the activations' codes; else its values meet their values.
constexpr bool multiplies_codes(const Matrix& w) { return w.bits && w.mode != Mode::fp8; }

// The order of an activation's codes in memory, so that those of a byte's neighbouring weights lie where shifting the
// byte brings them. Natural; or for 4-bit weights, in every block of 128, the 64 even ones, then the 64 odd ones; or
// for 2-bit weights, in every block of 256, those that are 0 modulo 4, then those that are 1 ...
enum class Order : int { natural, even_odd, quarters };

constexpr int even_odd_block = 128, quarters_block = 256;

// The order that gemv takes.
constexpr Order gemv_order(const Matrix& w) {
    return w.bits == 4 ? Order::even_odd : w.bits == 2 ? Order::quarters : Order::natural;
}

// An input of `tokens` rows. `values` for matrices that are multiplied in floating point; the rest, quantized for one
// group size, for the others. Rows of codes are padded with zeros to whole blocks (128, or 256 in quarters), rows
// of scales and sums to whole sixteens.
struct Activations {
    const float* values;    // [tokens, in]
    const int8_t* codes;    // [tokens, stride]
    const float* scales;    // [tokens, groups]: a
    const float* sums;      // [tokens, groups]: a * sum(q)
    const int32_t* totals;  // [tokens, groups]: sum(q)
    int64_t tokens, in, stride, groups;
};

struct LinearKernels {
    // Quantize a row of n values; codes, scales, sums and totals are already zero beyond the row.
    void (*quantize)(const float* x, int64_t n, int group, Order order, int8_t* codes, float* scales, float* sums,
                     int32_t* totals);
    // y[t * stride + row] for rows [row0, row1) and tokens [t0, t1). For few tokens and few rows: reads the rows once
    // for every gemv_tokens tokens. Activations are in gemv_order.
    void (*gemv)(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, int64_t t0, int64_t t1, float* y,
                 int64_t stride);
    // The same for many tokens; natural activations.
    void (*gemm)(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, int64_t t0, int64_t t1, float* y,
                 int64_t stride);
    int gemm_rows;  // gemm works on tiles of so many rows
};

extern const LinearKernels linear_scalar, linear_avx2, linear_avxvnni, linear_avx512vnni, linear_neon,
    linear_neon_dotprod, linear_neon_i8mm;

}  // namespace edgeq
