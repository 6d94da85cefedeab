// The vision tower: its operations, and all of its blocks in one call.
#include "bind_layers.h"
#include "bind_linear.h"
#include "interruptions.h"
#include "layers/rows.h"
#include "vision/vision.h"

using namespace nanobind::literals;
using namespace edgeq;

namespace {

// Weights that a call uses while the GIL is released.
struct Held {
    std::vector<nb::tuple> tuples;
    std::vector<In> arrays;

    // A pair (weight, bias) as edgeq.weights has it.
    nb::tuple pair(nb::handle of, const char* name) {
        tuples.push_back(items_of(of, name, "(weight, bias)", 2));
        return tuples.back();
    }

    const float* vector(nb::handle of, const char* name, Index n) {
        arrays.push_back(item<In>(of, name, "a float32 array"));
        return vector_of(arrays.back(), name, n);
    }

    Affine affine(nb::handle of, const char* name, Index out, Index in) {
        const nb::tuple both = pair(of, name);
        const Matrix& w = matrix_of(both[0], name).matrix;
        if (w.out != out || w.in != in) refuse(name, "shape " + text({out, in}) + ", found " + text({w.out, w.in}));
        return {w, vector(both[1], name, out)};
    }
};

std::vector<Index> spans_of(nb::handle lengths, Index T) {
    std::vector<Index> spans;
    Index left = T;
    for (nb::handle x : items_of(lengths, "lengths", "integers")) {
        spans.push_back(item<Index>(x, "lengths", "integers"));
        require(0 < spans.back() && spans.back() <= left, "lengths", "at least one token each, together the rows of x",
                spans.back());
        left -= spans.back();
    }
    require(left == 0, "lengths", "as many tokens as x has rows", T - left);
    return spans;
}

// x [T, n] -> T
Index rows_in(const In& x) {
    require(x.ndim() == 2 && x.shape(0) > 0 && x.shape(1) > 0, "x", "2 axes [T, n]");
    require_contiguous(x, "x");
    return x.shape(0);
}

void layer_norm(const In& x, const In& gain, const In& bias, float eps, const Out& out) {
    const auto y = output(out, x);
    const auto from = grid<const float>(x, "x");
    const float *gains = vector_of(gain, "gain", y.n), *biases = vector_of(bias, "bias", y.n);
    nb::gil_scoped_release release;
    each_row(y.rows, y.n, [&](Index row) { vision_kernels().layer_norm(y[row], from[row], gains, biases, y.n, eps); });
}

void gelu(const In& x, bool exact, const Out& out) {
    const auto y = output(out, x);
    const auto from = grid<const float>(x, "x");
    nb::gil_scoped_release release;
    each_row(y.rows, y.n, [&](Index row) { vision_kernels().gelu(y[row], from[row], y.n, exact); });
}

void affine_(const In& x, const BoundMatrix& w, const In& bias, const Out& out) {
    const Index T = rows_in(x);
    require(Index(x.shape(1)) == w.matrix.in, "x", "as many columns as the matrix", x.shape(1));
    require_shape(out, "out", {T, w.matrix.out});
    require_contiguous(out, "out");
    const Affine both{w.matrix, vector_of(bias, "bias", w.matrix.out)};
    nb::gil_scoped_release release;
    affine(x.data(), T, both, out.data());
}

void full_attention_(const In& q, const In& k, const In& v, nb::handle lengths, const Out& out) {
    require(q.ndim() == 3 && q.shape(0) > 0 && q.shape(1) > 0 && q.shape(2) > 0, "q", "3 axes [T, H, D]");
    const Index T = q.shape(0), H = q.shape(1), D = q.shape(2);
    const Heads queries = heads_of(q, "q", T, H, D), keys = heads_of(k, "k", T, H, D),
                values = heads_of(v, "v", T, H, D);
    const std::vector<Index> spans = spans_of(lengths, T);
    float* y = output(out, q).data;
    nb::gil_scoped_release release;
    full_attention(queries, keys, values, H, D, spans, y);
}

void vision_blocks(const In& x, nb::handle blocks, Index heads, float eps, const In& cos, const In& sin,
                   nb::handle lengths, const Out& out) {
    const Index T = rows_in(x), hidden = x.shape(1);
    output(out, x);
    require(heads > 0 && hidden % heads == 0, "heads", "a divisor of the hidden size", heads);
    Held held;
    VisionTower tower{{}, hidden, heads, eps, cos.data(), sin.data(), 0, spans_of(lengths, T)};
    tower.pairs = angles(cos, sin, T, hidden / heads);
    held.tuples.push_back(items_of(blocks, "blocks", "a sequence of VisionBlockWeights"));
    for (nb::handle of : nb::tuple(held.tuples.back())) {
        const nb::tuple w = items_of(of, "blocks", "VisionBlockWeights", 6);
        held.tuples.push_back(w);
        const nb::tuple norm1 = held.pair(w[0], "norm1"), norm2 = held.pair(w[1], "norm2");
        const nb::tuple fc1 = held.pair(w[4], "fc1");
        const Index wide = matrix_of(fc1[0], "fc1").matrix.out;
        tower.blocks.push_back({held.vector(norm1[0], "norm1", hidden), held.vector(norm1[1], "norm1", hidden),
                                held.vector(norm2[0], "norm2", hidden), held.vector(norm2[1], "norm2", hidden),
                                held.affine(w[2], "qkv", 3 * hidden, hidden), held.affine(w[3], "proj", hidden, hidden),
                                held.affine(w[4], "fc1", wide, hidden), held.affine(w[5], "fc2", hidden, wide)});
    }
    Interruptions interruptions(true);
    bool finished;
    {
        nb::gil_scoped_release release;
        std::memcpy(out.data(), x.data(), T * hidden * sizeof(float));
        finished = run_vision(tower, out.data(), [&] { return interruptions.go_on(); });
    }
    if (!finished) nb::raise_python_error();
}

size_t nbytes(Index T, Index hidden, Index heads, Index wide) {
    require(T > 0 && hidden > 0 && wide > 0 && heads > 0 && hidden % heads == 0, "tokens, hidden, heads, intermediate",
            "positive numbers, the heads a divisor of the hidden size");
    entries({T, hidden, 64}), entries({hidden, std::max(hidden, wide), 64});
    return vision_nbytes(T, hidden, heads, wide);
}

}  // namespace

void bind_vision(nb::module_& m) {
    m.def("layer_norm", &layer_norm, "x"_a.noconvert(), "gain"_a.noconvert(), "bias"_a.noconvert(), "eps"_a,
          "out"_a.noconvert());
    m.def("gelu", &gelu, "x"_a.noconvert(), "exact"_a, "out"_a.noconvert());
    m.def("affine", &affine_, "x"_a.noconvert(), "w"_a, "bias"_a.noconvert(), "out"_a.noconvert(),
          "out = x @ w^T + bias; plain matrices to about 13 bits, see vision/kernels.h.");
    m.def("full_attention", &full_attention_, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "lengths"_a,
          "out"_a.noconvert(), "Within spans of `lengths`: float32 [T, H, D], any strides before the last axis.");
    m.def("vision_blocks", &vision_blocks, "x"_a.noconvert(), "blocks"_a, "heads"_a, "eps"_a, "cos"_a.noconvert(),
          "sin"_a.noconvert(), "lengths"_a, "out"_a.noconvert(),
          "All blocks: VisionBlockWeights. May raise what a signal's handler raises.");
    m.def("vision_nbytes", &nbytes, "tokens"_a, "hidden"_a, "heads"_a, "intermediate"_a,
          "Bytes that vision_blocks works in, for tokens of one frame.");
}
