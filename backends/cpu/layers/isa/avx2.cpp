#include "layers/isa/avx2-inl.h"

#define LAYERS layers_avx2
#include "layers/layers-inl.h"
