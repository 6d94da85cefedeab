// kernels_test: every instruction set that this machine has against scalar.
//
// Integer parts must be equal: with scales that are powers of two and biases that are small multiples of them, every
// float on the way is exact, so equal integers give equal results and nothing else does. Float parts: NMSE = sum of
// squared differences over sum of squares, at most 1e-12: sums of up to 72 terms in another order, float32.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/isa.h"
#include "kernels/linear.h"
#include "kernels/threads.h"

using namespace edgeq;

namespace {

int failures = 0;

void check(bool right, const char* what, const char* isa, const char* detail) {
    if (right) return;
    failures++;
    std::printf("FAILED %s: %s %s\n", isa, what, detail);
}

constexpr double largest_nmse = 1e-12;

double nmse(const std::vector<float>& expected, const std::vector<float>& found) {
    double error = 0, power = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        double d = double(expected[i]) - found[i];
        error += d * d;
        power += double(expected[i]) * expected[i];
    }
    return error == 0 ? 0 : error / power;
}

uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t(bits >> 16);
}

// Cuts off what half precision cannot hold; its subnormals become zero.
uint16_t to_f16(float x) {
    if (std::fabs(x) < 0x1p-14f) return 0;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits >> 16 & 0x8000) | (((bits >> 23 & 255) - 112) << 10) | (bits >> 13 & 1023));
}

// A matrix that ends exactly where its memory ends, so that a sanitizer sees any read beyond it.
struct TestMatrix {
    std::vector<char> data, scales, biases, block_scales, block_biases;
    Matrix w;

    static std::vector<char> store(const std::vector<float>& values, Type type) {
        std::vector<char> bytes(values.size() * type_size(type));
        for (size_t i = 0; i < values.size(); i++) {
            if (type_size(type) == 1) {
                bytes[i] = char(std::lrint(values[i]));
            } else if (type == Type::f32) {
                std::memcpy(&bytes[4 * i], &values[i], 4);
            } else {
                uint16_t half = type == Type::f16 ? to_f16(values[i]) : to_bf16(values[i]);
                std::memcpy(&bytes[2 * i], &half, 2);
            }
        }
        return bytes;
    }

    // exact: scales and biases are powers of two.
    TestMatrix(int64_t out, int64_t in, int bits, int group, Type type, bool exact, std::mt19937& random) {
        std::uniform_real_distribution<float> uniform(0.5f, 2.0f);
        auto number = [&] { return exact ? std::ldexp(1.0f, int(random() % 3) - 1) : uniform(random); };
        if (bits) {
            data.resize(out * in * bits / 8);
            for (auto& byte : data) byte = char(random());
            std::vector<float> s(out * (in / group)), b(s.size());
            for (auto& x : s) x = number() / 8;
            for (auto& x : b) x = -number();
            scales = store(s, type);
            biases = store(b, type);
        } else {
            std::vector<float> values(out * in);
            for (auto& x : values) x = number() - 1;
            data = store(values, type);
        }
        w = {data.data(), scales.data(), biases.data(), out, in, bits, group, type};
    }

    // As GGUF's types have it: int8 scales and biases in units of their block's (shift >= 0), or none but the zero's;
    // u4: both in the same bytes.
    void like_gguf(int shift, bool with_biases, int zero, Mode mode, std::mt19937& random, bool u4 = false) {
        const size_t groups = w.out * (w.in / w.group);
        auto integers = [&](int sign) {
            std::vector<float> x(groups);
            for (auto& v : x) v = float(sign * (1 + int(random() % 2)) + (u4 ? 16 * (1 + int(random() % 2)) : 0));
            return store(x, Type::i8);
        };
        auto units = [&] {
            std::vector<float> x(groups >> shift);
            for (auto& v : x) v = std::ldexp(1.0f, int(random() % 2) - 4);
            return store(x, Type::f16);
        };
        if (shift >= 0) {
            w.type = u4 ? Type::u4 : Type::i8, w.block_shift = shift;
            scales = integers(u4 || random() % 2 ? 1 : -1), biases = integers(-1);
            block_scales = units(), block_biases = units();
            w.block_scales = reinterpret_cast<const uint16_t*>(block_scales.data());
            if (with_biases) w.block_biases = reinterpret_cast<const uint16_t*>(block_biases.data());
            w.scales = scales.data();
        }
        w.biases = !with_biases ? nullptr : u4 ? scales.data() : biases.data();
        w.zero = zero + table_zero(mode), w.mode = mode;
    }

