// What the kernels of layers/ share: rows that end within a vector, and functions of a vector. See layers-inl.h.
#pragma once

#include "layers/layers.h"

namespace edgeq {
namespace {

#define INLINE static inline __attribute__((always_inline))

INLINE Index smaller(Index a, Index b) { return a < b ? a : b; }

INLINE V load_upto(const float* p, Index n) { return n >= W ? load(p) : load_n(p, int(n)); }

INLINE void store_upto(float* p, V x, Index n) {
    if (n >= W)
        store(p, x);
    else
        store_n(p, x, int(n));
}

// e^x for finite x, clamped to [e^-87, e^88]: x = n ln 2 + r with |r| <= ln(2) / 2, and 7 terms of the series for e^r
// (remainder below 6e-9).
INLINE V exp_(V x) {
    x = max_of(set1(-87.0f), sub(set1(0.0f), max_of(set1(-88.0f), sub(set1(0.0f), x))));
    V n = round_(mul(x, set1(1.44269504f)));
    V r = fma(n, set1(-0.693359375f), x);  // ln 2 in two parts: n times the first is exact
    r = fma(n, set1(2.12194440e-4f), r);
    V p = set1(1.0f / 5040);
    p = fma(p, r, set1(1.0f / 720));
    p = fma(p, r, set1(1.0f / 120));
    p = fma(p, r, set1(1.0f / 24));
    p = fma(p, r, set1(1.0f / 6));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return mul(p, pow2(n));
}

INLINE V sigmoid(V x) { return div(set1(1.0f), add(set1(1.0f), exp_(sub(set1(0.0f), x)))); }

INLINE V silu(V x) { return mul(x, sigmoid(x)); }

}  // namespace
}  // namespace edgeq
