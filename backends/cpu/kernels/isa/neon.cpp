// Armv8.0: Cortex-A53 and A72 (Raspberry Pi 4), every 64-bit Arm.
#include "kernels/kernels.h"

namespace edgeq {
namespace {
constexpr bool signed_bytes = true;
}
}  // namespace edgeq

#include "kernels/isa/neon-inl.h"

namespace edgeq {
namespace {

// Two products of 128 * 127 fit into 16 bits.
I dot(I acc, B w, B a) {
    int16x8_t products = vmull_s8(vget_low_s8(w), vget_low_s8(a));
    return vpadalq_s16(acc, vmlal_high_s8(products, w, a));
}

I dot_rows(I acc, B w, B a) {
    return vpadalq_s16(acc, vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(a)), vmull_high_s8(w, a)));
}

I dot8(I acc, B w, B a) { return dot(acc, w, a); }
I dot8_rows(I acc, B w, B a) { return dot_rows(acc, w, a); }

}  // namespace
}  // namespace edgeq

#include "kernels/linear-inl.h"

const edgeq::LinearKernels edgeq::linear_neon = {quantize, gemv, gemm, tile_rows};
