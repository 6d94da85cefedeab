// Attention over all keys of a span, block by block with a running maximum (Dao et al., "FlashAttention",
// arXiv:2205.14135; Milakov and Gimelshein, arXiv:1805.02867), on codes: a block's weights are codes under the block's
// own largest, and what is merged into the sums has that as a factor.
#pragma once

#include "vision/multiply-inl.h"

namespace edgeq {
namespace {

// largest * 2^x for x <= 0, and almost 0 far below: 2^n, n an integer, times a polynomial in the rest, |rest| <= 1/2,
// within 2.6e-6 (least largest relative error, by Lawson's iteration).
INLINE V exp2_(V x, const float largest) {
    x = max_of(set1(-126.0f), x);
    const V n = round_(x), rest = sub(x, n);
    V p = set1(largest * 0.0095701f);
    p = fma(p, rest, set1(largest * 0.05591786f));
    p = fma(p, rest, set1(largest * 0.24024745f));
    p = fma(p, rest, set1(largest * 0.69312181f));
    p = fma(p, rest, set1(largest * 0.99999926f));
    return scale2(p, n);
}

constexpr float largest_weight = floats ? 1.0f : 4095.0f;  // code_limit(key_block)

void pack_keys(const float* k, Index stride, Index keys, Index D, const PackedHead& head, Index block) {
    Code* to = static_cast<Code*>(head.keys) + block * head.keys_size;
    float* scales = head.key_scales + block * head.key_scales_size;
    const Index width = code_stride(D);
    alignas(64) Code rows[W * group_depth];
    for (Index first = 0; first < key_block; first += W)
        for (Index c = 0; c < width; c += group_depth) {
            const Index n = smaller(group_depth, D - c), some = smaller(group_depth, width - c);
            for (int r = 0; r < W; r++) {
                const Index key = first + r;
                Code* codes = rows + r * some;
                scales[c / group_depth * key_block + key] =
                    key < keys ? encode_group(k + key * stride + c, n, 1.0f, codes) : 0.0f;
                clear(codes, key < keys ? padded(n, W) : 0, some);
            }
            to_tile(rows, some, some / step,
                    to + first / tile * tile * width + first % tile * step + c * tile);
        }
}

void pack_values(const float* v, Index stride, Index keys, Index D, const PackedHead& head, Index block) {
    Code* to = static_cast<Code*>(head.values) + block * head.values_size;
    float* scales = head.value_scales + block * head.value_scales_size;
    for (Index c = 0; c < padded(D, tile); c += W) {
        Code* column = to + c / tile * tile * key_block + c % tile * step;
        auto value = [&](Index key) { return c < D && key < keys ? load_upto(v + key * stride + c, D - c) : set1(0.0f); };
        V inverse = set1(1.0f), scale = set1(1.0f);
        if (!floats) {
            Extent extent;
            for (Index key = 0; key < keys; key++) extent.take(value(key));
            float peaks[W], inverses[W];
            store(peaks, extent.most);
            for (int i = 0; i < W; i++) {
                inverses[i] = peaks[i] < least_peak ? 0.0f : largest_weight / peaks[i];
                peaks[i] = peaks[i] < least_peak ? 0.0f : peaks[i] / largest_weight;
            }
            inverse = load(inverses), scale = add(load(peaks), extent.none);
        }
        store(scales + c, scale);
        for (Index key = 0; key < key_block; key += step) {
            V codes[step];
            for (int i = 0; i < step; i++) codes[i] = mul(value(key + i), inverse);
            store_steps(column + key * tile, codes);
        }
    }
}

// Scores of block_rows queries from `row` on with the block's first `keys` keys; those of the others are no_peak.
INLINE void score(const FullAttend& a, Index row, Index block, Index keys, float (*scores)[key_block]) {
    const Index width = code_stride(a.D);
    const Code* codes = static_cast<const Code*>(a.head.keys) + block * a.head.keys_size;
    const float* key_scales = a.head.key_scales + block * a.head.key_scales_size;
    for (Index first = 0; first < keys; first += tile)
        for (Index g = 0; g < a.q.groups; g++) {
            const Index c = g * group_depth, steps = padded(smaller(group_depth, a.D - c), step) / step;
            const float *q_scales = a.q.scales + row * a.q.groups + g, *k_scales = key_scales + g * key_block + first;
            products(codes + first * width + c * tile, static_cast<const Code*>(a.q.codes) + row * a.q.stride + c,
                     a.q.stride, steps, [&](int r, int v, V x) {
                         float* to = scores[r] + first + v * W;
                         x = mul(x, mul(load(k_scales + v * W), set1(q_scales[r * a.q.groups])));
                         store(to, g == 0 ? x : add(x, load(to)));
                     });
        }
    for (int r = 0; r < block_rows; r++)
        for (Index i = keys; i < key_block; i++) scores[r][i] = no_peak;
}

// Some queries and one block of keys.
INLINE void attend_block(const FullAttend& a, Index row, Index block, float* out, float* peak, float* total) {
    constexpr int lanes = (block_rows + W - 1) / W * W;
    const Index keys = smaller(key_block, a.keys - block * key_block), width = padded(a.D, tile);
    alignas(64) float scores[block_rows][key_block];
    alignas(64) Code weights[block_rows][key_block];
    alignas(64) float peaks[lanes] = {}, before[lanes] = {}, shrink[lanes], grow[lanes];
    score(a, row, block, keys, scores);
    for (int r = 0; r < block_rows; r++) {
        V most = load(scores[r]);
        for (Index i = W; i < key_block; i += W) most = max_of(most, load(scores[r] + i));
        peaks[r] = peak_of(most);
    }
    float totals[block_rows];
    for (int r = 0; r < block_rows; r++) {
        const V largest = set1(peaks[r]);
        I sums = i_zero();
        for (Index i = 0; i < key_block; i += W)
            sums = i_add(sums, store_codes(weights[r] + i, exp2_(sub(load(scores[r] + i), largest), largest_weight)));
        totals[r] = sum(i_float(sums));
    }
    for (int r = 0; r < block_rows; r++) {
        before[r] = peak[r];
        peak[r] = before[r] > peaks[r] ? before[r] : peaks[r];
        before[r] -= peak[r], peaks[r] -= peak[r];
    }
    for (int i = 0; i < lanes; i += W) {
        store(shrink + i, exp2_(load(before + i), 1.0f));
        store(grow + i, exp2_(load(peaks + i), 1.0f / largest_weight));
    }
    for (int r = 0; r < block_rows; r++) total[r] = total[r] * shrink[r] + totals[r] * grow[r];
    const Code* codes = static_cast<const Code*>(a.head.values) + block * a.head.values_size;
    const float* scales = a.head.value_scales + block * a.head.value_scales_size;
    for (Index c = 0; c < width; c += tile)
        products(codes + c * key_block, weights[0], key_block, padded(keys, step) / step, [&](int r, int v, V x) {
            float* to = out + r * width + c + v * W;
            const V scale = mul(load(scales + c + v * W), set1(grow[r]));
            store(to, fma(x, scale, mul(load(to), set1(shrink[r]))));
        });
}

void attend(const FullAttend& a) {
    const Index width = padded(a.D, tile), rows = padded(a.rows, block_rows);
    float *out = a.work, *peak = out + piece_queries * width, *total = peak + piece_queries;
    for (Index i = 0; i < rows * width; i++) out[i] = 0.0f;
    for (Index r = 0; r < rows; r++) peak[r] = no_peak, total[r] = 0.0f;
    for (Index block = 0; block * key_block < a.keys; block++)
        for (Index row = 0; row < rows; row += block_rows)
            attend_block(a, row, block, out + row * width, peak + row, total + row);
    for (Index r = 0; r < a.rows; r++)
        for (Index i = 0; i < a.D; i += W)
            store_upto(a.out + r * a.out_stride + i, mul(load(out + r * width + i), set1(1.0f / total[r])), a.D - i);
}

}  // namespace
}  // namespace edgeq
