// The inner loop of gemm over dot_rows: for sets whose products take codes of one row and one token. Included by a file
// of isa/ before linear-inl.h.
#pragma once

#include "kernels/kernels.h"

namespace edgeq {
namespace {

template <int bits, int tokens>
EDGEQ_INLINE void dot_group(const uint8_t* codes, int distance, const int8_t* q, int64_t stride, int group,
                            I (*d)[tokens]) {
    for (int k = 0; k < group; k += 16) {
        Codes16 x[tokens];
        for (int t = 0; t < tokens; t++) x[t] = load_codes16(q + t * stride + k);
        for (int v = 0; v < row_vectors; v++) {
            B w[4];
            for (int i = 0; i < 4; i++) w[i] = b_load(codes + v * distance + (k + 4 * i) * lanes);
            for (int t = 0; t < tokens; t++) d[v][t] = dot_rows<bits>(d[v][t], w, x[t]);
        }
    }
}

}  // namespace
}  // namespace edgeq
