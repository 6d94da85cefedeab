// Some queries over part of their keys: scores, weights and sums of values, block by block.
//
// Blockwise with a running maximum (Dao et al., "FlashAttention", arXiv:2205.14135; Milakov and Gimelshein,
// "Online normalizer calculation for softmax", arXiv:1805.02867).
#pragma once

#include "layers/vector-inl.h"

namespace edgeq {
namespace {

constexpr int R = attend_rows;
constexpr int SPAN = W < kv_tile ? kv_tile : 2 * kv_tile;  // keys whose scores are summed at a time
constexpr int SPAN_V = SPAN / W;
constexpr int WIDE = W == 4 ? 4 : 2;  // vectors of values summed at a time

INLINE float first_of(V x) {
    float all[W];
    store(all, x);
    return all[0];
}

INLINE V load_kv(const uint8_t* p, Index entry, const KvType type) {
    if (type == KvType::f32) return load(reinterpret_cast<const float*>(p) + entry);
    if (type == KvType::int8) return load_i8(reinterpret_cast<const int8_t*>(p) + entry);
    const uint16_t* half = reinterpret_cast<const uint16_t*>(p) + entry;
    return type == KvType::f16 ? load_f16(half) : load_bf16(half);
}

// Memory that will be read soon, asked for line by line while something else is computed. The cache is read once per
// token and in an order that the machine does not foresee: without this a deep decode waits for it (measured: 2x).
struct Ahead {
    const uint8_t *at, *end;
    void next() {
        if (at < end) __builtin_prefetch(at), at += 64;
    }
};

// Scores of R rows and SPAN keys, whose tiles start at entry `tile`.
INLINE void score_span(float* scores, const float* q, Index width, const uint8_t* keys, Index tile, const KvType type,
                       Ahead& ahead) {
    V total[R][SPAN_V];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < SPAN_V; j++) total[r][j] = set1(0.0f);
    for (Index i = 0; i < width; i++) {
        ahead.next();
        V key[SPAN_V];
        for (int j = 0; j < SPAN_V; j++)
            key[j] = load_kv(keys, tile + (j * W / kv_tile) * width * kv_tile + i * kv_tile + j * W % kv_tile, type);
        for (int r = 0; r < R; r++) {
            const V query = set1(q[r * width + i]);
            for (int j = 0; j < SPAN_V; j++) total[r][j] = fma(query, key[j], total[r][j]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < SPAN_V; j++) store(scores + r * attend_keys + j * W, total[r][j]);
}

// The same for int4, whose scales belong to groups of entries: each group is summed by itself. `scales` [groups,
// kv_page] begins at the first of the keys.
INLINE void score_span_int4(float* scores, const float* q, Index width, const uint8_t* keys, const uint16_t* scales,
                            Ahead& ahead) {
    constexpr Index half = kv_group / 2;
    V total[R][SPAN_V];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < SPAN_V; j++) total[r][j] = set1(0.0f);
    for (Index group = 0; group < width / kv_group; group++) {
        V part[R][SPAN_V];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < SPAN_V; j++) part[r][j] = set1(0.0f);
        for (Index i = 0; i < half; i++) {
            ahead.next();
            V low[SPAN_V], high[SPAN_V];
            for (int j = 0; j < SPAN_V; j++)
                load_i4(keys + (j * W / kv_tile) * width / 2 * kv_tile + (group * half + i) * kv_tile + j * W % kv_tile,
                        low[j], high[j]);
            for (int r = 0; r < R; r++) {
                const float* query = q + r * width + group * kv_group + i;
                for (int j = 0; j < SPAN_V; j++)
                    part[r][j] = fma(set1(query[0]), low[j], fma(set1(query[half]), high[j], part[r][j]));
            }
        }
        for (int j = 0; j < SPAN_V; j++) {
            const V scale = load_f16(scales + group * kv_page + j * W);
            for (int r = 0; r < R; r++) total[r][j] = fma(part[r][j], scale, total[r][j]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < SPAN_V; j++) store(scores + r * attend_keys + j * W, total[r][j]);
}

// The scores or weights of a block of keys times their scales. Those of keys that are not there yet are undefined, and
// so is what comes of them, which nobody reads.
INLINE void mul_rows(float* scores, const uint8_t* page_scales, Index first) {
    const float* scales = reinterpret_cast<const float*>(page_scales) + first % kv_page;
    for (Index i = 0; i < attend_keys; i += W) store(scores + i, mul(load(scores + i), load(scales + i)));
}

// Turn a row's scores of the keys from `first` on into weights under the running maximum; rescale what was summed. Keys
// that the row does not see weigh nothing at all, so that its sums are the same in whatever company it is.
INLINE void weigh_row(const Attend& a, Index row, Index first, Index count, const KvType type) {
    float* scores = a.scores + row * attend_keys;
    const Index seen = smaller(a.visible[row] - first, count);
    if (seen <= 0) {
        for (Index i = 0; i < attend_keys; i += W) store(scores + i, set1(0.0f));
        return;
    }
    if (type == KvType::int8) mul_rows(scores, a.pages[first / kv_page] + a.key_scales, first);
    for (Index i = seen; i < attend_keys; i++) scores[i] = no_peak;
    V most = load(scores);
    for (Index i = W; i < attend_keys; i += W) most = max_of(most, load(scores + i));
    const float peak = peak_of(most);
    if (peak > a.sums.peak[row]) {
        float* out = a.sums.out + row * a.width;
        const V shrink = exp_(set1(a.sums.peak[row] - peak));
        for (Index i = 0; i < a.width; i += W) store(out + i, mul(load(out + i), shrink));
        a.sums.total[row] *= first_of(shrink);
        a.sums.peak[row] = peak;
    }
    const V base = set1(a.sums.peak[row]);
    for (Index i = 0; i < attend_keys; i += W) store(scores + i, exp_(sub(load(scores + i), base)));
    for (Index i = seen; i < attend_keys; i++) scores[i] = 0.0f;
    V total = set1(0.0f);
    for (Index i = 0; i < attend_keys; i += W) total = add(total, load(scores + i));
    a.sums.total[row] += sum(total);
    if (type == KvType::int8) mul_rows(scores, a.pages[first / kv_page] + a.value_scales, first);
}

// out += weights @ values for R rows and `wide` vectors of the width from entry i on.
INLINE void sum_values_at(const Attend& a, Index row, Index i, const int wide, const uint8_t* values, Index entry,
                          Index count, const KvType type, Ahead& ahead) {
    const float* weights = a.scores + row * attend_keys;
    float* out = a.sums.out + row * a.width + i;
    V total[R][WIDE];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < wide; j++) total[r][j] = load(out + r * a.width + j * W);
    for (Index key = 0; key < count; key++) {
        ahead.next();
        V value[WIDE];
        for (int j = 0; j < wide; j++) value[j] = load_kv(values, entry + key * a.width + i + j * W, type);
        for (int r = 0; r < R; r++) {
            const V weight = set1(weights[r * attend_keys + key]);
            for (int j = 0; j < wide; j++) total[r][j] = fma(weight, value[j], total[r][j]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < wide; j++) store(out + r * a.width + j * W, total[r][j]);
}

INLINE void sum_values(const Attend& a, Index row, const uint8_t* values, Index entry, Index count, const KvType type,
                       Ahead& ahead) {
    Index i = 0;
    for (; i + WIDE * W <= a.width; i += WIDE * W) sum_values_at(a, row, i, WIDE, values, entry, count, type, ahead);
    for (; i < a.width; i += W) sum_values_at(a, row, i, 1, values, entry, count, type, ahead);
}

// The same for int4, from the first key's values and scales on.
INLINE void sum_values_int4(const Attend& a, Index row, const uint8_t* values, const uint16_t* scales, Index count,
                            Ahead& ahead) {
    constexpr Index half = kv_group / 2;
    const float* weights = a.scores + row * attend_keys;
    for (Index group = 0; group < a.width / kv_group; group++) {
        float factors[attend_keys];
        for (Index i = 0; i < attend_keys; i += W) store(factors + i, load_f16(scales + group * kv_page + i));
        for (Index i = 0; i < half; i += W) {
            float* out = a.sums.out + row * a.width + group * kv_group + i;
            V low[R], high[R];
            for (int r = 0; r < R; r++) low[r] = load(out + r * a.width), high[r] = load(out + r * a.width + half);
            for (Index key = 0; key < count; key++) {
                ahead.next();
                V first, second;
                load_i4(values + key * a.width / 2 + group * half + i, first, second);
                const V factor = set1(factors[key]);
                first = mul(first, factor), second = mul(second, factor);
                for (int r = 0; r < R; r++) {
                    const V weight = set1(weights[r * attend_keys + key]);
                    low[r] = fma(weight, first, low[r]);
                    high[r] = fma(weight, second, high[r]);
                }
            }
            for (int r = 0; r < R; r++) store(out + r * a.width, low[r]), store(out + r * a.width + half, high[r]);
        }
    }
}

INLINE void attend_as(const Attend& a, const KvType type) {
    for (Index r = 0; r < a.rows; r++) a.sums.peak[r] = no_peak, a.sums.total[r] = 0.0f;
    for (Index i = 0; i < a.rows * a.width; i += W) store(a.sums.out + i, set1(0.0f));
    const Index key_row = kv_row(type, a.width), block_nbytes = attend_keys * key_row * kv_size(type);
    for (Index first = a.begin; first < a.end; first += attend_keys) {
        const Index count = smaller(attend_keys, a.end - first);
        const Index page = first / kv_page;
        const Index entry = first % kv_page * key_row;  // of a tile of keys, and of a row of values
        const uint8_t *keys = a.pages[page] + a.keys, *values = a.pages[page] + a.values;
        auto scales = [&](Index of, Index span) {
            return reinterpret_cast<const uint16_t*>(a.pages[page] + of) + first % kv_page + span;
        };
        const uint8_t* these = values + entry * kv_size(type);
        Ahead ahead{these, these + block_nbytes * count / attend_keys};
        for (Index span = 0; span < count; span += SPAN)
            for (Index row = 0; row < a.rows; row += R) {
                float* scores = a.scores + row * attend_keys + span;
                const float* q = a.q + row * a.width;
                const Index tile = entry + span * key_row;
                if (type == KvType::int4)
                    score_span_int4(scores, q, a.width, keys + tile, scales(a.key_scales, span), ahead);
                else
                    score_span(scores, q, a.width, keys, tile, type, ahead);
            }
        for (Index row = 0; row < a.rows; row++) weigh_row(a, row, first, count, type);
        const Index next = first + attend_keys;
        if (next < a.follow) {
            ahead.at = a.pages[next / kv_page] + a.keys + next % kv_page * key_row * kv_size(type);
            ahead.end = ahead.at + block_nbytes;
        }
        for (Index row = 0; row < a.rows; row += R) {
            if (type == KvType::int4)
                sum_values_int4(a, row, values + entry, scales(a.value_scales, 0), count, ahead);
            else
                sum_values(a, row, values, entry, count, type, ahead);
        }
    }
}

void attend(const Attend& a) {
    switch (a.type) {
        case KvType::f16: return attend_as(a, KvType::f16);
        case KvType::bf16: return attend_as(a, KvType::bf16);
        case KvType::f32: return attend_as(a, KvType::f32);
        case KvType::int8: return attend_as(a, KvType::int8);
        case KvType::int4: return attend_as(a, KvType::int4);
    }
}

void merge(const Sums& all, const Sums& more, Index rows, Index width) {
    for (Index row = 0; row < rows; row++) {
        if (more.total[row] == 0.0f) continue;  // sees none of these keys
        const float peak = all.peak[row] > more.peak[row] ? all.peak[row] : more.peak[row];
        const V before = exp_(set1(all.peak[row] - peak)), after = exp_(set1(more.peak[row] - peak));
        float *out = all.out + row * width, *next = more.out + row * width;
        for (Index i = 0; i < width; i += W) store(out + i, fma(load(next + i), after, mul(load(out + i), before)));
        all.total[row] = all.total[row] * first_of(before) + more.total[row] * first_of(after);
        all.peak[row] = peak;
    }
}

}  // namespace
}  // namespace edgeq
