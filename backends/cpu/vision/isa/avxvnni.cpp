// AVX2 with VNNI: the addition with it.
#include "vision/isa/avx2-inl.h"

namespace edgeq {
namespace {

inline I dot_codes(I sum, I x, I y) { return _mm256_dpwssd_avx_epi32(sum, x, y); }

}  // namespace
}  // namespace edgeq

#define VISION vision_avxvnni
#include "vision/vision-inl.h"
