// The delta rule: rows of a state move on by a chunk of tokens.
#pragma once

#include "layers/vector-inl.h"

namespace edgeq {
namespace {

constexpr Index delta_widest = 256;  // keys; Qwen3.5 has 128

// R rows of the state stay in the nearest cache while the tokens of the chunk pass: the first step reads them from
// `from`, the last writes them to `to`. A step takes B = 1 or 2 tokens, with one pass over the rows that reads what the
// state recalls for every k and answers to every q, and one that writes.
INLINE void delta_step(float* to, const float* from, const int R, const int B, const Index K, const float* q,
                       const float* k, const DeltaStep& step, const float* v, Index v_stride, float* o,
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
            delta_step(next, from, R, 2, K, q, k, c.steps[t / 2], v, c.v_stride, o, c.o_stride);
        else
            delta_step(next, from, R, 1, K, q, k, c.steps[t / 2], v, c.v_stride, o, c.o_stride);
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

void delta(float* to, const float* from, Index rows, const DeltaChunk& c) {
    if (c.K == 128) return delta_of(to, from, rows, 128, c);  // Qwen3.5's, for which the compiler unrolls
    delta_of(to, from, rows, c.K, c);
}

// --- token by token --------------------------------------------------------------------------------------------------

// Where a pass over R rows leaves what it has made of them; null is nowhere.
struct Left {
    float *near, *to;
    bool past_caches;  // `to` is aligned, and nobody reads it soon
};

// R rows of a state take the updates [first, last) in (`some` of them: 0, 1, or 2 for any number) and are left where
// they are wanted. Then they may be asked: sums [R, 2] become S k and S q.
INLINE void delta_pass(const Left& left, const float* from, const int R, const Index K, Index row, const DeltaSteps& s,
                       Index first, Index last, const int some, const bool asked, const float* k, const float* q,
                       float* sums) {
    V by[4][2], only[4], only_decay;
    for (int r = 0; r < R; r++) by[r][0] = by[r][1] = set1(0.0f);
    const float* only_key = some == 1 ? s.k[first] : nullptr;
    if (some == 1) {
        only_decay = set1(s.decay[first]);
        for (int r = 0; r < R; r++) only[r] = set1(s.d[first][row + r]);
    }
    for (Index i = 0; i < K; i += W) {
        V x[4];
        for (int r = 0; r < R; r++) x[r] = held(load_upto(from + r * K + i, K - i));
        if (some == 1) {
            const V key = held(load_upto(only_key + i, K - i));
            for (int r = 0; r < R; r++) x[r] = fma(only[r], key, mul(x[r], only_decay));
        }
        if (some == 2) {
            for (Index u = first; u < last; u++) {
                const V key = held(load_upto(s.k[u] + i, K - i)), decay = set1(s.decay[u]);
                for (int r = 0; r < R; r++) x[r] = fma(set1(s.d[u][row + r]), key, mul(x[r], decay));
            }
        }
        if (left.near)
            for (int r = 0; r < R; r++) store_upto(left.near + r * K + i, x[r], K - i);
        if (left.to) {
            if (left.past_caches)
                for (int r = 0; r < R; r++) stream(left.to + r * K + i, x[r]);
            else
                for (int r = 0; r < R; r++) store_upto(left.to + r * K + i, x[r], K - i);
        }
        if (!asked) continue;
        const V key = held(load_upto(k + i, K - i)), query = held(load_upto(q + i, K - i));
        for (int r = 0; r < R; r++) {
            by[r][0] = fma(x[r], key, by[r][0]);
            by[r][1] = fma(x[r], query, by[r][1]);
        }
    }
    if (!asked) return;
    if (R == 1) {
        float four[4];
        sum4(by[0][0], by[0][1], set1(0.0f), set1(0.0f), four);
        sums[0] = four[0], sums[1] = four[1];
    }
    for (int r = 0; r + 1 < R; r += 2) sum4(by[r][0], by[r][1], by[r + 1][0], by[r + 1][1], sums + 2 * r);
}

// R rows ask token t, which takes in what the token before it wrote (the first one: what the state lacks).
INLINE void delta_ask(float* to, const float* from, float* near, const int R, const Index K, Index row, Index t,
                      bool past_caches, const DeltaSteps& s) {
    const Index token = s.before + t, first = t ? token - 1 : 0;
    const bool again = t + 1 < s.tokens || s.written == s.tokens;  // somebody goes on from what is left near
    const Left left{again && token > first ? near : nullptr, s.written == t ? to : nullptr, past_caches};
    if (t > 0 && token > 1) from = near;
    const float *k = s.k[token], *q = s.q + t * K;
    float sums[8];
    if (token == first)
        delta_pass(left, from, R, K, row, s, first, token, 0, true, k, q, sums);
    else if (token == first + 1)
        delta_pass(left, from, R, K, row, s, first, token, 1, true, k, q, sums);
    else
        delta_pass(left, from, R, K, row, s, first, token, 2, true, k, q, sums);
    const float decay = s.decay[token], beta = s.beta[t], own = s.own[t];
    const float* v = s.v + t * s.v_stride + row;
    float *written = s.d[token] + row, *o = s.o + t * s.o_stride + row;
    for (int r = 0; r < R; r++) {
        const float d = beta * (v[r] - decay * sums[2 * r]);
        written[r] = d;
        o[r] = decay * sums[2 * r + 1] + own * d;
    }
}

// R rows take in what the last token wrote (without tokens: what the state lacks), and are left in `to`.
INLINE void delta_end(float* to, const float* from, float* near, const int R, const Index K, Index row,
                      bool past_caches, const DeltaSteps& s) {
    const Index last = s.before + s.tokens;
    const Left left{nullptr, to, past_caches};
    if (s.tokens == 0)
        delta_pass(left, from, R, K, row, s, 0, last, 2, false, nullptr, nullptr, nullptr);
    else
        delta_pass(left, last == 1 ? from : near, R, K, row, s, last - 1, last, 1, false, nullptr, nullptr, nullptr);
}

// Rows stay in the nearest cache while all tokens pass. What a token writes waits for what it was answered, so several
// groups of rows are on their way together. A state comes from memory and goes back there: what is needed next is asked
// for early, and what is written goes past the caches, which spares reading what was there. (Measured for one token on
// a cold state, one Zen 4 core: 121 instead of 182 microseconds for 1 MB.)
INLINE void delta_steps_of(float* to, const float* from, Index rows, const Index K, const DeltaSteps& s) {
    const bool past_caches = K % W == 0 && reinterpret_cast<uintptr_t>(to) % (W * sizeof(float)) == 0;
    const Index ahead = delta_ahead / K;  // rows
    for (Index begin = 0; begin < rows; begin += delta_tile) {
        const Index end = smaller(rows, begin + delta_tile);
        auto each = [&](auto&& run) __attribute__((always_inline)) {
            Index r = begin;
            for (; r + DELTA_ROWS <= end; r += DELTA_ROWS) run(DELTA_ROWS, r);
            for (; r < end; r++) run(1, r);
        };
        auto soon = [&](const int R, Index r) __attribute__((always_inline)) {
            const char* at = reinterpret_cast<const char*>(from + (r + ahead) * K);
            if (r + ahead + R <= rows)
                for (Index i = 0; i < R * K * Index(sizeof(float)); i += 64) __builtin_prefetch(at + i);
        };
        for (Index t = 0; t < s.tokens; t++)
            each([&](const int R, Index r) __attribute__((always_inline)) {
                if (t == 0) soon(R, r);
                delta_ask(to + r * K, from + r * K, s.room + (r - begin) * K, R, K, r, t, past_caches, s);
            });
        if (s.written == s.tokens)
            each([&](const int R, Index r) __attribute__((always_inline)) {
                if (s.tokens == 0) soon(R, r);
                delta_end(to + r * K, from + r * K, s.room + (r - begin) * K, R, K, r, past_caches, s);
            });
    }
    if (past_caches && s.written >= 0) stream_end();
}

void delta_steps(float* to, const float* from, Index rows, const DeltaSteps& s) {
    if (s.K == 128) return delta_steps_of(to, from, rows, 128, s);
    delta_steps_of(to, from, rows, s.K, s);
}

}  // namespace
}  // namespace edgeq
