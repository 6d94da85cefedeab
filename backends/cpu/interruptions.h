#pragma once

#include <nanobind/nanobind.h>

#include <chrono>

namespace edgeq {

namespace nb = nanobind;

// Lets Ctrl-C through in the midst of a long call: it looks for signals after a layer, but not so often that a busy
// thread of Python, which has to hand the GIL over for it, could slow the call down.
class Interruptions {
public:
    explicit Interruptions(bool many) : many_(many) {}  // whether the call is a long one

    // False where Python is to raise an exception, which is set.
    bool go_on() {
        using namespace std::chrono_literals;
        if (!many_ || std::chrono::steady_clock::now() - since_ < 50ms) return true;
        nb::gil_scoped_acquire hold;
        const bool none = PyErr_CheckSignals() == 0;
        since_ = std::chrono::steady_clock::now();
        return none;
    }

private:
    bool many_;
    std::chrono::steady_clock::time_point since_ = std::chrono::steady_clock::now();
};

}  // namespace edgeq
