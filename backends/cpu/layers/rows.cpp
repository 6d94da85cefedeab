#include "layers/rows.h"

#include <cstring>

namespace edgeq {

bool all_finite(const float* x, Index n) {
    constexpr uint32_t exponent = 0x7f800000;  // all of its bits are set in what is infinite or not a number
    bool all = true;
    for (Index block = 0; all && block < n; block += rows_piece) {
        uint32_t found = 0;
        for (Index i = block, end = std::min(n, block + rows_piece); i < end; i++) {
            uint32_t bits;
            std::memcpy(&bits, x + i, sizeof bits);
            found |= (bits & exponent) == exponent;
        }
        all = !found;
    }
    return all;
}

}  // namespace edgeq
