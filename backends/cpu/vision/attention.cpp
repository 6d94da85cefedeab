// Full attention: keys and values are packed first, head by head and block by block; then every piece takes some
// queries of a head through all keys of their span.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/threads.h"
#include "vision/packed.h"

namespace edgeq {

// --- keys and values -------------------------------------------------------------------------------------------------

PackedKeys::PackedKeys(Index heads, Index D, const std::vector<Index>& spans) : heads(heads), D(D) {
    const VisionKernels& kernels = vision_kernels();
    Index first = 0;
    for (Index tokens : spans) {
        this->spans.push_back({first, tokens, Index(blocks.size())});
        for (Index at = 0; at < tokens; at += key_block)
            blocks.push_back({first + at, std::min<Index>(key_block, tokens - at), Index(this->spans.size()) - 1});
        first += tokens;
    }
    const Index width = padded(D, kernels.tile), count = Index(blocks.size());
    sizes_.keys_size = key_block * code_stride(D), sizes_.values_size = key_block * width;
    sizes_.key_scales_size = key_block * code_groups(D), sizes_.value_scales_size = width;
    codes_.resize(heads * count * (sizes_.keys_size + sizes_.values_size) * kernels.code_nbytes);
    scales_.resize(heads * count * (sizes_.key_scales_size + sizes_.value_scales_size));
}

PackedHead PackedKeys::head(Index head, Index span) {
    const Index count = Index(blocks.size()), at = head * count + spans[span].block, all = heads * count;
    const Index code = vision_kernels().code_nbytes;
    PackedHead packed = sizes_;
    packed.keys = codes_.data() + at * packed.keys_size * code;
    packed.values = codes_.data() + (all * packed.keys_size + at * packed.values_size) * code;
    packed.key_scales = scales_.data() + at * packed.key_scales_size;
    packed.value_scales = scales_.data() + all * packed.key_scales_size + at * packed.value_scales_size;
    return packed;
}

void PackedKeys::pack(const Heads& k, const Heads& v, Index begin, Index end, Index first) {
    const VisionKernels& kernels = vision_kernels();
    parallel_for((end - begin) * heads, [&](int piece) {
        const Index i = begin + piece / heads, h = piece % heads;
        const KeyBlock& block = blocks[i];
        const Index within = i - spans[block.span].block, t = block.first - first;
        const PackedHead to = head(h, block.span);
        kernels.pack_keys(k.at(t, h), k.stride, block.keys, D, to, within);
        kernels.pack_values(v.at(t, h), v.stride, block.keys, D, to, within);
    });
}

// --- queries ---------------------------------------------------------------------------------------------------------

namespace {

struct Scratch {
    ScratchVector<char> codes;
    Floats scales, work;
};

thread_local Scratch scratch_of_thread;

}  // namespace

void PackedKeys::attend(const Heads& q, Index begin, Index end, float* out, Index out_stride) {
    const VisionKernels& kernels = vision_kernels();
    std::vector<KeyBlock> pieces;  // queries that go together
    for (Index i = 0; i < Index(spans.size()); i++) {
        const Index from = std::max(begin, spans[i].first), to = std::min(end, spans[i].first + spans[i].tokens);
        for (Index t = from; t < to; t += piece_queries) pieces.push_back({t, std::min(piece_queries + t, to) - t, i});
    }
    const float factor = float(1.0 / std::sqrt(double(D)) * std::log2(std::exp(1.0)));
    parallel_for(heads * Index(pieces.size()), [&](int i) {
        const Index h = i / Index(pieces.size());
        const KeyBlock& piece = pieces[i % Index(pieces.size())];
        Scratch& scratch = scratch_of_thread;
        Codes codes{nullptr, nullptr, code_stride(D), code_groups(D)};
        make_room(scratch.codes, piece_queries * codes.stride * kernels.code_nbytes);
        make_room(scratch.scales, piece_queries * codes.groups);
        make_room(scratch.work, attend_work(D, kernels.tile));
        codes.codes = scratch.codes.data(), codes.scales = scratch.scales.data();
        const Index t = piece.first - begin;
        for (Index r = 0; r < piece.keys; r++) kernels.encode(q.at(t + r, h), D, factor, key_length, codes, r);
        kernels.attend({piece.keys, spans[piece.span].tokens, D, codes, head(h, piece.span),
                        out + t * out_stride + h * D, out_stride, scratch.work.data()});
    });
}

void full_attention(const Heads& q, const Heads& k, const Heads& v, Index H, Index D, const std::vector<Index>& spans,
                    float* out) {
    PackedKeys packed(H, D, spans);
    packed.pack(k, v, 0, Index(packed.blocks.size()), 0);
    Index T = 0;
    for (Index tokens : spans) T += tokens;
    packed.attend(q, 0, T, out, H * D);
}

}  // namespace edgeq
