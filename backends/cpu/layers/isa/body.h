// The kernels of layers.h, over the vector operations of the file that includes this one:
//
//     V, W                      a vector of floats and how many it has
//     load, store, load_n, store_n (n <= W entries, the others zero / untouched), set1
//     stream, stream_end        an aligned store past the caches, where there is one; before others may read those
//     held                      the same, in a register: the compiler likes to load again what several sums need
//     add, sub, mul, div, fma (x * y + z), max_of
//     sum, peak_of              across the vector
//     sum4(a, b, c, d, out)     four sums at once
//     round_, pow2              to the nearest integer; 2^x of an integer, |x| <= 127
//     load4                     4 W entries as 4 vectors, entry i going to vector i % 4
//     load_f16, load_bf16, load_i8  W entries of 16 or 8 bits, widened
//     load_i4(p, low, high)     W bytes as two vectors: the lower and the upper four bits of each, minus 8
//     store_f16                 rounded to nearest even
//
// and LAYERS, the name of the table. Everything here has internal linkage.

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

// --- norms and pointwise ---------------------------------------------------------------------------------------------

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

// --- the causal convolution ------------------------------------------------------------------------------------------

constexpr Index conv_block = 128;  // channels at a time, so that their taps stay near

// Some taps of one token, for a block of channels; `rows` are its inputs, oldest first. `out` goes on from the taps
// before, or stays a sum for those that follow.
INLINE void conv_token(float* out, const float* const* rows, const float (*taps)[conv_block + W], const Index width,
                       Index block, const bool goes_on, const bool more) {
    auto channels = [&](Index c, Index n) {
        V total = goes_on ? load_upto(out + c, n) : set1(0.0f);
        for (Index i = 0; i < width; i++)
            total = fma(load_upto(rows[i] + c, n), load_upto(taps[i] + c, n), total);
        store_upto(out + c, more ? total : silu(total), n);
    };
    Index c = 0;
    for (; c + W <= block; c += W) channels(c, W);
    if (c < block) channels(c, block - c);
}

// Taps [first, first + some) of all tokens, for channels [c0, c0 + block).
INLINE void conv_taps(float* y, Index y_stride, const float* x, Index x_stride, const float* tail, Index t_stride,
                      const float* w, Index width, Index t0, Index t1, Index c0, Index block, Index first, Index some) {
    alignas(64) float taps[conv_widest][conv_block + W];
    Index c = 0;
    if (width == 4) {
        for (; c + W <= block; c += W) {
            V columns[4];
            load4(w + (c0 + c) * 4, columns);
            for (int i = 0; i < 4; i++) store(taps[i] + c, columns[i]);
        }
    }
    for (; c < block; c++)
        for (Index i = 0; i < some; i++) taps[i][c] = w[(c0 + c) * width + first + i];
    for (Index t = t0; t < t1; t++) {
        const float* rows[conv_widest];
        for (Index i = 0; i < some; i++) {
            const Index from = t - (width - 1) + first + i;
            rows[i] = c0 + (from < 0 ? tail + (width - 1 + from) * t_stride : x + from * x_stride);
        }
        float* out = y + (t - t0) * y_stride + c0;
        if (width == 4 && block == conv_block)
            conv_token(out, rows, taps, 4, conv_block, false, false);  // the family's: no loop but over the channels
        else
            conv_token(out, rows, taps, some, block, first > 0, first + some < width);
    }
}

void conv_silu(float* y, Index y_stride, const float* x, Index x_stride, const float* tail, Index t_stride,
               const float* w, Index width, Index t0, Index t1, Index n) {
    for (Index c0 = 0; c0 < n; c0 += conv_block)
        for (Index first = 0; first < width; first += conv_widest)
            conv_taps(y, y_stride, x, x_stride, tail, t_stride, w, width, t0, t1, c0, smaller(conv_block, n - c0), first,
                      smaller(conv_widest, width - first));
}

constexpr Index delta_widest = 256;  // keys; Qwen3.5 has 128

// --- the delta rule --------------------------------------------------------------------------------------------------

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

// --- attention -------------------------------------------------------------------------------------------------------

// Blockwise with a running maximum (Dao et al., "FlashAttention", arXiv:2205.14135; Milakov and Gimelshein,
// "Online normalizer calculation for softmax", arXiv:1805.02867).

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
        const Index page = first / kv_page, entry = first % kv_page * key_row;  // of a tile of keys, and a row of values
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

extern const LayerKernels LAYERS;
const LayerKernels LAYERS = {add_rows, silu_mul,  sigmoid_mul, rms_norm, l2_norm, dot,
                             rope,     conv_silu, delta,       attend,   merge,   rotate, to_f16};

}  // namespace edgeq
