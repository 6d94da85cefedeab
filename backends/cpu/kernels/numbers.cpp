#include "kernels/numbers.h"

#include <math.h>
#include <string.h>

namespace edgeq {
namespace {

float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h >> 15) << 31, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 0) {  // zero and subnormals: fraction * 2^-24
        float value = float(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    uint32_t bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

float e4m3_to_float(uint8_t e) {
    const int exponent = e >> 3 & 15, fraction = e & 7;
    const float magnitude = (e & 127) == 127 ? NAN
                            : exponent       ? ldexpf(8 + fraction, exponent - 10)
                                             : fraction * 0x1p-9f;
    return e & 128 ? -magnitude : magnitude;
}

float number_at(const Matrix& w, Type type, const void* p, const uint16_t* blocks, int64_t group) {
    return value_at(p, type, group) * (blocks ? half_to_float(blocks[group >> w.block_shift]) : 1);
}

}  // namespace

float value_at(const void* p, Type type, int64_t i) {
    if (type == Type::f32) return static_cast<const float*>(p)[i];
    if (type == Type::i8) return static_cast<const int8_t*>(p)[i];
    if (type == Type::f16) return half_to_float(static_cast<const uint16_t*>(p)[i]);
    if (type == Type::bf16) return from_bits(uint32_t(static_cast<const uint16_t*>(p)[i]) << 16);
    const uint8_t byte = static_cast<const uint8_t*>(p)[i];
    if (type == Type::e8m0) return from_bits(byte ? uint32_t(byte) << 23 : 1u << 22);
    if (type == Type::e4m3) return e4m3_to_float(byte);
    return type == Type::u4 ? byte & 15 : byte >> 4;
}

int code_at(const Matrix& w, const uint8_t* row, int64_t c) {
    int64_t bit = c * w.bits;
    int code = row[bit / 8] >> bit % 8;
    if (bit % 8 + w.bits > 8) code |= row[bit / 8 + 1] << (8 - bit % 8);
    code &= (1 << w.bits) - 1;
    if (w.mode == Mode::iq4) return iq4_codes[code];
    return w.mode == Mode::fp4 ? fp4_codes[code] : code;
}

float scale_at(const Matrix& w, int64_t group) {
    const float scale = number_at(w, w.type, w.scales, w.block_scales, group);
    return w.mode == Mode::fp4 ? 0.5f * scale : scale;
}

float bias_at(const Matrix& w, int64_t group) {
    if (!w.biases) return scale_at(w, group) * float(-w.zero);
    if (w.type == Type::u4) return -number_at(w, Type::u4_high, w.biases, w.block_biases, group);
    return number_at(w, w.type, w.biases, w.block_biases, group);
}

void dequantize_group(const Matrix& w, const uint8_t* row, int64_t g, int64_t at, float* y) {
    const float scale = scale_at(w, at), bias = w.mode == Mode::affine ? bias_at(w, at) : 0;
    for (int64_t i = 0, c = g * w.group; i < w.group; i++, c++) {
        if (w.mode == Mode::fp8)
            y[i] = scale * e4m3_to_float(row[c]);
        else if (w.mode == Mode::affine)
            y[i] = scale * float(code_at(w, row, c)) + bias;
        else
            y[i] = scale * float(code_at(w, row, c) - w.zero);
    }
}

}  // namespace edgeq
