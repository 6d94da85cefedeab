// Attention over all keys of a span, block by block with a running maximum (Dao et al., "FlashAttention",
// arXiv:2205.14135; Milakov and Gimelshein, arXiv:1805.02867), on codes: the weights of a block's keys are codes of
// their own, under the block's own largest, and what is merged into the sums has that as a factor.
#pragma once

#include "vision/multiply-inl.h"

namespace edgeq {
namespace {

// 2^x for x <= 0, and almost 0 far below: 2^n, n the integer below, times a polynomial in the rest, within 2.6e-6
// (least largest relative error, by Lawson's iteration).
INLINE V exp2_(V x) {
    const V rest = fraction(x);
    V p = set1(0.013534168f);
    p = fma(p, rest, set1(0.05201146f));
    p = fma(p, rest, set1(0.24144275f));
    p = fma(p, rest, set1(0.69300383f));
    p = fma(p, rest, set1(1.0000026f));
    return scale2(p, x);
}

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
                    key < keys ? encode_group(k + key * stride + c, n, 1.0f, key_length, codes) : 0.0f;
                clear(codes, key < keys ? padded(n, W) : 0, some);
            }
            to_tile(rows, some, some / step, to + first / tile * tile * width + first % tile * step + c * tile);
        }
}

void pack_values(const float* v, Index stride, Index keys, Index D, const PackedHead& head, Index block) {
    Code* to = static_cast<Code*>(head.values) + block * head.values_size;
    float* scales = head.value_scales + block * head.value_scales_size;
    for (Index c = 0; c < padded(D, tile); c += W) {
        Code* column = to + c / tile * tile * key_block + c % tile * step;
        auto value = [&](Index key) {
            return c < D && key < keys ? load_upto(v + key * stride + c, D - c) : set1(0.0f);
        };
        float scale[W], inverse[W];
        for (int i = 0; i < W; i++) scale[i] = inverse[i] = 1.0f;
        if (!floats) {
            V sums = set1(0.0f), most = set1(0.0f);
            for (Index key = 0; key < keys; key++)
                sums = fma(value(key), value(key), sums), most = max_of(most, abs_of(value(key)));
            float squares[W], peaks[W];
            store(squares, sums), store(peaks, most);
            for (int i = 0; i < W; i++) {
                scale[i] = scale_of(length_of(squares[i], peaks[i], keys), peaks[i], value_length);
                inverse[i] = reciprocal(scale[i]);
            }
        }
        for (int i = 0; i < W; i++) scales[c + i] = scale[i];
        for (Index key = 0; key < key_block; key += step) {
            V codes[step];
            for (int i = 0; i < step; i++) codes[i] = mul(value(key + i), load(inverse));
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

// Some queries and one block of keys. A key's weight is its share 2^(score - the block's largest).
INLINE void attend_block(const FullAttend& a, Index row, Index block, float* out, float* peak, float* total) {
    constexpr int lanes = (block_rows + W - 1) / W * W;
    const Index keys = smaller(key_block, a.keys - block * key_block), width = padded(a.D, tile);
    alignas(64) float scores[block_rows][key_block];
    alignas(64) Code shares[block_rows][key_block];
    alignas(64) float peaks[lanes] = {}, totals[lanes] = {}, scales[lanes] = {}, shrink[lanes], grow[lanes];
    score(a, row, block, keys, scores);
    for (int r = 0; r < block_rows; r++) {
        V most = load(scores[r]);
        for (Index i = W; i < key_block; i += W) most = max_of(most, load(scores[r] + i));
        peaks[r] = peak_of(most);
    }
    for (int r = 0; r < block_rows; r++) {
        const V largest = set1(peaks[r]);
        V squares = set1(0.0f);
        for (Index i = 0; i < key_block; i += W) {
            const V share = exp2_(sub(load(scores[r] + i), largest));
            squares = fma(share, share, squares);
            store(scores[r] + i, share);
        }
        scales[r] = floats ? 1.0f : __builtin_sqrtf(sum(squares)) / share_length;
    }
    for (int r = 0; r < block_rows; r++) {
        const V inverse = set1(1.0f / scales[r]);
        I sums = i_zero();
        for (Index i = 0; i < key_block; i += W)
            sums = i_add(sums, store_codes(shares[r] + i, mul(load(scores[r] + i), inverse)));
        totals[r] = sum(i_float(sums));
    }
    for (int i = 0; i < block_rows; i += W) {
        const Index some = block_rows - i;
        const V before = load_upto(peak + i, some), here = load(peaks + i), now = max_of(before, here);
        store(shrink + i, exp2_(sub(before, now)));
        store(grow + i, mul(exp2_(sub(here, now)), load(scales + i)));
        store_upto(peak + i, now, some);
    }
    const Code* codes = static_cast<const Code*>(a.head.values) + block * a.head.values_size;
    const float* value_scales = a.head.value_scales + block * a.head.value_scales_size;
    for (Index c = 0; c < width; c += tile)
        products(codes + c * key_block, shares[0], key_block, padded(keys, step) / step, [&](int r, int v, V x) {
            float* to = out + r * width + c + v * W;
            const V scale = mul(load(value_scales + c + v * W), set1(grow[r]));
            store(to, fma(x, scale, mul(load(to), set1(shrink[r]))));
        });
    for (int i = 0; i < block_rows; i += W) {
        const V sums =
            fma(load(totals + i), load(grow + i), mul(load_upto(total + i, block_rows - i), load(shrink + i)));
        store_upto(total + i, sums, block_rows - i);
    }
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
