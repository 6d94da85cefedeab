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

I add_products(I acc, I words) { return _mm256_add_epi32(acc, _mm256_madd_epi16(words, _mm256_set1_epi16(1))); }

I dot(I acc, B w, B a) { return add_products(acc, _mm256_maddubs_epi16(w, a)); }  // 2 * 63 * 127 fits into 16 bits

I dot_apart(I acc, B w, B a) { return dot(acc, w, a); }

// |w| times a with w's sign: two products of 128 * 127 fit.
I dot8(I acc, B w, B a) { return dot(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(a, w)); }

template <int bits>
inline I dot_rows(I acc, const B* w, Codes16 a) {
    if constexpr (bits == 8) {
        for (int i = 0; i < 4; i++) acc = dot8(acc, w[i], broadcast_four(a + 4 * i));
        return acc;
    }
    I words[4];
    for (int i = 0; i < 4; i++) words[i] = _mm256_maddubs_epi16(w[i], broadcast_four(a + 4 * i));
    const I first = _mm256_add_epi16(words[0], words[1]), last = _mm256_add_epi16(words[2], words[3]);
    if constexpr (bits == 6) return add_products(add_products(acc, first), last);  // 4 * 63 * 127 fits
    return add_products(acc, _mm256_add_epi16(first, last));                       // 8 * 31 * 127 fits
}

}  // namespace
}  // namespace edgeq

#include "kernels/dot-rows-inl.h"
#include "kernels/linear-inl.h"

const edgeq::LinearKernels edgeq::linear_avx2 = {quantize, gemv, gemm, tile_rows};
