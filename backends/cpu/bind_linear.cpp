#include <nanobind/nanobind.h>

#include "kernels/isa.h"
#include "kernels/threads.h"

namespace nb = nanobind;
using namespace nb::literals;

void bind_linear(nb::module_& m) {
    m.def("isa", [] { return edgeq::isa_name(edgeq::active_isa()); }, "The instruction set whose kernels run.");
    m.def(
        "isas",
        [] {
            nb::list names;
            for (int i = 0; i < edgeq::isa_count; i++)
                if (auto isa = static_cast<edgeq::Isa>(i); edgeq::isa_supported(isa)) names.append(edgeq::isa_name(isa));
            return names;
        },
        "The instruction sets that this build and machine have, slowest first.");
    m.def("set_isa", &edgeq::set_isa, "name"_a, "Force an instruction set; RuntimeError where it is not to be had.");
    m.def("thread_count", &edgeq::thread_count, "Threads that a kernel may use.");
    m.def(
        "set_thread_count",
        [](int threads) {
            if (threads < 1 || threads > 1024) throw nb::value_error("threads: expected 1 to 1024");
            edgeq::set_thread_count(threads);
        },
        "threads"_a, "Set how many threads the kernels use, from the next operation on.");
}
