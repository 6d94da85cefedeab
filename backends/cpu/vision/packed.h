// The keys and values of all heads and spans, packed for the kernels.
#pragma once

#include <vector>

#include "vision/vision.h"

namespace edgeq {

// Some tokens, from the `first` of all on, which lie in one span: keys of a block, or queries that go together.
struct KeyBlock {
    Index first, keys, span;
};

class PackedKeys {
public:
    struct Span {
        Index first, tokens, block;  // its first block
    };
    const Index heads, D;
    std::vector<Span> spans;
    std::vector<KeyBlock> blocks;  // of all spans, in order

    PackedKeys(Index heads, Index D, const std::vector<Index>& spans);

    // Blocks [begin, end), whose keys and values are those from token `first` on.
    void pack(const Heads& k, const Heads& v, Index begin, Index end, Index first);

    // Tokens [begin, end), whose queries these are, attend to their spans. `out` [token, head, D] may be where q lies.
    void attend(const Heads& q, Index begin, Index end, float* out, Index out_stride);

private:
    PackedHead head(Index head, Index span);

    PackedHead sizes_{};  // all but the pointers
    ScratchVector<char> codes_;
    Floats scales_;
};

}  // namespace edgeq
