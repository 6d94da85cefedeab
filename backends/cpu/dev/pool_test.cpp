// pool_test [--no-fork]: the thread pool. Small enough to run under the thread sanitizer (tools/sanitize).
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/threads.h"

using namespace edgeq;

namespace {

int failures = 0;

void check(bool right, const char* what) {
    if (right) return;
    failures++;
    std::printf("FAILED pool: %s\n", what);
}

void test_every_piece_once() {
    for (int threads : {1, 2, 3, 4, 7}) {
        set_thread_count(threads);
        check(start_threads() == threads, "as many threads as asked for");
        for (int pieces : {0, 1, 2, 3, 5, 64, 1000}) {
            for (int repeat = 0; repeat < 50; repeat++) {
                std::vector<std::atomic<int>> done(pieces);
                parallel_for(pieces, [&](int i) { done[i]++; });
                bool once = true;
                for (auto& d : done) once = once && d == 1;
                check(once, "every piece once");
            }
        }
    }
}

// A parallel_for inside a piece does its pieces in order on the piece's own thread, also where the outer one has but
// one piece or one thread.
void test_nested() {
    for (int threads : {1, 4}) {
        set_thread_count(threads);
        for (int outer : {1, 8}) {
            std::atomic<int> sum{0}, astray{0};
            parallel_for(outer, [&](int) {
                const auto here = std::this_thread::get_id();
                int expected = 0;
                parallel_for(10, [&](int i) {
                    if (std::this_thread::get_id() != here || i != expected++) astray++;
                    parallel_for(3, [&](int j) { sum += (std::this_thread::get_id() == here) * j; });
                });
            });
            check(sum == outer * 30 && astray == 0, "nested");
        }
    }
    set_thread_count(4);
    std::vector<std::atomic<int>> done(64);
    parallel_for(1, [&](int) { parallel_for(2, [](int) {}); });
    parallel_for(64, [&](int i) { done[i]++; });  // the outside is outside again
    for (auto& d : done) check(d == 1, "after nested");
}

void test_several_callers() {
    std::atomic<int> total{0};
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; i++)
        callers.emplace_back([&] {
            for (int j = 0; j < 200; j++) parallel_for(20, [&](int) { total++; });
        });
    for (auto& caller : callers) caller.join();
    check(total == 3 * 200 * 20, "several callers");
}

void test_after_sleep() {
    for (int i = 0; i < 3; i++) {  // with a pause the threads sleep
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        std::atomic<int> n{0};
        parallel_for(16, [&](int) { n++; });
        check(n == 16, "after sleep");
    }
}

// What parallel_for throws, as text; `inside` counts the pieces that are being worked on.
template <class Function>
std::string thrown(int pieces, std::atomic<int>& inside, Function&& function) {
    try {
        parallel_for(pieces, [&](int i) {
            inside++;
            struct Leave {
                std::atomic<int>& inside;
                ~Leave() { inside--; }
            } leave{inside};
            function(i);
        });
    } catch (const std::exception& error) {
        return inside == 0 ? error.what() : "while others still worked";
    }
    return "nothing";
}

void test_exceptions() {
    using std::chrono::microseconds;
    std::atomic<int> inside{0};
    for (int threads : {1, 2, 4, 7}) {
        set_thread_count(threads);
        for (int pieces : {1, 2, 64}) {
            for (int bad : {0, pieces / 2, pieces - 1}) {
                for (int repeat = 0; repeat < 20; repeat++) {
                    const auto found = thrown(pieces, inside, [&](int i) {
                        if (i == bad) throw std::runtime_error(std::to_string(i));
                        std::this_thread::sleep_for(microseconds(repeat));
                    });
                    check(found == std::to_string(bad), "the exception of a piece");
                }
            }
            const auto all = thrown(pieces, inside, [](int i) { throw std::runtime_error(i < 0 ? "" : "every one"); });
            check(all == "every one", "an exception of all pieces");
            const auto nested = thrown(pieces, inside, [](int) {
                parallel_for(5, [](int i) {
                    if (i == 3) throw std::bad_alloc();
                });
            });
            check(nested == std::bad_alloc().what(), "an exception of a nested piece");
            check(thrown(pieces, inside, [](int) {}) == "nothing", "and the next call works");
        }
        int begun = 0;
        try {
            parallel_for(3000000000LL, [&](int) { begun++; });
            check(false, "too many pieces");
        } catch (const std::length_error&) {
            check(begun == 0, "too many pieces are none");
        }
    }
    set_thread_count(4);
    std::atomic<int> begun{0};
    thrown(1 << 20, inside, [&](int i) {
        begun++;
        if (i == 0) throw std::bad_alloc();
        std::this_thread::sleep_for(microseconds(50));
    });
    check(begun < 1 << 20, "what nobody has begun is left out");
    // Two callers, of whom one fails always: neither gets what is the other's.
    std::atomic<int> wrong{0}, total{0};
    std::thread failing([&] {
        std::atomic<int> own{0};
        for (int i = 0; i < 300; i++) wrong += thrown(20, own, [](int) { throw std::runtime_error("mine"); }) != "mine";
    });
    for (int i = 0; i < 300; i++) parallel_for(20, [&](int) { total++; });
    failing.join();
    check(wrong == 0 && total == 300 * 20, "exceptions go to their caller");
}

void test_fork() {
    pid_t child = fork();
    if (child == 0) {
        std::atomic<int> n{0};
        parallel_for(100, [&](int) { n++; });
        _exit(n == 100 ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    check(status == 0, "fork");
}

}  // namespace

int main(int argc, char** argv) {
    test_every_piece_once();
    test_nested();
    test_several_callers();
    test_after_sleep();
    test_exceptions();
    if (argc < 2 || std::strcmp(argv[1], "--no-fork") != 0) test_fork();
    std::printf("pool: %d failures\n", failures);
    return failures ? 1 : 0;
}
