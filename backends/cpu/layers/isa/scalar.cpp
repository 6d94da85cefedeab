#include "layers/isa/scalar-inl.h"

#define LAYERS layers_scalar
#include "layers/layers-inl.h"
