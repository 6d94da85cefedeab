#include "layers/isa/avx512vnni-inl.h"

#define LAYERS layers_avx512
#include "layers/layers-inl.h"
