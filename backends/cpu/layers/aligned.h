// Vectors on cache line boundaries: a 64-byte load that straddles two lines costs twice.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace edgeq {

template <class T>
struct LineAllocator {
    using value_type = T;
    LineAllocator() = default;
    template <class U>
    LineAllocator(const LineAllocator<U>&) {}
    T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* p, std::size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const LineAllocator&) const { return true; }
    bool operator!=(const LineAllocator&) const { return false; }
};

using Floats = std::vector<float, LineAllocator<float>>;

}  // namespace edgeq
