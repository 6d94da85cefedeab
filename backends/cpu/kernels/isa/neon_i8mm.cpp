// Armv8.6 integer matrix products: Apple M2 and later, Neoverse N2.
#include "kernels/kernels.h"

namespace edgeq {
namespace {
constexpr bool signed_bytes = false;  // usdot multiplies unsigned by signed
}
}  // namespace edgeq

#include "kernels/isa/neon-inl.h"

namespace edgeq {
namespace {

I dot(I acc, B w, B a) { return vdotq_s32(acc, w, a); }
I dot8(I acc, B w, B a) { return vusdotq_s32(acc, vreinterpretq_u8_s8(w), a); }

using Codes16 = B;
Codes16 load_codes16(const int8_t* p) { return vld1q_s8(p); }

template <int bits>
inline I dot_rows(I acc, const B* w, Codes16 a) {
    acc = vusdotq_laneq_s32(acc, vreinterpretq_u8_s8(w[0]), a, 0);
    acc = vusdotq_laneq_s32(acc, vreinterpretq_u8_s8(w[1]), a, 1);
    acc = vusdotq_laneq_s32(acc, vreinterpretq_u8_s8(w[2]), a, 2);
    return vusdotq_laneq_s32(acc, vreinterpretq_u8_s8(w[3]), a, 3);
}

}  // namespace
}  // namespace edgeq

#include "kernels/linear-inl.h"

const edgeq::LinearKernels edgeq::linear_neon_i8mm = {quantize, gemv, gemm, tile_rows};
