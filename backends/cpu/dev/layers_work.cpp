// layers_work ISA PIECE TOKENS PAST REPEATS: the native work of one piece of the 0.8B model at 4 bits, on one thread
// and without Python, for who counts instructions (tools/count_arm): two numbers of repetitions, and the difference
// between their counts is the piece. PIECE: delta (a Gated DeltaNet layer with its feed-forward), attention (the same
// of a gated attention layer with PAST tokens behind it), head (a sixteenth of the vocabulary).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/isa.h"
#include "kernels/linear.h"
#include "kernels/threads.h"
#include "layers/layers.h"

using namespace edgeq;

namespace {

constexpr Index hidden = 1024, intermediate = 3584, vocabulary = 248320;
constexpr Index Hk = 16, Hv = 16, K = 128, V = 128, width = 4, C = 2 * Hk * K + Hv * V;
constexpr Index Hq = 8, Hkv = 2, D = 256, pairs = 32;
constexpr float eps = 1e-6f;

using Vector = std::vector<float>;

struct Weights {
    std::vector<uint8_t> codes;
    std::vector<uint16_t> scales, biases;
    Matrix w;

    Weights(Index out, Index in)
        : codes(out * in / 2, 0x5a), scales(out * in / 64, 0x3c00), biases(out * in / 64, 0xbd00),
          w{codes.data(), scales.data(), biases.data(), out, in, 4, 64, Type::bf16} {}
};

void project(const Vector& x, Index tokens, const Weights& w, Vector& y) {
    float* out = y.data();
    linears(x.data(), tokens, &w.w, 1, &out);
}

void add_normed(const Vector& x, const Vector& y, const Vector& gain, Index tokens, Vector& sum, Vector& normed) {
    const LayerKernels& k = layer_kernels();
    k.add(sum.data(), x.data(), y.data(), tokens * hidden);
    for (Index t = 0; t < tokens; t++)
        k.rms_norm(&normed[t * hidden], &sum[t * hidden], gain.data(), nullptr, hidden, eps);
}

struct FeedForward {
    Weights gate{intermediate, hidden}, up{intermediate, hidden}, down{hidden, intermediate};
    Vector gated, upper, out;

    explicit FeedForward(Index tokens) : gated(tokens * intermediate), upper(gated), out(tokens * hidden) {}

    void run(const Vector& x, Index tokens) {
        const Matrix ws[] = {gate.w, up.w};
        float* ys[] = {gated.data(), upper.data()};
        linears(x.data(), tokens, ws, 2, ys);
        layer_kernels().silu_mul(gated.data(), gated.data(), upper.data(), tokens * intermediate);
        project(gated, tokens, down, out);
    }
};

void delta_layer(Index tokens, int repeats) {
    const Weights qkv(C, hidden), z(Hv * V, hidden), b(Hv, hidden), a(Hv, hidden), o(hidden, Hv * V);
    FeedForward mlp(tokens);
    Vector x(tokens * hidden, 0.1f), normed(x), sum(x), mixed(tokens * Hv * V), out(x), gain(hidden, 1.0f);
    Vector qkv_out(tokens * C), z_out(tokens * Hv * V), b_out(tokens * Hv), a_out(tokens * Hv);
    Vector conv(C * width, 0.2f), decay(Hv, -1.0f), bias(Hv, 0.1f), norm(V, 1.0f), tail((width - 1) * C);
    Vector state(Hv * V * K), tail_after(tail), state_after(state);
    DeltaNet net{};
    net.Hk = Hk, net.Hv = Hv, net.K = K, net.V = V, net.width = width, net.eps = eps;
    net.qkv = {qkv_out.data(), C}, net.z = {z_out.data(), Hv * V}, net.b = {b_out.data(), Hv};
    net.a = {a_out.data(), Hv}, net.out = {mixed.data(), Hv * V};
    net.conv = conv.data(), net.A = decay.data(), net.dt_bias = bias.data(), net.norm = norm.data();
    const std::vector<DeltaSequence> sequences{
        {tokens, 0, tail.data(), state.data(), {}, tail_after.data(), {state_after.data()}, {}}};
    for (int i = 0; i < repeats; i++) {
        add_normed(x, x, gain, tokens, sum, normed);
        const Matrix ws[] = {qkv.w, z.w, b.w, a.w};
        float* ys[] = {qkv_out.data(), z_out.data(), b_out.data(), a_out.data()};
        linears(normed.data(), tokens, ws, 4, ys);
        delta_net(net, sequences);
        project(mixed, tokens, o, out);
        add_normed(x, out, gain, tokens, sum, normed);
        mlp.run(normed, tokens);
    }
}

void attention_layer(Index tokens, Index past, int repeats) {
    const Weights q(2 * Hq * D, hidden), k(Hkv * D, hidden), v(Hkv * D, hidden), o(hidden, Hq * D);
    FeedForward mlp(tokens);
    Vector x(tokens * hidden, 0.1f), normed(x), sum(x), mixed(tokens * Hq * D), out(x), gain(hidden, 1.0f);
    Vector q_out(tokens * 2 * Hq * D), k_out(tokens * Hkv * D), v_out(k_out), norm(D, 1.0f),
        angle(tokens * pairs, 0.7f);
    std::vector<std::vector<uint8_t>> pages((past + tokens + kv_page - 1) / kv_page,
                                            std::vector<uint8_t>(kv_page_nbytes(KvType::f16, Hkv, D)));
    std::vector<uint8_t*> pointers;
    for (auto& page : pages) pointers.push_back(page.data());
    Attention a{};
    a.Hq = Hq, a.Hkv = Hkv, a.D = D, a.type = KvType::f16, a.eps = eps, a.pairs = pairs;
    a.q_norm = a.k_norm = norm.data(), a.cos = a.sin = angle.data();
    a.q = {q_out.data(), 2 * Hq * D, 2 * D}, a.gate = {q_out.data() + D, 2 * Hq * D, 2 * D};
    a.k = {k_out.data(), Hkv * D, D}, a.v = {v_out.data(), Hkv * D, D}, a.out = mixed.data();
    const std::vector<KvSequence> sequences{{tokens, past, pointers}};
    for (int i = 0; i < repeats; i++) {
        add_normed(x, x, gain, tokens, sum, normed);
        const Matrix ws[] = {q.w, k.w, v.w};
        float* ys[] = {q_out.data(), k_out.data(), v_out.data()};
        linears(normed.data(), tokens, ws, 3, ys);
        attention(a, sequences);
        project(mixed, tokens, o, out);
        add_normed(x, out, gain, tokens, sum, normed);
        mlp.run(normed, tokens);
    }
}

void head(int repeats) {
    const Weights w(vocabulary / 16, hidden);
    const Vector x(hidden, 0.1f);
    Vector y(vocabulary / 16);
    for (int i = 0; i < repeats; i++) project(x, 1, w, y);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 6) return std::fprintf(stderr, "usage: layers_work ISA PIECE TOKENS PAST REPEATS\n"), 2;
    set_thread_count(1);
    set_isa(argv[1]);
    const Index tokens = std::atol(argv[3]), past = std::atol(argv[4]);
    const int repeats = std::atoi(argv[5]);
    if (!std::strcmp(argv[2], "delta")) return delta_layer(tokens, repeats), 0;
    if (!std::strcmp(argv[2], "attention")) return attention_layer(tokens, past, repeats), 0;
    return head(repeats), 0;
}
