// The causal convolution of some channels and tokens, and its SiLU.
#pragma once

#include "layers/vector-inl.h"

namespace edgeq {
namespace {

constexpr Index conv_block = 128;  // channels at a time, so that their taps stay near

// Some taps of one token, for a block of channels; `rows` are its inputs, oldest first. `out` goes on from the taps
// before, or stays a sum for those that follow.
INLINE void conv_token(float* out, const float* const* rows, const float (*taps)[conv_block + W], const Index width,
                       Index block, const bool goes_on, const bool more) {
    auto channels = [&](Index c, Index n) {
        V total = goes_on ? load_upto(out + c, n) : set1(0.0f);
        for (Index i = 0; i < width; i++) total = fma(load_upto(rows[i] + c, n), load_upto(taps[i] + c, n), total);
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
            conv_taps(y, y_stride, x, x_stride, tail, t_stride, w, width, t0, t1, c0, smaller(conv_block, n - c0),
                      first, smaller(conv_widest, width - first));
}

}  // namespace
}  // namespace edgeq
