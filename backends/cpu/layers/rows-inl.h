// Kernels that work on one row, or on two entry by entry: norms, gates, rotary embedding, rotation, float16.
#pragma once

#include "layers/vector-inl.h"

namespace edgeq {
namespace {

void add_rows(float* y, const float* x, const float* z, Index n) {
    for (Index i = 0; i < n; i += W) store_upto(y + i, add(load_upto(x + i, n - i), load_upto(z + i, n - i)), n - i);
}

void silu_mul(float* y, const float* gate, const float* up, Index n) {
    for (Index i = 0; i < n; i += W)
        store_upto(y + i, mul(silu(load_upto(gate + i, n - i)), load_upto(up + i, n - i)), n - i);
}

void sigmoid_mul(float* y, const float* x, const float* gate, Index n) {
    for (Index i = 0; i < n; i += W)
        store_upto(y + i, mul(load_upto(x + i, n - i), sigmoid(load_upto(gate + i, n - i))), n - i);
}

float dot(const float* x, const float* y, Index n) {
    V even = set1(0.0f), odd = set1(0.0f);
    Index i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        even = fma(load(x + i), load(y + i), even);
        odd = fma(load(x + i + W), load(y + i + W), odd);
    }
    for (; i < n; i += W) even = fma(load_upto(x + i, n - i), load_upto(y + i, n - i), even);
    return sum(add(even, odd));
}

void rms_norm(float* y, const float* x, const float* gain, const float* gate, Index n, float eps) {
    const V scale = set1(1.0f / __builtin_sqrtf(dot(x, x, n) / float(n) + eps));
    for (Index i = 0; i < n; i += W) {
        V value = mul(mul(load_upto(x + i, n - i), scale), load_upto(gain + i, n - i));
        if (gate) value = mul(value, silu(load_upto(gate + i, n - i)));
        store_upto(y + i, value, n - i);
    }
}

void l2_norm(float* y, const float* x, Index n, float eps, float scale) {
    const V factor = set1(scale / __builtin_sqrtf(dot(x, x, n) + eps));
    for (Index i = 0; i < n; i += W) store_upto(y + i, mul(load_upto(x + i, n - i), factor), n - i);
}

void rope(float* y, const float* x, const float* cos, const float* sin, Index pairs, Index n) {
    for (Index i = 0; i < pairs; i += W) {
        const Index left = pairs - i;
        V c = load_upto(cos + i, left), s = load_upto(sin + i, left);
        V first = load_upto(x + i, left), second = load_upto(x + pairs + i, left);
        store_upto(y + i, sub(mul(first, c), mul(second, s)), left);
        store_upto(y + pairs + i, add(mul(second, c), mul(first, s)), left);
    }
    if (y != x)
        for (Index i = 2 * pairs; i < n; i += W) store_upto(y + i, load_upto(x + i, n - i), n - i);
}

void to_f16(uint16_t* y, const float* x, Index n) {
    const V largest = set1(65504.0f), smallest = set1(-65504.0f), zero = set1(0.0f);
    for (Index i = 0; i < n; i += W) {
        V value = max_of(load_upto(x + i, n - i), smallest);
        value = sub(zero, max_of(sub(zero, value), sub(zero, largest)));
        uint16_t bits[W];
        store_f16(bits, value);
        __builtin_memcpy(y + i, bits, smaller(W, n - i) * sizeof *bits);
    }
}

void rotate(float* x, Index n) {
    const Index block = n & -n;
    const V norm = set1(1.0f / __builtin_sqrtf(float(block)));
    for (Index step = 1; step < block; step *= 2)
        for (Index at = 0; at < n; at += 2 * step) {
            float *first = x + at, *second = first + step;
            Index i = 0;
            for (; i + W <= step; i += W) {
                const V a = load(first + i), b = load(second + i);
                store(first + i, add(a, b));
                store(second + i, sub(a, b));
            }
            for (; i < step; i++) {
                const float a = first[i], b = second[i];
                first[i] = a + b;
                second[i] = a - b;
            }
        }
    for (Index i = 0; i < n; i += W) store_upto(x + i, mul(load_upto(x + i, n - i), norm), n - i);
}

}  // namespace
}  // namespace edgeq
