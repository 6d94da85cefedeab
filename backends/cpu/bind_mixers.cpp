// The larger pieces of a layer, projections included: weights are checked once, when a piece is made, and what lies
// between the projections never becomes a Python object.
#include "bind_layers.h"
#include "bind_linear.h"

#include "kernels/linear.h"
#include "kernels/threads.h"
#include "layers/aligned.h"

using namespace nanobind::literals;
using namespace edgeq;

namespace {

// Memory for what lies between the projections, of the calling thread and kept from call to call.
float* room(Index tokens, Index each) {
    thread_local Floats memory;
    const Index floats = entries({tokens, each});
    if (Index(memory.size()) < floats) memory.resize(floats);
    return memory.data();
}

void require_matrix(const BoundMatrix& w, const char* name, Index out, Index in) {
    if (w.matrix.out != out || w.matrix.in != in) refuse(name, "shape " + text({out, in}));
}

// x [T, hidden] -> T
Index tokens_in(const In& x, const Out& out, const BoundMatrix& first, const BoundMatrix& last) {
    require(x.ndim() == 2 && x.shape(0) > 0, "x", "2 axes [T, hidden]");
    const Index T = x.shape(0);
    require_shape(x, "x", {T, first.matrix.in});
    require_contiguous(x, "x");
    require_shape(out, "out", {T, last.matrix.out});
    require_contiguous(out, "out");
    return T;
}

void project(const float* x, Index T, const BoundMatrix& w, float* y) { linears(x, T, &w.matrix, 1, &y); }

// --- feed-forward ----------------------------------------------------------------------------------------------------

struct Mlp {
    BoundMatrix gate, up, down;

    Mlp(const BoundMatrix& gate, const BoundMatrix& up, const BoundMatrix& down) : gate(gate), up(up), down(down) {
        require_matrix(up, "up_proj", gate.matrix.out, gate.matrix.in);
        if (down.matrix.in != gate.matrix.out) refuse("down_proj", std::to_string(gate.matrix.out) + " columns");
    }

    void run(const In& x, const Out& out) const {
        const Index T = tokens_in(x, out, gate, down), n = gate.matrix.out;
        nb::gil_scoped_release release;
        float* memory = room(T, 2 * n);
        float* ys[] = {memory, memory + T * n};
        const Matrix ws[] = {gate.matrix, up.matrix};
        linears(x.data(), T, ws, 2, ys);
        constexpr Index piece = 1 << 14;  // entries
        parallel_for((T * n + piece - 1) / piece, [&](int i) {
            const Index at = i * piece;
            layer_kernels().silu_mul(ys[0] + at, ys[0] + at, ys[1] + at, std::min(piece, T * n - at));
        });
        project(ys[0], T, down, out.data());
    }
};

// --- Gated DeltaNet --------------------------------------------------------------------------------------------------

struct DeltaNetMixer {
    BoundMatrix qkv, z, b, a, out_proj;
    In conv, decay, dt_bias, norm;
    Index Hv, V, width, C;

    DeltaNetMixer(const BoundMatrix& qkv, const BoundMatrix& z, const BoundMatrix& b, const BoundMatrix& a,
                  const In& conv, const In& decay, const In& dt_bias, const In& norm, const BoundMatrix& out_proj)
        : qkv(qkv), z(z), b(b), a(a), out_proj(out_proj), conv(conv), decay(decay), dt_bias(dt_bias), norm(norm) {
        Hv = decay.size(), V = norm.size(), C = qkv.matrix.out;
        require(conv.ndim() == 2, "conv", "2 axes");
        width = conv.shape(1);
        require(1 <= width, "conv", "at least one tap");
        require_shape(conv, "conv", {C, width});
        require_contiguous(conv, "conv");
        vector_of(decay, "decay", Hv);
        vector_of(dt_bias, "dt_bias", Hv);
        vector_of(norm, "norm", V);
        require(Hv > 0 && V > 0, "decay, norm", "at least one head");
        const Index hidden = qkv.matrix.in;
        require_matrix(z, "in_proj_z", entries({Hv, V}), hidden);
        require_matrix(b, "in_proj_b", Hv, hidden);
        require_matrix(a, "in_proj_a", Hv, hidden);
        if (out_proj.matrix.in != Hv * V) refuse("out_proj", std::to_string(Hv * V) + " columns");
    }

