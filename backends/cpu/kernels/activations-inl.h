// Activations in int8. See linear-inl.h.
#pragma once

#include <string.h>

#include "kernels/kernels.h"

namespace edgeq {
namespace {

// One group: codes to q, the scale returned.
template <int group>
EDGEQ_INLINE float quantize_group(const float* x, int8_t* q) {
    F v[group / lanes], largest = f_zero();
    for (int i = 0; i < group / lanes; i++) {
        v[i] = f_load(x + i * lanes);
        largest = f_max(largest, f_abs(v[i]));
    }
    const float amax = f_max_lane(largest);
    const bool zero = amax < 1e-30f;  // its reciprocal would overflow
    const F inverse = f_set(zero ? 0 : 127.0f / amax);
    for (int i = 0; i < group / lanes; i++) f_store_int8(q + i * lanes, f_mul(v[i], inverse));
    return zero ? 0 : amax / 127.0f;
}

// The sum of a group's codes.
template <int group>
EDGEQ_INLINE int total_of(const int8_t* q) {
    if constexpr (group % (4 * lanes) == 0) {
        alignas(64) uint8_t ones[4 * lanes];
        memset(ones, 1, sizeof ones);
        I sums = i_zero();
        for (int i = 0; i < group; i += 4 * lanes) sums = dot(sums, b_load(ones), load_codes(q + i));
        return int(f_sum(i_float(sums)));
    }
    int total = 0;
    for (int i = 0; i < group; i++) total += q[i];
    return total;
}

// Codes of a group, from their natural order.
void reorder(const int8_t* q, int64_t first, int group, Order order, int8_t* codes) {
    if (order == Order::even_odd) {
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

// Totals come after all codes of a row: what has just been stored in pieces cannot be loaded as a whole at once.
template <int group>
void quantize_groups(const float* x, int64_t n, Order order, int8_t* codes, float* scales, float* sums,
                     int32_t* totals) {
    for (int64_t g = 0; g < n / group; g++) {
        const int64_t first = g * group;
        if (order == Order::natural) {
            scales[g] = quantize_group<group>(x + first, codes + first);
        } else {
            int8_t q[group];
            scales[g] = quantize_group<group>(x + first, q);
            totals[g] = total_of<group>(q);
            reorder(q, first, group, order, codes);
        }
    }
    for (int64_t g = 0; g < n / group; g++) {
        if (order == Order::natural) totals[g] = total_of<group>(codes + g * group);
        sums[g] = scales[g] * float(totals[g]);
    }
}

void quantize(const float* x, int64_t n, int group, Order order, int8_t* codes, float* scales, float* sums,
              int32_t* totals) {
    switch (group) {
        case 16: return quantize_groups<16>(x, n, order, codes, scales, sums, totals);
        case 32: return quantize_groups<32>(x, n, order, codes, scales, sums, totals);
        case 64: return quantize_groups<64>(x, n, order, codes, scales, sums, totals);
        case 128: return quantize_groups<128>(x, n, order, codes, scales, sums, totals);
    }
}

}  // namespace
}  // namespace edgeq
