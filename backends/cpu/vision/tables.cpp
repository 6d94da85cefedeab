#include "kernels/isa.h"
#include "vision/vision.h"

namespace edgeq {

const VisionKernels& vision_kernels() {
    switch (active_isa()) {
#if defined(__x86_64__)
        case Isa::avx2: return vision_avx2;
        case Isa::avxvnni: return vision_avxvnni;
        case Isa::avx512vnni: return vision_avx512vnni;
#elif defined(__aarch64__)
        case Isa::neon:
        case Isa::neon_dotprod:
        case Isa::neon_i8mm: return vision_neon;
#endif
        default: return vision_scalar;
    }
}

}  // namespace edgeq
