// Scratch memory: what is kept from call to call to work in. On cache line boundaries, since a 64-byte load that
// straddles two lines costs twice; and counted.
#pragma once

#include <atomic>
#include <cstddef>
#include <new>
#include <vector>

namespace edgeq {

// Bytes of scratch memory that all threads hold now.
extern std::atomic<std::size_t> scratch_nbytes;

template <class T>
struct ScratchAllocator {
    using value_type = T;
    ScratchAllocator() = default;
    template <class U>
    ScratchAllocator(const ScratchAllocator<U>&) {}
    T* allocate(std::size_t n) {
        T* p = static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)));
        scratch_nbytes += n * sizeof(T);
        return p;
    }
    void deallocate(T* p, std::size_t n) {
        scratch_nbytes -= n * sizeof(T);
        ::operator delete(p, std::align_val_t(64));
    }
    bool operator==(const ScratchAllocator&) const { return true; }
    bool operator!=(const ScratchAllocator&) const { return false; }
};

template <class T>
using ScratchVector = std::vector<T, ScratchAllocator<T>>;
using Floats = ScratchVector<float>;

// Makes room for n entries, whose content is lost. What a long prompt took is given back by the first call that needs a
// quarter of it; small amounts are kept.
template <class T>
void make_room(ScratchVector<T>& memory, std::size_t n) {
    constexpr std::size_t kept = (std::size_t(1) << 20) / sizeof(T);
    const std::size_t held = memory.size();
    if (held >= n && (held / 4 <= n || held <= kept)) return;
    ScratchVector<T>().swap(memory);  // before there is another
    memory.resize(n);
}

}  // namespace edgeq
