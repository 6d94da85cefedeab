#include "kernels/threads.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/cores.h"

namespace edgeq {
namespace {

// How long a thread polls before it sleeps. Waking one takes 5 to 50 microseconds, the gaps between the operations of
// a token are shorter than that; see "Threads" in docs/speed.md for the measurement.
constexpr std::chrono::microseconds spin_time{60};

// How long the caller sleeps before it looks again, although it will be told: every time a core falls idle, Linux
// considers moving a thread to it that waits for another core, but never one that ran within half a millisecond.
constexpr std::chrono::microseconds patience{300};

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Polls `ready` for at most spin_time; false if it never was.
template <class Condition>
bool spin_until(Condition ready) {
    auto deadline = std::chrono::steady_clock::now() + spin_time;
    do {
        for (int i = 0; i < 32; i++) {
            if (ready()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    return false;
}

thread_local bool inside_piece = false;

// While it lives, this thread is inside a piece.
class Inside {
public:
    Inside() { inside_piece = true; }
    ~Inside() { inside_piece = before_; }
    Inside(const Inside&) = delete;

private:
    const bool before_ = inside_piece;
};

// Pieces still to be taken from one thread's share: the end in the upper half, the next one in the lower, so that one
// atomic addition takes a piece and tells whether there was one.
struct alignas(64) Share {
    std::atomic<uint64_t> range{0};

    void set(int begin, int end) { range.store(uint64_t(end) << 32 | uint32_t(begin), std::memory_order_release); }

    // The next piece, or -1.
    int take() {
        if (empty(range.load(std::memory_order_relaxed))) return -1;
        uint64_t taken = range.fetch_add(1, std::memory_order_acq_rel);
        return empty(taken) ? -1 : int(uint32_t(taken));
    }

    static bool empty(uint64_t r) { return uint32_t(r) >= (r >> 32); }
};

class Pool {
public:
    // Of `threads`, the caller's included, as many as the system gives.
    explicit Pool(int threads) : shares_(new Share[threads]) {
        workers_.reserve(threads - 1);  // beyond this line only the start of a thread can fail
        try {
            for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
        } catch (const std::exception&) {  // std::system_error, or std::bad_alloc
        }
        threads_ = int(workers_.size()) + 1;
    }

    ~Pool() {
        {
            std::lock_guard lock(sleep_);
            stop_ = true;
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    int threads() const { return threads_.load(std::memory_order_relaxed); }

    void run(int pieces, void (*function)(void*, int), void* context) {
        // A worker reads these only while it holds a piece, and no piece is left when the last run returned.
        function_ = function;
        context_ = context;
        failed_.store(false, std::memory_order_relaxed);
        unfinished_.store(pieces, std::memory_order_relaxed);
        int sharers = std::min(threads(), pieces);
        for (int i = 0; i < sharers; i++)
            shares_[i].set(int(int64_t(pieces) * i / sharers), int(int64_t(pieces) * (i + 1) / sharers));
        job_.fetch_add(1);
        if (sleepers_.load() > 0) {
            pass_lock();
            wake_.notify_all();
        }
        take_pieces(0);
        if (!spin_until([&] { return finished(); })) {
            std::unique_lock lock(sleep_);
            caller_sleeps_ = true;
            while (!done_.wait_for(lock, patience, [&] { return unfinished_.load() == 0; })) {}
            caller_sleeps_ = false;
        }
        if (failed_) std::rethrow_exception(std::exchange(error_, nullptr));
    }

private:
    bool finished() const { return unfinished_.load(std::memory_order_acquire) == 0; }

    // Who was about to sleep has now either seen the news or hears the call that comes next.
    void pass_lock() { std::lock_guard lock(sleep_); }

    // Everything of the thread's own share, then of the others'.
    void take_pieces(int thread) {
        const Inside inside;
        const int count = threads();
        for (int i = 0; i < count; i++) {
            Share& share = shares_[(thread + i) % count];
            for (int piece; (piece = share.take()) >= 0;) {
                run_piece(piece);
                if (unfinished_.fetch_sub(1) == 1 && caller_sleeps_.load()) {
                    pass_lock();
                    done_.notify_one();
                }
            }
        }
    }

    // Keeps the first exception for the caller, who must not leave while another thread works with what it points to.
    // The pieces that are still to come are only counted.
    void run_piece(int piece) {
        if (failed_.load(std::memory_order_relaxed)) return;
        try {
            function_(context_, piece);
        } catch (...) {
            if (!failed_.exchange(true)) error_ = std::current_exception();
        }
    }

    void work(int thread) {
        for (;;) {
            uint32_t seen = job_.load();
            take_pieces(thread);
            auto news = [&] { return job_.load(std::memory_order_acquire) != seen; };
            if (spin_until([&] { return news() || stop_.load(std::memory_order_relaxed); }) && !stop_) continue;
            std::unique_lock lock(sleep_);
            sleepers_.fetch_add(1);
            wake_.wait(lock, [&] { return job_.load() != seen || stop_; });
            sleepers_.fetch_sub(1);
            if (stop_) return;
        }
    }

    std::atomic<int> threads_{1};  // a worker that starts early sees 1, and takes part a moment later
    std::unique_ptr<Share[]> shares_;
    void (*function_)(void*, int) = nullptr;
    void* context_ = nullptr;
    alignas(64) std::atomic<uint32_t> job_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<int> unfinished_{0};
    std::atomic<bool> caller_sleeps_{false}, failed_{false};
    std::exception_ptr error_;  // written by who sets failed_, read when no piece is left
    std::mutex sleep_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
};

// What fork leaves behind cannot be used or freed (its threads are gone, its locks in any state): the child forgets
// it and starts afresh. Never destroyed, since a detached Python thread may still compute while the process exits.
struct Process {
    std::mutex callers;
    std::atomic<int> threads{0};  // 0: not yet decided
    Pool* pool = nullptr;
};

Process* process;

void start_afresh() {
    auto* fresh = new Process;
    if (process) fresh->threads = process->threads.load();
    process = fresh;
}

Process& here() {
    static bool once = [] {
        start_afresh();
        pthread_atfork(nullptr, nullptr, start_afresh);
        return true;
    }();
    (void)once;
    return *process;
}

// Whether there is address space for what the allocator maps for so many threads: 64 MB for each that uses it, up to
// eight for a core. Where only the work would find out that there is none, it would fail for it.
bool room_beside(int threads) {
    const size_t nbytes = (size_t(64) << 20) * std::min(threads, 8 * default_thread_count());
    void* p = mmap(nullptr, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p != MAP_FAILED && munmap(p, nbytes) == 0;
}

// The pool, which has `threads` threads where the system gives so many and, beyond the number of cores, room beside
// them. Where it does not, what each takes of the address space is wanted for the work: at most half of what it gave,
// and no more than there are cores. The caller holds p.callers.
Pool& pool_of(Process& p, int threads) {
    if (p.pool && p.pool->threads() == threads) return *p.pool;
    delete p.pool;
    p.pool = nullptr;
    p.pool = new Pool(threads);
    const int found = p.pool->threads(), cores = default_thread_count();
    if (found < threads || (threads > cores && !room_beside(threads))) {
        delete p.pool;
        p.pool = nullptr;
        p.pool = new Pool(std::max(1, std::min(found / 2, cores)));
        p.threads.compare_exchange_strong(threads, p.pool->threads());
    }
    return *p.pool;
}

}  // namespace

int thread_count() {
    Process& p = here();
    if (p.threads == 0) p.threads = default_thread_count();
    return p.threads;
}

void set_thread_count(int threads) { here().threads = std::max(1, threads); }

int start_threads() {
    const int threads = thread_count();
    if (threads > 1 && !inside_piece) {
        Process& p = here();
        std::lock_guard lock(p.callers);
        pool_of(p, threads);
    }
    return thread_count();
}

void detail::run(long long pieces, void (*function)(void*, int), void* context) {
    if (pieces > INT32_MAX) throw std::length_error("a loop of more than 2^31 pieces");
    const int threads = thread_count();
    if (pieces <= 1 || threads == 1 || inside_piece) {
        const Inside inside;
        for (int i = 0; i < int(pieces); i++) function(context, i);
        return;
    }
    Process& p = here();
    std::lock_guard lock(p.callers);
    pool_of(p, threads).run(int(pieces), function, context);
}

}  // namespace edgeq
