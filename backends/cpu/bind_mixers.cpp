// The larger pieces of a layer, projections included, and all layers in one call: weights come as the tuples that
// edgeq.weights declares, and what lies between them never becomes a Python object.
#include "bind_layers.h"
#include "bind_linear.h"
#include "bind_states.h"

#include "interruptions.h"

#include <nanobind/stl/tuple.h>

#include <tuple>

#include "kernels/linear.h"
#include "kernels/scratch.h"
#include "layers/rows.h"
#include "layers/stack.h"

using namespace nanobind::literals;
using namespace edgeq;

namespace {

// What a call uses while the GIL is released. Tuples keep their items, whatever becomes of the lists they came from.
struct Held {
    std::vector<nb::tuple> tuples;
    std::vector<In> arrays;
    std::vector<std::shared_ptr<const DeltaMemory>> states;

    nb::tuple items(nb::handle sequence, const char* name, const char* expected) {
        tuples.push_back(items_of(sequence, name, expected));
        return tuples.back();
    }

    nb::tuple items(nb::handle sequence, const char* name, const char* expected, Index count) {
        tuples.push_back(items_of(sequence, name, expected, count));
        return tuples.back();
    }

    // A contiguous float32 array.
    const In& array(nb::handle of, const char* name, std::initializer_list<Index> shape) {
        arrays.push_back(item<In>(of, name, "a float32 array"));
        require_shape(arrays.back(), name, shape);
        require_contiguous(arrays.back(), name);
        return arrays.back();
    }
};

// --- weights ---------------------------------------------------------------------------------------------------------

const Matrix& matrix_in(nb::handle of, const char* name, Index out, Index in) {
    const Matrix& w = matrix_of(of, name).matrix;
    if (w.out != out || w.in != in) refuse(name, "shape " + text({out, in}) + ", found " + text({w.out, w.in}));
    return w;
}

// The length of a vector.
Index length_of(nb::handle of, const char* name) {
    const In x = item<In>(of, name, "a float32 array");
    require(x.ndim() == 1 && x.shape(0) > 0, name, "1 axis");
    return x.shape(0);
}

FeedForward mlp_in(nb::handle weights, Index hidden, Held& held) {
    const nb::tuple w = held.items(weights, "w", "MLPWeights", 3);
    const Index n = matrix_of(w[0], "gate_proj").matrix.out;
    return {matrix_in(w[0], "gate_proj", n, hidden), matrix_in(w[1], "up_proj", n, hidden),
            matrix_in(w[2], "down_proj", hidden, n)};
}

DeltaNetMixer delta_net_in(nb::handle weights, Index hidden, Index key_heads, float eps, Held& held) {
    const nb::tuple w = held.items(weights, "w", "DeltaNetWeights", 9);
    const Index C = matrix_of(w[0], "in_proj_qkv").matrix.out, Hv = matrix_of(w[2], "in_proj_b").matrix.out;
    const Index V = length_of(w[7], "norm");
    require(key_heads > 0 && Hv % key_heads == 0, "key_heads", "a divisor of the value heads", key_heads);
    const Index values = entries({Hv, V}), K = (C - values) / (2 * key_heads);
    require(K > 0 && C == 2 * key_heads * K + values, "in_proj_qkv", "rows for queries, keys and values");
    const In conv = item<In>(w[4], "conv", "a float32 array");
    require(conv.ndim() == 2 && conv.shape(1) > 0, "conv", "2 axes, and at least one tap");
    DeltaNet between{};
    between.Hk = key_heads, between.Hv = Hv, between.K = K, between.V = V, between.width = conv.shape(1);
    between.conv = held.array(w[4], "conv", {C, between.width}).data();
    between.A = held.array(w[5], "decay", {Hv}).data();
    between.dt_bias = held.array(w[6], "dt_bias", {Hv}).data();
    between.norm = held.array(w[7], "norm", {V}).data(), between.eps = eps;
    return {matrix_in(w[0], "in_proj_qkv", C, hidden),
            matrix_in(w[1], "in_proj_z", values, hidden),
            matrix_in(w[2], "in_proj_b", Hv, hidden),
            matrix_in(w[3], "in_proj_a", Hv, hidden),
            matrix_in(w[8], "out_proj", hidden, values),
            between,
            {}};
}

AttentionMixer attention_in(nb::handle weights, Index hidden, float eps, Held& held) {
    const nb::tuple w = held.items(weights, "w", "AttentionWeights", 6);
    const Index q = matrix_of(w[0], "q_proj").matrix.out, D = length_of(w[4], "q_norm");
    require(q / 2 / D > 0 && q % (2 * D) == 0, "q_proj", "rows for a query and a gate of every head", q);
    Attention a{};
    a.D = D, a.Hq = q / 2 / D, a.Hkv = matrix_of(w[1], "k_proj").matrix.out / D, a.eps = eps;
    require(a.Hkv > 0 && a.Hq % a.Hkv == 0, "k_proj", "rows for a divisor of the query heads");
    a.q_norm = held.array(w[4], "q_norm", {D}).data(), a.k_norm = held.array(w[5], "k_norm", {D}).data();
    return {matrix_in(w[0], "q_proj", q, hidden),
            matrix_in(w[1], "k_proj", a.Hkv * D, hidden),
            matrix_in(w[2], "v_proj", a.Hkv * D, hidden),
            matrix_in(w[3], "o_proj", hidden, a.Hq * D),
            a,
            {}};
}

// Layers that are ready to run; they keep their weights. Those of a whole decoder know its final norm and its rotary
// embedding, too.
struct Layers {
    Index hidden = 0;
    float eps;
    std::vector<DecoderLayer> layers;
    const float *norm = nullptr, *frequencies = nullptr;
    Index pairs = 0;
    float factor = 1.0f;
    int sections[3] = {};
    Held held;
    nb::object after_layer;  // called with the number of each layer that has run

