// Everything of the seam that is no matrix product: checks what comes from Python and calls layers/.
//
// Inputs are float32 with contiguous last axis and any strides before; outputs are contiguous and made by the caller.
// A wrong dtype is a TypeError (of nanobind), everything else that is wrong a ValueError that names the argument.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <string>
#include <vector>

#include "kernels/threads.h"
#include "layers/layers.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace edgeq;

namespace {

using In = nb::ndarray<const float, nb::device::cpu>;
using Out = nb::ndarray<float, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MaybeIn = std::optional<In>;

// --- checks ----------------------------------------------------------------------------------------------------------

void require(bool condition, const char* name, const std::string& expected) {
    if (!condition) throw nb::value_error((std::string(name) + ": expected " + expected).c_str());
}

std::string text(std::initializer_list<Index> shape) {
    std::string all;
    for (Index n : shape) all += (all.empty() ? "[" : ", ") + std::to_string(n);
    return all + "]";
}

template <class A>
void require_shape(const A& x, const char* name, std::initializer_list<Index> shape) {
    bool same = x.ndim() == shape.size();
    size_t i = 0;
    for (Index n : shape) same = same && Index(x.shape(i++)) == n;
    require(same, name, "shape " + text(shape));
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

const float* vector_of(const In& x, const char* name, Index n) {
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

Grid<float> output(const Out& y, const In& like) {
    require_same_shape(y, "out", like);
    require_contiguous(y, "out");
    return grid<float>(y, "out");
}

// [T, columns...] as rows of a token; the columns lie one after another.
Rows<const float> tokens_of(const In& x, const char* name, std::initializer_list<Index> shape) {
    require_shape(x, name, shape);
    require_contiguous(x, name, 1);
    return {x.data(), x.stride(0)};
}

// --- norms and pointwise ---------------------------------------------------------------------------------------------

constexpr Index piece_size = 1 << 15;  // entries; fewer are not worth waking a thread

template <class Function>
void each_row(const Grid<float>& y, Function&& function) {
    nb::gil_scoped_release release;
    const Index rows = std::max<Index>(1, piece_size / std::max<Index>(1, y.n));
    parallel_for(int((y.rows + rows - 1) / rows), [&](int piece) {
        for (Index row = piece * rows, end = std::min(y.rows, row + rows); row < end; row++) function(row);
    });
}

using Pointwise = void (*)(float*, const float*, const float*, Index);

void pointwise(Pointwise kernel, const In& x, const In& z, const Out& out) {
    const auto y = output(out, x);
    require_same_shape(z, "second argument", x);
    const auto first = grid<const float>(x, "first argument"), second = grid<const float>(z, "second argument");
    each_row(y, [&](Index row) { kernel(y[row], first[row], second[row], y.n); });
}

void rms_norm(const In& x, const In& gain, const MaybeIn& gate, float eps, const Out& out) {
    const auto y = output(out, x);
    const auto from = grid<const float>(x, "x");
    const float* gains = vector_of(gain, "gain", y.n);
    const auto& kernels = layer_kernels();
    if (!gate) return each_row(y, [&](Index row) { kernels.rms_norm(y[row], from[row], gains, nullptr, y.n, eps); });
    require_same_shape(*gate, "gate", x);
    const auto gates = grid<const float>(*gate, "gate");
    each_row(y, [&](Index row) { kernels.rms_norm(y[row], from[row], gains, gates[row], y.n, eps); });
}

void l2_norm(const In& x, float eps, const Out& out) {
    const auto y = output(out, x);
    const auto from = grid<const float>(x, "x");
    each_row(y, [&](Index row) { layer_kernels().l2_norm(y[row], from[row], y.n, eps, 1.0f); });
}

// Cosines and sines [T, pairs]; returns the pairs.
Index angles(const In& cos, const In& sin, Index T, Index D) {
    require(cos.ndim() == 2, "cos", "2 axes");
    const Index pairs = cos.shape(1);
    require(2 * pairs <= D, "cos", "at most half the head's width of pairs");
    require_shape(cos, "cos", {T, pairs});
    require_shape(sin, "sin", {T, pairs});
    require_contiguous(cos, "cos");
    require_contiguous(sin, "sin");
    return pairs;
}

void rope(const In& x, const In& cos, const In& sin, const Out& out) {
    require(x.ndim() == 3, "x", "3 axes [T, H, D]");
    const auto y = output(out, x);
    const auto from = grid<const float>(x, "x");
    const Index pairs = angles(cos, sin, x.shape(0), y.n);
    each_row(y, [&](Index row) {
        const Index t = row / y.inner;
        layer_kernels().rope(y[row], from[row], cos.data() + t * pairs, sin.data() + t * pairs, pairs, y.n);
    });
}

// --- DeltaNet --------------------------------------------------------------------------------------------------------

// Output arrays of a shape, one for every kept state.
std::vector<float*> outputs(const nb::list& arrays, const char* name, Index count, std::initializer_list<Index> shape) {
    require(Index(nb::len(arrays)) == count, name, std::to_string(count) + " arrays");
    std::vector<float*> pointers;
    for (nb::handle item : arrays) {
        Out array;
        if (!nb::try_cast<Out>(item, array, false)) throw nb::type_error((std::string(name) + ": expected writable float32 arrays").c_str());
        require_shape(array, name, shape);
        require_contiguous(array, name);
        pointers.push_back(array.data());
    }
    return pointers;
}

void causal_conv_silu(const In& x, const In& w, const In& tail, const Out& out) {
    require(x.ndim() == 2 && w.ndim() == 2, "x, w", "2 axes");
    const Index T = x.shape(0), C = x.shape(1), width = w.shape(1);
    require(1 <= width && width <= conv_widest, "w", "1 to 8 taps");
    require_shape(w, "w", {C, width});
    require_contiguous(w, "w");
    require_shape(tail, "tail", {width - 1, C});
    require_contiguous(tail, "tail");
    const auto y = output(out, x);
    const auto from = grid<const float>(x, "x");
    nb::gil_scoped_release release;
    constexpr Index channels = 256, tokens = 64;
    const Index across = (C + channels - 1) / channels, along = (T + tokens - 1) / tokens;
    parallel_for(int(across * along), [&](int piece) {
        const Index c = piece % across * channels, t0 = piece / across * tokens;
        layer_kernels().conv_silu(y[t0] + c, C, from.data + c, from.inner_stride, tail.data() + c, C,
                                  w.data() + c * width, width, t0, std::min(T, t0 + tokens), std::min(channels, C - c));
    });
}

void delta_rule_(const In& q, const In& k, const In& v, const In& g, const In& beta, const In& state,
                 const nb::list& after, const Out& out) {
    require(q.ndim() == 3 && v.ndim() == 3, "q, v", "3 axes [T, H, width]");
    const Index T = q.shape(0), Hk = q.shape(1), K = q.shape(2), Hv = v.shape(1), V = v.shape(2);
    require(T > 0 && Hk > 0 && K > 0 && V > 0 && Hv > 0 && Hv % Hk == 0, "q, v", "value heads a multiple of key heads");
    const Index keep = Index(nb::len(after)) - 1;
    require(0 <= keep && keep <= T, "after", "1 to T + 1 arrays");
    DeltaRule rule{Hk, Hv, K, V, keep, tokens_of(q, "q", {T, Hk, K}), tokens_of(k, "k", {T, Hk, K}),
                   tokens_of(v, "v", {T, Hv, V}), tokens_of(g, "g", {T, Hv}), tokens_of(beta, "beta", {T, Hv}), {}};
    const auto y = output(out, v);
    rule.out = {y.data, Hv * V};
    require_shape(state, "state", {Hv, V, K});
    require_contiguous(state, "state");
    const auto states = outputs(after, "after", keep + 1, {Hv, V, K});
    nb::gil_scoped_release release;
    delta_rule(rule, {T, nullptr, state.data(), nullptr, states.data()});
}

// Items of a tuple that describes a sequence.
template <class T>
T item(const nb::handle& tuple, size_t i, const char* expected) {
    T value;
    if (!nb::try_cast<T>(tuple[i], value, false))
        throw nb::type_error(("sequences: expected tuples " + std::string(expected)).c_str());
    return value;
}

constexpr const char* delta_tuple = "(tokens, tail, state, tails after, states after)";

// The sequences and their arrays; Python's tuples keep the memory.
struct DeltaSequences {
    std::vector<DeltaSequence> sequences;
    std::vector<std::vector<float*>> after;  // not moved once a sequence points into it
    Index tokens = 0;

    DeltaSequences(const nb::list& tuples, const DeltaNet& net) {
        after.reserve(2 * nb::len(tuples));
        const Index C = 2 * net.Hk * net.K + net.Hv * net.V, before = net.width - 1, count = net.keep + 1;
        for (nb::handle tuple : tuples) {
            require(nb::isinstance<nb::tuple>(tuple) && nb::len(tuple) == 5, "sequences", delta_tuple);
            const Index n = item<Index>(tuple, 0, delta_tuple);
            require(n > 0 && n >= net.keep, "sequences", "at least one token, and as many as states are kept");
            const In tail = item<In>(tuple, 1, delta_tuple), state = item<In>(tuple, 2, delta_tuple);
            require_shape(tail, "tail", {before, C});
            require_contiguous(tail, "tail");
            require_shape(state, "state", {net.Hv, net.V, net.K});
            require_contiguous(state, "state");
            after.push_back(outputs(item<nb::list>(tuple, 3, delta_tuple), "tails after", count, {before, C}));
            after.push_back(outputs(item<nb::list>(tuple, 4, delta_tuple), "states after", count, {net.Hv, net.V, net.K}));
            sequences.push_back({n, tail.data(), state.data(), after[after.size() - 2].data(), after.back().data()});
            tokens += n;
        }
    }
};

void delta_net_(const In& qkv, const In& z, const In& b, const In& a, const In& conv, const In& A, const In& dt_bias,
                const In& norm, float eps, Index key_heads, Index keep, const nb::list& sequences, const Out& out) {
    require(qkv.ndim() == 2 && z.ndim() == 2 && conv.ndim() == 2, "qkv, z, conv", "2 axes");
    const Index T = qkv.shape(0), C = qkv.shape(1), Hv = A.size(), V = norm.size(), width = conv.shape(1);
    require(Hv > 0 && V > 0 && key_heads > 0 && Hv % key_heads == 0, "A", "a multiple of the key heads");
    const Index K = (C - Hv * V) / (2 * key_heads);
    require(K > 0 && C == 2 * key_heads * K + Hv * V, "qkv", "columns for queries, keys and values");
    require(2 <= width && width <= conv_widest, "conv", "2 to 8 taps");
    require(keep >= 0, "keep", "0 or more");
    DeltaNet net{key_heads, Hv, K, V, width, keep, tokens_of(qkv, "qkv", {T, C}), tokens_of(z, "z", {T, Hv * V}),
                 tokens_of(b, "b", {T, Hv}), tokens_of(a, "a", {T, Hv}), conv.data(), vector_of(A, "A", Hv),
                 vector_of(dt_bias, "dt_bias", Hv), vector_of(norm, "norm", V), eps, {}};
    require_shape(conv, "conv", {C, width});
    require_contiguous(conv, "conv");
    net.out = {output(out, z).data, Hv * V};
    const DeltaSequences all(sequences, net);
    require(all.tokens == T, "sequences", "as many tokens as qkv has rows");
    nb::gil_scoped_release release;
    delta_net(net, all.sequences.data(), Index(all.sequences.size()));
}

// --- attention -------------------------------------------------------------------------------------------------------

KvType kv_type(const char* name) {
    if (std::string(name) == "f16") return KvType::f16;
    if (std::string(name) == "bf16") return KvType::bf16;
    if (std::string(name) == "f32") return KvType::f32;
    throw nb::value_error("dtype: expected f16, bf16 or f32");
}

Index page_nbytes(const char* dtype, Index heads, Index D) {
    require(0 < heads && heads < 1 << 20 && 0 < D && D < 1 << 20, "heads, D", "1 to a million");
    return 2 * heads * kv_page * kv_width(D) * kv_size(kv_type(dtype));
}

uint8_t* page_of(const nb::handle& item, Index nbytes) {
    Bytes page;
    if (!nb::try_cast<Bytes>(item, page, false)) throw nb::type_error("pages: expected writable uint8 arrays");
    require(Index(page.size()) == nbytes, "pages", std::to_string(nbytes) + " bytes each");
    require(reinterpret_cast<uintptr_t>(page.data()) % sizeof(float) == 0, "pages", "aligned data");
    return page.data();
}

// q, k, v and the gate [T, H, D], any strides before the last axis.
struct Heads {
    const float* data;
    Index stride, head_stride;
    Heads(const In& x, const char* name, Index T, Index H, Index D) : data(x.data()) {
        require_shape(x, name, {T, H, D});
        require_readable(x, name);
        stride = x.stride(0);
        head_stride = x.stride(1);
    }
};

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

void attention_(const In& q, const In& k, const In& v, const MaybeIn& gate, const MaybeIn& q_norm,
                const MaybeIn& k_norm, float eps, const MaybeIn& cos, const MaybeIn& sin, const char* dtype,
                const nb::list& sequences, const Out& out) {
    require(q.ndim() == 3 && k.ndim() == 3, "q, k", "3 axes [T, H, D]");
    const Index T = q.shape(0), Hq = q.shape(1), D = q.shape(2), Hkv = k.shape(1);
    require(Hkv > 0 && D > 0 && Hq > 0 && Hq % Hkv == 0, "q", "a multiple of the KV heads");
    const Heads queries(q, "q", T, Hq, D), keys(k, "k", T, Hkv, D), values(v, "v", T, Hkv, D);
    Attention a{};
    a.Hq = Hq, a.Hkv = Hkv, a.D = D, a.type = kv_type(dtype), a.eps = eps;
    a.q = queries.data, a.q_stride = queries.stride, a.q_head_stride = queries.head_stride;
    a.k = keys.data, a.k_stride = keys.stride, a.k_head_stride = keys.head_stride;
    a.v = values.data, a.v_stride = values.stride, a.v_head_stride = values.head_stride;
    if (gate) {
        const Heads gates(*gate, "gate", T, Hq, D);
        a.gate = gates.data, a.gate_stride = gates.stride, a.gate_head_stride = gates.head_stride;
    }
    require(bool(q_norm) == bool(k_norm) && bool(cos) == bool(sin), "q_norm, k_norm, cos, sin", "pairs of them");
    if (q_norm) a.q_norm = vector_of(*q_norm, "q_norm", D), a.k_norm = vector_of(*k_norm, "k_norm", D);
    if (cos) a.pairs = angles(*cos, *sin, T, D), a.cos = cos->data(), a.sin = sin->data();
    a.out = output(out, q).data;

    const KvSequences all(sequences, page_nbytes(dtype, Hkv, D));
    require(all.tokens == T, "sequences", "as many tokens as q has rows");
    nb::gil_scoped_release release;
    attention(a, all.sequences.data(), Index(all.sequences.size()));
}

void append_(const In& k, const In& v, const char* dtype, const nb::tuple& sequence) {
    require(k.ndim() == 3, "k", "3 axes [T, H, D]");
    const Index T = k.shape(0), H = k.shape(1), D = k.shape(2);
    const Heads keys(k, "k", T, H, D), values(v, "v", T, H, D);
    Attention a{};
    a.Hkv = H, a.D = D, a.type = kv_type(dtype);
    a.k = keys.data, a.k_stride = keys.stride, a.k_head_stride = keys.head_stride;
    a.v = values.data, a.v_stride = values.stride, a.v_head_stride = values.head_stride;
    nb::list one;
    one.append(sequence);
    const KvSequences all(one, page_nbytes(dtype, H, D));
    require(all.tokens == T, "sequence", "as many tokens as k has rows");
    nb::gil_scoped_release release;
    append_kv(a, all.sequences[0], 0);
}

void read_page_(const Bytes& page, const char* dtype, const Out& keys, const Out& values) {
    require(keys.ndim() == 3, "keys", "3 axes [tokens, heads, D]");
    const Index tokens = keys.shape(0), heads = keys.shape(1), D = keys.shape(2);
    require(tokens <= kv_page, "keys", "at most a page of tokens");
    require_shape(values, "values", {tokens, heads, D});
    require_contiguous(keys, "keys");
    require_contiguous(values, "values");
    require(Index(page.size()) == page_nbytes(dtype, heads, D), "page", "a page of that dtype, heads and D");
    nb::gil_scoped_release release;
    read_page(page.data(), kv_type(dtype), heads, D, tokens, keys.data(), values.data());
}

}  // namespace

void bind_layers(nb::module_& m) {
    m.attr("KV_PAGE") = kv_page;
    m.def("add", [](In x, In y, Out out) { pointwise(layer_kernels().add, x, y, out); }, "x"_a.noconvert(),
          "y"_a.noconvert(), "out"_a.noconvert());
    m.def("silu_mul", [](In gate, In up, Out out) { pointwise(layer_kernels().silu_mul, gate, up, out); },
          "gate"_a.noconvert(), "up"_a.noconvert(), "out"_a.noconvert());
    m.def("sigmoid_mul", [](In x, In gate, Out out) { pointwise(layer_kernels().sigmoid_mul, x, gate, out); },
          "x"_a.noconvert(), "gate"_a.noconvert(), "out"_a.noconvert());
    m.def("rms_norm", &rms_norm, "x"_a.noconvert(), "gain"_a.noconvert(), "gate"_a.noconvert().none(), "eps"_a,
          "out"_a.noconvert());
    m.def("l2_norm", &l2_norm, "x"_a.noconvert(), "eps"_a, "out"_a.noconvert());
    m.def("rope", &rope, "x"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(), "out"_a.noconvert());
    m.def("causal_conv_silu", &causal_conv_silu, "x"_a.noconvert(), "w"_a.noconvert(), "tail"_a.noconvert(),
          "out"_a.noconvert());
    m.def("delta_rule", &delta_rule_, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "g"_a.noconvert(),
          "beta"_a.noconvert(), "state"_a.noconvert(), "after"_a, "out"_a.noconvert());
    m.def("delta_net", &delta_net_, "qkv"_a.noconvert(), "z"_a.noconvert(), "b"_a.noconvert(), "a"_a.noconvert(),
          "conv"_a.noconvert(), "A"_a.noconvert(), "dt_bias"_a.noconvert(), "norm"_a.noconvert(), "eps"_a,
          "key_heads"_a, "keep"_a, "sequences"_a, "out"_a.noconvert());
    m.def("attention", &attention_, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(),
          "gate"_a.noconvert().none(), "q_norm"_a.noconvert().none(), "k_norm"_a.noconvert().none(), "eps"_a,
          "cos"_a.noconvert().none(), "sin"_a.noconvert().none(), "dtype"_a, "sequences"_a, "out"_a.noconvert());
    m.def("append", &append_, "k"_a.noconvert(), "v"_a.noconvert(), "dtype"_a, "sequence"_a);
    m.def("page_nbytes", &page_nbytes, "dtype"_a, "heads"_a, "D"_a, "Bytes of a page of keys and values.");
    m.def("read_page", &read_page_, "page"_a.noconvert(), "dtype"_a, "keys"_a.noconvert(), "values"_a.noconvert());
}
