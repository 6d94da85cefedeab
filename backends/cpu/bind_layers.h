// The arrays and sequences that the bindings of layers/ take.
//
// Inputs are float32 with a contiguous last axis and any strides before; outputs are contiguous and made by the caller.
#pragma once

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "bind_checks.h"
#include "layers/layers.h"

namespace edgeq {

using In = nb::ndarray<const float, nb::device::cpu>;
using Out = nb::ndarray<float, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
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
    return {x.data(), entries({inner, outer}), Index(x.shape(last)), inner < 1 ? 1 : inner, last == 2 ? x.stride(0) : 0,
            last == 0 ? 0 : x.stride(last - 1)};
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

// --- sequences --------------------------------------------------------------------------------------------------------

constexpr const char* delta_tuple = "tuples (tokens, state, (states after)), a state being (conv, matrix)";

// The sequences of a call, and their arrays.
struct DeltaSequences {
    std::vector<DeltaSequence> sequences;
    std::vector<std::vector<float*>> after;  // not moved once a sequence points into it
    std::vector<In> inputs;
    std::vector<Out> outputs;

    // Together they have `tokens` tokens.
    DeltaSequences(nb::handle tuples, const DeltaNet& net, Index tokens) {
        const nb::tuple all = items_of(tuples, "sequences", delta_tuple);
        after.reserve(2 * nb::len(all));
        for (nb::handle tuple : all) {
            const nb::tuple parts = items_of(tuple, "sequences", delta_tuple, 3);
            const Index n = item<Index>(parts[0], "sequences", delta_tuple);
            require(0 < n && n >= net.keep, "sequences", "at least one token, and as many as states are kept");
            require(n <= tokens, "sequences", "as many tokens as x has rows");
            add(n, parts[1], parts[2], net);
            tokens -= n;
        }
        require(tokens == 0, "sequences", "as many tokens as x has rows");
    }

private:
    // The arrays of a state, its convolution's tail and its matrix, which `held` keeps.
    template <class A>
    static auto arrays(nb::handle state, const DeltaNet& net, std::vector<A>& held) {
        const nb::tuple parts = items_of(state, "sequences", delta_tuple, 2);
        const A tail = item<A>(parts[0], "conv", "a float32 array");
        const A matrix = item<A>(parts[1], "matrix", "a float32 array");
        require_shape(tail, "conv", {net.width - 1, 2 * net.Hk * net.K + net.Hv * net.V});
        require_shape(matrix, "matrix", {net.Hv, net.V, net.K});
        require_contiguous(tail, "conv");
        require_contiguous(matrix, "matrix");
        held.push_back(tail);
        held.push_back(matrix);
        return std::pair(tail.data(), matrix.data());
    }

    void add(Index n, nb::handle before, nb::handle states, const DeltaNet& net) {
        const std::string count = std::to_string(net.keep + 1) + " states";
        after.emplace_back();
        after.emplace_back();
        for (nb::handle state : items_of(states, "states after", count.c_str(), net.keep + 1)) {
            const auto [tail, matrix] = arrays(state, net, outputs);
            after[after.size() - 2].push_back(tail);
            after.back().push_back(matrix);
        }
        const auto [tail, matrix] = arrays(before, net, inputs);
        sequences.push_back({n, tail, matrix, after[after.size() - 2].data(), after.back().data()});
    }
};

inline KvType kv_type(const char* name) {
    if (std::string(name) == "f16") return KvType::f16;
    if (std::string(name) == "bf16") return KvType::bf16;
    if (std::string(name) == "f32") return KvType::f32;
    if (std::string(name) == "int8") return KvType::int8;
    if (std::string(name) == "int4") return KvType::int4;
    throw nb::value_error("dtype: expected f16, bf16, f32, int8 or int4");
}

inline Index page_nbytes(const char* dtype, Index heads, Index D) {
    require(0 < heads && heads < 1 << 20 && 0 < D && D < 1 << 20, "heads, D", "1 to a million");
    return kv_page_nbytes(kv_type(dtype), heads, D);
}

inline Bytes page_of(nb::handle x, Index nbytes) {
    Bytes page = item<Bytes>(x, "pages", "writable uint8 arrays");
    if (Index(page.size()) != nbytes) refuse("pages", std::to_string(nbytes) + " bytes each");
    require(reinterpret_cast<uintptr_t>(page.data()) % sizeof(float) == 0, "pages", "aligned data");  // of scales, too
    return page;
}

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

// q, k or v [T, H, D], any strides before the last axis.
inline Heads heads_of(const In& x, const char* name, Index T, Index H, Index D) {
    require_shape(x, name, {T, H, D});
    require_readable(x, name);
    return {x.data(), x.stride(0), x.stride(1)};
}

constexpr const char* kv_tuple = "tuples (tokens, past, [pages])";

// The sequences of a call, and their pages.
struct KvSequences {
    std::vector<KvSequence> sequences;
    std::vector<std::vector<uint8_t*>> pages;  // not moved once a sequence points into it
    std::vector<Bytes> held;

    // Together they have `tokens` tokens; a page has `nbytes`.
    KvSequences(nb::handle tuples, Index nbytes, Index tokens) {
        const nb::tuple all = items_of(tuples, "sequences", kv_tuple);
        pages.reserve(nb::len(all));
        for (nb::handle tuple : all) {
            const nb::tuple parts = items_of(tuple, "sequences", kv_tuple, 3);
            const Index n = item<Index>(parts[0], "sequences", kv_tuple);
            const Index past = item<Index>(parts[1], "sequences", kv_tuple);
            require(n > 0 && past >= 0 && past < Index(1) << 40, "sequences", "at least one token, and none before zero");
            require(n <= tokens, "sequences", "as many tokens as rows");
            pages.emplace_back();
            for (nb::handle page : items_of(parts[2], "pages", "a list of them")) {
                held.push_back(page_of(page, nbytes));
                pages.back().push_back(held.back().data());
            }
            require(Index(pages.back().size()) * kv_page >= past + n, "pages", "room for all tokens");
            sequences.push_back({n, past, pages.back().data()});
            tokens -= n;
        }
        require(tokens == 0, "sequences", "as many tokens as rows");
    }
};

}  // namespace edgeq