    Layers(nb::handle weights, Index key_heads, float eps) : eps(eps) {
        const nb::tuple ws = held.items(weights, "layers", "a sequence of LayerWeights");
        for (size_t i = 0; i < nb::len(ws); i++) {
            const nb::tuple w = held.items(ws[i], "layers", "LayerWeights", 4);
            if (i == 0) hidden = length_of(w[0], "input_layernorm");
            const float* input_norm = held.array(w[0], "input_layernorm", {hidden}).data();
            const float* post_norm = held.array(w[2], "post_attention_layernorm", {hidden}).data();
            const nb::tuple mixer = held.items(w[1], "layers", "DeltaNetWeights or AttentionWeights");
            const FeedForward mlp = mlp_in(w[3], hidden, held);
            if (nb::len(mixer) == 6)
                layers.push_back({input_norm, post_norm, attention_in(mixer, hidden, eps, held), mlp});
            else
                layers.push_back({input_norm, post_norm, delta_net_in(mixer, hidden, key_heads, eps, held), mlp});
        }
    }

    Layers(nb::handle weights, Index key_heads, float eps, nb::handle gain, nb::handle angles, float factor,
           const std::tuple<int, int, int>& parts)
        : Layers(weights, key_heads, eps) {
        norm = held.array(gain, "norm", {hidden}).data();
        pairs = length_of(angles, "frequencies");
        frequencies = held.array(angles, "frequencies", {pairs}).data();
        this->factor = factor;
        sections[0] = std::get<0>(parts), sections[1] = std::get<1>(parts), sections[2] = std::get<2>(parts);
    }
};

// --- sequences -------------------------------------------------------------------------------------------------------

// How many tokens every sequence has, and how many states before the last are kept of it.
struct Lengths {
    std::vector<Index> tokens, keep;

    // Together the sequences have T tokens.
    Lengths(nb::handle lengths, Index T) {
        Index left = T;
        for (nb::handle x : items_of(lengths, "lengths", "integers")) {
            const Index n = item<Index>(x, "lengths", "integers");
            require(0 < n && n <= left, "lengths", "at least one token for every sequence, together the rows of x", n);
            tokens.push_back(n);
            left -= n;
        }
        require(left == 0, "lengths", "as many tokens as x has rows", T - left);
    }

    Lengths(nb::handle lengths, nb::handle kept, Index T) : Lengths(lengths, T) {
        for (nb::handle x : items_of(kept, "keep", "one for every sequence", count())) {
            const Index n = item<Index>(x, "keep", "integers");
            require(0 <= n && n <= tokens[keep.size()], "keep", "0 to the sequence's tokens", n);
            keep.push_back(n);
        }
    }

