// Row by row, on several threads where that pays.
#pragma once

#include <algorithm>

#include "kernels/threads.h"
#include "layers/layers.h"

namespace edgeq {

constexpr Index rows_piece = 1 << 15;  // entries; fewer are not worth waking a thread

// Calls function(row) for `rows` rows of n entries.
template <class Function>
void each_row(Index rows, Index n, Function&& function) {
    if (n == 0) return;
    const Index some = std::max<Index>(1, rows_piece / n);
    parallel_for((rows + some - 1) / some, [&](int piece) {
        for (Index row = piece * some, end = std::min(rows, row + some); row < end; row++) function(row);
    });
}

}  // namespace edgeq
