#include "layers/isa/neon-inl.h"

#define LAYERS layers_neon
#include "layers/layers-inl.h"
