// AVX2: two products for each of 8 sums at a time, and an addition.
#include "vision/isa/avx2-inl.h"

namespace edgeq {
namespace {

inline I dot_codes(I sum, I x, I y) { return _mm256_add_epi32(sum, _mm256_madd_epi16(x, y)); }

}  // namespace
}  // namespace edgeq

#define VISION vision_avx2
#include "vision/vision-inl.h"
