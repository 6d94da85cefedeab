// AVX2 with FMA and F16C: Haswell, Zen and later.
#include "kernels/kernels.h"

namespace edgeq {
namespace {
constexpr bool signed_bytes = true;  // vpmaddubsw saturates at 16 bits: two products of 255 * 127 do not fit
}
}  // namespace edgeq

#include "kernels/isa/avx2-inl.h"

namespace edgeq {
namespace {

I dot_rows(I acc, B w, B a) {  // two products of 63 * 127 fit into 16 bits
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
}

// |w| times a with w's sign: two products of 128 * 127 fit.
I dot8_rows(I acc, B w, B a) { return dot_rows(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(a, w)); }

I dot(I acc, B w, B a) { return dot_rows(acc, w, a); }
I dot8(I acc, B w, B a) { return dot8_rows(acc, w, a); }

}  // namespace
}  // namespace edgeq

#include "kernels/linear-inl.h"

const edgeq::LinearKernels edgeq::linear_avx2 = {quantize, gemv, gemm, tile_rows};
