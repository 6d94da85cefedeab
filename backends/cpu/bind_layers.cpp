// The small operations of the seam that are no matrix product; the mixers are in bind_mixers.cpp.
#include "bind_layers.h"

#include <nanobind/stl/tuple.h>

#include <tuple>

#include "kernels/linear.h"
#include "kernels/scratch.h"
#include "kernels/threads.h"
#include "layers/rows.h"
#include "layers/stack.h"

using namespace nanobind::literals;
using namespace edgeq;

namespace {

// --- norms and pointwise ---------------------------------------------------------------------------------------------

template <class Function>
void each_row(const Grid<float>& y, Function&& function) {
    nb::gil_scoped_release release;
    edgeq::each_row(y.rows, y.n, function);
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

void delta_rule_(const In& q, const In& k, const In& v, const In& g, const In& beta, const In& state, nb::handle after,
                 const Out& out) {
    require(q.ndim() == 3 && v.ndim() == 3, "q, v", "3 axes [T, H, width]");
    const Index T = q.shape(0), Hk = q.shape(1), K = q.shape(2), Hv = v.shape(1), V = v.shape(2);
    require(T > 0 && Hk > 0 && K > 0 && V > 0 && Hv > 0 && Hv % Hk == 0, "q, v", "value heads a multiple of key heads");
    const nb::tuple kept = items_of(after, "after", "1 to T + 1 arrays");
    const Index keep = Index(nb::len(kept)) - 1;
    require(0 <= keep && keep <= T, "after", "1 to T + 1 arrays");
    DeltaRule rule{Hk, Hv, K, V, {}, {}, {}, {}, {}, {}};
    rule.q = tokens_of(q, "q", {T, Hk, K}), rule.k = tokens_of(k, "k", {T, Hk, K});
    rule.v = tokens_of(v, "v", {T, Hv, V});
    rule.g = tokens_of(g, "g", {T, Hv}), rule.beta = tokens_of(beta, "beta", {T, Hv});
    const auto y = output(out, v);
    rule.out = {y.data, Hv * V};
    require_shape(state, "state", {Hv, V, K});
    require_contiguous(state, "state");
    const Outputs states(kept, "after", keep + 1, {Hv, V, K});
    nb::gil_scoped_release release;
    DeltaSequence s{};
    s.tokens = T, s.keep = keep, s.state = state.data();
    for (Index i = 0; i < states_written(keep); i++) s.states_after.push_back(states.pointers[i * delta_most]);
    const Index k_size = Hk * K, d_size = Hv * V, update_size = k_size + d_size + Hv;
    Floats updates(keep * update_size);
    for (float* at = updates.data(); Index(s.updates.size()) < keep; at += update_size)
        s.updates.push_back({at, at + k_size, at + k_size + d_size});
    delta_rule(rule, s);
    for (Index i = 1; i <= keep; i++) {  // those that were not written, each from the one before
        if (i % delta_most == 0 && i / delta_most < states_written(keep)) continue;
        DeltaSequence before{};
        before.state = states.pointers[i - 1], before.pending = {s.updates[i - 1]};
        apply_updates(Hk, Hv, K, V, before, states.pointers[i]);
    }
}

// --- attention -------------------------------------------------------------------------------------------------------

void attention_(const In& q, const In& k, const In& v, Index past, nb::handle pages, const Out& out) {
    require(q.ndim() == 3 && k.ndim() == 3, "q, k", "3 axes [T, H, D]");
    const Index T = q.shape(0), Hq = q.shape(1), D = q.shape(2), Hkv = k.shape(1);
    require(Hkv > 0 && D > 0 && Hq > 0 && Hq % Hkv == 0, "q", "a multiple of the KV heads");
    Attention a{};
    a.Hq = Hq, a.Hkv = Hkv, a.D = D;
    a.q = heads_of(q, "q", T, Hq, D), a.k = heads_of(k, "k", T, Hkv, D), a.v = heads_of(v, "v", T, Hkv, D);
    a.out = output(out, q).data;
    const nb::tuple held = items_of(pages, "pages", "a sequence of them");
    const std::vector<KvSequence> sequences{kv_sequence(T, past, held, Hkv, D, a.type)};
    nb::gil_scoped_release release;
    attention(a, sequences);
}

void append_(const In& k, const In& v, Index past, nb::handle pages) {
    require(k.ndim() == 3, "k", "3 axes [T, H, D]");
    const Index T = k.shape(0), H = k.shape(1), D = k.shape(2);
    Attention a{};
    a.Hkv = H, a.D = D;
    a.k = heads_of(k, "k", T, H, D), a.v = heads_of(v, "v", T, H, D);
    const nb::tuple held = items_of(pages, "pages", "a sequence of them");
    const KvSequence sequence = kv_sequence(T, past, held, H, D, a.type);
    nb::gil_scoped_release release;
    append_kv(a, sequence, 0);
}

void read_page_(const Page& page, const Out& keys, const Out& values) {
    require(keys.ndim() == 3, "keys", "3 axes [tokens, heads, D]");
    const Index tokens = keys.shape(0);
    require(tokens <= kv_page, "keys", "at most a page of tokens");
    for (const auto& [array, name] : {std::pair(keys, "keys"), std::pair(values, "values")}) {
        require_shape(array, name, {tokens, page.heads, page.D});
        require_contiguous(array, name);
    }
    nb::gil_scoped_release release;
    read_page(page.data(), page.type, page.heads, page.D, tokens, keys.data(), values.data());
}

void rope_angles_(const Positions& positions, const In& frequencies, float factor,
                  const std::tuple<int, int, int>& sections, const Out& cos, const Out& sin) {
    require(cos.ndim() == 2, "cos", "2 axes");
    const Index T = cos.shape(0), pairs = cos.shape(1);
    require_shape(positions, "positions", {3, T});
    require_aligned(positions, "positions");
    require_shape(frequencies, "frequencies", {pairs});
    require_contiguous(frequencies, "frequencies");
    for (const auto& [array, name] : {std::pair(cos, "cos"), std::pair(sin, "sin")}) {
        require_shape(array, name, {T, pairs});
        require_contiguous(array, name);
    }
    const int parts[] = {std::get<0>(sections), std::get<1>(sections), std::get<2>(sections)};
    nb::gil_scoped_release release;
    rope_angles(positions.data(), positions.stride(0), positions.stride(1), T, frequencies.data(), factor, parts, pairs,
                cos.data(), sin.data());
}

nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> empty(size_t nbytes) {
    const auto [data, owner] = owned_block(nbytes);
    return {data, {nbytes}, owner};
}

// Bytes held now: by pages of keys and values, by states, and by scratch memory.
nb::tuple memory_held() {
    const size_t pages = Page::held_nbytes, blocks = blocks_nbytes();
    return nb::make_tuple(pages, blocks > pages ? blocks - pages : 0, scratch_nbytes.load());
}

void release_scratch() {
    release_workspace();
    release_linear_scratch();
}

void bind_pages(nb::module_& m) {
    m.attr("KV_PAGE") = kv_page;
    m.def("memory_held", &memory_held, "Bytes held now by pages of keys and values, by states, and by scratch memory.");
    m.def("idle_blocks", &idle_blocks, "nbytes"_a,
          "Blocks of a size that nobody uses, and that are still this process's memory.");
    m.def("release_scratch", &release_scratch, "Give back to the system what the calling thread has kept to work in.");
    m.def("release_idle_blocks", &trim_blocks, "Give back to the system the pages of blocks that nobody uses.");
    nb::class_<Page>(m, "Page",
                     "Room for KV_PAGE tokens' keys and values of a layer, laid out as layers/layers.h says.")
        .def(
            "__init__",
            [](Page* self, const char* dtype, Index heads, Index dim) { new (self) Page(kv_type(dtype), heads, dim); },
            "dtype"_a, "heads"_a, "dim"_a)
        .def(
            "__init__",
            [](Page* self, const char* dtype, Index heads, Index dim, Bytes memory) {
                new (self) Page(kv_type(dtype), heads, dim, std::move(memory));
            },
            "dtype"_a, "heads"_a, "dim"_a, "memory"_a)
        .def("copy", &Page::copy, "tokens"_a = kv_page,
             "A page of its own with the first tokens of this one, and zeros.")
        .def_prop_ro(
            "data",
            [](nb::handle_t<Page> self) {
                const Page& page = nb::cast<const Page&>(self);
                return nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(page.data(), {size_t(page.size)}, self);
            },
            "Its bytes, not to be written to.")
        .def("read", &read_page_, "keys"_a.noconvert(), "values"_a.noconvert(),
             "The first tokens' keys and values, each float32 [tokens, heads, dim].")
        .def_ro("nbytes", &Page::nbytes, "Bytes of its own memory.")
        .def_rw("written", &Page::written, "Tokens that are in use by somebody.");
    m.def("append", &append_, "k"_a.noconvert(), "v"_a.noconvert(), "past"_a, "pages"_a,
          "Write keys and values float32 [T, heads, dim] to the pages of a sequence, after `past` tokens.");
}

}  // namespace

void bind_mixers(nb::module_& m);

void bind_layers(nb::module_& m) {
    m.def("empty", &empty, "nbytes"_a, "Bytes on a cache line, not cleared, for what comes and goes with every token.");
    m.def(
        "add", [](In x, In y, Out out) { pointwise(layer_kernels().add, x, y, out); }, "x"_a.noconvert(),
        "y"_a.noconvert(), "out"_a.noconvert());
    m.def(
        "silu_mul", [](In gate, In up, Out out) { pointwise(layer_kernels().silu_mul, gate, up, out); },
        "gate"_a.noconvert(), "up"_a.noconvert(), "out"_a.noconvert());
    m.def(
        "sigmoid_mul", [](In x, In gate, Out out) { pointwise(layer_kernels().sigmoid_mul, x, gate, out); },
        "x"_a.noconvert(), "gate"_a.noconvert(), "out"_a.noconvert());
    m.def("rms_norm", &rms_norm, "x"_a.noconvert(), "gain"_a.noconvert(), "gate"_a.noconvert().none(), "eps"_a,
          "out"_a.noconvert());
    m.def("l2_norm", &l2_norm, "x"_a.noconvert(), "eps"_a, "out"_a.noconvert());
    m.def("rope", &rope, "x"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(), "out"_a.noconvert());
    m.def("causal_conv_silu", &causal_conv_silu, "x"_a.noconvert(), "w"_a.noconvert(), "tail"_a.noconvert(),
          "out"_a.noconvert());
    m.def("delta_rule", &delta_rule_, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "g"_a.noconvert(),
          "beta"_a.noconvert(), "state"_a.noconvert(), "after"_a, "out"_a.noconvert());
    m.def("attention", &attention_, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "past"_a, "pages"_a,
          "out"_a.noconvert());
    m.def("rope_angles", &rope_angles_, "positions"_a.noconvert(), "frequencies"_a.noconvert(), "factor"_a,
          "sections"_a, "cos"_a.noconvert(), "sin"_a.noconvert(),
          "positions int32 [3, T] -> cos, sin float32 [T, pairs].");
    bind_pages(m);
    bind_mixers(m);
}
