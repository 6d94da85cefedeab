// layers_test: every instruction set that this machine has against scalar, and each against itself in other company,
// through the functions that the backend calls, on vectors that end exactly where their memory ends.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "dev/compare.h"
#include "kernels/isa.h"
#include "kernels/threads.h"
#include "layers/layers.h"

using namespace edgeq;

namespace {

constexpr double sums_nmse = 1e-12;       // float32 sums in another order
constexpr double recurrent_nmse = 1e-10;  // and fed back a hundred times
constexpr double rounded_nmse = 1e-8;     // a key near the middle of two 16-bit numbers may become the other one: a
                                          // 256th (bfloat16) or a 127th of the largest (int8), once in some thousands

void test_rows(Index n) {
    const Vector x = normal(n, 5), z = normal(n, 5), gain = normal(n);
    Vector y(n);
    auto kernel = [&](const char* what, auto&& call) {
        compare(what, sums_nmse, [&] { return call(layer_kernels()), y; });
    };
    kernel("add", [&](const LayerKernels& k) { k.add(y.data(), x.data(), z.data(), n); });
    kernel("silu_mul", [&](const LayerKernels& k) { k.silu_mul(y.data(), x.data(), z.data(), n); });
    kernel("sigmoid_mul", [&](const LayerKernels& k) { k.sigmoid_mul(y.data(), x.data(), z.data(), n); });
    kernel("rms_norm", [&](const LayerKernels& k) { k.rms_norm(y.data(), x.data(), gain.data(), nullptr, n, 1e-6f); });
    kernel("gated", [&](const LayerKernels& k) { k.rms_norm(y.data(), x.data(), gain.data(), z.data(), n, 1e-6f); });
    kernel("l2_norm", [&](const LayerKernels& k) { k.l2_norm(y.data(), x.data(), n, 1e-6f, 0.5f); });
    const Index pairs = n / 3;
    const Vector cosines = normal(pairs), sines = normal(pairs);
    kernel("rope", [&](const LayerKernels& k) { k.rope(y.data(), x.data(), cosines.data(), sines.data(), pairs, n); });
}

// A DeltaNet layer's input for some tokens of a sequence, and what comes of it when they are fed in calls of some
// lengths: the outputs, then the last call's keep + 1 tails and states.
struct DeltaCase {
    Index tokens, Hk, Hv, K, V, width, C = 2 * Hk * K + Hv * V, size = Hv * V * K;
    Vector qkv = normal(tokens * C), z = normal(tokens * Hv * V), b = normal(tokens * Hv), a = normal(tokens * Hv, 3);
    Vector conv = normal(C * width), dt_bias = normal(Hv), gain = normal(V);
    Vector tail = normal((width - 1) * C), state = normal(size), decay = normal(Hv);

    // The same without its last n tokens.
    DeltaCase without(Index n) const {
        DeltaCase shorter = *this;
        shorter.tokens -= n;
        return shorter;
    }

