// What the bindings of layers/ check, before a kernel sees a pointer.
//
// Inputs are float32 with a contiguous last axis and any strides before; outputs are contiguous and made by the caller.
// A wrong dtype is a TypeError (of nanobind), everything else that is wrong a ValueError that names the argument.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "layers/layers.h"

namespace edgeq {

namespace nb = nanobind;

using In = nb::ndarray<const float, nb::device::cpu>;
using Out = nb::ndarray<float, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MaybeIn = std::optional<In>;

// --- checks ----------------------------------------------------------------------------------------------------------

[[noreturn]] inline void refuse(const char* name, const std::string& expected) {
    throw nb::value_error((std::string(name) + ": expected " + expected).c_str());
}

inline void require(bool condition, const char* name, const char* expected) {
    if (!condition) refuse(name, expected);
}

inline std::string text(std::initializer_list<Index> shape) {
    std::string all;
    for (Index n : shape) all += (all.empty() ? "[" : ", ") + std::to_string(n);
    return all + "]";
}

template <class A>
void require_shape(const A& x, const char* name, std::initializer_list<Index> shape) {
    bool same = x.ndim() == shape.size();
    size_t i = 0;
    for (Index n : shape) same = same && Index(x.shape(i++)) == n;
    if (!same) refuse(name, "shape " + text(shape));
}

template <class A>
void require_readable(const A& x, const char* name) {
    require(reinterpret_cast<uintptr_t>(x.data()) % sizeof(float) == 0, name, "aligned data");
    const size_t last = x.ndim() - 1;
    require(x.ndim() >= 1 && (x.shape(last) <= 1 || x.stride(last) == 1), name, "a contiguous last axis");
}

// Axes `from` and later lie one after another.
template <class A>
void require_contiguous(const A& x, const char* name, size_t from = 0) {
    require_readable(x, name);
    Index size = 1;
    for (size_t i = x.ndim(); i-- > from;) {
        require(x.shape(i) <= 1 || x.stride(i) == size, name, "a contiguous array");
        size *= x.shape(i);
    }
}

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
    require(x.ndim() <= 3, name, "at most 3 axes");
    const size_t last = x.ndim() - 1;
    const Index inner = last == 0 ? 1 : x.shape(last - 1), outer = last == 2 ? x.shape(0) : 1;
    return {x.data(), inner * outer, Index(x.shape(last)), inner < 1 ? 1 : inner, last == 2 ? x.stride(0) : 0,
            last == 0 ? 0 : x.stride(last - 1)};
}

