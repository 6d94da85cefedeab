// The delta rule: rows of a state move on by a chunk of tokens.
#pragma once

#include "layers/vector-inl.h"

namespace edgeq {
namespace {

constexpr Index delta_widest = 256;  // keys; Qwen3.5 has 128

// R rows of the state stay in the nearest cache while the tokens of the chunk pass: the first step reads them from
// `from`, the last writes them to `to`. A step takes B = 1 or 2 tokens, with one pass over the rows that reads what the
// state recalls for every k and answers to every q, and one that writes.
INLINE void delta_step(float* to, const float* from, const int R, const int B, const Index K, const bool past_caches,
                       const float* q, const float* k, const DeltaStep& step, const float* v, Index v_stride, float* o,
                       Index o_stride) {
    V by[4][4];  // row; k, k of the second token, q, q of the second token
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 4; j++) by[r][j] = set1(0.0f);
    for (Index i = 0; i < K; i += W) {
        V keys[2], queries[2];
        for (int j = 0; j < B; j++) {
            keys[j] = held(load_upto(k + j * K + i, K - i));
            queries[j] = held(load_upto(q + j * K + i, K - i));
        }
        for (int r = 0; r < R; r++) {
            const V s = held(load_upto(from + r * K + i, K - i));
            for (int j = 0; j < B; j++) {
                by[r][j] = fma(s, keys[j], by[r][j]);
                by[r][2 + j] = fma(s, queries[j], by[r][2 + j]);
            }
        }
    }
    V write[4][2];
    for (int r = 0; r < R; r++) {
        float sums[4];
        sum4(by[r][0], by[r][1], by[r][2], by[r][3], sums);
        const float d = step.beta[0] * (v[r] - step.decay[0] * sums[0]);
        o[r] = step.decay[0] * sums[2] + step.own[0] * d;
        write[r][0] = set1(step.lift[0] * d);
        if (B == 2) {
            const float e = step.beta[1] * (v[v_stride + r] - step.decay[1] * sums[1] - step.recall * d);
            o[o_stride + r] = step.decay[1] * sums[3] + step.answer * d + step.own[1] * e;
            write[r][1] = set1(step.lift[1] * e);
        }
    }
    const V through = set1(step.through);
    const bool whole = step.through == 1.0f;
    for (Index i = 0; i < K; i += W) {
        V keys[2];
        for (int j = 0; j < B; j++) keys[j] = held(load_upto(k + j * K + i, K - i));
        for (int r = 0; r < R; r++) {
            V s = load_upto(from + r * K + i, K - i);
            if (!whole) s = mul(s, through);
            for (int j = 0; j < B; j++) s = fma(write[r][j], keys[j], s);
            if (past_caches)
                stream(to + r * K + i, s);
            else
                store_upto(to + r * K + i, s, K - i);
        }
    }
}

INLINE void delta_rows(float* to, const float* from, float* near, const int R, const Index K, Index row,
                       const DeltaChunk& c) {
    for (Index t = 0; t < c.tokens; t += 2) {
        float* next = t + 2 >= c.tokens ? to : near;
        const float* v = c.v + t * c.v_stride + row;
        float* o = c.o + t * c.o_stride + row;
        const float *q = c.q + t * K, *k = c.k + t * K;
        if (t + 1 < c.tokens)
            delta_step(next, from, R, 2, K, false, q, k, c.steps[t / 2], v, c.v_stride, o, c.o_stride);
        else
            delta_step(next, from, R, 1, K, false, q, k, c.steps[t / 2], v, c.v_stride, o, c.o_stride);
        from = near;
    }
}

constexpr int DELTA_ROWS = W == 8 ? 2 : 4;  // AVX2 has registers for the sums of two

INLINE void delta_of(float* to, const float* from, Index rows, const Index K, const DeltaChunk& c) {
    alignas(64) float room[DELTA_ROWS * delta_widest];
    // A row too wide for the room is worked on where it ends up.
    auto near = [&](Index r) { return K <= delta_widest ? room : to + r * K; };
    Index r = 0;
    for (; r + DELTA_ROWS <= rows; r += DELTA_ROWS) delta_rows(to + r * K, from + r * K, near(r), DELTA_ROWS, K, r, c);
    for (; r < rows; r++) delta_rows(to + r * K, from + r * K, near(r), 1, K, r, c);
}

// One token that nobody follows up soon, as when decoding: the state comes from memory and goes back there. What is
// needed next is asked for early, and the new state goes past the caches, which spares reading what was there.
// Measured on a cold state, one Zen 4 core: 121 instead of 182 microseconds for 1 MB.
INLINE void delta_last(float* to, const float* from, Index rows, const Index K, const DeltaChunk& c) {
    const Index ahead = delta_ahead / K;  // rows
    for (Index r = 0; r < rows; r += 4) {
        const char* soon = reinterpret_cast<const char*>(from + (r + ahead) * K);
        if (r + ahead < rows)
            for (Index i = 0; i < 4 * K * Index(sizeof(float)); i += 64) __builtin_prefetch(soon + i);
        delta_step(to + r * K, from + r * K, 4, 1, K, true, c.q, c.k, c.steps[0], c.v + r, 0, c.o + r, 0);
    }
    stream_end();
}

void delta(float* to, const float* from, Index rows, const DeltaChunk& c) {
    const bool aligned = reinterpret_cast<uintptr_t>(to) % (W * sizeof(float)) == 0;
    if (c.last && c.tokens == 1 && c.K == 128 && rows % 4 == 0 && aligned) return delta_last(to, from, rows, 128, c);
    if (c.K == 128) return delta_of(to, from, rows, 128, c);  // Qwen3.5's, for which the compiler unrolls
    delta_of(to, from, rows, c.K, c);
}

}  // namespace
}  // namespace edgeq