    // As MLX's modes have it: scales of one byte, all of them where not exact. The largest would give infinity, NaN
    // codes NaN.
    void like_mlx(Mode mode, Type type, bool exact, std::mt19937& random) {
        std::vector<float> x(w.out * (w.in / w.group));
        for (auto& v : x)
            v = type == Type::e8m0 ? float(exact ? 126 + random() % 2 : random() % 200)
                                   : float(exact ? 8 * (6 + random() % 2) : random() % 127 + 128 * (random() % 2));
        scales = store(x, Type::i8);
        w.type = type, w.scales = scales.data(), w.biases = nullptr, w.mode = mode, w.zero = table_zero(mode);
        if (mode == Mode::fp8)
            for (auto& code : data) code = (code & 127) == 127 ? 0 : code;
    }
};

// exact: every group's largest magnitude is 127 / 16, so that its scale is a power of two.
std::vector<float> make_input(int64_t tokens, int64_t in, bool exact, std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<float> x(tokens * in);
    for (size_t i = 0; i < x.size(); i++)
        x[i] = !exact ? normal(random) : i % 16 == 7 ? 127 / 16.0f : float(int(random() % 255) - 127) / 16;
    return x;
}

std::vector<float> product(const char* isa, const TestMatrix& m, const std::vector<float>& x, int64_t tokens) {
    set_isa(isa);
    std::vector<float> y(tokens * m.w.out, NAN);
    float* ys = y.data();
    linears(x.data(), tokens, &m.w, 1, &ys);
    return y;
}

void compare(const char* isa, const TestMatrix& m, int64_t tokens, bool exact, std::mt19937& random) {
    char detail[160];
    auto x = make_input(tokens, m.w.in, exact, random);
    auto expected = product("scalar", m, x, tokens), found = product(isa, m, x, tokens);
    double error = nmse(expected, found);
    std::snprintf(detail, sizeof detail, "[%ld, %ld] bits %d group %d type %d block %d mode %d tokens %ld: nmse %g",
                  long(m.w.out), long(m.w.in), m.w.bits, m.w.group, int(m.w.type), m.w.block_shift, int(m.w.mode),
                  long(tokens), error);
    if (exact && multiplies_codes(m.w)) check(expected == found, "integer part", isa, detail);
    check(error <= largest_nmse, "float part", isa, detail);
}

void test_matrix(const char* isa, int64_t out, int64_t in, int bits, int group, Type type, int64_t tokens) {
    std::mt19937 random(unsigned(out + in + bits + group + tokens));
    for (bool exact : {true, false})
        compare(isa, TestMatrix(out, in, bits, group, type, exact, random), tokens, exact, random);
}

