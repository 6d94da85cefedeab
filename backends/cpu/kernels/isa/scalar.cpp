// The reference: plain loops, to be checked against quant/affine.py by reading.
#include <math.h>
#include <string.h>

#include "kernels/kernels.h"

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

float value_at(const void* p, Type type, int64_t i) {
    if (type == Type::f32) return static_cast<const float*>(p)[i];
    uint16_t half = static_cast<const uint16_t*>(p)[i];
    if (type == Type::f16) return half_to_float(half);
    uint32_t bits = uint32_t(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Code c of a row: `bits` bits from bit c * bits on.
int code_at(const uint8_t* row, int bits, int64_t c) {
    int64_t bit = c * bits;
    int code = row[bit / 8] >> bit % 8;
    if (bit % 8 + bits > 8) code |= row[bit / 8 + 1] << (8 - bit % 8);
    return code & ((1 << bits) - 1);
}

int64_t place(int64_t c, Order order) {
    if (order == Order::natural) return c;
    return c / order_block * order_block + c % 2 * (order_block / 2) + c % order_block / 2;
}

void quantize(const float* x, int64_t n, int group, Order order, int8_t* codes, float* scales, float* sums,
              int32_t* totals) {
    for (int64_t g = 0; g < n / group; g++) {
        float amax = 0;
        for (int i = 0; i < group; i++) amax = fmaxf(amax, fabsf(x[g * group + i]));
        bool zero = amax < 1e-30f;  // its reciprocal would overflow
        float inverse = zero ? 0 : 127.0f / amax;
        int total = 0;
        for (int i = 0; i < group; i++) {
            float scaled = nearbyintf(x[g * group + i] * inverse);
            int q = scaled >= -127 && scaled <= 127 ? int(scaled) : -128;  // -128: x is not finite, nor is the scale
            codes[place(g * group + i, order)] = int8_t(q);
            total += q;
        }
        scales[g] = zero ? 0 : amax / 127.0f;
        totals[g] = total;
        sums[g] = scales[g] * float(total);
    }
}

float quantized_product(const Matrix& w, const Activations& a, int64_t row, int64_t t, Order order) {
    const uint8_t* codes = static_cast<const uint8_t*>(w.data) + row * (w.in * w.bits / 8);
    const int64_t groups = w.in / w.group;
    float y = 0;
    for (int64_t g = 0; g < groups; g++) {
        int32_t dot = 0;
        for (int64_t c = g * w.group; c < (g + 1) * w.group; c++)
            dot += code_at(codes, w.bits, c) * a.codes[t * a.stride + place(c, order)];
        float scale = value_at(w.scales, w.type, row * groups + g) * a.scales[t * a.groups + g];
        y += scale * float(dot);
        y += value_at(w.biases, w.type, row * groups + g) * a.sums[t * a.groups + g];
    }
    return y;
}

float plain_product(const Matrix& w, const Activations& a, int64_t row, int64_t t) {
    float y = 0;
    for (int64_t i = 0; i < w.in; i++) y += value_at(w.data, w.type, row * w.in + i) * a.values[t * a.in + i];
    return y;
}

void product(const Matrix& w, const Activations& a, Order order, int64_t row0, int64_t row1, int64_t t0, int64_t t1,
             float* y, int64_t stride) {
    for (int64_t t = t0; t < t1; t++)
        for (int64_t row = row0; row < row1; row++)
            y[t * stride + row] = w.bits ? quantized_product(w, a, row, t, order) : plain_product(w, a, row, t);
}

void gemv(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, int64_t t0, int64_t t1, float* y,
          int64_t stride) {
    product(w, a, w.bits == 4 ? Order::even_odd : Order::natural, row0, row1, t0, t1, y, stride);
}

void gemm(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, int64_t t0, int64_t t1, float* y,
          int64_t stride) {
    product(w, a, Order::natural, row0, row1, t0, t1, y, stride);
}

}  // namespace
}  // namespace edgeq

const edgeq::LinearKernels edgeq::linear_scalar = {quantize, gemv, gemm, 8};