    Index count() const { return Index(tokens.size()); }
};

// Tells the mixer its sequences; the states after, [sequence][keep + 1], are what comes back to Python.
nb::list take_states(DeltaNetMixer& mixer, nb::handle states, const Lengths& lengths, nb::handle kind, Held& held) {
    const DeltaNet& net = mixer.between;
    const nb::tuple before = held.items(states, "states", "one for every sequence", lengths.count());
    nb::list all;
    for (Index i = 0; i < lengths.count(); i++) {
        DeltaSequence s{};
        s.tokens = lengths.tokens[i], s.keep = lengths.keep[i];
        all.append(take_state(net, s, before[i], kind, held.arrays, held.states));
        mixer.sequences.push_back(std::move(s));
    }
    return all;
}

void take_angles(AttentionMixer& mixer, const In& cos, const In& sin, Index T) {
    Attention& a = mixer.between;
    a.pairs = angles(cos, sin, T, a.D), a.cos = cos.data(), a.sin = sin.data();
}

void take_pages(AttentionMixer& mixer, nb::handle caches, const Lengths& lengths, Held& held) {
    Attention& a = mixer.between;
    const nb::tuple all = held.items(caches, "caches", "one for every sequence", lengths.count());
    for (Index i = 0; i < lengths.count(); i++) {
        const KvType type_before = a.type;
        const nb::tuple cache = held.items(all[i], "caches", "(past, pages)", 2);
        const nb::tuple pages = held.items(cache[1], "pages", "a sequence of them");
        const Index past = item<Index>(cache[0], "past", "an integer");
        mixer.sequences.push_back(kv_sequence(lengths.tokens[i], past, pages, a.Hkv, a.D, a.type));
        require(i == 0 || a.type == type_before, "pages", "one type for all sequences");
    }
}

// --- calls -----------------------------------------------------------------------------------------------------------

// x [T, hidden] -> T
Index tokens_in(const In& x, const Out& out) {
    require(x.ndim() == 2 && x.shape(0) > 0 && x.shape(1) > 0, "x", "2 axes [T, hidden]");
    require_contiguous(x, "x");
    output(out, x);
    return x.shape(0);
}

void mlp(const In& x, nb::handle weights, const Out& out) {
    const Index T = tokens_in(x, out);
    Held held;
    const FeedForward w = mlp_in(weights, x.shape(1), held);
    nb::gil_scoped_release release;
    run_mlp(w, x.data(), T, out.data());
}

nb::list delta_net_(const In& x, nb::handle weights, Index key_heads, float eps, nb::handle states, nb::handle lengths,
                    nb::handle keep, nb::type_object kind, const Out& out) {
    const Index T = tokens_in(x, out);
    const Lengths all(lengths, keep, T);
    Held held;
    DeltaNetMixer mixer = delta_net_in(weights, x.shape(1), key_heads, eps, held);
    nb::list after = take_states(mixer, states, all, kind, held);
    nb::gil_scoped_release release;
    run_mixer(mixer, x.data(), T, out.data());
    return after;
}

void gated_attention(const In& x, nb::handle weights, float eps, const In& cos, const In& sin, nb::handle caches,
                     nb::handle lengths, const Out& out) {
    const Index T = tokens_in(x, out);
    const Lengths all(lengths, T);
    Held held;
    AttentionMixer mixer = attention_in(weights, x.shape(1), eps, held);
    take_angles(mixer, cos, sin, T);
    take_pages(mixer, caches, all, held);
    nb::gil_scoped_release release;
    run_mixer(mixer, x.data(), T, out.data());
}

// The layers with their sequences; in `all` the states after, None for attention.
std::vector<DecoderLayer> stack_of(const Layers& ready, nb::handle states, const Lengths& tokens, nb::handle kind,
                                   nb::list& all, Held& held) {
    const nb::tuple before = held.items(states, "states", "those of every layer", Index(ready.layers.size()));
    std::vector<DecoderLayer> stack = ready.layers;
    for (size_t i = 0; i < stack.size(); i++) {
        if (auto* mixer = std::get_if<AttentionMixer>(&stack[i].mixer)) {
            take_pages(*mixer, before[i], tokens, held);
            all.append(nb::none());
        } else {
            all.append(take_states(std::get<DeltaNetMixer>(stack[i].mixer), before[i], tokens, kind, held));
        }
    }
    return stack;
}

void give_angles(std::vector<DecoderLayer>& stack, const float* cos, const float* sin, Index pairs) {
    for (DecoderLayer& layer : stack)
        if (auto* mixer = std::get_if<AttentionMixer>(&layer.mixer)) {
            require(pairs <= mixer->between.D / 2, "cos", "at most half the head's width of pairs");
            mixer->between.pairs = pairs, mixer->between.cos = cos, mixer->between.sin = sin;
        }
}

nb::list decoder_layers(const In& x, nb::handle weights, Index key_heads, float eps, const In& cos, const In& sin,
                        nb::handle states, nb::handle lengths, nb::handle keep, nb::type_object kind, const Out& out) {
    const Index T = tokens_in(x, out), hidden = x.shape(1);
    const Lengths tokens(lengths, keep, T);
    const Layers ready(weights, key_heads, eps);
    if (!ready.layers.empty()) require_shape(x, "x", {T, ready.hidden});
    Held held;
    nb::list all;
    std::vector<DecoderLayer> stack = stack_of(ready, states, tokens, kind, all, held);
    for (DecoderLayer& layer : stack)
        if (auto* mixer = std::get_if<AttentionMixer>(&layer.mixer)) take_angles(*mixer, cos, sin, T);
    Interruptions interruptions(T > few_tokens);
    bool finished;
    {
        nb::gil_scoped_release release;
        std::memcpy(out.data(), x.data(), T * hidden * sizeof(float));
        finished = run_layers(stack, T, hidden, eps, out.data(), [&] { return interruptions.go_on(); });
    }
    if (!finished) nb::raise_python_error();
    return all;
}

nb::list decoder(const In& x, const Layers& ready, const Positions& positions, nb::handle states, nb::handle lengths,
                 nb::handle keep, nb::type_object kind, const Out& out) {
    const Index T = tokens_in(x, out), hidden = x.shape(1);
    require(ready.norm, "layers", "those of a whole decoder");
    require_shape(x, "x", {T, ready.hidden});
    require_shape(positions, "positions", {3, T});
    require_aligned(positions, "positions");
    const Lengths tokens(lengths, keep, T);
    Held held;
    nb::list all;
    std::vector<DecoderLayer> stack = stack_of(ready, states, tokens, kind, all, held);
    Floats angles(2 * T * ready.pairs);
    float *cos = angles.data(), *sin = cos + T * ready.pairs;
    give_angles(stack, cos, sin, ready.pairs);
    Interruptions interruptions(T > few_tokens);
    Index done = 0;
    auto go_on = [&] {
        if (ready.after_layer.is_valid()) {
            nb::gil_scoped_acquire acquire;
            ready.after_layer(done++);
        }
        return interruptions.go_on();
    };
    bool finished;
    {
        nb::gil_scoped_release release;
        rope_angles(positions.data(), positions.stride(0), positions.stride(1), T, ready.frequencies, ready.factor,
                    ready.sections, ready.pairs, cos, sin);
        std::memcpy(out.data(), x.data(), T * hidden * sizeof(float));
        finished = run_layers(stack, T, hidden, ready.eps, out.data(), go_on);
        float* y = out.data();
        if (finished)
            each_row(T, hidden, [&](Index t) {
                layer_kernels().rms_norm(y + t * hidden, y + t * hidden, ready.norm, nullptr, hidden, ready.eps);
            });
    }
    if (!finished) nb::raise_python_error();
    return all;
}

}  // namespace