// The forms that GGUF's types take, with blocks of 128 and of 256 weights.
void test_gguf_matrices(const char* isa) {
    struct Form {
        int bits, group, shift;
        bool biases;
        int zero;
        Mode mode = Mode::affine;
        bool u4 = false;
    };
    const Form forms[] = {
        {4, 32, 3, true, 0},
        {4, 32, 2, true, 0},
        {5, 32, 3, true, 0},
        {6, 16, 4, false, 32},
        {6, 16, 3, false, 32},
        {2, 16, 4, true, 0, Mode::affine, true},
        {2, 16, 3, true, 0, Mode::affine, true},
        {3, 16, 4, false, 4},
        {3, 16, 3, false, 4},
        {4, 32, 3, false, 0, Mode::iq4},
        {4, 32, 2, false, 0, Mode::iq4},
        {4, 32, -1, false, 0, Mode::iq4},
        {4, 32, -1, false, 8},
        {5, 32, -1, false, 16},
        {8, 32, -1, false, 128},
    };
    std::mt19937 random(11);
    for (auto& f : forms)
        for (int64_t tokens : {1, 2, 3, 5, 8, 19})
            for (int64_t in : {256, 768, 1280})
                for (bool exact : {true, false}) {
                    TestMatrix m(37, in, f.bits, f.group, Type::f16, exact, random);
                    m.like_gguf(f.shift, f.biases, f.zero, f.mode, random, f.u4);
                    compare(isa, m, tokens, exact, random);
                }
}

void test_mlx_modes(const char* isa) {
    struct Form {
        Mode mode;
        int bits, group;
        Type type;
    };
    const Form forms[] = {
        {Mode::fp4, 4, 32, Type::e8m0}, {Mode::fp4, 4, 16, Type::e4m3}, {Mode::fp8, 8, 32, Type::e8m0}};
    std::mt19937 random(13);
    for (auto& f : forms)
        for (int64_t tokens : {1, 2, 3, 5, 8, 19})
            for (int64_t in : {32, 96, 256, 1280})
                for (bool exact : {true, false}) {
                    TestMatrix m(37, in, f.bits, f.group, Type::f16, exact, random);
                    m.like_mlx(f.mode, f.type, exact, random);
                    compare(isa, m, tokens, exact, random);
                }
}

void test_matrices(const char* isa) {
    for (int bits : {2, 3, 4, 5, 6, 8})
        for (int group : {32, 64, 128})
            for (int64_t tokens : {1, 2, 3, 5, 8, 19})
                for (int64_t in : {1, 3, 17}) test_matrix(isa, 37, in * group, bits, group, Type::bf16, tokens);
    for (int64_t tokens : {1, 2, 3, 5, 8, 19})
        for (int bits : {2, 3, 6})
            for (int64_t in : {32, 96, 256, 1280}) test_matrix(isa, 37, in, bits, 16, Type::f32, tokens);
    for (Type type : {Type::f32, Type::f16, Type::bf16}) {
        test_matrix(isa, 5, 640, 4, 64, type, 1);
        test_matrix(isa, 5, 640, 4, 64, type, 18);
        for (int64_t in : {1, 31, 64, 301})
            for (int64_t tokens : {1, 4, 11, 21}) test_matrix(isa, 35, in, 0, 0, type, tokens);
    }
    test_matrix(isa, 1, 64, 4, 64, Type::bf16, 1);
    test_matrix(isa, 70, 1024, 4, 64, Type::bf16, 600);  // more than one block of tokens
}

void test_quantize(const char* isa) {
    std::mt19937 random(3);
    const int64_t n = 384;
    for (int group : {16, 32, 64, 128})
        for (Order order : {Order::natural, Order::even_odd, Order::quarters})
            for (int kind = 0; kind < 4; kind++) {
                auto x = make_input(1, n, false, random);
                for (auto& v : x) v *= kind == 1 ? 0 : kind == 2 ? 1e-38f : 1;
                if (kind == 3) x[200] = INFINITY;
                struct Result {
                    int8_t codes[512] = {};  // whole blocks
                    float scales[n / 16] = {}, sums[n / 16] = {};
                    int32_t totals[n / 16] = {};
                } results[2];
                for (int i = 0; i < 2; i++) {
                    set_isa(i ? isa : "scalar");
                    auto& r = results[i];
                    linear_kernels().quantize(x.data(), n, group, order, r.codes, r.scales, r.sums, r.totals);
                    if (kind == 3) {  // what a group with an infinity gives is not defined, except that it shows
                        check(!std::isfinite(r.scales[200 / group]), "infinity must show", isa, "");
                        const int64_t block = order == Order::quarters ? quarters_block : even_odd_block;
                        std::memset(r.codes + 200 / block * block, 0, block);
                        r.scales[200 / group] = r.sums[200 / group] = 0;
                        r.totals[200 / group] = 0;
                    }
                }
                check(std::memcmp(&results[0], &results[1], sizeof results[0]) == 0, "quantize", isa, "");
            }
}

