// The thread pool: one per process, shared by every model in it.
//
//     parallel_for(pieces, [&](int piece) { ... });
//
// calls the function once for every piece in [0, pieces), on the caller's thread and on the pool's. Every thread has a
// contiguous share of the pieces (so that memory streams) and takes them one by one; who is finished takes what is
// left of the others' shares, so that a thread which the system has put aside costs one piece and not a share. Make
// pieces small: 10 to 100 microseconds. A thread with nothing to do spins for some microseconds and then sleeps.
//
// What a piece throws comes out of parallel_for, once no thread works on a piece any more: the first exception, and
// pieces that nobody had begun by then are left out. A parallel_for inside a piece does all its pieces itself, one
// after another, on the piece's thread. Calls from several threads take turns. After fork the child starts its own
// threads.
#pragma once

namespace edgeq {

// Threads that a parallel_for may use, the caller's included.
int thread_count();

// Sets that number, at least 1. Takes effect with the next parallel_for.
void set_thread_count(int threads);

// Starts them now, not with the first parallel_for, and returns how many there are: fewer than asked for where the
// system gives no more, and thread_count() is that number from then on.
int start_threads();

namespace detail {
void run(long long pieces, void (*function)(void* context, int piece), void* context);
}

template <class Function>
void parallel_for(long long pieces, Function&& function) {
    detail::run(
        pieces, [](void* context, int piece) { (*static_cast<Function*>(context))(piece); },
        const_cast<void*>(static_cast<const void*>(&function)));
}

}  // namespace edgeq