template <class A, class B>
void require_same_shape(const A& x, const char* name, const B& like) {
    bool same = x.ndim() == like.ndim();
    for (size_t i = 0; same && i < x.ndim(); i++) same = x.shape(i) == like.shape(i);
    require(same, name, "the other arguments' shape");
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
inline std::vector<float*> outputs(const nb::list& arrays, const char* name, Index count,
                                   std::initializer_list<Index> shape) {
    if (Index(nb::len(arrays)) != count) refuse(name, std::to_string(count) + " arrays");
    std::vector<float*> pointers;
    for (nb::handle item : arrays) {
        Out array;
        if (!nb::try_cast<Out>(item, array, false))
            throw nb::type_error((std::string(name) + ": expected writable float32 arrays").c_str());
        require_shape(array, name, shape);
        require_contiguous(array, name);
        pointers.push_back(array.data());
    }
    return pointers;
}

// --- sequences --------------------------------------------------------------------------------------------------------

// Items of a tuple that describes a sequence.
template <class T>
T item(const nb::handle& tuple, size_t i, const char* expected) {
    T value;
    if (!nb::try_cast<T>(tuple[i], value, false))
        throw nb::type_error(("sequences: expected tuples " + std::string(expected)).c_str());
    return value;
}

constexpr const char* delta_tuple = "(tokens, state, (states after)), a state being (conv, matrix)";

// The arrays of a state, its convolution's tail and its matrix.
template <class A>
auto state_arrays(const nb::handle& state, const DeltaNet& net) {
    require(nb::isinstance<nb::tuple>(state) && nb::len(state) == 2, "sequences", delta_tuple);
    const A tail = item<A>(state, 0, "of float32 arrays"), matrix = item<A>(state, 1, "of float32 arrays");
    require_shape(tail, "conv", {net.width - 1, 2 * net.Hk * net.K + net.Hv * net.V});
    require_shape(matrix, "matrix", {net.Hv, net.V, net.K});
    require_contiguous(tail, "conv");
    require_contiguous(matrix, "matrix");
    return std::pair(tail.data(), matrix.data());
}

// The sequences and their arrays; Python's tuples keep the memory.
struct DeltaSequences {
    std::vector<DeltaSequence> sequences;
    std::vector<std::vector<float*>> after;  // not moved once a sequence points into it
    Index tokens = 0;

    DeltaSequences(const nb::list& tuples, const DeltaNet& net) {
        after.reserve(2 * nb::len(tuples));
        for (nb::handle tuple : tuples) {
            require(nb::isinstance<nb::tuple>(tuple) && nb::len(tuple) == 3, "sequences", delta_tuple);
            const Index n = item<Index>(tuple, 0, delta_tuple);
            require(n > 0 && n >= net.keep, "sequences", "at least one token, and as many as states are kept");
            const nb::tuple before = item<nb::tuple>(tuple, 1, delta_tuple);
            const nb::tuple states = item<nb::tuple>(tuple, 2, delta_tuple);
            if (Index(nb::len(states)) != net.keep + 1) refuse("states after", std::to_string(net.keep + 1) + " states");
            after.emplace_back();
            after.emplace_back();
            for (nb::handle state : states) {
                const auto [tail, matrix] = state_arrays<Out>(state, net);
                after[after.size() - 2].push_back(tail);
                after.back().push_back(matrix);
            }
            const auto [tail, matrix] = state_arrays<In>(before, net);
            sequences.push_back({n, tail, matrix, after[after.size() - 2].data(), after.back().data()});
            tokens += n;
        }
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

inline uint8_t* page_of(const nb::handle& item, Index nbytes) {
    Bytes page;
    if (!nb::try_cast<Bytes>(item, page, false)) throw nb::type_error("pages: expected writable uint8 arrays");
    if (Index(page.size()) != nbytes) refuse("pages", std::to_string(nbytes) + " bytes each");
    require(reinterpret_cast<uintptr_t>(page.data()) % sizeof(float) == 0, "pages", "aligned data");
    return page.data();
}

// Cosines and sines [T, pairs]; returns the pairs.
inline Index angles(const In& cos, const In& sin, Index T, Index D) {
    require(cos.ndim() == 2, "cos", "2 axes");
    const Index pairs = cos.shape(1);
    require(2 * pairs <= D, "cos", "at most half the head's width of pairs");
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

constexpr const char* kv_tuple = "(tokens, past, [pages])";

// The sequences and their pages; Python's tuples keep the memory.
struct KvSequences {
    std::vector<KvSequence> sequences;
    std::vector<std::vector<uint8_t*>> pages;  // not moved once a sequence points into it
    Index tokens = 0;

    KvSequences(const nb::list& tuples, Index nbytes) {
        pages.reserve(nb::len(tuples));
        for (nb::handle tuple : tuples) {
            require(nb::isinstance<nb::tuple>(tuple) && nb::len(tuple) == 3, "sequences", kv_tuple);
            const Index n = item<Index>(tuple, 0, kv_tuple), past = item<Index>(tuple, 1, kv_tuple);
            require(n > 0 && past >= 0 && past < Index(1) << 40, "sequences", "at least one token");
            pages.emplace_back();
            for (nb::handle page : item<nb::list>(tuple, 2, kv_tuple)) pages.back().push_back(page_of(page, nbytes));
            require(Index(pages.back().size()) * kv_page >= past + n, "pages", "room for all tokens");
            sequences.push_back({n, past, pages.back().data()});
            tokens += n;
        }
    }
};

}  // namespace edgeq
