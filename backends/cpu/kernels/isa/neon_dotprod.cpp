// Armv8.2 with dot products: Cortex-A76 (Raspberry Pi 5), Apple M1.
#include "kernels/kernels.h"

namespace edgeq {
namespace {
constexpr bool signed_bytes = true;  // sdot multiplies signed by signed
}
}  // namespace edgeq

#include "kernels/isa/neon-inl.h"

namespace edgeq {
namespace {

I dot(I acc, B w, B a) { return vdotq_s32(acc, w, a); }
I dot8(I acc, B w, B a) { return vdotq_s32(acc, w, a); }
I dot_rows(I acc, B w, B a) { return vdotq_s32(acc, w, a); }
I dot8_rows(I acc, B w, B a) { return vdotq_s32(acc, w, a); }

}  // namespace
}  // namespace edgeq

#include "kernels/linear-inl.h"

const edgeq::LinearKernels edgeq::linear_neon_dotprod = {quantize, gemv, gemm, tile_rows};
