// A matrix that Python has handed over: checked once, then used by any binding that multiplies.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <vector>

#include "kernels/kernels.h"

namespace edgeq {

// Keeps the arrays alive whose memory `matrix` points into.
struct BoundMatrix {
    Matrix matrix;
    std::vector<nanobind::ndarray<nanobind::ro>> arrays;
};

}  // namespace edgeq
