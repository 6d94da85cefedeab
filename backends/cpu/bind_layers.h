// The arrays and sequences that the bindings of layers/ take.
//
// Inputs are float32 with a contiguous last axis and any strides before; outputs are contiguous and made by the caller.
#pragma once

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind_checks.h"
#include "blocks.h"
#include "layers/layers.h"

namespace edgeq {

using In = nb::ndarray<const float, nb::device::cpu>;
using Out = nb::ndarray<float, nb::device::cpu>;
using MaybeIn = std::optional<In>;

// --- arrays ----------------------------------------------------------------------------------------------------------

inline const float* vector_of(const In& x, const char* name, Index n) {
    require_shape(x, name, {n});
    require_contiguous(x, name);
    return x.data();
}

// An array as rows of its last axis, whatever the (at most two) axes before it.
template <class T>
struct Grid {
    T* data;
    Index rows, n, inner, outer_stride, inner_stride;
    T* operator[](Index row) const { return data + row / inner * outer_stride + row % inner * inner_stride; }
};

template <class T, class A>
Grid<T> grid(const A& x, const char* name) {
    require_readable(x, name);
    require(1 <= x.ndim() && x.ndim() <= 3, name, "1 to 3 axes");
    if (is_empty(x)) return {x.data(), 0, 0, 1, 0, 0};
    const size_t last = x.ndim() - 1;
    const Index inner = last == 0 ? 1 : x.shape(last - 1), outer = last == 2 ? x.shape(0) : 1;
    const Index outer_stride = last == 2 ? x.stride(0) : 0, inner_stride = last == 0 ? 0 : x.stride(last - 1);
    return {x.data(), entries({inner, outer}), Index(x.shape(last)), inner, outer_stride, inner_stride};
}

inline Grid<float> output(const Out& y, const In& like) {
    require_same_shape(y, "out", like);
    require_contiguous(y, "out");
    return grid<float>(y, "out");
}

// [T, columns...] as rows of a token; the columns lie one after another.
inline Rows<const float> tokens_of(const In& x, const char* name, std::initializer_list<Index> shape) {
    require_shape(x, name, shape);
    require_contiguous(x, name, 1);
    return {x.data(), x.stride(0)};
}

// Output arrays of a shape, one for every kept state.
struct Outputs {
    std::vector<Out> arrays;
    std::vector<float*> pointers;

    Outputs(nb::handle sequence, const char* name, Index count, std::initializer_list<Index> shape) {
        const std::string expected = std::to_string(count) + " arrays";
        for (nb::handle x : items_of(sequence, name, expected.c_str(), count)) {
            arrays.push_back(item<Out>(x, name, "writable float32 arrays"));
            require_shape(arrays.back(), name, shape);
            require_contiguous(arrays.back(), name);
            pointers.push_back(arrays.back().data());
        }
    }
};

// --- memory that comes and goes with every token --------------------------------------------------------------------

// A block that goes back when it is let go.
struct Owned {
    const size_t nbytes;
    Block block;
    explicit Owned(size_t nbytes) : nbytes(nbytes), block(take_block(nbytes)) {}
    Owned(const Owned&) = delete;
    ~Owned() { give_back(block); }
};

// A block's memory, and the Python object that keeps it.
inline std::pair<char*, nb::capsule> owned_block(size_t nbytes) {
    auto owned = std::make_unique<Owned>(nbytes);
    nb::capsule owner(owned.get(), [](void* p) noexcept { delete static_cast<Owned*>(p); });
    return {owned.release()->block.data, owner};
}

// --- pages of keys and values ---------------------------------------------------------------------------------------

inline KvType kv_type(const char* name) {
    if (std::string(name) == "f16") return KvType::f16;
    if (std::string(name) == "bf16") return KvType::bf16;
    if (std::string(name) == "f32") return KvType::f32;
    if (std::string(name) == "int8") return KvType::int8;
    if (std::string(name) == "int4") return KvType::int4;
    throw nb::value_error("dtype: expected f16, bf16, f32, int8 or int4");
}

// Somebody else's bytes, of a mapped file for example.
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Room for kv_page tokens of a layer, or such a page in memory of somebody else's, which is only read. How many tokens
// are in use by somebody is Python's to say.
class Page {
public:
    const KvType type;
    const Index heads, D, size, nbytes;  // bytes, and those of its own memory
    Index written = 0;
    static inline std::atomic<size_t> held_nbytes{0};  // by all pages