void test_several(const char* isa) {
    std::mt19937 random(5);
    for (int64_t tokens : {1, 7, 17}) {
        TestMatrix a(33, 256, 4, 64, Type::bf16, true, random), b(65, 256, 8, 32, Type::f16, true, random),
            c(16, 256, 0, 0, Type::bf16, true, random), d(40, 256, 4, 64, Type::f32, true, random);
        auto x = make_input(tokens, 256, true, random);
        std::vector<float> ya(33 * tokens), yb(65 * tokens), yc(16 * tokens), yd(40 * tokens);
        float* ys[] = {ya.data(), yb.data(), yc.data(), yd.data()};
        Matrix ws[] = {a.w, b.w, c.w, d.w};
        set_isa(isa);
        linears(x.data(), tokens, ws, 4, ys);
        check(ya == product(isa, a, x, tokens) && yb == product(isa, b, x, tokens) &&
                  yc == product(isa, c, x, tokens) && yd == product(isa, d, x, tokens),
              "several matrices", isa, "");
    }
}

// A row is the same whatever other rows are in the call, up to few_tokens of them and, apart from that, beyond.
void test_company(const char* isa) {
    std::mt19937 random(9);
    const int64_t out = 37, in = 384;
    for (int bits : {0, 2, 3, 4, 5, 6, 8}) {
        TestMatrix m(out, in, bits, bits ? 32 : 0, Type::bf16, false, random);
        const auto x = make_input(300, in, false, random);
        auto rows = [&](int64_t first, int64_t count) {
            return product(isa, m, {x.begin() + first * in, x.begin() + (first + count) * in}, count);
        };
        auto equal = [&](const std::vector<float>& all, const std::vector<float>& some, int64_t first) {
            return std::equal(some.begin(), some.end(), all.begin() + first * out);
        };
        const auto few = rows(0, few_tokens), many = rows(0, 300);
        for (int64_t count = 1; count < few_tokens; count++)
            check(equal(few, rows(1, count), 1), "few rows in company", isa, "");
        for (int64_t count : {17, 50, 299}) check(equal(many, rows(1, count), 1), "many rows in company", isa, "");
        set_thread_count(7);
        check(few == rows(0, few_tokens) && many == rows(0, 300), "rows on more threads", isa, "");
        set_thread_count(2);
    }
}

void test_forcing() {
    bool unknown = false;
    try {
        set_isa("mmx");
    } catch (const std::exception&) {
        unknown = true;
    }
    check(unknown, "an unknown set is an error", "dispatch", "");
}

}  // namespace

// Any argument leaves out all sets but the one that the dispatch chooses, for machines that are emulated.
int main(int argc, char**) {
    const Isa chosen = active_isa();
    std::printf("dispatch chooses %s\n", isa_name(chosen));
    test_forcing();
    set_thread_count(2);
    for (int i = 0; i < isa_count; i++) {
        Isa isa = static_cast<Isa>(i);
        if (!isa_supported(isa) || (argc > 1 && isa != chosen)) continue;
        int before = failures;
        test_quantize(isa_name(isa));
        test_matrices(isa_name(isa));
        test_gguf_matrices(isa_name(isa));
        test_mlx_modes(isa_name(isa));
        test_several(isa_name(isa));
        test_company(isa_name(isa));
        std::printf("%s: %s\n", isa_name(isa), failures == before ? "ok" : "FAILED");
    }
    return failures ? 1 : 0;
}
