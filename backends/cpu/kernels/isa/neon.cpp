// Armv8.0: Cortex-A53 and A72 (Raspberry Pi 4), every 64-bit Arm.
#include "kernels/kernels.h"

namespace edgeq {
namespace {
constexpr bool signed_bytes = true;
constexpr int row_bytes = 4;
}  // namespace
}  // namespace edgeq

#include "kernels/isa/neon-inl.h"

namespace edgeq {
namespace {

// Two products of 128 * 127 fit into 16 bits.
I dot(I acc, B w, B a) {
    int16x8_t products = vmull_s8(vget_low_s8(w), vget_low_s8(a));
    return vpadalq_s16(acc, vmlal_high_s8(products, w, a));
}

I dot8(I acc, B w, B a) { return dot(acc, w, a); }

I dot_apart(I acc, B w, B a) {
    return vpadalq_s16(acc, vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(a)), vmull_high_s8(w, a)));
}

using Codes16 = const int8_t*;
Codes16 load_codes16(const int8_t* p) { return p; }

// Products are summed in 16 bits as long as they fit: 8 * 31 * 127, 4 * 63 * 127, 2 * 128 * 127.
template <int bits>
inline I dot_rows(I acc, const B* w, Codes16 p) {
    constexpr int together = bits == 8 ? 1 : bits == 6 ? 2 : 4;  // fours
    for (int i = 0; i < 4; i += together) {
        int16x8_t low, high;
        for (int j = i; j < i + together; j++) {
            int32_t four;
            memcpy(&four, p + 4 * j, 4);
            const B a = vreinterpretq_s8_s32(vdupq_n_s32(four));
            low =
                j == i ? vmull_s8(vget_low_s8(w[j]), vget_low_s8(a)) : vmlal_s8(low, vget_low_s8(w[j]), vget_low_s8(a));
            high = j == i ? vmull_high_s8(w[j], a) : vmlal_high_s8(high, w[j], a);
        }
        acc = vpadalq_s16(acc, vpaddq_s16(low, high));
    }
    return acc;
}

}  // namespace
}  // namespace edgeq

#include "kernels/dot-rows-inl.h"
#include "kernels/linear-inl.h"

const edgeq::LinearKernels edgeq::linear_neon = {quantize, gemv, gemm, tile_rows};
