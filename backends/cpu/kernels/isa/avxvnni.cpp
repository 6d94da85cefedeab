// AVX2 with AVX-VNNI: Alder Lake, Zen 5 and later.
#include "kernels/kernels.h"

namespace edgeq {
namespace {
constexpr bool signed_bytes = false;
}
}  // namespace edgeq

#include "kernels/isa/avx2-inl.h"

namespace edgeq {
namespace {

I dot(I acc, B w, B a) { return _mm256_dpbusd_avx_epi32(acc, w, a); }
I dot8(I acc, B w, B a) { return _mm256_dpbusd_avx_epi32(acc, w, a); }
I dot_apart(I acc, B w, B a) { return dot(acc, w, a); }

template <int bits>
inline I dot_rows(I acc, const B* w, Codes16 a) {
    for (int i = 0; i < 4; i++) acc = dot(acc, w[i], broadcast_four(a + 4 * i));
    return acc;
}

}  // namespace
}  // namespace edgeq

#include "kernels/dot-rows-inl.h"
#include "kernels/linear-inl.h"

const edgeq::LinearKernels edgeq::linear_avxvnni = {quantize, gemv, gemm, tile_rows};
