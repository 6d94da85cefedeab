// The tower's blocks. Keys and values are made for all tokens first, band by band; then each band of tokens goes
// through the rest of the block by itself, so that nothing but x and the packed keys and values has room for all.
#include <algorithm>

#include "layers/rows.h"
#include "vision/packed.h"

namespace edgeq {
namespace {

// Some neighbouring blocks of keys, and their tokens.
struct Band {
    Index first, tokens, begin, end;
};

std::vector<Band> bands_of(const PackedKeys& packed) {
    std::vector<Band> bands;
    for (Index i = 0; i < Index(packed.blocks.size()); i++) {
        const KeyBlock& block = packed.blocks[i];
        if (bands.empty() || bands.back().tokens + block.keys > vision_band) bands.push_back({block.first, 0, i, i});
        bands.back().tokens += block.keys, bands.back().end = i + 1;
    }
    return bands;
}

struct Work {
    Projection q, kv, proj, fc1, fc2;
    Projection::Memory memory;
    Floats normed,
        wide;  // of a band: what a norm gives; keys and values, queries, or what lies within the feed-forward
};

void norm(const VisionTower& tower, const float* x, Index T, const float* gain, const float* bias, float* y) {
    const Index hidden = tower.hidden;
    each_row(T, hidden, [&](Index t) {
        vision_kernels().layer_norm(y + t * hidden, x + t * hidden, gain, bias, hidden, tower.eps);
    });
}

// Turns `count` vectors of every token of a band by the token's angles.
void rotate(const VisionTower& tower, Index first, Index T, Index count, float* x, Index stride) {
    const Index D = tower.hidden / tower.heads;
    each_row(T, count * D, [&](Index t) {
        const float *cos = tower.cos + (first + t) * tower.pairs, *sin = tower.sin + (first + t) * tower.pairs;
        for (Index h = 0; h < count; h++) {
            float* vector = x + t * stride + h * D;
            layer_kernels().rope(vector, vector, cos, sin, tower.pairs, D);
        }
    });
}

void pack_band(const VisionTower& tower, const VisionBlock& block, const Band& band, const float* x, PackedKeys& packed,
               Work& work) {
    const Index hidden = tower.hidden, D = hidden / tower.heads;
    float *h = work.normed.data(), *kv = work.wide.data();
    norm(tower, x + band.first * hidden, band.tokens, block.norm1, block.bias1, h);
    work.kv.multiply(h, band.tokens, {}, kv, 2 * hidden, work.memory);
    rotate(tower, band.first, band.tokens, tower.heads, kv, 2 * hidden);
    packed.pack({kv, 2 * hidden, D}, {kv + hidden, 2 * hidden, D}, band.begin, band.end, band.first);
}

void run_band(const VisionTower& tower, const VisionBlock& block, const Band& band, float* all, PackedKeys& packed,
              Work& work) {
    const Index hidden = tower.hidden, D = hidden / tower.heads, T = band.tokens;
    float *x = all + band.first * hidden, *h = work.normed.data(), *wide = work.wide.data();
    norm(tower, x, T, block.norm1, block.bias1, h);
    work.q.multiply(h, T, {}, wide, hidden, work.memory);
    rotate(tower, band.first, T, tower.heads, wide, hidden);
    packed.attend({wide, hidden, D}, band.first, band.first + T, wide, hidden);
    work.proj.multiply(wide, T, {nullptr, true, false}, x, hidden, work.memory);
    norm(tower, x, T, block.norm2, block.bias2, h);
    work.fc1.multiply(h, T, {nullptr, false, true}, wide, block.fc1.weight.out, work.memory);
    work.fc2.multiply(wide, T, {nullptr, true, false}, x, hidden, work.memory);
}

Index widest_of(Index hidden, Index wide) { return std::max(2 * hidden, wide); }

}  // namespace

size_t vision_nbytes(Index T, Index hidden, Index heads, Index wide) {
    const VisionKernels& kernels = vision_kernels();
    const Index D = hidden / heads, blocks = (T + key_block - 1) / key_block, band = std::min(T, vision_band);
    auto codes = [&](Index rows, Index n) {
        return rows * (code_stride(n) * kernels.code_nbytes + code_groups(n) * 4);
    };
    const Index keys = codes(key_block, D), values = padded(D, kernels.tile) * (key_block * kernels.code_nbytes + 4);
    const Index weights = codes(4 * hidden + wide, hidden) + codes(hidden, wide);
    const Index between = 4 * band * (hidden + widest_of(hidden, wide)) + codes(band, std::max(hidden, wide));
    return size_t(blocks * heads * (keys + values) + weights + between);
}

bool run_vision(const VisionTower& tower, float* x, const std::function<bool()>& go_on) {
    PackedKeys packed(tower.heads, tower.hidden / tower.heads, tower.spans);
    const std::vector<Band> bands = bands_of(packed);
    Index longest = 0, widest = 0;
    for (const Band& band : bands) longest = std::max(longest, band.tokens);
    for (const VisionBlock& block : tower.blocks)
        widest = std::max(widest, widest_of(tower.hidden, block.fc1.weight.out));
    Work work;
    work.normed.resize(longest * tower.hidden);
    work.wide.resize(longest * widest);
    for (const VisionBlock& block : tower.blocks) {
        const Index hidden = tower.hidden;
        work.kv.prepare(rows_of(block.qkv, hidden, 2 * hidden)), work.q.prepare(rows_of(block.qkv, 0, hidden));
        work.proj.prepare(block.proj), work.fc1.prepare(block.fc1), work.fc2.prepare(block.fc2);
        for (const Band& band : bands) pack_band(tower, block, band, x, packed, work);
        for (const Band& band : bands) {
            run_band(tower, block, band, x, packed, work);
            if (!go_on()) return false;
        }
    }
    return true;
}

}  // namespace edgeq