    void run(const In& x, Index key_heads, float eps, Index keep, nb::handle sequences, const Out& out) const {
        const Index T = tokens_in(x, out, qkv, out_proj);
        require(key_heads > 0 && Hv % key_heads == 0, "key_heads", "a divisor of the value heads");
        const Index K = (C - Hv * V) / (2 * key_heads);
        require(K > 0 && C == 2 * key_heads * K + Hv * V, "in_proj_qkv", "rows for queries, keys and values");
        require(keep >= 0, "keep", "0 or more");
        DeltaNet net{key_heads, Hv, K, V, width, keep, {}, {}, {}, {}, conv.data(), decay.data(), dt_bias.data(),
                     norm.data(), eps, {}};
        const DeltaSequences all(sequences, net, T);
        nb::gil_scoped_release release;
        float* memory = room(T, C + 2 * Hv * V + 2 * Hv);
        float* ys[] = {memory, memory + T * C, memory + T * (C + 2 * Hv * V), memory + T * (C + 2 * Hv * V + Hv)};
        float* mixed = ys[1] + T * Hv * V;
        const Matrix ws[] = {qkv.matrix, z.matrix, b.matrix, a.matrix};
        linears(x.data(), T, ws, 4, ys);
        net.qkv = {ys[0], C}, net.z = {ys[1], Hv * V}, net.b = {ys[2], Hv}, net.a = {ys[3], Hv};
        net.out = {mixed, Hv * V};
        delta_net(net, all.sequences.data(), Index(all.sequences.size()));
        project(mixed, T, out_proj, out.data());
    }
};

// --- gated attention -------------------------------------------------------------------------------------------------

struct AttentionMixer {
    BoundMatrix q, k, v, o;
    In q_norm, k_norm;
    Index Hq, Hkv, D;

    AttentionMixer(const BoundMatrix& q, const BoundMatrix& k, const BoundMatrix& v, const BoundMatrix& o,
                   const In& q_norm, const In& k_norm)
        : q(q), k(k), v(v), o(o), q_norm(q_norm), k_norm(k_norm) {
        D = q_norm.size();
        vector_of(q_norm, "q_norm", D);
        vector_of(k_norm, "k_norm", D);
        require(D > 0 && q.matrix.out % (2 * D) == 0, "q_proj", "rows for a query and a gate of every head");
        Hq = q.matrix.out / (2 * D), Hkv = k.matrix.out / D;
        require(Hkv > 0 && Hq % Hkv == 0, "k_proj", "a divisor of the query heads");
        require_matrix(k, "k_proj", Hkv * D, q.matrix.in);
        require_matrix(v, "v_proj", Hkv * D, q.matrix.in);
        if (o.matrix.in != Hq * D) refuse("o_proj", std::to_string(Hq * D) + " columns");
    }

    void run(const In& x, float eps, const In& cos, const In& sin, const char* dtype, nb::handle sequences,
             const Out& out) const {
        const Index T = tokens_in(x, out, q, o), q_size = 2 * Hq * D, kv_size = Hkv * D;
        Attention a{};
        a.Hq = Hq, a.Hkv = Hkv, a.D = D, a.type = kv_type(dtype), a.eps = eps;
        a.q_norm = q_norm.data(), a.k_norm = k_norm.data();
        a.pairs = angles(cos, sin, T, D), a.cos = cos.data(), a.sin = sin.data();
        const KvSequences all(sequences, page_nbytes(dtype, Hkv, D), T);
        nb::gil_scoped_release release;
        float* memory = room(T, q_size + 2 * kv_size + Hq * D);
        float* ys[] = {memory, memory + T * q_size, memory + T * (q_size + kv_size)};
        a.out = ys[2] + T * kv_size;
        const Matrix ws[] = {q.matrix, k.matrix, v.matrix};
        linears(x.data(), T, ws, 3, ys);
        a.q = {ys[0], q_size, 2 * D}, a.gate = {ys[0] + D, q_size, 2 * D};  // per head: query, then gate
        a.k = {ys[1], kv_size, D}, a.v = {ys[2], kv_size, D};
        attention(a, all.sequences.data(), Index(all.sequences.size()));
        project(a.out, T, o, out.data());
    }
};

}  // namespace

void bind_mixers(nb::module_& m) {
    nb::class_<Mlp>(m, "Mlp", "SwiGLU feed-forward.")
        .def(nb::init<const BoundMatrix&, const BoundMatrix&, const BoundMatrix&>(), "gate_proj"_a, "up_proj"_a,
             "down_proj"_a)
        .def("__call__", &Mlp::run, "x"_a.noconvert(), "out"_a.noconvert());
    nb::class_<DeltaNetMixer>(m, "DeltaNet", "Gated DeltaNet mixer.")
        .def(nb::init<const BoundMatrix&, const BoundMatrix&, const BoundMatrix&, const BoundMatrix&, const In&,
                      const In&, const In&, const In&, const BoundMatrix&>(),
             "in_proj_qkv"_a, "in_proj_z"_a, "in_proj_b"_a, "in_proj_a"_a, "conv"_a.noconvert(), "decay"_a.noconvert(),
             "dt_bias"_a.noconvert(), "norm"_a.noconvert(), "out_proj"_a)
        .def("__call__", &DeltaNetMixer::run, "x"_a.noconvert(), "key_heads"_a, "eps"_a, "keep"_a, "sequences"_a,
             "out"_a.noconvert());
    nb::class_<AttentionMixer>(m, "GatedAttention", "Gated attention mixer.")
        .def(nb::init<const BoundMatrix&, const BoundMatrix&, const BoundMatrix&, const BoundMatrix&, const In&,
                      const In&>(),
             "q_proj"_a, "k_proj"_a, "v_proj"_a, "o_proj"_a, "q_norm"_a.noconvert(), "k_norm"_a.noconvert())
        .def("__call__", &AttentionMixer::run, "x"_a.noconvert(), "eps"_a, "cos"_a.noconvert(), "sin"_a.noconvert(),
             "dtype"_a, "sequences"_a, "out"_a.noconvert());
}
