// Armv8.2 with dot products: Cortex-A76 (Raspberry Pi 5), Apple M1.
#include "kernels/kernels.h"

namespace edgeq {
namespace {
constexpr bool signed_bytes = true;  // sdot multiplies signed by signed
constexpr int row_bytes = 4;
}  // namespace
}  // namespace edgeq

#include "kernels/isa/neon-inl.h"

namespace edgeq {
namespace {

I dot(I acc, B w, B a) { return vdotq_s32(acc, w, a); }
I dot8(I acc, B w, B a) { return vdotq_s32(acc, w, a); }
I dot_apart(I acc, B w, B a) { return dot(acc, w, a); }

using Codes16 = B;
Codes16 load_codes16(const int8_t* p) { return vld1q_s8(p); }

template <int bits>
inline I dot_rows(I acc, const B* w, Codes16 a) {
    acc = vdotq_laneq_s32(acc, w[0], a, 0);
    acc = vdotq_laneq_s32(acc, w[1], a, 1);
    acc = vdotq_laneq_s32(acc, w[2], a, 2);
    return vdotq_laneq_s32(acc, w[3], a, 3);
}

}  // namespace
}  // namespace edgeq

#include "kernels/dot-rows-inl.h"
#include "kernels/linear-inl.h"

const edgeq::LinearKernels edgeq::linear_neon_dotprod = {quantize, gemv, gemm, tile_rows};
