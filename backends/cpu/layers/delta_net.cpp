// Gated DeltaNet between its projections, value head by value head: no head needs another, so there is one
// parallel_for and no barrier. Tokens pass in chunks small enough that a chunk's queries and keys stay in the nearest
// cache while the head's state streams past.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/linear.h"
#include "kernels/scratch.h"
#include "kernels/threads.h"
#include "layers/layers.h"

namespace edgeq {
namespace {

constexpr Index chunk_tokens = 32;
constexpr float l2_eps = 1e-6f;              // of q and k; fixed by the architecture
constexpr float smallest_factor = 0x1p-20f;  // of the state, before it is multiplied through (see DeltaStep)

// What one head computes about a chunk before the delta rule runs.
struct Chunk {
    Floats q, k, v, o;
    float g[chunk_tokens], beta[chunk_tokens];
    DeltaStep steps[chunk_tokens / 2];

    void resize(Index K, Index V) {
        q.resize(chunk_tokens * K);
        k.resize(chunk_tokens * K);
        v.resize(chunk_tokens * V);
        o.resize(chunk_tokens * V);
    }
};

thread_local Chunk chunk_of_thread;

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// The steps of a chunk from its q, k, g and beta.
void plan_steps(Chunk& c, Index tokens, Index K) {
    const auto dot = layer_kernels().dot;
    float factor = 1.0f;
    for (Index t = 0; t < tokens; t += 2) {
        DeltaStep& step = c.steps[t / 2];
        const bool pair = t + 1 < tokens;
        const float *q1 = &c.q[t * K], *k1 = &c.k[t * K], *q2 = q1 + K, *k2 = k1 + K;
        const float e2 = pair ? std::exp(c.g[t + 1]) : 1.0f;
        step.beta[0] = c.beta[t];
        step.decay[0] = factor * std::exp(c.g[t]);
        step.own[0] = dot(q1, k1, K);
        if (pair) {
            step.beta[1] = c.beta[t + 1];
            step.decay[1] = step.decay[0] * e2;
            step.own[1] = dot(q2, k2, K);
            step.recall = e2 * dot(k1, k2, K);
            step.answer = e2 * dot(q2, k1, K);
        }
        const float decayed = step.decay[pair ? 1 : 0];
        const bool fold = t + 2 >= tokens || decayed < smallest_factor;
        step.through = fold ? decayed : 1.0f;
        factor = fold ? 1.0f : decayed;
        step.lift[0] = e2 / factor;
        step.lift[1] = 1.0f / factor;
    }
}

// Calls run(first token, tokens, from, to) for the chunks of one head: whole chunks up to the first state that is
// kept, then token by token, every one into its own state. A sequence of few tokens goes token by token from the start:
// in pairs the sums have another order, and verifying must give the bits of decoding.
template <class Run>
void each_chunk(const DeltaSequence& s, Index head, Index head_size, Run&& run) {
    const Index before_kept = s.tokens - s.keep, whole = s.tokens <= few_tokens ? 0 : before_kept;
    const float* from = s.state + head * head_size;
    if (before_kept == 0) std::memcpy(s.states_after[0] + head * head_size, from, head_size * sizeof(float));
    for (Index t = 0, tokens; t < s.tokens; t += tokens) {
        tokens = t < whole ? std::min(chunk_tokens, whole - t) : 1;
        float* to = s.states_after[std::max<Index>(0, t + tokens - before_kept)] + head * head_size;
        run(t, tokens, from, to);
        from = to;
    }
}

// q, k and beta, g of the chunk are there, q and k of unit length; v and o are `v` and `o`.
void run_delta(Chunk& c, Index tokens, Index K, Index V, const float* v, Index v_stride, float* o, Index o_stride,
               const float* from, float* to, bool last) {
    plan_steps(c, tokens, K);
    layer_kernels().delta(to, from, V, {tokens, K, c.q.data(), c.k.data(), v, v_stride, o, o_stride, c.steps, last});
}

// Channels [first, first + n) of the tails after tokens - keep, ..., tokens tokens.
void copy_tails(const DeltaNet& net, const DeltaSequence& s, Rows<const float> x, Index first, Index n) {
    const Index C = net.channels(), rows = net.width - 1;
    for (Index i = 0; i <= s.keep; i++)
        for (Index row = 0; row < rows; row++) {
            const Index token = s.tokens - s.keep + i + row - rows;
            const float* from = token < 0 ? s.tail + (rows + token) * C : x[token];
            std::memcpy(s.tails_after[i] + row * C + first, from + first, n * sizeof(float));
        }
}

// Ask for n channels of some tokens' rows: they are far apart, so that the hardware does not see them coming.
void prefetch(Rows<const float> x, Index t0, Index t1, Index channel, Index n) {
    for (Index t = t0; t < t1; t++)
        for (Index i = 0; i < n; i += 16) __builtin_prefetch(x[t] + channel + i, 0, 2);
}

void run_head(const DeltaNet& net, const DeltaSequence& s, Index start, Index head) {
    const LayerKernels& kernels = layer_kernels();
    const Index K = net.K, V = net.V, share = net.Hv / net.Hk;
    const Index C = net.channels();
    const Index q_at = head / share * K, k_at = net.Hk * K + q_at, v_at = 2 * net.Hk * K + head * V;
    const float q_scale = 1.0f / std::sqrt(float(K));
    const Rows<const float> x{net.qkv[start], net.qkv.stride};
    const float* state = s.state + head * V * K;
    for (Index i = 0; i < std::min(delta_ahead, V * K); i += 16) __builtin_prefetch(state + i);
    Chunk& c = chunk_of_thread;
    c.resize(K, V);
    each_chunk(s, head, V * K, [&](Index t0, Index tokens, const float* from, float* to) {
        auto convolve = [&](float* y, Index channel, Index n) {
            kernels.conv_silu(y, n, x.data + channel, x.stride, s.tail + channel, C, net.conv + channel * net.width,
                              net.width, t0, t0 + tokens, n);
        };
        convolve(c.q.data(), q_at, K);
        convolve(c.k.data(), k_at, K);
        convolve(c.v.data(), v_at, V);
        const Index next = t0 + tokens, after = std::min(next + tokens, s.tokens);
        for (auto [channel, n] : {std::pair(q_at, K), std::pair(k_at, K), std::pair(v_at, V)})
            prefetch(x, next, after, channel, n);
        prefetch({net.z[start], net.z.stride}, t0, next, head * V, V);
        for (Index t = 0; t < tokens; t++) {
            const Index row = start + t0 + t;
            kernels.l2_norm(&c.q[t * K], &c.q[t * K], K, l2_eps, q_scale);
            kernels.l2_norm(&c.k[t * K], &c.k[t * K], K, l2_eps, 1.0f);
            c.g[t] = net.A[head] * softplus(net.a[row][head] + net.dt_bias[head]);
            c.beta[t] = sigmoid(net.b[row][head]);
        }
        run_delta(c, tokens, K, V, c.v.data(), V, c.o.data(), V, from, to, t0 + tokens == s.tokens);
        for (Index t = 0; t < tokens; t++) {
            const Index row = start + t0 + t;
            kernels.rms_norm(net.out[row] + head * V, &c.o[t * V], net.norm, net.z[row] + head * V, V, net.eps);
        }
    });
    if (head % share == 0) {
        copy_tails(net, s, x, q_at, K);
        copy_tails(net, s, x, k_at, K);
    }
    copy_tails(net, s, x, v_at, V);
}

}  // namespace

void delta_net(const DeltaNet& net, const std::vector<DeltaSequence>& sequences) {
    const Index count = Index(sequences.size());
    std::vector<Index> starts(count, 0);
    for (Index i = 1; i < count; i++) starts[i] = starts[i - 1] + sequences[i - 1].tokens;
    parallel_for(int(count * net.Hv), [&](int piece) {
        const Index i = piece / net.Hv;
        run_head(net, sequences[i], starts[i], piece % net.Hv);
    });
}

void delta_rule(const DeltaRule& rule, const DeltaSequence& s) {
    const Index K = rule.K, V = rule.V, share = rule.Hv / rule.Hk;
    const float q_scale = 1.0f / std::sqrt(float(K));
    parallel_for(int(rule.Hv), [&](int head) {
        Chunk& c = chunk_of_thread;
        c.resize(K, V);
        each_chunk(s, head, V * K, [&](Index t0, Index tokens, const float* from, float* to) {
            for (Index t = 0; t < tokens; t++) {
                const float* q = rule.q[t0 + t] + head / share * K;
                for (Index i = 0; i < K; i++) c.q[t * K + i] = q[i] * q_scale;
                std::memcpy(&c.k[t * K], rule.k[t0 + t] + head / share * K, K * sizeof(float));
                c.g[t] = rule.g[t0 + t][head];
                c.beta[t] = rule.beta[t0 + t][head];
            }
            run_delta(c, tokens, K, V, rule.v[t0] + head * V, rule.v.stride, rule.out[t0] + head * V, rule.out.stride,
                      from, to, t0 + tokens == s.tokens);
        });
    });
}

}  // namespace edgeq
