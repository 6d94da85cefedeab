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
I dot_rows(I acc, B w, B a) { return vdotq_s32(acc, w, a); }
I dot8_rows(I acc, B w, B a) { return vusdotq_s32(acc, vreinterpretq_u8_s8(w), a); }

}  // namespace
}  // namespace edgeq

#include "kernels/linear-inl.h"

const edgeq::LinearKernels edgeq::linear_neon_i8mm = {quantize, gemv, gemm, tile_rows};
