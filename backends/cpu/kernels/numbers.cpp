#include "kernels/numbers.h"

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

float number_at(const Matrix& w, const void* p, const uint16_t* blocks, int64_t group) {
    return value_at(p, w.type, group) * (blocks ? half_to_float(blocks[group >> w.block_shift]) : 1);
}

}  // namespace

float value_at(const void* p, Type type, int64_t i) {
    if (type == Type::f32) return static_cast<const float*>(p)[i];
    if (type == Type::i8) return static_cast<const int8_t*>(p)[i];
    uint16_t half = static_cast<const uint16_t*>(p)[i];
    if (type == Type::f16) return half_to_float(half);
    uint32_t bits = uint32_t(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

int code_at(const Matrix& w, const uint8_t* row, int64_t c) {
    int64_t bit = c * w.bits;
    int code = row[bit / 8] >> bit % 8;
    if (bit % 8 + w.bits > 8) code |= row[bit / 8 + 1] << (8 - bit % 8);
    code &= (1 << w.bits) - 1;
    return w.iq4 ? iq4_codes[code] : code;
}

float scale_at(const Matrix& w, int64_t group) { return number_at(w, w.scales, w.block_scales, group); }

float bias_at(const Matrix& w, int64_t group) {
    return w.biases ? number_at(w, w.biases, w.block_biases, group) : scale_at(w, group) * float(-w.zero);
}

}  // namespace edgeq
