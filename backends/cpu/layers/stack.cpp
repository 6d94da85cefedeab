#include "layers/stack.h"

#include <algorithm>

#include "kernels/linear.h"
#include "kernels/scratch.h"
#include "kernels/threads.h"
#include "layers/rows.h"

namespace edgeq {
namespace {

// --- memory ----------------------------------------------------------------------------------------------------------

// Memory of the calling thread, kept from call to call.
thread_local Floats memory;

float* workspace(Index floats) {
    make_room(memory, floats);
    return memory.data();
}

Index workspace_size(const FeedForward& mlp, Index T) { return 2 * T * mlp.gate.out; }

Index workspace_size(const DeltaNetMixer& m, Index T) { return T * (m.qkv.out + 2 * m.z.out + m.b.out + m.a.out); }

Index workspace_size(const AttentionMixer& m, Index T) { return T * (m.q.out + m.k.out + m.v.out + m.out.in); }

// --- the pieces, in a workspace of their size ------------------------------------------------------------------------

void project(const float* x, Index T, const Matrix& w, float* y) { linears(x, T, &w, 1, &y); }

void run(const FeedForward& mlp, const float* x, Index T, float* y, float* work) {
    const Index size = T * mlp.gate.out;
    float* gate_up[] = {work, work + size};
    const Matrix ws[] = {mlp.gate, mlp.up};
    linears(x, T, ws, 2, gate_up);
    constexpr Index piece = 1 << 14;  // entries
    parallel_for((size + piece - 1) / piece, [&](int i) {
        float* gate = gate_up[0] + i * piece;
        layer_kernels().silu_mul(gate, gate, gate_up[1] + i * piece, std::min(piece, size - i * piece));
    });
    project(work, T, mlp.down, y);
}

void run(const DeltaNetMixer& m, const float* x, Index T, float* y, float* work) {
    float *qkv = work, *z = qkv + T * m.qkv.out, *b = z + T * m.z.out, *a = b + T * m.b.out, *mixed = a + T * m.a.out;
    float* ys[] = {qkv, z, b, a};
    const Matrix ws[] = {m.qkv, m.z, m.b, m.a};
    linears(x, T, ws, 4, ys);
    DeltaNet net = m.between;
    net.qkv = {qkv, m.qkv.out}, net.z = {z, m.z.out}, net.b = {b, m.b.out}, net.a = {a, m.a.out};
    net.out = {mixed, m.z.out};
    delta_net(net, m.sequences);
    project(mixed, T, m.out, y);
}

void run(const AttentionMixer& m, const float* x, Index T, float* y, float* work) {
    float *q = work, *k = q + T * m.q.out, *v = k + T * m.k.out, *mixed = v + T * m.v.out;
    float* ys[] = {q, k, v};
    const Matrix ws[] = {m.q, m.k, m.v};
    linears(x, T, ws, 3, ys);
    Attention a = m.between;
    a.q = {q, m.q.out, 2 * a.D}, a.gate = {q + a.D, m.q.out, 2 * a.D};  // per head: query, then gate
    a.k = {k, m.k.out, a.D}, a.v = {v, m.v.out, a.D};
    a.out = mixed;
    attention(a, m.sequences);
    project(mixed, T, m.out, y);
}

template <class Piece>
void run_alone(const Piece& piece, const float* x, Index T, float* y) {
    run(piece, x, T, y, workspace(workspace_size(piece, T)));
}

// --- the layers ------------------------------------------------------------------------------------------------------

Index workspace_size(const std::vector<DecoderLayer>& layers, Index T) {
    Index size = 0;
    for (const DecoderLayer& layer : layers) {
        size = std::max(size, workspace_size(layer.mlp, T));
        size = std::max(size, std::visit([&](const auto& mixer) { return workspace_size(mixer, T); }, layer.mixer));
    }
    return size;
}

}  // namespace

void release_workspace() { Floats().swap(memory); }

void run_mlp(const FeedForward& mlp, const float* x, Index T, float* y) { run_alone(mlp, x, T, y); }
void run_mixer(const DeltaNetMixer& mixer, const float* x, Index T, float* y) { run_alone(mixer, x, T, y); }
void run_mixer(const AttentionMixer& mixer, const float* x, Index T, float* y) { run_alone(mixer, x, T, y); }

bool run_layers(const std::vector<DecoderLayer>& layers, Index T, Index hidden, float eps, float* x,
                const std::function<bool()>& go_on) {
    const LayerKernels& kernels = layer_kernels();
    float* h = workspace(T * hidden + workspace_size(layers, T));  // a piece's input, then its output
    float* work = h + T * hidden;
    auto norm = [&](const float* gain) {
        each_row(T, hidden,
                 [&](Index t) { kernels.rms_norm(h + t * hidden, x + t * hidden, gain, nullptr, hidden, eps); });
    };
    auto add = [&] {
        each_row(T, hidden, [&](Index t) { kernels.add(x + t * hidden, x + t * hidden, h + t * hidden, hidden); });
    };
    for (const DecoderLayer& layer : layers) {
        norm(layer.input_norm);
        std::visit([&](const auto& mixer) { run(mixer, h, T, h, work); }, layer.mixer);
        add();
        norm(layer.post_norm);
        run(layer.mlp, h, T, h, work);
        add();
        if (!go_on()) return false;
    }
    return true;
}

}  // namespace edgeq
