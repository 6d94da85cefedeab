// kernels_bench [threads] [isa]: the matrix kernels on shapes of the 0.8B and 2B models.
//
// Weights lie on huge pages, where the system gives them: a mapped file is read about as fast (ext4 keeps it in large
// folios), memory on pages of 4 KiB a third slower.
//
// One token: GB/s of weights read, over matrices that together exceed the caches ("memory") or from one that stays in
// the second-level cache ("cache": what the arithmetic alone could do), beside the rate of a plain read of memory.
// Many tokens: 10^9 operations (two for a multiply-add) a second.
// A token: every matrix of the 0.8B model at 4 bits once, alone and with a busy neighbour.
// Best of several passes; on one thread by the thread's processor time, so that other programs count little.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <new>
#include <random>
#include <vector>

#include "kernels/isa.h"
#include "kernels/linear.h"
#include "kernels/threads.h"

using namespace edgeq;

namespace {

double seconds() {
    timespec now;
    clock_gettime(thread_count() == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &now);
    return double(now.tv_sec) + double(now.tv_nsec) * 1e-9;
}

template <class Function>
double best_seconds(int passes, Function&& function) {
    double best = 1e9;
    for (int i = 0; i < passes; i++) {
        double start = seconds();
        function();
        best = std::min(best, seconds() - start);
    }
    return best;
}

template <class T>
struct HugePages {
    using value_type = T;
    static constexpr size_t page = 2 << 20;

    T* allocate(size_t n) {
        size_t nbytes = (n * sizeof(T) + page - 1) / page * page;
        void* p = std::aligned_alloc(page, nbytes);
        if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(p, nbytes, MADV_HUGEPAGE);
#endif
        return static_cast<T*>(p);
    }

