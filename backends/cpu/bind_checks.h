// What every binding checks before a kernel sees a pointer, and how it refuses.
//
// A wrong dtype or kind of object is a TypeError, everything else that is wrong a ValueError, and both name the
// argument. Arrays are never converted (noconvert): a copy of an output would swallow the result. What a kernel uses
// while the GIL is released is held here, in C++: a list that Python passes may be changed by another thread.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <new>
#include <string>
#include <vector>

namespace edgeq {

namespace nb = nanobind;

using Index = long long;

// --- refusing --------------------------------------------------------------------------------------------------------

[[noreturn]] inline void refuse(const char* name, const std::string& expected) {
    throw nb::value_error((std::string(name) + ": expected " + expected).c_str());
}

[[noreturn]] inline void refuse_type(const char* name, const std::string& expected) {
    throw nb::type_error((std::string(name) + ": expected " + expected).c_str());
}

inline void require(bool condition, const char* name, const char* expected) {
    if (!condition) refuse(name, expected);
}

// The same for a number, which is told.
inline void require(bool condition, const char* name, const char* expected, Index found) {
    if (!condition) refuse(name, std::string(expected) + ", found " + std::to_string(found));
}

// --- sizes -----------------------------------------------------------------------------------------------------------

constexpr Index most_entries = Index(1) << 48;  // no address space holds so many floats, and a few sums stay below 2^63

// How many entries an array with these sizes has.
inline Index entries(std::initializer_list<Index> sizes) {
    Index n = 1;
    for (Index size : sizes)
        if (size == 0) return 0;
    for (Index size : sizes)
        if (__builtin_mul_overflow(n, size, &n) || n > most_entries) throw std::bad_alloc();
    return n;
}

// --- shapes and memory -----------------------------------------------------------------------------------------------

inline std::string text(std::initializer_list<Index> shape) {
    std::string all;
    for (Index n : shape) all += (all.empty() ? "[" : ", ") + std::to_string(n);
    return all + "]";
}

template <class A>
std::string shape_of(const A& x) {
    std::string all;
    for (size_t i = 0; i < x.ndim(); i++) all += (i ? ", " : "") + std::to_string(x.shape(i));
    return "[" + all + "]";
}

template <class A>
void require_shape(const A& x, const char* name, std::initializer_list<Index> shape) {
    bool same = x.ndim() == shape.size();
    size_t i = 0;
    for (Index n : shape) same = same && Index(x.shape(i++)) == n;
    if (!same) refuse(name, "shape " + text(shape) + ", found " + shape_of(x));
}

template <class A, class B>
void require_same_shape(const A& x, const char* name, const B& like) {
    bool same = x.ndim() == like.ndim();
    for (size_t i = 0; same && i < x.ndim(); i++) same = x.shape(i) == like.shape(i);
    if (!same) refuse(name, "the other arguments' shape " + shape_of(like) + ", found " + shape_of(x));
}

template <class A>
void require_aligned(const A& x, const char* name) {
    const size_t size = x.itemsize();
    if (reinterpret_cast<uintptr_t>(x.data()) % size != 0)
        refuse(name, "aligned data, at a multiple of " + std::to_string(size) + " bytes");
}

// Some axis has no entries: nothing will be read, whatever the other axes and the strides say.
template <class A>
bool is_empty(const A& x) {
    for (size_t i = 0; i < x.ndim(); i++)
        if (x.shape(i) == 0) return true;
    return false;
}

// Rows that can be read: aligned, and the last axis contiguous.
template <class A>
void require_readable(const A& x, const char* name) {
    if (is_empty(x)) return;
    require_aligned(x, name);
    const size_t last = x.ndim() - 1;
    require(x.ndim() >= 1 && (x.shape(last) <= 1 || x.stride(last) == 1), name, "a contiguous last axis");
}

// Axes `from` and later lie one after another.
template <class A>
void require_contiguous(const A& x, const char* name, size_t from = 0) {
    if (is_empty(x)) return;
    require_readable(x, name);
    Index size = 1;
    for (size_t i = x.ndim(); i-- > from;) {
        require(x.shape(i) == 1 || x.stride(i) == size, name, "a contiguous array");
        size *= x.shape(i);
    }
}

// --- sequences -------------------------------------------------------------------------------------------------------

// The items of a list, a tuple or anything else that gives them one after another; the tuple keeps them alive.
inline nb::tuple items_of(nb::handle sequence, const char* name, const char* expected) {
    nb::object held = nb::borrow(sequence);
    if (!PyTuple_Check(sequence.ptr()) && !PyList_Check(sequence.ptr())) {
        held = nb::steal(PyObject_GetIter(sequence.ptr()));
        if (!held.is_valid()) {
            PyErr_Clear();
            refuse_type(name, expected);
        }
    }
    PyObject* items = PySequence_Tuple(held.ptr());
    if (!items) nb::raise_python_error();
    return nb::steal<nb::tuple>(items);
}

// The same, exactly `count` of them.
inline nb::tuple items_of(nb::handle sequence, const char* name, const char* expected, Index count) {
    nb::tuple items = items_of(sequence, name, expected);
    if (Index(nb::len(items)) != count)
        refuse(name, std::string(expected) + ", found " + std::to_string(nb::len(items)) + " items");
    return items;
}

// One of them, as T. An array is held by its T.
template <class T>
T item(nb::handle of, const char* name, const char* expected) {
    T value;
    if (!nb::try_cast<T>(of, value, false)) refuse_type(name, expected);
    return value;
}

}  // namespace edgeq
