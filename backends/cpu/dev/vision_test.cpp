// vision_test: the vision tower's kernels, every instruction set that this machine has against scalar, and rows against
// themselves in other company and on other threads; on vectors that end exactly where their memory ends.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "dev/compare.h"
#include "kernels/isa.h"
#include "kernels/threads.h"
#include "layers/half.h"
#include "vision/vision.h"

using namespace edgeq;

namespace {

constexpr double sums_nmse = 1e-12;  // float32 sums in another order, or with another rounding of a product
constexpr double codes_nmse = 1e-9;  // scales differ in their last bit, and a number in the middle becomes another code
constexpr double tower_nmse = 1e-8;  // and that fed back from block to block
constexpr double floats_nmse = 1e-7;  // where codes are floats: all that codes lose, once (4e-9) or in a whole tower

// Small integers: the sum of their squares is exact, and so are the scales of their codes.
Vector integers(Index n) {
    Vector x(n);
    for (float& v : x) v = float(int(generator() % 15) - 7);
    return x;
}

// Where codes are integers the results are within `bound`, equal if that is 0; where they are floats, codes lose anew.
void compare_codes(const char* what, double bound, const std::function<Vector()>& compute) {
    compare(what, [bound] { return vision_kernels().step == 1 ? floats_nmse : bound; }, compute);
}

// A matrix of 16 or 32 bits, in memory of its size.
struct TestMatrix {
    std::vector<char> data;
    Vector bias;
    Affine w;

    TestMatrix(Index out, Index in, Type type, const Vector& values) : data(out * in * (type == Type::f32 ? 4 : 2)) {
        for (Index i = 0; i < out * in; i++) {
            const uint16_t half = type == Type::f16 ? to_f16_bits(values[i]) : to_bf16_bits(values[i]);
            if (type == Type::f32)
                std::memcpy(&data[4 * i], &values[i], 4);
            else
                std::memcpy(&data[2 * i], &half, 2);
        }
        bias.assign(out, 0.0f);
        w = {{data.data(), nullptr, nullptr, out, in, 0, 0, type}, bias.data()};
    }
    TestMatrix(const TestMatrix&) = delete;
};

Vector product(const Vector& x, Index T, const Affine& w) {
    Vector y(T * w.weight.out);
    affine(x.data(), T, w, y.data());
    return y;
}

void test_rows(Index n) {
    const Vector x = normal(n, 3), gain = normal(n), bias = normal(n);
    Vector y(n);
    compare("layer_norm", sums_nmse, [&] {
        vision_kernels().layer_norm(y.data(), x.data(), gain.data(), bias.data(), n, 1e-6f);
        return y;
    });
    for (bool exact : {false, true}) {
        compare(exact ? "gelu, erf" : "gelu, tanh", sums_nmse,
                [&] { return vision_kernels().gelu(y.data(), x.data(), n, exact), y; });
        double error = 0, power = 0;
        for (Index i = 0; i < n; i++) {
            const double z = x[i], inner = std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z);
            const double right = exact ? z / 2 * std::erfc(-z / std::sqrt(2.0)) : z / 2 * (1 + std::tanh(inner));
            error += std::pow(y[i] - right, 2), power += right * right;
        }
        check(error <= 1e-13 * double(n), exact ? "gelu, erf, in double" : "gelu, tanh, in double", "", error / power);
    }
}

void test_products(Index T, Index out, Index in) {
    for (Type type : {Type::bf16, Type::f16, Type::f32}) {
        const TestMatrix whole(out, in, type, integers(out * in)), any(out, in, type, normal(out * in, 0.03f));
        const Vector x = integers(T * in), y = normal(T * in);
        if (in <= group_depth) compare_codes("products of integers", 0.0, [&] { return product(x, T, whole.w); });
        compare_codes("products", codes_nmse, [&] { return product(y, T, any.w); });
        const Vector all = product(y, T, any.w);  // under the best set
        const Vector last(y.end() - in, y.end()), alone = product(last, 1, any.w);
        check(std::equal(alone.begin(), alone.end(), all.end() - out), "a row alone", "", 0);
        double error = 0, power = 0;
        for (Index t = 0; t < T; t++)
            for (Index o = 0; o < out; o++) {
                double right = 0;
                for (Index i = 0; i < in; i++) {
                    const char* p = any.data.data();
                    uint16_t half;
                    float weight;
                    std::memcpy(&half, p + 2 * (o * in + i), 2);
                    weight = type == Type::f16 ? from_f16(half) : from_bf16(half);
                    if (type == Type::f32) std::memcpy(&weight, p + 4 * (o * in + i), 4);
                    right += double(weight) * y[t * in + i];
                }
                error += std::pow(all[t * out + o] - right, 2), power += right * right;
            }
        check(error <= 3e-8 * power, "products in double", isa_name(active_isa()), error / power);
    }
}

