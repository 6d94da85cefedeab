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
    Floats q, k, v, o, d, room;
    float g[chunk_tokens], beta[chunk_tokens];
    DeltaStep steps[chunk_tokens / 2];

    void resize(Index K, Index V) {
        q.resize(chunk_tokens * K);
        k.resize(chunk_tokens * K);
        v.resize(chunk_tokens * V);
        o.resize(chunk_tokens * V);
        d.resize(chunk_tokens * V);
        room.resize(delta_tile * K);
    }
};

static_assert(chunk_tokens == delta_most);

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

// One value head of a layer.
struct Head {
    Index head, key_head, K, V;
    bool writes_keys;  // the first of those that share the key head

    Index size() const { return V * K; }
};

Head head_of(Index head, Index Hk, Index Hv, Index K, Index V) {
    const Index share = Hv / Hk;
    return {head, head / share, K, V, head % share == 0};
}

// What the tokens of a chunk are asked and answer, beside what stands in the chunk.
struct Values {
    const float* v;
    Index v_stride;
    float* o;
    Index o_stride;
};

// A chunk through the delta rule in pairs of tokens.
void run_pairs(Chunk& c, const Head& h, Index tokens, const Values& values, const float* from, float* to) {
    plan_steps(c, tokens, h.K);
    layer_kernels().delta(
        to, from, h.V,
        {tokens, h.K, c.q.data(), c.k.data(), values.v, values.v_stride, values.o, values.o_stride, c.steps});
}

// A chunk of tokens, or none, through the delta rule one by one, after the updates that the state lacks. Token t writes
// updates[t] if there is such a one.
void run_steps(Chunk& c, const Head& h, const std::vector<DeltaUpdate>& pending, Index tokens, const Values& values,
               const DeltaUpdate* const* updates, const float* from, Index written, float* to) {
    const Index before = Index(pending.size()), K = h.K, V = h.V;
    const float* k[2 * delta_most];
    float *d[2 * delta_most], decay[2 * delta_most], own[delta_most];
    for (Index i = 0; i < before; i++) {
        k[i] = pending[i].k + h.key_head * K;
        d[i] = pending[i].d + h.head * V;
        decay[i] = pending[i].decay[h.head];
    }
    for (Index t = 0; t < tokens; t++) {
        const Index i = before + t;
        k[i] = &c.k[t * K];
        d[i] = updates[t] ? updates[t]->d + h.head * V : &c.d[t * V];
        decay[i] = std::exp(c.g[t]);
        own[t] = layer_kernels().dot(&c.q[t * K], k[i], K);
        if (!updates[t]) continue;
        updates[t]->decay[h.head] = decay[i];
        if (h.writes_keys) std::memcpy(updates[t]->k + h.key_head * K, k[i], K * sizeof(float));
    }
    layer_kernels().delta_steps(to, from, V,
                                {K, before, tokens, k, d, decay, c.q.data(), values.v, values.v_stride, values.o,
                                 values.o_stride, c.beta, own, written, c.room.data()});
}

// One head's tokens. `ready(t0, tokens)` puts q and k of unit length, beta and g of tokens [t0, t0 + tokens) into the
// chunk and says where their values are; `done(t0, tokens)` takes the answers. A long sequence goes in chunks up to the
// first state that is kept and from there token by token; one of few tokens goes token by token from the start: in
// pairs the sums have another order, and verifying must give the bits of decoding.
template <class Ready, class Done>
void run_tokens(Chunk& c, const Head& h, const DeltaSequence& s, Ready&& ready, Done&& done) {
    static const std::vector<DeltaUpdate> nothing;
    const bool few = s.tokens <= few_tokens;
    const Index whole = few ? 0 : s.tokens - s.keep, at = h.head * h.size();
    const float* from = s.state + at;
    const auto* pending = &s.pending;
    size_t next = 0;  // of the states that are written
    if (!few) {
        float* to = s.states_after[next++] + at;
        if (!pending->empty() || whole == 0) {
            run_steps(c, h, *pending, 0, {}, nullptr, from, 0, to);
            from = to, pending = &nothing;
        }
        for (Index t = 0, tokens; t < whole; t += tokens, from = to) {
            tokens = std::min(chunk_tokens, whole - t);
            run_pairs(c, h, tokens, ready(t, tokens), from, to);
            done(t, tokens);
        }
    }
    const Index first_update = s.tokens - s.keep;
    for (Index t = whole, tokens; t < s.tokens; t += tokens) {
        tokens = std::min(delta_most, s.tokens - t);
        const DeltaUpdate* updates[delta_most];
        for (Index i = 0; i < tokens; i++)
            updates[i] = t + i < first_update ? nullptr : &s.updates[t + i - first_update];
        const bool writes = next < s.states_after.size();
        const Index written = writes ? s.tokens - s.keep + Index(next) * delta_most - t : -1;
        float* to = writes ? s.states_after[next++] + at : nullptr;
        run_steps(c, h, *pending, tokens, ready(t, tokens), updates, from, written, to);
        done(t, tokens);
        from = to, pending = &nothing;
    }
}

