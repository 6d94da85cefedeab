// The quantizer's inner loop.
#include <string>

#include "bind_checks.h"
#include "kernels/quantize.h"

using namespace nanobind::literals;
using namespace edgeq;

namespace {

using Weights = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Factors = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Stored stored_of(const std::string& name) {
    if (name == "bfloat16") return Stored::bfloat16;
    if (name == "float16") return Stored::float16;
    if (name == "float32") return Stored::float32;
    refuse("stored", "bfloat16, float16 or float32, found " + name);
}

template <class Array>
void require_room(const Array& x, const char* name, Index rows, Index columns) {
    require_shape(x, name, {rows, columns});
    require_aligned(x, name);
}

void quantize_checked(const Weights& x, int bits, int group_size, const char* stored, const Words& words,
                      const Factors& scales, const Factors& biases, const Factors& errors) {
    require(bits >= 2 && bits <= 8 && bits != 7, "bits", "2, 3, 4, 5, 6 or 8", bits);
    require(group_size == 32 || group_size == 64 || group_size == 128, "group_size", "32, 64 or 128", group_size);
    const Index rows = x.shape(0), columns = x.shape(1), groups = columns / group_size;
    require(columns % group_size == 0, "x", "columns in whole groups", columns);
    require_aligned(x, "x");
    require_room(words, "words", rows, entries({groups, group_size / 32, bits}));
    require_room(scales, "scales", rows, groups);
    require_room(biases, "biases", rows, groups);
    require_room(errors, "errors", rows, groups);
    const QuantizeShape shape{rows, columns, bits, group_size, stored_of(stored)};
    nb::gil_scoped_release release;
    quantize(shape, x.data(), words.data(), scales.data(), biases.data(), errors.data());
}

}  // namespace

void bind_quantize(nb::module_& m) {
    m.def("quantize", &quantize_checked, "x"_a.noconvert(), "bits"_a, "group_size"_a, "stored"_a, "words"_a.noconvert(),
          "scales"_a.noconvert(), "biases"_a.noconvert(), "errors"_a.noconvert(),
          "Group-wise affine quantization with the search of edgeq.quant.search; the same bits as its NumPy form.");
}