Vector attended(const std::vector<Index>& spans, Index H, Index D, const Vector& q, const Vector& k, const Vector& v) {
    Vector out(q.size());
    full_attention({q.data(), H * D, D}, {k.data(), H * D, D}, {v.data(), H * D, D}, H, D, spans, out.data());
    return out;
}

void test_attention(const std::vector<Index>& spans, Index H, Index D, float spread) {
    Index T = 0;
    for (Index n : spans) T += n;
    const Vector q = normal(T * H * D, spread), k = normal(T * H * D), v = normal(T * H * D);
    compare_codes("attention", codes_nmse, [&] { return attended(spans, H, D, q, k, v); });
    const Vector together = attended(spans, H, D, q, k, v);
    const Index first = spans[0] * H * D;  // the first span alone
    auto begin = [&](const Vector& x) { return Vector(x.begin(), x.begin() + first); };
    const Vector alone = attended({spans[0]}, H, D, begin(q), begin(k), begin(v));
    check(std::equal(alone.begin(), alone.end(), together.begin()), "a span alone", "", 0);
    double error = 0, power = 0;  // of the first head's first token, in double
    std::vector<double> weights(spans[0]), right(D);
    double total = 0;
    for (Index j = 0; j < spans[0]; j++) {
        double s = 0;
        for (Index i = 0; i < D; i++) s += double(q[i]) * k[j * H * D + i];
        total += weights[j] = std::exp(s / std::sqrt(double(D)));
    }
    for (Index j = 0; j < spans[0]; j++)
        for (Index i = 0; i < D; i++) right[i] += weights[j] / total * v[j * H * D + i];
    for (Index i = 0; i < D; i++) error += std::pow(together[i] - right[i], 2), power += right[i] * right[i];
    check(error <= 1e-6 * power, "attention in double", isa_name(active_isa()), error / power);
}

void test_tower(const std::vector<Index>& spans, bool quantized) {
    constexpr Index hidden = 96, heads = 4, wide = 200, pairs = hidden / heads / 2;
    Index T = 0;
    for (Index n : spans) T += n;
    const Vector x = normal(T * hidden), cosines = normal(T * pairs), sines = normal(T * pairs);
    const Vector gain = normal(hidden), bias = normal(hidden);
    const TestMatrix qkv(3 * hidden, hidden, Type::bf16, normal(3 * hidden * hidden, 0.1f));
    const TestMatrix proj(hidden, hidden, Type::f16, normal(hidden * hidden, 0.1f));
    const TestMatrix fc1(wide, hidden, Type::bf16, normal(wide * hidden, 0.1f));
    const TestMatrix fc2(hidden, wide, Type::f32, normal(hidden * wide, 0.1f));
    std::vector<uint8_t> codes(3 * hidden * hidden);
    for (uint8_t& c : codes) c = uint8_t(generator());
    const Vector scales(3 * hidden * 3, 1e-3f), biases(3 * hidden * 3, -0.128f);
    Affine attention = qkv.w;
    if (quantized)
        attention.weight = {codes.data(), scales.data(), biases.data(), 3 * hidden, hidden, 8, 32, Type::f32};
    VisionTower tower{{}, hidden, heads, 1e-6f, cosines.data(), sines.data(), pairs, spans};
    for (int i = 0; i < 2; i++)
        tower.blocks.push_back({gain.data(), bias.data(), gain.data(), bias.data(), attention, proj.w, fc1.w, fc2.w});
    auto run = [&] {
        Vector y = x;
        run_vision(tower, y.data(), [] { return true; });
        return y;
    };
    compare_codes(quantized ? "tower, 8 bits" : "tower", quantized ? 1e-5 : tower_nmse, run);  // int8 ties are coarser
    const Vector several = run();
    set_thread_count(1);
    check(run() == several, "one thread", "", 0);
    set_thread_count(3);
}

}  // namespace

// Any argument makes the tower's pictures smaller, for machines that are emulated.
int main(int argc, char**) {
    set_thread_count(3);
    const std::vector<Index> spans = argc > 1 ? std::vector<Index>{300, 70, 33} : std::vector<Index>{900, 200, 33};
    for (Index n : {1, 5, 16, 31, 100, 768}) test_rows(n);
    for (Index T : {1, 6, 20})
        for (Index in : {1, 5, 33, 64, 128, 130, 300}) test_products(T, in == 64 ? 64 : 70, in);
    for (float spread : {0.3f, 5.0f}) {
        test_attention({300, 40}, 2, 64, spread);
        test_attention({1, 128}, 1, 36, spread);
        test_attention({129}, 1, 200, spread);
    }
    for (bool quantized : {false, true}) test_tower(spans, quantized);
    std::printf("vision: %d failures\n", failures);
    return failures ? 1 : 0;
}
