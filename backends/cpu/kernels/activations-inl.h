// Activations in int8. See linear-inl.h.
#pragma once

#include "kernels/kernels.h"

namespace edgeq {
namespace {

// One group: codes to q, the sum of the codes returned, the scale to *scale.
int quantize_group(const float* x, int group, int8_t* q, float* scale) {
    F largest = f_zero();
    for (int i = 0; i < group; i += lanes) largest = f_max(largest, f_abs(f_load(x + i)));
    float amax = f_max_lane(largest);
    if (amax < 1e-30f) {  // its reciprocal would overflow
        *scale = 0;
        for (int i = 0; i < group; i++) q[i] = 0;
        return 0;
    }
    F inverse = f_set(127.0f / amax);
    for (int i = 0; i < group; i += lanes) f_store_int8(q + i, f_mul(f_load(x + i), inverse));
    *scale = amax / 127.0f;
    int total = 0;
    for (int i = 0; i < group; i++) total += q[i];
    return total;
}

void quantize(const float* x, int64_t n, int group, Order order, int8_t* codes, float* scales, float* sums,
              int32_t* totals) {
    for (int64_t g = 0; g < n / group; g++) {
        int8_t q[128];
        totals[g] = quantize_group(x + g * group, group, q, &scales[g]);
        sums[g] = scales[g] * float(totals[g]);
        const int64_t first = g * group;
        if (order == Order::natural) {
            for (int i = 0; i < group; i++) codes[first + i] = q[i];
        } else if (order == Order::even_odd) {
            int8_t* even = codes + first / even_odd_block * even_odd_block + first % even_odd_block / 2;
            for (int i = 0; i < group / 2; i++) {
                even[i] = q[2 * i];
                even[even_odd_block / 2 + i] = q[2 * i + 1];
            }
        } else {
            int8_t* to = codes + first / quarters_block * quarters_block + first % quarters_block / 4;
            for (int i = 0; i < group / 4; i++)
                for (int j = 0; j < 4; j++) to[j * (quarters_block / 4) + i] = q[4 * i + j];
        }
    }
}

}  // namespace
}  // namespace edgeq