    void deallocate(T* p, size_t) { std::free(p); }
    bool operator==(const HugePages&) const { return true; }
};

template <class T>
using Weights = std::vector<T, HugePages<T>>;

struct Storage {
    Weights<uint64_t> data;
    Weights<uint16_t> scales, biases;
    Matrix w;
};

Storage make(int64_t out, int64_t in, int bits, int group) {
    Storage s;
    std::mt19937_64 random(1);
    s.data.resize(out * (bits ? in * bits / 8 : in * 2) / 8);
    for (auto& x : s.data) x = bits ? random() : 0x3c003c013c023c03;
    if (bits) {
        s.scales.assign(out * (in / group), 0x3c00);
        s.biases.assign(out * (in / group), 0xbd00);
    }
    s.w = {s.data.data(), s.scales.data(), s.biases.data(), out, in, bits, group, Type::bf16};
    return s;
}

double read_rate() {
    Weights<uint64_t> memory(64 << 20, 1);
    const int pieces = 64 * thread_count();
    const size_t share = memory.size() / pieces;
    std::vector<uint64_t> sums(pieces);
    double best = best_seconds(5, [&] {
        parallel_for(pieces, [&](int piece) {
            const uint64_t* p = memory.data() + piece * share;
            uint64_t a = 0, b = 0, c = 0, d = 0;
            for (size_t i = 0; i + 16 <= share; i += 16) {
                a += p[i] + p[i + 1] + p[i + 2] + p[i + 3];
                b += p[i + 4] + p[i + 5] + p[i + 6] + p[i + 7];
                c += p[i + 8] + p[i + 9] + p[i + 10] + p[i + 11];
                d += p[i + 12] + p[i + 13] + p[i + 14] + p[i + 15];
            }
            sums[piece] = a + b + c + d;
        });
    });
    return double(memory.size()) * 8 / best * 1e-9;
}

void decode(bool cached, int bits, int group, int64_t out, int64_t in, int tokens) {
    double nbytes = double(out) * (bits ? in * bits / 8.0 + 4.0 * (in / group) : in * 2.0);
    int count = std::max(1, int((cached ? 20e6 : 256e6) / nbytes));
    Storage s = make(cached ? out : out * count, in, bits, group);
    std::vector<float> x(in * tokens, 0.5f), y(out * count * tokens);
    std::vector<Matrix> ws(count, s.w);
    for (int i = 0; i < count; i++) {
        Matrix& w = ws[i];
        w.out = out;
        if (cached) continue;
        w.data = static_cast<const char*>(w.data) + int64_t(row_nbytes(w)) * out * i;
        if (bits) {
            w.scales = static_cast<const uint16_t*>(w.scales) + out * (in / group) * i;
            w.biases = static_cast<const uint16_t*>(w.biases) + out * (in / group) * i;
        }
    }
    double time = best_seconds(7, [&] {
        for (int i = 0; i < count; i++) {
            float* out_i = y.data() + i * out * tokens;
            linears(x.data(), tokens, &ws[i], 1, &out_i);
        }
    });
    std::printf("  %-6s  %d bits group %3d  %5ld x %5ld  T %d  %6.1f GB/s  %7.1f us a call\n",
                cached ? "cache" : "memory", bits, group, long(out), long(in), tokens, nbytes * count / time * 1e-9,
                time / count * 1e6);
}

void prefill(int bits, int group, int64_t out, int64_t in, int64_t tokens) {
    Storage s = make(out, in, bits, group);
    std::vector<float> x(in * tokens), y(out * tokens);
    for (size_t i = 0; i < x.size(); i++) x[i] = float(i % 17) - 8;
    float* ys = y.data();
    double time = best_seconds(5, [&] { linears(x.data(), tokens, &s.w, 1, &ys); });
    std::printf("  %d bits group %3d  %5ld x %5ld  T %4ld  %7.1f GOP/s\n", bits, group, long(out), long(in),
                long(tokens), 2.0 * double(out) * double(in) * double(tokens) / time * 1e-9);
}

// Tokens a second, mean of `duration` seconds by the clock on the wall.
double token_rate(const std::vector<Storage>& matrices, double duration) {
    std::vector<float> x(3584, 0.5f), y(248320);
    float* ys = y.data();
    auto clock = [] {
        timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return double(now.tv_sec) + double(now.tv_nsec) * 1e-9;
    };
    int tokens = 0;
    const double start = clock();
    while (clock() - start < duration) {
        for (auto& matrix : matrices) linears(x.data(), 1, &matrix.w, 1, &ys);
        tokens++;
    }
    return tokens / (clock() - start);
}

void token() {
    std::vector<Storage> matrices;
    for (int layer = 0; layer < 24; layer++) {
        const int64_t shapes[4][2] = {{8192, 1024}, {1024, 2048}, {7168, 1024}, {1024, 3584}};
        for (auto& shape : shapes) matrices.push_back(make(shape[0], shape[1], 4, 64));
    }
    matrices.push_back(make(248320, 1024, 4, 64));
    double nbytes = 0;
    for (auto& m : matrices) nbytes += double(m.w.out) * double(m.w.in) * 0.5625;
    for (int repeat = 0; repeat < 3; repeat++) {
        double alone = token_rate(matrices, 1.5);
        pid_t busy = fork();
        if (busy == 0)
            for (volatile long x = 0;;) x = x + 1;
        double beside = token_rate(matrices, 1.5);
        kill(busy, SIGKILL);
        waitpid(busy, nullptr, 0);
        std::printf("  alone %6.1f tokens/s, %5.1f GB/s; with a busy neighbour %6.1f, ratio %.2f\n", alone,
                    alone * nbytes * 1e-9, beside, beside / alone);
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1) set_thread_count(std::atoi(argv[1]));
    if (argc > 2) set_isa(argv[2]);
    std::printf("%s, %d threads, plain read %.1f GB/s\n", isa_name(active_isa()), thread_count(), read_rate());
    std::printf("one token and few\n");
    for (int bits : {4, 8, 6, 5, 3, 0}) {
        decode(false, bits, 64, 3584, 1024, 1);
        decode(true, bits, 64, bits ? 512 : 128, 1024, 1);
    }
    for (int group : {32, 128}) decode(true, 4, group, 512, 1024, 1);
    for (int tokens : {2, 3, 4}) decode(true, 4, 64, 512, 1024, tokens);
    decode(false, 4, 64, 1024, 1024, 1);
    decode(false, 4, 64, 1024, 3584, 1);
    decode(false, 4, 64, 6144, 2048, 1);
    std::printf("many tokens\n");
    for (int bits : {4, 8, 6, 5, 3, 0}) prefill(bits, 64, 3584, 1024, 512);
    for (int group : {32, 128}) prefill(4, group, 3584, 1024, 512);
    for (int tokens : {5, 8, 16, 64}) prefill(4, 64, 3584, 1024, tokens);
    prefill(4, 64, 1024, 3584, 512);
    prefill(4, 64, 6144, 2048, 2048);
    std::printf("a token of the 0.8B model, 4 bits\n");
    token();
}
