// A matrix that Python has handed over: checked once, then used by any binding that multiplies.
#pragma once

#include <vector>

#include "bind_checks.h"
#include "kernels/kernels.h"

namespace edgeq {

// Keeps the arrays alive whose memory `matrix` points into.
struct BoundMatrix {
    Matrix matrix;
    std::vector<nb::ndarray<nb::ro>> arrays;
};

// The matrix that a Python object is.
inline const BoundMatrix& matrix_of(nb::handle x, const char* name) {
    const BoundMatrix* w = nullptr;
    if (!nb::try_cast<const BoundMatrix*>(x, w, false) || !w) refuse_type(name, "a Matrix");
    return *w;
}

}  // namespace edgeq