    // Where `lacking`, every call keeps all of its states, and the next goes on from the one that lacks most.
    Vector run(const std::vector<Index>& lengths, Index keep, bool lacking = false) const {
        const Index k_size = Hk * K, d_size = Hv * V, update_size = k_size + d_size + Hv;
        Vector updates(tokens * update_size), out(tokens * d_size), negative = decay, old_tail = tail;
        auto update = [&](Index token) {
            float* at = &updates[token * update_size];
            return DeltaUpdate{at, at + k_size, at + k_size + d_size};
        };
        for (float& d : negative) d = -std::exp(d);
        std::vector<Vector> states{state};
        std::vector<DeltaUpdate> pending;
        Vector window, kept_tails, kept_states;
        Index at = 0;
        for (Index n : lengths) {
            const bool last = at + n == tokens;
            const Index kept = last ? keep : lacking ? n : 0;
            DeltaNet net{};
            net.Hk = Hk, net.Hv = Hv, net.K = K, net.V = V, net.width = width, net.eps = 1e-6f;
            net.qkv = {qkv.data() + at * C, C}, net.z = {z.data() + at * d_size, d_size};
            net.b = {b.data() + at * Hv, Hv}, net.a = {a.data() + at * Hv, Hv};
            net.conv = conv.data(), net.A = negative.data(), net.dt_bias = dt_bias.data(), net.norm = gain.data();
            net.out = {out.data() + at * d_size, d_size};
            window.assign((width - 1 + kept) * C, 0);
            std::vector<Vector> after(states_written(kept), Vector(size));
            const Vector old_state = states[0];
            DeltaSequence s{n, kept, old_tail.data(), old_state.data(), pending, window.data(), {}, {}};
            for (Vector& x : after) s.states_after.push_back(x.data());
            for (Index i = 0; i < kept; i++) s.updates.push_back(update(at + n - kept + i));
            delta_net(net, {s});
            states = after, pending = s.updates;
            if (!last) old_tail.assign(window.end() - (width - 1) * C, window.end());
            at += n;
        }
        for (Index i = 0; i <= keep; i++) {
            const Index of = i ? (i - 1) / delta_most : 0;
            DeltaSequence s{};
            s.state = states[of].data();
            for (Index u = of * delta_most; u < i; u++) s.pending.push_back(update(tokens - keep + u));
            Vector whole(size);
            apply_updates(Hk, Hv, K, V, s, whole.data());
            kept_tails.insert(kept_tails.end(), window.begin() + i * C, window.begin() + (i + width - 1) * C);
            kept_states.insert(kept_states.end(), whole.begin(), whole.end());
        }
        out.insert(out.end(), kept_tails.begin(), kept_tails.end());
        out.insert(out.end(), kept_states.begin(), kept_states.end());
        return out;
    }
};

void test_delta_net(Index tokens, Index keep, Index Hk, Index Hv, Index K, Index V, Index width) {
    const DeltaCase layer{tokens, Hk, Hv, K, V, width};
    compare("delta_net", recurrent_nmse, [&] { return layer.run({tokens}, keep); });
}

// An attention layer's input for `total` tokens of a sequence, and what comes of it when they are fed in calls of some
// lengths: the outputs [total, Hq * D], then the keys and values that were kept.
struct AttentionCase {
    KvType type;
    Index total, Hq, Hkv, D, pairs = D / 4;
    Vector k = normal(total * Hkv * D), v = normal(total * Hkv * D), q = normal(total * 2 * Hq * D);
    Vector gain = normal(D), cosines = normal(total * pairs), sines = normal(total * pairs);

