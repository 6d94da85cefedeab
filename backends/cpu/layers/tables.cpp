#include "kernels/isa.h"
#include "layers/layers.h"

namespace edgeq {

const LayerKernels& layer_kernels() {
    switch (active_isa()) {
#if defined(__x86_64__)
        case Isa::avx2:
        case Isa::avxvnni: return layers_avx2;
        case Isa::avx512vnni: return layers_avx512;
#elif defined(__aarch64__)
        case Isa::neon:
        case Isa::neon_dotprod:
        case Isa::neon_i8mm: return layers_neon;
#endif
        default: return layers_scalar;
    }
}

}  // namespace edgeq
