// The small operations of the seam that are no matrix product; the mixers are in bind_mixers.cpp.
#include "bind_layers.h"

#include <memory>

#include "blocks.h"
#include "kernels/threads.h"

using namespace nanobind::literals;
using namespace edgeq;

namespace {

// --- norms and pointwise ---------------------------------------------------------------------------------------------

constexpr Index piece_size = 1 << 15;  // entries; fewer are not worth waking a thread

template <class Function>
void each_row(const Grid<float>& y, Function&& function) {
    if (y.n == 0) return;
    nb::gil_scoped_release release;
    const Index rows = std::max<Index>(1, piece_size / y.n);
    parallel_for((y.rows + rows - 1) / rows, [&](int piece) {
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

void causal_conv_silu(const In& x, const In& w, const In& tail, const Out& out) {
    require(x.ndim() == 2 && w.ndim() == 2, "x, w", "2 axes");
    const Index T = x.shape(0), C = x.shape(1), width = w.shape(1);
    require(1 <= width, "w", "at least one tap");
    require_shape(w, "w", {C, width});
    require_contiguous(w, "w");
    require_shape(tail, "tail", {width - 1, C});
    require_contiguous(tail, "tail");
    const auto y = output(out, x);
    const auto from = grid<const float>(x, "x");
    nb::gil_scoped_release release;
    constexpr Index channels = 256, tokens = 64;
    const Index across = (C + channels - 1) / channels, along = (T + tokens - 1) / tokens;
    parallel_for(across * along, [&](int piece) {
        const Index c = piece % across * channels, t0 = piece / across * tokens;
        layer_kernels().conv_silu(y[t0] + c, C, from.data + c, from.inner_stride, tail.data() + c, C,
                                  w.data() + c * width, width, t0, std::min(T, t0 + tokens), std::min(channels, C - c));
    });
}

void delta_rule_(const In& q, const In& k, const In& v, const In& g, const In& beta, const In& state,
                 nb::handle after, const Out& out) {
    require(q.ndim() == 3 && v.ndim() == 3, "q, v", "3 axes [T, H, width]");
    const Index T = q.shape(0), Hk = q.shape(1), K = q.shape(2), Hv = v.shape(1), V = v.shape(2);
    require(T > 0 && Hk > 0 && K > 0 && V > 0 && Hv > 0 && Hv % Hk == 0, "q, v", "value heads a multiple of key heads");
    const nb::tuple kept = items_of(after, "after", "1 to T + 1 arrays");
    const Index keep = Index(nb::len(kept)) - 1;
    require(0 <= keep && keep <= T, "after", "1 to T + 1 arrays");
    DeltaRule rule{Hk, Hv, K, V, keep, tokens_of(q, "q", {T, Hk, K}), tokens_of(k, "k", {T, Hk, K}),
                   tokens_of(v, "v", {T, Hv, V}), tokens_of(g, "g", {T, Hv}), tokens_of(beta, "beta", {T, Hv}), {}};
    const auto y = output(out, v);
    rule.out = {y.data, Hv * V};
    require_shape(state, "state", {Hv, V, K});
    require_contiguous(state, "state");
    const Outputs states(kept, "after", keep + 1, {Hv, V, K});
    nb::gil_scoped_release release;
    delta_rule(rule, {T, nullptr, state.data(), nullptr, states.pointers.data()});
}

// --- attention -------------------------------------------------------------------------------------------------------

void attention_(const In& q, const In& k, const In& v, const char* dtype, nb::handle sequences, const Out& out) {
    require(q.ndim() == 3 && k.ndim() == 3, "q, k", "3 axes [T, H, D]");
    const Index T = q.shape(0), Hq = q.shape(1), D = q.shape(2), Hkv = k.shape(1);
    require(Hkv > 0 && D > 0 && Hq > 0 && Hq % Hkv == 0, "q", "a multiple of the KV heads");
    Attention a{};
    a.Hq = Hq, a.Hkv = Hkv, a.D = D, a.type = kv_type(dtype);
    a.q = heads_of(q, "q", T, Hq, D), a.k = heads_of(k, "k", T, Hkv, D), a.v = heads_of(v, "v", T, Hkv, D);
    a.out = output(out, q).data;
    const KvSequences all(sequences, page_nbytes(dtype, Hkv, D), T);
    nb::gil_scoped_release release;
    attention(a, all.sequences.data(), Index(all.sequences.size()));
}

void append_(const In& k, const In& v, const char* dtype, nb::handle sequence) {
    require(k.ndim() == 3, "k", "3 axes [T, H, D]");
    const Index T = k.shape(0), H = k.shape(1), D = k.shape(2);
    Attention a{};
    a.Hkv = H, a.D = D, a.type = kv_type(dtype);
    a.k = heads_of(k, "k", T, H, D), a.v = heads_of(v, "v", T, H, D);
    const KvSequences all(nb::make_tuple(sequence), page_nbytes(dtype, H, D), T);
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
    const KvType type = kv_type(dtype);
    nb::gil_scoped_release release;
    read_page(page.data(), type, heads, D, tokens, keys.data(), values.data());
}

// A block that goes back when it is let go.
struct Owned {
    Block block;
    explicit Owned(size_t nbytes) : block(take_block(nbytes)) {}
    Owned(const Owned&) = delete;
    ~Owned() { give_back(block); }
};

nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> empty(size_t nbytes) {
    auto owned = std::make_unique<Owned>(nbytes);
    nb::capsule owner(owned.get(), [](void* p) noexcept { delete static_cast<Owned*>(p); });
    return {owned.release()->block.data, {nbytes}, owner};
}

}  // namespace

void bind_mixers(nb::module_& m);

void bind_layers(nb::module_& m) {
    m.attr("KV_PAGE") = kv_page;
    m.def("empty", &empty, "nbytes"_a, "Bytes on a cache line, not cleared, for what comes and goes with every token.");
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
    m.def("attention", &attention_, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "dtype"_a, "sequences"_a,
          "out"_a.noconvert());
    m.def("append", &append_, "k"_a.noconvert(), "v"_a.noconvert(), "dtype"_a, "sequence"_a);
    m.def("page_nbytes", &page_nbytes, "dtype"_a, "heads"_a, "D"_a, "Bytes of a page of keys and values.");
    m.def("read_page", &read_page_, "page"_a.noconvert(), "dtype"_a, "keys"_a.noconvert(), "values"_a.noconvert());
    bind_mixers(m);
}