// Channels [first, first + n) of the window.
void copy_window(const DeltaNet& net, const DeltaSequence& s, Rows<const float> x, Index first, Index n) {
    const Index C = net.channels(), before = net.width - 1;
    for (Index row = 0; row < before + s.keep; row++) {
        const Index token = s.tokens - s.keep + row - before;
        const float* from = token < 0 ? s.tail + (before + token) * C : x[token];
        std::memcpy(s.window + row * C + first, from + first, n * sizeof(float));
    }
}

// Ask for n channels of some tokens' rows: they are far apart, so that the hardware does not see them coming.
void prefetch(Rows<const float> x, Index t0, Index t1, Index channel, Index n) {
    for (Index t = t0; t < t1; t++)
        for (Index i = 0; i < n; i += 16) __builtin_prefetch(x[t] + channel + i, 0, 2);
}

void run_head(const DeltaNet& net, const DeltaSequence& s, Index start, const Head& h) {
    const LayerKernels& kernels = layer_kernels();
    const Index K = net.K, V = net.V, C = net.channels(), head = h.head;
    const Index q_at = h.key_head * K, k_at = net.Hk * K + q_at, v_at = 2 * net.Hk * K + head * V;
    const float q_scale = 1.0f / std::sqrt(float(K));
    const Rows<const float> x{net.qkv[start], net.qkv.stride};
    const float* state = s.state + head * h.size();
    for (Index i = 0; i < std::min(delta_ahead, h.size()); i += 16) __builtin_prefetch(state + i);
    Chunk& c = chunk_of_thread;
    c.resize(K, V);
    auto ready = [&](Index t0, Index tokens) -> Values {
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
        return {c.v.data(), V, c.o.data(), V};
    };
    run_tokens(c, h, s, ready, [&](Index t0, Index tokens) {
        for (Index t = 0; t < tokens; t++) {
            const Index row = start + t0 + t;
            kernels.rms_norm(net.out[row] + head * V, &c.o[t * V], net.norm, net.z[row] + head * V, V, net.eps);
        }
    });
    if (h.writes_keys) {
        copy_window(net, s, x, q_at, K);
        copy_window(net, s, x, k_at, K);
    }
    copy_window(net, s, x, v_at, V);
}

}  // namespace

void delta_net(const DeltaNet& net, const std::vector<DeltaSequence>& sequences) {
    const Index count = Index(sequences.size());
    std::vector<Index> starts(count, 0);
    for (Index i = 1; i < count; i++) starts[i] = starts[i - 1] + sequences[i - 1].tokens;
    parallel_for(int(count * net.Hv), [&](int piece) {
        const Index i = piece / net.Hv;
        run_head(net, sequences[i], starts[i], head_of(piece % net.Hv, net.Hk, net.Hv, net.K, net.V));
    });
}

void delta_rule(const DeltaRule& rule, const DeltaSequence& s) {
    const Index K = rule.K, V = rule.V;
    const float q_scale = 1.0f / std::sqrt(float(K));
    parallel_for(int(rule.Hv), [&](int head) {
        const Head h = head_of(head, rule.Hk, rule.Hv, K, V);
        Chunk& c = chunk_of_thread;
        c.resize(K, V);
        auto ready = [&](Index t0, Index tokens) -> Values {
            for (Index t = 0; t < tokens; t++) {
                const float* q = rule.q[t0 + t] + h.key_head * K;
                for (Index i = 0; i < K; i++) c.q[t * K + i] = q[i] * q_scale;
                std::memcpy(&c.k[t * K], rule.k[t0 + t] + h.key_head * K, K * sizeof(float));
                c.g[t] = rule.g[t0 + t][head];
                c.beta[t] = rule.beta[t0 + t][head];
            }
            return {rule.v[t0] + head * V, rule.v.stride, rule.out[t0] + head * V, rule.out.stride};
        };
        run_tokens(c, h, s, ready, [](Index, Index) {});
    });
}

void apply_updates(Index Hk, Index Hv, Index K, Index V, const DeltaSequence& s, float* to) {
    parallel_for(int(Hv), [&](int head) {
        const Head h = head_of(head, Hk, Hv, K, V);
        Chunk& c = chunk_of_thread;
        c.resize(K, V);
        run_steps(c, h, s.pending, 0, {}, nullptr, s.state + head * h.size(), 0, to + head * h.size());
    });
}

}  // namespace edgeq
