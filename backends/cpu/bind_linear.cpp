// Matrices, instruction sets and threads. A wrong dtype or a writable array wanted is a TypeError (of nanobind), a
// wrong shape, alignment or number a ValueError that names the argument. Arrays are never converted (noconvert): a
// copy of `out` would swallow the result.
#include "bind_linear.h"

#include <nanobind/stl/optional.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels/isa.h"
#include "kernels/linear.h"
#include "kernels/threads.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace edgeq;

namespace {

using AnyArray = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Input = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// --- checks ----------------------------------------------------------------------------------------------------------

void require(bool condition, const std::string& message) {
    if (!condition) throw nb::value_error(message.c_str());
}

std::string shape_text(size_t rows, size_t columns) {
    return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

template <class Array>
void require_shape(const Array& x, const char* name, size_t rows, size_t columns) {
    require(x.shape(0) == rows && x.shape(1) == columns,
            std::string(name) + ": expected shape " + shape_text(rows, columns) + ", found " +
                shape_text(x.shape(0), x.shape(1)));
}

template <class Array>
void require_aligned(const Array& x, const char* name) {
    require(reinterpret_cast<uintptr_t>(x.data()) % x.itemsize() == 0, std::string(name) + ": misaligned");
}

// The number type of an array; uint16 is bfloat16, as everywhere in edgeq.
Type type_of(const AnyArray& x, const char* name) {
    if (x.dtype() == nb::dtype<float>()) return Type::f32;
    if (x.dtype() == nb::dtype<uint16_t>()) return Type::bf16;
    if (x.dtype() == nb::dlpack::dtype{uint8_t(nb::dlpack::dtype_code::Float), 16, 1}) return Type::f16;
    throw nb::type_error((std::string(name) + ": expected float32, float16 or uint16 (bfloat16)").c_str());
}

// --- the matrix ------------------------------------------------------------------------------------------------------

// How many groups share one of `blocks` float16 units, as a shift.
int block_shift(size_t groups, size_t blocks) {
    for (int shift : {2, 3, 4})
        if (blocks << shift == groups) return shift;
    throw nb::value_error("block_scales: expected one number for 4, 8 or 16 groups");
}

BoundMatrix quantized(const Codes& codes, const AnyArray& scales, const std::optional<AnyArray>& biases, int bits,
                      int group_size, const std::optional<AnyArray>& block_scales,
                      const std::optional<AnyArray>& block_biases, int zero, bool iq4) {
    require(bits == 2 || bits == 3 || bits == 4 || bits == 5 || bits == 6 || bits == 8,
            "bits: expected 2, 3, 4, 5, 6 or 8, found " + std::to_string(bits));
    require(group_size == 32 || group_size == 64 || group_size == 128 || (group_size == 16 && bits == 6),
            "group_size: expected 32, 64 or 128, or 16 with 6 bits, found " + std::to_string(group_size));
    const size_t out = codes.shape(0), words = codes.shape(1), in = words * 32 / bits;
    require(out > 0 && words > 0 && words * 32 % bits == 0 && in % group_size == 0,
            "codes: " + shape_text(out, words) + " is no whole number of groups");
    require(!iq4 || (bits == 4 && group_size == 32), "iq4: expected 4 bits in groups of 32");
    require(zero >= 0 && zero <= 128, "zero: expected 0 to 128, found " + std::to_string(zero));
    const size_t groups = in / group_size;
    const Type type = block_scales ? Type::i8 : type_of(scales, "scales");
    Matrix m = {codes.data(), scales.data(), nullptr, int64_t(out), int64_t(in), bits, group_size, type};
    m.zero = zero, m.iq4 = iq4;
    BoundMatrix bound = {m, {nb::ndarray<nb::ro>(codes)}};
    // Points the matrix to numbers [out, columns] of a type, and keeps them.
    auto take = [&](const AnyArray& x, const char* name, Type expected, size_t columns) {
        bool right = expected == Type::i8 ? x.dtype() == nb::dtype<int8_t>() : type_of(x, name) == expected;
        require(right, std::string(name) + ": not the dtype that goes with the other arrays'");
        require_shape(x, name, out, columns);
        require_aligned(x, name);
        bound.arrays.push_back(nb::ndarray<nb::ro>(x));
        return x.data();
    };
    require_aligned(codes, "codes");
    bound.matrix.scales = take(scales, "scales", type, groups);
    if (biases) bound.matrix.biases = take(*biases, "biases", type, groups);
    require(bool(block_biases) == (block_scales && biases), "block_biases: expected with biases and block_scales");
    if (block_scales) {
        const size_t blocks = block_scales->shape(1);
        bound.matrix.block_shift = block_shift(groups, blocks);
        bound.matrix.block_scales =
            static_cast<const uint16_t*>(take(*block_scales, "block_scales", Type::f16, blocks));
        if (biases)
            bound.matrix.block_biases =
                static_cast<const uint16_t*>(take(*block_biases, "block_biases", Type::f16, blocks));
    }
    return bound;
}

BoundMatrix plain(const AnyArray& values) {
    require(values.size() > 0, "values: empty");
    require_aligned(values, "values");
    Matrix m = {values.data(), nullptr, nullptr, int64_t(values.shape(0)), int64_t(values.shape(1)), 0, 0,
                type_of(values, "values")};
    return {m, {nb::ndarray<nb::ro>(values)}};
}

size_t nbytes(const BoundMatrix& m) {
    size_t total = 0;
    for (auto& x : m.arrays) total += x.nbytes();
    return total;
}

// --- operations ------------------------------------------------------------------------------------------------------

void check_product(const Input& x, const Matrix& w, const Output& y) {
    require(x.shape(1) == size_t(w.in), "x: expected " + std::to_string(w.in) + " columns for a matrix " +
                                            shape_text(w.out, w.in) + ", found " + std::to_string(x.shape(1)));
    require_shape(y, "out", x.shape(0), w.out);
    require_aligned(y, "out");
}

void linear_one(const Input& x, const BoundMatrix& w, const Output& y) {
    require_aligned(x, "x");
    check_product(x, w.matrix, y);
    float* out = y.data();
    nb::gil_scoped_release release;
    linears(x.data(), x.shape(0), &w.matrix, 1, &out);
}

void linear_several(const Input& x, const nb::sequence& ws, const nb::sequence& outs) {
    const size_t count = nb::len(ws);
    require(count > 0 && nb::len(outs) == count, "outs: expected one for each matrix");
    require_aligned(x, "x");
    std::vector<Matrix> matrices;
    std::vector<float*> pointers;
    std::vector<Output> outputs;  // hold them while the GIL is released
    for (size_t i = 0; i < count; i++) {
        matrices.push_back(nb::cast<const BoundMatrix&>(ws[i]).matrix);
        outputs.push_back(nb::cast<Output>(outs[i], false));
        check_product(x, matrices[i], outputs[i]);
        pointers.push_back(outputs[i].data());
    }
    nb::gil_scoped_release release;
    linears(x.data(), x.shape(0), matrices.data(), int(count), pointers.data());
}

void embed_checked(const BoundMatrix& table, const Ids& ids, const Output& y) {
    require_shape(y, "out", ids.shape(0), table.matrix.in);
    require_aligned(y, "out");
    require_aligned(ids, "ids");
    for (size_t i = 0; i < ids.shape(0); i++)
        require(ids.data()[i] >= 0 && ids.data()[i] < table.matrix.out,
                "ids: " + std::to_string(ids.data()[i]) + " is no row of " + std::to_string(table.matrix.out));
    nb::gil_scoped_release release;
    embed(table.matrix, ids.data(), ids.shape(0), y.data());
}

nb::list isas() {
    nb::list names;
    for (int i = 0; i < isa_count; i++)
        if (auto isa = static_cast<Isa>(i); isa_supported(isa)) names.append(isa_name(isa));
    return names;
}

void set_threads(int threads) {
    require(threads >= 1 && threads <= 1024, "threads: expected 1 to 1024, found " + std::to_string(threads));
    set_thread_count(threads);
}

}  // namespace

void bind_linear(nb::module_& m) {
    nb::class_<BoundMatrix>(m, "Matrix", "A matrix [out, in] in the memory of the arrays that it is made of.")
        .def(nb::new_(&quantized), "codes"_a.noconvert(), "scales"_a.noconvert(),
             "biases"_a.noconvert().none(), "bits"_a, "group_size"_a, "block_scales"_a.noconvert() = nb::none(),
             "block_biases"_a.noconvert() = nb::none(), "zero"_a = 0, "iq4"_a = false,
             "Group-quantized, see edgeq.weights.QMatrix; scales and biases float32, float16 or uint16 (bfloat16), or "
             "int8 in units of block_scales and block_biases, float16.")
        .def(nb::new_(&plain), "values"_a.noconvert(), "Plain: float32, float16 or uint16 (bfloat16) [out, in].")
        .def_prop_ro("shape", [](const BoundMatrix& w) { return nb::make_tuple(w.matrix.out, w.matrix.in); })
        .def_prop_ro("bits", [](const BoundMatrix& w) { return w.matrix.bits; }, "0 for a plain matrix.")
        .def_prop_ro("nbytes", &nbytes, "What one token reads of it.");
    m.def("linear", &linear_one, "x"_a.noconvert(), "w"_a, "out"_a.noconvert(),
          "out = x @ w^T: x float32 [T, in], w Matrix [out, in], out float32 [T, out].");
    m.def("linears", &linear_several, "x"_a.noconvert(), "ws"_a, "outs"_a,
          "linear with several matrices of one input, quantizing it once and waking the threads once.");
    m.def("embed", &embed_checked, "table"_a, "ids"_a.noconvert(), "out"_a.noconvert(),
          "Rows of a matrix: ids int32 [T] -> out float32 [T, in].");
    m.def("isa", [] { return isa_name(active_isa()); },
          "The instruction set whose kernels run; RuntimeError if EDGEQ_ISA names none that is here.");
    m.def("isas", &isas, "The instruction sets that this build and machine have, slowest first.");
    m.def("set_isa", &set_isa, "name"_a, "Force an instruction set; RuntimeError where it is not to be had.");
    m.def("thread_count", &thread_count, "Threads that an operation may use.");
    m.def("set_thread_count", &set_threads, "threads"_a, "Set how many threads operations use, from the next one on.");
}
