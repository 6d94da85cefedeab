// layers_test: every instruction set that this machine has against scalar, through the functions that the backend
// calls, on vectors that end exactly where their memory ends. NMSE = sum of squared differences over sum of squares.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

#include "kernels/isa.h"
#include "layers/layers.h"

using namespace edgeq;

namespace {

using Vector = std::vector<float>;

constexpr double sums_nmse = 1e-12;       // float32 sums in another order
constexpr double recurrent_nmse = 1e-10;  // and fed back a hundred times
constexpr double rounded_nmse = 1e-8;     // a key near the middle of two 16-bit numbers may become the other one: a
                                          // 256th (bfloat16) or a 127th of the largest (int8), once in some thousands

int failures = 0;
std::mt19937 generator(7);

Vector normal(Index n, float scale = 1.0f) {
    std::normal_distribution<float> distribution(0.0f, scale);
    Vector x(n);
    for (float& v : x) v = distribution(generator);
    return x;
}

// Runs `compute` under every instruction set; it returns what is to be compared.
void compare(const char* what, double bound, const std::function<Vector()>& compute) {
    set_isa("scalar");
    const Vector expected = compute();
    for (int i = 1; i < isa_count; i++) {
        const Isa isa = static_cast<Isa>(i);
        if (!isa_supported(isa)) continue;
        set_isa(isa_name(isa));
        const Vector found = compute();
        double error = 0, power = 0;
        for (size_t j = 0; j < expected.size(); j++) {
            error += std::pow(double(expected[j]) - found[j], 2);
            power += std::pow(double(expected[j]), 2);
        }
        if (error <= bound * power) continue;
        failures++;
        std::printf("FAILED %s: %s, NMSE %g\n", isa_name(isa), what, error / power);
    }
}

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

void test_delta_net(Index tokens, Index keep, Index Hk, Index Hv, Index K, Index V, Index width) {
    const Index C = 2 * Hk * K + Hv * V, size = Hv * V * K;
    const Vector qkv = normal(tokens * C), z = normal(tokens * Hv * V);
    const Vector b = normal(tokens * Hv), a = normal(tokens * Hv, 3);
    const Vector conv = normal(C * width), dt_bias = normal(Hv), gain = normal(V);
    const Vector tail = normal((width - 1) * C), state = normal(size);
    Vector decay = normal(Hv);
    for (float& d : decay) d = -std::exp(d);
    compare("delta_net", recurrent_nmse, [&] {
        std::vector<Vector> tails(keep + 1, Vector((width - 1) * C)), states(keep + 1, Vector(size));
        std::vector<float*> tail_pointers, state_pointers;
        for (Vector& t : tails) tail_pointers.push_back(t.data());
        for (Vector& s : states) state_pointers.push_back(s.data());
        Vector out(tokens * Hv * V);
        const DeltaNet net{Hk, Hv, K, V, width, keep, {qkv.data(), C}, {z.data(), Hv * V}, {b.data(), Hv},
                           {a.data(), Hv}, conv.data(), decay.data(), dt_bias.data(), gain.data(), 1e-6f,
                           {out.data(), Hv * V}};
        const DeltaSequence sequence{tokens, tail.data(), state.data(), tail_pointers.data(), state_pointers.data()};
        delta_net(net, &sequence, 1);
        for (const auto* after : {&tails, &states})
            for (const Vector& v : *after) out.insert(out.end(), v.begin(), v.end());
        return out;
    });
}

void test_attention(KvType type, Index tokens, Index past, Index Hq, Index Hkv, Index D) {
    const Index total = past + tokens, pairs = D / 4;
    const Vector q = normal(tokens * 2 * Hq * D), k = normal(total * Hkv * D), v = normal(total * Hkv * D);
    const Vector gain = normal(D), cosines = normal(total * pairs), sines = normal(total * pairs);
    compare("attention", type == KvType::f32 ? sums_nmse : rounded_nmse, [&] {
        const Index nbytes = kv_page_nbytes(type, Hkv, D);
        std::vector<std::vector<uint8_t>> pages((total + kv_page - 1) / kv_page, std::vector<uint8_t>(nbytes, 0xff));
        std::vector<uint8_t*> pointers;
        for (auto& page : pages) pointers.push_back(page.data());
        Vector out(tokens * Hq * D);
        Attention a{};
        a.Hq = Hq, a.Hkv = Hkv, a.D = D, a.type = type, a.eps = 1e-6f, a.pairs = pairs;
        a.q_norm = a.k_norm = gain.data(), a.cos = cosines.data(), a.sin = sines.data();
        a.k = {k.data(), Hkv * D, D}, a.v = {v.data(), Hkv * D, D};
        if (past) append_kv(a, {past, 0, pointers.data()}, 0);
        a.k.data += past * Hkv * D, a.v.data += past * Hkv * D, a.cos += past * pairs, a.sin += past * pairs;
        a.q = {q.data(), 2 * Hq * D, 2 * D}, a.gate = {q.data() + D, 2 * Hq * D, 2 * D};
        a.out = out.data();
        const KvSequence sequence{tokens, past, pointers.data()};
        attention(a, &sequence, 1);
        for (Index i = 0; i < Index(pages.size()); i++) {
            const Index count = std::min<Index>(kv_page, total - i * kv_page);
            Vector keys(count * Hkv * D), values(count * Hkv * D);
            read_page(pointers[i], type, Hkv, D, count, keys.data(), values.data());
            out.insert(out.end(), keys.begin(), keys.end());
            out.insert(out.end(), values.begin(), values.end());
        }
        return out;
    });
}

}  // namespace

int main() {
    for (Index n : {3, 4, 15, 16, 17, 33, 127, 1000}) test_rows(n);
    for (Index tokens : {1, 2, 3, 64, 97}) test_delta_net(tokens, 0, 2, 4, 128, 128, 4);
    test_delta_net(4, 4, 1, 4, 128, 128, 4);
    test_delta_net(40, 3, 2, 2, 40, 7, 3);
    test_delta_net(5, 1, 1, 1, 300, 9, 8);
    for (KvType type : {KvType::f16, KvType::bf16, KvType::f32, KvType::int8, KvType::int4}) {
        test_attention(type, 1, 700, 8, 2, 256);
        test_attention(type, 40, 250, 4, 2, 64);
        test_attention(type, 5, 0, 3, 3, 40);
    }
    std::printf("layers: every instruction set against scalar, %d failures\n", failures);
    return failures != 0;
}
