// Python binding of the quantizer: checks shapes, releases the GIL, calls quantize().

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "quantize.h"

namespace nb = nanobind;

namespace {

using edgeq::QuantizeShape;
using edgeq::Stored;
using Weights = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Factors = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Stored stored_of(const std::string& name) {
    if (name == "bfloat16") return Stored::bfloat16;
    if (name == "float16") return Stored::float16;
    if (name == "float32") return Stored::float32;
    throw std::invalid_argument("stored must be bfloat16, float16 or float32, not " + name);
}

template <typename Array>
void expect_shape(const Array& array, const char* name, size_t rows, size_t columns) {
    if (array.shape(0) != rows || array.shape(1) != columns) {
        throw std::invalid_argument(std::string(name) + " has the wrong shape");
    }
}

void quantize_checked(Weights x, int bits, int group_size, const std::string& stored, Words words, Factors scales,
                      Factors biases, Factors errors) {
    if (!(bits >= 2 && bits <= 8 && bits != 7)) throw std::invalid_argument("bits must be 2, 3, 4, 5, 6 or 8");
    if (group_size != 32 && group_size != 64 && group_size != 128) {
        throw std::invalid_argument("group_size must be 32, 64 or 128");
    }
    const size_t rows = x.shape(0), columns = x.shape(1);
    const size_t group = static_cast<size_t>(group_size);
    if (columns % group != 0) throw std::invalid_argument("columns must be a multiple of group_size");
    expect_shape(words, "words", rows, columns * static_cast<size_t>(bits) / 32);
    expect_shape(scales, "scales", rows, columns / group);
    expect_shape(biases, "biases", rows, columns / group);
    expect_shape(errors, "errors", rows, columns / group);
    const QuantizeShape shape{static_cast<int64_t>(rows), static_cast<int64_t>(columns), bits, group_size,
                            stored_of(stored)};
    nb::gil_scoped_release release;
    edgeq::quantize(shape, x.data(), words.data(), scales.data(), biases.data(), errors.data());
}

}  // namespace

void bind_quantize(nb::module_& m) {
    m.def("quantize", &quantize_checked, nb::arg("x"), nb::arg("bits"), nb::arg("group_size"), nb::arg("stored"),
          nb::arg("words"), nb::arg("scales"), nb::arg("biases"), nb::arg("errors"),
          "Group-wise affine quantization with the search of edgeq.quant.search; the same bits as its NumPy form.");
}
