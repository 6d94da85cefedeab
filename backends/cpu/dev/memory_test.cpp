// memory_test: every allocation of representative calls fails once, alone or with all that come after it, on several
// threads. The call then throws std::bad_alloc, or does without and is right (a pool with fewer threads); it never
// ends the process, and the next call is right.
//
// Every attempt begins cold: a new calling thread and a new pool, so that no scratch of an earlier one is left.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "blocks.h"
#include "kernels/isa.h"
#include "kernels/linear.h"
#include "kernels/quantize.h"
#include "kernels/threads.h"
#include "layers/stack.h"
#include "vision/vision.h"

// --- the counter hook ------------------------------------------------------------------------------------------------

namespace {

constexpr long long never = 1LL << 60;
std::atomic<long long> left{never};  // allocations before the one that fails
std::atomic<bool> lasting{false};    // whether the ones after it fail as well

void* allocate(std::size_t size, std::size_t alignment) {
    const long long before = left.load() >= never ? never : left.fetch_sub(1);
    if (before == 0 || (before < 0 && lasting)) throw std::bad_alloc();
    void* p = nullptr;
    if (posix_memalign(&p, alignment, size ? size : 1) != 0) throw std::bad_alloc();
    return p;
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size, alignof(std::max_align_t)); }
void* operator new[](std::size_t size) { return allocate(size, alignof(std::max_align_t)); }
void* operator new(std::size_t size, std::align_val_t alignment) { return allocate(size, std::size_t(alignment)); }
void* operator new[](std::size_t size, std::align_val_t alignment) { return allocate(size, std::size_t(alignment)); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

using namespace edgeq;

namespace {

// --- calls -----------------------------------------------------------------------------------------------------------

using Vector = std::vector<float>;

std::mt19937 generator(3);

Vector normal(Index n, float scale = 1.0f) {
    std::normal_distribution<float> distribution(0.0f, scale);
    Vector x(n);
    for (float& v : x) v = distribution(generator);
    return x;
}

// Two quantized matrices (of two group sizes: two copies of the input) and a plain one.
struct Linears {
    static constexpr Index out = 300, in = 512;
    std::vector<uint8_t> codes = std::vector<uint8_t>(out * in / 2, 0x5a);
    Vector scales = normal(out * in / 32), biases = normal(out * in / 32), plain = normal(out * in), x, ys[3];
    Matrix ws[3];

    explicit Linears(Index tokens) : x(normal(tokens * in)) {
        ws[0] = {codes.data(), scales.data(), biases.data(), out, in, 4, 64, Type::f32};
        ws[1] = {codes.data(), scales.data(), biases.data(), out, in, 4, 32, Type::f32};
        ws[2] = {plain.data(), nullptr, nullptr, out, in, 0, 0, Type::f32};
        for (Vector& y : ys) y.resize(tokens * out);
    }

    void run() {
        float* to[] = {ys[0].data(), ys[1].data(), ys[2].data()};
        linears(x.data(), Index(x.size()) / in, ws, 3, to);
    }

    Vector result() const {
        Vector all;
        for (const Vector& y : ys) all.insert(all.end(), y.begin(), y.end());
        return all;
    }
};

struct Embed {
    Linears table{1};
    std::vector<int32_t> ids = std::vector<int32_t>(100, 7);
    Vector y = Vector(100 * Linears::in);

    void run() { embed(table.ws[0], ids.data(), Index(ids.size()), y.data()); }
    Vector result() const { return y; }
};

struct Delta {
    static constexpr Index Hk = 2, Hv = 8, K = 64, V = 32, width = 4, C = 2 * Hk * K + Hv * V;
    Index tokens;
    Vector qkv = normal(tokens * C), z = normal(tokens * Hv * V), b = normal(tokens * Hv), a = normal(tokens * Hv);
    Vector conv = normal(C * width), decay = Vector(Hv, -1.0f), bias = normal(Hv), gain = normal(V);
    Vector tail = normal((width - 1) * C), state = normal(Hv * V * K), tail_after = tail, state_after = state;
    Vector out = Vector(tokens * Hv * V);

    explicit Delta(Index tokens) : tokens(tokens) {}

    void run() {
        DeltaNet net{};
        net.Hk = Hk, net.Hv = Hv, net.K = K, net.V = V, net.width = width, net.eps = 1e-6f;
        net.qkv = {qkv.data(), C}, net.z = {z.data(), Hv * V}, net.b = {b.data(), Hv}, net.a = {a.data(), Hv};
        net.conv = conv.data(), net.A = decay.data(), net.dt_bias = bias.data(), net.norm = gain.data();
        net.out = {out.data(), Hv * V};
        delta_net(net, {{tokens, 0, tail.data(), state.data(), {}, tail_after.data(), {state_after.data()}, {}}});
    }

    Vector result() const {
        Vector all = out;
        all.insert(all.end(), state_after.begin(), state_after.end());
        return all;
    }
};

struct Attend_ {
    static constexpr Index Hq = 8, Hkv = 2, D = 64;
    KvType type;
    Index tokens, past;
    Vector q = normal(tokens * Hq * D), k = normal((past + tokens) * Hkv * D), v = normal((past + tokens) * Hkv * D);
    Vector gain = normal(D), out = Vector(tokens * Hq * D);
    std::vector<Block> blocks;
    std::vector<uint8_t*> pages;

    Attend_(KvType type, Index tokens, Index past) : type(type), tokens(tokens), past(past) {
        for (Index i = 0; i < past + tokens; i += kv_page) {
            blocks.push_back(take_block(kv_page_nbytes(type, Hkv, D)));
            pages.push_back(reinterpret_cast<uint8_t*>(blocks.back().data));
        }
        if (past) append_kv(shape(0), {past, 0, pages}, 0);
    }
    Attend_(const Attend_&) = delete;
    ~Attend_() {
        for (const Block& block : blocks) give_back(block);
    }

    Attention shape(Index from) {
        Attention a{};
        a.Hq = Hq, a.Hkv = Hkv, a.D = D, a.type = type, a.eps = 1e-6f;
        a.q_norm = a.k_norm = gain.data();
        a.q = {q.data(), Hq * D, D};
        a.k = {k.data() + from * Hkv * D, Hkv * D, D}, a.v = {v.data() + from * Hkv * D, Hkv * D, D};
        a.out = out.data();
        return a;
    }

    void run() { attention(shape(past), {{tokens, past, pages}}); }

    Vector result() const { return out; }
};

// A DeltaNet layer and an attention layer with their feed-forwards.
struct Layers {
    static constexpr Index hidden = 64, wide = 96, Hk = 2, Hv = 4, K = 16, V = 16, C = 2 * Hk * K + Hv * V;
    static constexpr Index Hq = 4, Hkv = 2, D = 32;
    Index tokens;
    Vector x = normal(tokens * hidden), y = x, gain = normal(hidden), angle = normal(tokens * D / 4);
    Vector conv = normal(C * 4), decay = Vector(Hv, -1.0f), bias = normal(Hv), norm = normal(D);
    Vector tail = normal(3 * C), state = normal(Hv * V * K), tail_after = tail, state_after = state;
    std::vector<Vector> weights;
    std::vector<std::vector<uint8_t>> pages;
    std::vector<DecoderLayer> layers;

    explicit Layers(Index tokens) : tokens(tokens) {
        const FeedForward mlp{matrix(wide, hidden), matrix(wide, hidden), matrix(hidden, wide)};
        DeltaNetMixer delta{};
        delta.qkv = matrix(C, hidden), delta.z = matrix(Hv * V, hidden), delta.out = matrix(hidden, Hv * V);
        delta.b = matrix(Hv, hidden), delta.a = matrix(Hv, hidden);
        DeltaNet& net = delta.between;
        net.Hk = Hk, net.Hv = Hv, net.K = K, net.V = V, net.width = 4, net.eps = 1e-6f;
        net.conv = conv.data(), net.A = decay.data(), net.dt_bias = bias.data(), net.norm = norm.data();
        delta.sequences = {{tokens, 0, tail.data(), state.data(), {}, tail_after.data(), {state_after.data()}, {}}};
        Attention a{};
        a.Hq = Hq, a.Hkv = Hkv, a.D = D, a.type = KvType::f16, a.eps = 1e-6f, a.pairs = D / 4;
        a.q_norm = a.k_norm = norm.data(), a.cos = a.sin = angle.data();
        AttentionMixer attention{};
        attention.q = matrix(2 * Hq * D, hidden), attention.out = matrix(hidden, Hq * D);
        attention.k = matrix(Hkv * D, hidden), attention.v = matrix(Hkv * D, hidden);
        attention.between = a, attention.sequences = {{tokens, 0, {}}};
        for (Index i = 0; i < tokens; i += kv_page) {
            pages.emplace_back(kv_page_nbytes(KvType::f16, Hkv, D));
            attention.sequences[0].pages.push_back(pages.back().data());
        }
        layers.push_back({gain.data(), gain.data(), delta, mlp});
        layers.push_back({gain.data(), gain.data(), attention, mlp});
    }

    Matrix matrix(Index out, Index in) {
        weights.push_back(normal(out * in, 0.1f));
        return {weights.back().data(), nullptr, nullptr, out, in, 0, 0, Type::f32};
    }

    void run() {
        y = x;
        run_layers(layers, tokens, hidden, 1e-6f, y.data(), [] { return true; });
    }

    Vector result() const { return y; }
};

// Two blocks of the vision tower over two frames.
struct Tower {
    static constexpr Index hidden = 64, heads = 2, wide = 96, T = 900;
    Vector x = normal(T * hidden), y = x, gain = normal(hidden), bias = normal(3 * hidden), angle = normal(T * 16);
    std::vector<Vector> weights;
    VisionTower tower{{}, hidden, heads, 1e-6f, angle.data(), angle.data(), 16, {800, 100}};

    Tower() {
        for (int i = 0; i < 2; i++)
            tower.blocks.push_back({gain.data(), bias.data(), gain.data(), bias.data(), affine(3 * hidden, hidden),
                                    affine(hidden, hidden), affine(wide, hidden), affine(hidden, wide)});
    }
    Tower(const Tower&) = delete;

    Affine affine(Index out, Index in) {
        weights.push_back(normal(out * in, 0.1f));
        return {{weights.back().data(), nullptr, nullptr, out, in, 0, 0, Type::f32}, bias.data()};
    }

    void run() {
        y = x;
        run_vision(tower, y.data(), [] { return true; });
    }

    Vector result() const { return y; }
};

struct Quantize {
    static constexpr Index rows = 40, columns = 128;
    Vector x = normal(rows * columns), scales = Vector(rows * 2), biases = scales, errors = scales;
    std::vector<uint32_t> words = std::vector<uint32_t>(rows * columns / 8);

    void run() {
        parallel_for(rows / 8, [&](int i) {
            const QuantizeShape shape{8, columns, 4, 64, Stored::bfloat16};
            edgeq::quantize(shape, &x[i * 8 * columns], &words[i * columns], &scales[i * 16], &biases[i * 16],
                            &errors[i * 16]);
        });
    }

    Vector result() const { return scales; }
};

// Blocks that come and go, small ones and such as fill huge pages.
struct Blocks {
    bool right = false;

    void run() {
        std::vector<Block> taken;
        struct Return {
            std::vector<Block>& taken;
            ~Return() {
                for (Block block : taken) give_back(block);
            }
        } back{taken};
        taken.reserve(40);
        for (int i = 0; i < 40; i++) {
            taken.push_back(take_block(i % 2 ? 100'000 : 300'000));
            taken.back().data[99'999] = char(i);
        }
        right = true;
        for (int i = 0; i < 40; i++) right = right && taken[i].data[99'999] == char(i);
    }

    Vector result() const { return {float(right)}; }
};

// --- the attempts ----------------------------------------------------------------------------------------------------

int failures = 0;

enum class Outcome { right, wrong, no_memory, other };

// The call on a new thread, with a pool that is new for it; allocation number `failing` fails.
template <class Call>
Outcome attempt(Call& call, const Vector& expected, long long failing, bool all_after, bool* reached) {
    Outcome outcome = Outcome::wrong, again = Outcome::wrong;
    std::thread([&] {
        static int threads = 3;
        set_thread_count(threads = 7 - threads);  // another number: another pool
        lasting = all_after;
        left = failing;
        try {
            call.run();
            outcome = Outcome::right;
        } catch (const std::bad_alloc&) {
            outcome = Outcome::no_memory;
        } catch (...) {
            outcome = Outcome::other;
        }
        *reached = left.load() < 0;
        left = never;
        if (outcome == Outcome::right && call.result() != expected) outcome = Outcome::wrong;
        call.run();
        if (call.result() == expected) again = Outcome::right;
    }).join();
    return again == Outcome::right ? outcome : Outcome::wrong;
}

template <class Call>
void test(const char* what, Call& call) {
    call.run();
    const Vector expected = call.result();
    int attempts = 0, thrown = 0;
    for (bool all_after : {false, true}) {
        bool reached = true;
        for (long long failing = 0; reached; failing++) {
            const Outcome outcome = attempt(call, expected, failing, all_after, &reached);
            attempts++;
            thrown += outcome == Outcome::no_memory;
            if (outcome == Outcome::right || outcome == Outcome::no_memory) continue;
            failures++;
            std::printf("FAILED %s: allocation %lld%s: %s\n", what, failing, all_after ? " and all after" : "",
                        outcome == Outcome::other ? "another exception" : "wrong result");
        }
    }
    std::printf("%s: %d attempts, %d without memory\n", what, attempts, thrown);
    if (!thrown && attempts > 2) failures++, std::printf("FAILED %s: nothing was thrown\n", what);
}

}  // namespace

int main() {
    Linears one(1), few(7), many(200);
    test("linears, 1 token", one);
    test("linears, 7 tokens", few);
    test("linears, 200 tokens", many);
    Embed rows;
    test("embed", rows);
    Delta decoded(1), prompt(100);
    test("delta_net, 1 token", decoded);
    test("delta_net, 100 tokens", prompt);
    for (KvType type : {KvType::f16, KvType::int8, KvType::int4}) {
        Attend_ next(type, 1, 1500), cold(type, 100, 0);
        test("attention, 1 token", next);
        test("attention, 100 tokens", cold);
    }
    Layers token(1), text(100);
    test("layers, 1 token", token);
    test("layers, 100 tokens", text);
    Tower tower;
    test("vision tower", tower);
    Quantize weights;
    test("quantize", weights);
    Blocks blocks;
    test("blocks", blocks);
    std::printf("memory: %d failures\n", failures);
    return failures ? 1 : 0;
}
