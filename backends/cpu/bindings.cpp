// The module edgeq.backends.cpu._native. Every function checks what it is given (dtype, contiguity, shapes) and
// raises before a kernel sees a pointer; kernels run without the GIL.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_linear(nb::module_& m);
void bind_layers(nb::module_& m);
void bind_states(nb::module_& m);
void bind_vision(nb::module_& m);
void bind_quantize(nb::module_& m);
void bind_guard(nb::module_& m);

NB_MODULE(_native, m) {
    m.doc() = "Native kernels of the CPU backend.";
    bind_linear(m);
    bind_states(m);
    bind_layers(m);
    bind_vision(m);
    bind_quantize(m);
    bind_guard(m);
}
