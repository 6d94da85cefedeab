// Layer norm and GELU of a row.
#pragma once

#include "layers/vector-inl.h"

namespace edgeq {
namespace {

INLINE V abs_of(V x) { return max_of(x, sub(set1(0.0f), x)); }

void layer_norm(float* y, const float* x, const float* gain, const float* bias, Index n, float eps) {
    V total = set1(0.0f);
    for (Index i = 0; i < n; i += W) total = add(total, load_upto(x + i, n - i));
    const float mean = sum(total) / float(n);
    auto centred = [&](Index i) { return sub(load_upto(x + i, n - i), set1(mean)); };
    V squares = set1(0.0f);
    Index i = 0;
    for (; i + W <= n; i += W) squares = fma(centred(i), centred(i), squares);
    float square = sum(squares);
    for (; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
    const V scale = set1(1.0f / __builtin_sqrtf(square / float(n) + eps));
    for (i = 0; i < n; i += W)
        store_upto(y + i, add(mul(mul(centred(i), scale), load_upto(gain + i, n - i)), load_upto(bias + i, n - i)),
                   n - i);
}

// 1 + tanh(u) = 2 / (1 + e^-2u)
INLINE V gelu_tanh(V x) {
    const V cube = mul(mul(x, x), x);
    const V twice = mul(set1(1.5957691216f), fma(set1(0.044715f), cube, x));  // 2 sqrt(2 / pi)
    return div(x, add(set1(1.0f), exp_(sub(set1(0.0f), twice))));
}

// erfc(z) = (a1 t + ... + a5 t^5) e^(-z^2) with t = 1 / (1 + p z) for z >= 0, within 1.5e-7 (Abramowitz and Stegun,
// "Handbook of Mathematical Functions", 7.1.26; here with halves of the a).
INLINE V gelu_erf(V x) {
    const V z = mul(abs_of(x), set1(0.70710678f)), t = div(set1(1.0f), fma(set1(0.3275911f), z, set1(1.0f)));
    V p = set1(0.5f * 1.061405429f);
    p = fma(p, t, set1(0.5f * -1.453152027f));
    p = fma(p, t, set1(0.5f * 1.421413741f));
    p = fma(p, t, set1(0.5f * -0.284496736f));
    p = fma(p, t, set1(0.5f * 0.254829592f));
    const V tail = mul(mul(p, t), exp_(sub(set1(0.0f), mul(z, z))));
    return sub(max_of(set1(0.0f), x), mul(abs_of(x), tail));
}

void gelu(float* y, const float* x, Index n, bool exact) {
    for (Index i = 0; i < n; i += W) {
        const V value = load_upto(x + i, n - i);
        store_upto(y + i, exact ? gelu_erf(value) : gelu_tanh(value), n - i);
    }
}

}  // namespace
}  // namespace edgeq
