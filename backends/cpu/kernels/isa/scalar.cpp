// The reference: plain loops, to be checked against edgeq/formats/affine.py by reading.
#include <math.h>
#include <string.h>

#include "kernels/numbers.h"

namespace edgeq {
namespace {

int64_t place(int64_t c, Order order) {
    if (order == Order::natural) return c;
    const int64_t block = order == Order::even_odd ? even_odd_block : quarters_block;
    const int64_t parts = order == Order::even_odd ? 2 : 4;
    return c / block * block + c % parts * (block / parts) + c % block / parts;
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
            dot += code_at(w, codes, c) * a.codes[t * a.stride + place(c, order)];
        float scale = scale_at(w, row * groups + g) * a.scales[t * a.groups + g];
        y += scale * float(dot);
        y += bias_at(w, row * groups + g) * a.sums[t * a.groups + g];
    }
    return y;
}

float plain_product(const Matrix& w, const Activations& a, int64_t row, int64_t t) {
    float y = 0;
    for (int64_t i = 0; i < w.in; i++) y += value_at(w.data, w.type, row * w.in + i) * a.values[t * a.in + i];
    return y;
}

float fp8_product(const Matrix& w, const Activations& a, int64_t row, int64_t t) {
    const uint8_t* codes = static_cast<const uint8_t*>(w.data) + row * w.in;
    float y = 0, weights[32];
    for (int64_t g = 0; g < w.in / 32; g++) {
        dequantize_group(w, codes, g, row * (w.in / 32) + g, weights);
        for (int i = 0; i < 32; i++) y += weights[i] * a.values[t * a.in + 32 * g + i];
    }
    return y;
}

void product(const Matrix& w, const Activations& a, Order order, int64_t row0, int64_t row1, int64_t t0, int64_t t1,
             float* y, int64_t stride) {
    for (int64_t t = t0; t < t1; t++)
        for (int64_t row = row0; row < row1; row++)
            y[t * stride + row] = multiplies_codes(w) ? quantized_product(w, a, row, t, order)
                                  : w.bits            ? fp8_product(w, a, row, t)
                                                      : plain_product(w, a, row, t);
}

void gemv(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, int64_t t0, int64_t t1, float* y,
          int64_t stride) {
    product(w, a, gemv_order(w), row0, row1, t0, t1, y, stride);
}

void gemm(const Matrix& w, const Activations& a, int64_t row0, int64_t row1, int64_t t0, int64_t t1, float* y,
          int64_t stride) {
    product(w, a, Order::natural, row0, row1, t0, t1, y, stride);
}

}  // namespace
}  // namespace edgeq

const edgeq::LinearKernels edgeq::linear_scalar = {quantize, gemv, gemm, 8};