void bind_mixers(nb::module_& m) {
    m.def("mlp", &mlp, "x"_a.noconvert(), "w"_a, "out"_a.noconvert(), "Feed-forward: w MLPWeights.");
    m.def("delta_net", &delta_net_, "x"_a.noconvert(), "w"_a, "key_heads"_a, "eps"_a, "states"_a, "lengths"_a, "keep"_a,
          "kind"_a, "out"_a.noconvert(),
          "Gated DeltaNet: w DeltaNetWeights, states (conv, matrix) for each sequence -> keep + 1 such, as tuples "
          "`kind`.");
    m.def("gated_attention", &gated_attention, "x"_a.noconvert(), "w"_a, "eps"_a, "cos"_a.noconvert(),
          "sin"_a.noconvert(), "caches"_a, "lengths"_a, "out"_a.noconvert(),
          "Gated attention: w AttentionWeights, caches (past, pages) with room for each sequence's tokens.");
    nb::class_<Layers>(m, "Layers", "The layers of a whole decoder, made ready once.")
        .def(nb::init<nb::handle, Index, float, nb::handle, nb::handle, float, const std::tuple<int, int, int>&>(),
             "layers"_a, "key_heads"_a, "eps"_a, "norm"_a, "frequencies"_a, "factor"_a, "sections"_a)
        .def(
            "call_after_each", [](Layers& layers, nb::callable call) { layers.after_layer = call; }, "call"_a,
            "From now on the decoder calls it with the number of each layer that has run; it must not hold the "
            "layers.");
    m.def("decoder", &decoder, "x"_a.noconvert(), "layers"_a, "positions"_a.noconvert(), "states"_a, "lengths"_a,
          "keep"_a, "kind"_a, "out"_a.noconvert(),
          "Rotary angles for positions int32 [3, T], the layers, and the final norm; states and result as below.");
    m.def("decoder_layers", &decoder_layers, "x"_a.noconvert(), "layers"_a, "key_heads"_a, "eps"_a, "cos"_a.noconvert(),
          "sin"_a.noconvert(), "states"_a, "lengths"_a, "keep"_a, "kind"_a, "out"_a.noconvert(),
          "Whole layers: LayerWeights, and for each the states or caches of all sequences, as above. Returns what "
          "delta_net returns for its layers, None for the others. May raise what a signal's handler raises.");
}