    Vector run(const std::vector<Index>& lengths) const {
        const Index nbytes = kv_page_nbytes(type, Hkv, D);
        std::vector<std::vector<uint8_t>> pages((total + kv_page - 1) / kv_page, std::vector<uint8_t>(nbytes, 0xff));
        std::vector<uint8_t*> pointers;
        for (auto& page : pages) pointers.push_back(page.data());
        Vector out(total * Hq * D);
        Index past = 0;
        for (Index tokens : lengths) {
            Attention a{};
            a.Hq = Hq, a.Hkv = Hkv, a.D = D, a.type = type, a.eps = 1e-6f, a.pairs = pairs;
            a.q_norm = a.k_norm = gain.data();
            a.cos = cosines.data() + past * pairs, a.sin = sines.data() + past * pairs;
            a.k = {k.data() + past * Hkv * D, Hkv * D, D}, a.v = {v.data() + past * Hkv * D, Hkv * D, D};
            a.q = {q.data() + past * 2 * Hq * D, 2 * Hq * D, 2 * D};
            a.gate = {a.q.data + D, 2 * Hq * D, 2 * D};
            a.out = out.data() + past * Hq * D;
            attention(a, {{tokens, past, pointers}});
            past += tokens;
        }
        for (Index i = 0; i < Index(pages.size()); i++) {
            const Index count = std::min<Index>(kv_page, total - i * kv_page);
            Vector keys(count * Hkv * D), values(count * Hkv * D);
            read_page(pointers[i], type, Hkv, D, count, keys.data(), values.data());
            out.insert(out.end(), keys.begin(), keys.end());
            out.insert(out.end(), values.begin(), values.end());
        }
        return out;
    }
};

void test_attention(KvType type, Index tokens, Index past, Index Hq, Index Hkv, Index D) {
    const AttentionCase layer{type, past + tokens, Hq, Hkv, D};
    std::vector<Index> lengths{tokens};
    if (past) lengths.insert(lengths.begin(), past);
    compare("attention", type == KvType::f32 ? sums_nmse : rounded_nmse, [&] { return layer.run(lengths); });
}

// --- in company ------------------------------------------------------------------------------------------------------

template <class Run>
void expect_equal(const char* what, const Vector& expected, Run&& run) {
    for (int threads : {1, 2, 7}) {
        set_thread_count(threads);
        if (run() == expected) continue;
        failures++;
        std::printf("FAILED %s: %s, %d threads\n", isa_name(active_isa()), what, threads);
    }
    set_thread_count(2);
}

// A token's attention is the same whoever else is in its calls, and on any number of threads.
void test_attention_in_company(KvType type) {
    const AttentionCase layer{type, 600, 4, 2, 32};
    const Vector expected = layer.run({600});
    std::vector<Index> one_by_one{250};
    one_by_one.resize(351, 1);
    for (const auto& lengths : {std::vector<Index>{600}, {17, 239, 5, 300, 39}, one_by_one})
        expect_equal("attention in company", expected, [&] { return layer.run(lengths); });
}

// Few tokens are the same in one call and in several, whatever is kept; a long call may end at any multiple of 32.
void test_delta_net_in_company(Index K, Index V) {
    const DeltaCase few{16, 2, 4, K, V, 4}, many{150, 2, 4, K, V, 4};
    const Vector verified = few.run({16}, 16);
    for (const auto& lengths : {std::vector<Index>{16}, {1, 15}, std::vector<Index>(16, 1)}) {
        const Index keep = lengths.back();
        const size_t kept = keep + 1, tail_size = few.tail.size(), state_size = few.state.size();
        const size_t outputs = 16 * few.Hv * V, states = outputs + 17 * tail_size;
        Vector expected(verified.begin(), verified.begin() + outputs);
        expected.insert(expected.end(), verified.begin() + states - kept * tail_size, verified.begin() + states);
        expected.insert(expected.end(), verified.end() - kept * state_size, verified.end());
        expect_equal("few tokens in company", expected, [&] { return few.run(lengths, keep); });
        expect_equal("states that lack updates", expected, [&] { return few.run(lengths, keep, true); });
    }
    const Vector kept = many.run({150}, 100);  // states that are written and states that lack updates
    const size_t state_size = many.state.size();
    for (Index n : {1, 31, 32, 33, 64, 99}) {
        const DeltaCase shorter = many.without(n);
        const Vector last = shorter.run({150 - n}, 100 - n);
        const Vector expected(last.end() - state_size, last.end());
        const auto end = kept.end() - n * state_size;
        expect_equal("kept states", expected, [&] { return Vector(end - state_size, end); });
    }
    const Vector whole = many.run({150}, 2);
    for (const auto& lengths : {std::vector<Index>{150}, {32, 118}, {64, 64, 22}})
        expect_equal("many tokens in company", whole, [&] { return many.run(lengths, 2); });
}

}  // namespace

// Any argument leaves out what takes minutes under emulation: long contexts, and every set in other company, which does
// not depend on it.
int main(int argc, char**) {
    const bool quick = argc > 1;
    for (Index n : {3, 4, 15, 16, 17, 33, 127, 1000}) test_rows(n);
    for (Index tokens : {1, 2, 3, 64, 97}) test_delta_net(tokens, 0, 2, 4, 128, 128, 4);
    test_delta_net(4, 4, 1, 4, 128, 128, 4);
    test_delta_net(40, 3, 2, 2, 40, 7, 3);
    test_delta_net(5, 1, 1, 1, 300, 9, 8);
    for (KvType type : {KvType::f16, KvType::bf16, KvType::f32, KvType::int8, KvType::int4}) {
        test_attention(type, 1, quick ? 300 : 700, 8, 2, 256);
        test_attention(type, 40, 250, 4, 2, 64);
        test_attention(type, 5, 0, 3, 3, 40);
    }
    for (int i = 0; i < isa_count; i++) {
        if (quick || !isa_supported(static_cast<Isa>(i))) continue;
        set_isa(isa_name(static_cast<Isa>(i)));
        for (KvType type : {KvType::f16, KvType::bf16, KvType::f32, KvType::int8, KvType::int4})
            test_attention_in_company(type);
        test_delta_net_in_company(128, 128);
        test_delta_net_in_company(40, 7);
    }
    for (Index width : {1, 2, 5, 9, 16, 33, 64}) test_delta_net(20, 2, 2, 2, 40, 136, width);
    std::printf("layers: every instruction set against scalar, %d failures\n", failures);
    return failures != 0;
}