    Page(KvType type, Index heads, Index D)
        : type(type), heads(checked(heads)), D(checked(D)), size(kv_page_nbytes(type, heads, D)), nbytes(size) {
        owned_.emplace(nbytes);
        data_ = reinterpret_cast<uint8_t*>(owned_->block.data);
        held_nbytes += nbytes;
    }
    Page(KvType type, Index heads, Index D, Bytes memory)
        : type(type), heads(checked(heads)), D(checked(D)), size(kv_page_nbytes(type, heads, D)), nbytes(0),
          others_(std::move(memory)), data_(const_cast<uint8_t*>(others_.data())) {
        require(Index(others_.shape(0)) == size, "memory", "the bytes of a page", others_.shape(0));
        written = kv_page;
    }
    ~Page() { held_nbytes -= nbytes; }
    Page(const Page&) = delete;

    // Of the first tokens; the rest is zero.
    Page* copy(Index tokens) const {
        require(0 <= tokens && tokens <= kv_page, "tokens", "at most a page's", tokens);
        auto page = std::make_unique<Page>(type, heads, D);
        if (tokens == kv_page) {
            std::memcpy(page->data_, data_, size);
        } else {
            std::memset(page->data_, 0, size);
            copy_tokens(data_, page->data_, type, heads, D, tokens);
        }
        return page.release();
    }

    uint8_t* data() const { return data_; }
    bool writable() const { return owned_.has_value(); }

private:
    std::optional<Owned> owned_;
    Bytes others_;
    uint8_t* data_;

    static Index checked(Index n) {
        require(0 < n && n < 1 << 20, "heads, dim", "1 to a million", n);
        return n;
    }
};

// A sequence that has room for `tokens` more; its pages are of one type, for these heads of width D. The tuple keeps
// them.
inline KvSequence kv_sequence(Index tokens, Index past, const nb::tuple& pages, Index heads, Index D, KvType& type) {
    require(tokens > 0 && past >= 0 && past < Index(1) << 40, "past", "at least one token, and none before zero");
    KvSequence s{tokens, past, {}};
    for (nb::handle x : pages) {
        const Page* page = item<const Page*>(x, "pages", "Page objects");
        if (!page) refuse_type("pages", "Page objects");
        if (s.pages.empty()) type = page->type;
        require(page->type == type && page->heads == heads && page->D == D, "pages",
                "one type, the heads and the width");
        require(page->writable() || Index(s.pages.size() + 1) * kv_page <= past, "pages",
                "memory of their own where tokens are written");
        s.pages.push_back(page->data());
    }
    require(Index(s.pages.size()) * kv_page >= past + tokens, "pages", "room for all tokens");
    return s;
}

// --- heads -----------------------------------------------------------------------------------------------------------

// Cosines and sines [T, pairs]; returns the pairs.
inline Index angles(const In& cos, const In& sin, Index T, Index D) {
    require(cos.ndim() == 2, "cos", "2 axes");
    const Index pairs = cos.shape(1);
    require(pairs <= D / 2, "cos", "at most half the head's width of pairs");
    require_shape(cos, "cos", {T, pairs});
    require_shape(sin, "sin", {T, pairs});
    require_contiguous(cos, "cos");
    require_contiguous(sin, "sin");
    return pairs;
}

using Positions = nb::ndarray<const int32_t, nb::ndim<2>, nb::device::cpu>;

// q, k or v [T, H, D], any strides before the last axis.
inline Heads heads_of(const In& x, const char* name, Index T, Index H, Index D) {
    require_shape(x, name, {T, H, D});
    require_readable(x, name);
    return {x.data(), x.stride(0), x.stride(1)};
}

}  // namespace edgeq
