// Matrices, instruction sets and threads.
#include "bind_linear.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels/isa.h"
#include "kernels/linear.h"
#include "kernels/threads.h"

using namespace nanobind::literals;
using namespace edgeq;

namespace {

using AnyArray = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Input = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// --- the matrix ------------------------------------------------------------------------------------------------------

// The number type of an array; uint16 is bfloat16, as everywhere in edgeq.
Type type_of(const AnyArray& x, const char* name) {
    if (x.dtype() == nb::dtype<float>()) return Type::f32;
    if (x.dtype() == nb::dtype<uint16_t>()) return Type::bf16;
    if (x.dtype() == nb::dlpack::dtype{uint8_t(nb::dlpack::dtype_code::Float), 16, 1}) return Type::f16;
    refuse_type(name, "float32, float16 or uint16 (bfloat16)");
}

// How many groups share one of `blocks` float16 units, as a shift.
int block_shift(Index groups, Index blocks) {
    for (int shift : {2, 3, 4})
        if (groups >> shift == blocks && groups % (1 << shift) == 0) return shift;
    refuse("block_scales", "one number for 4, 8 or 16 groups");
}

Mode mode_of(const std::string& name) {
    if (name == "affine") return Mode::affine;
    if (name == "iq4") return Mode::iq4;
    if (name == "mxfp4" || name == "nvfp4") return Mode::fp4;
    if (name == "mxfp8") return Mode::fp8;
    refuse("mode", "affine, iq4, mxfp4, nvfp4 or mxfp8, found " + name);
}

const char* mode_name(const BoundMatrix& w) {
    switch (w.matrix.mode) {
        case Mode::affine: return "affine";
        case Mode::iq4: return "iq4";
        case Mode::fp4: return w.matrix.type == Type::e8m0 ? "mxfp4" : "nvfp4";
        case Mode::fp8: return "mxfp8";
    }
    return nullptr;
}

void require_sizes(const std::string& mode, int bits, int group_size) {
    require(bits == 2 || bits == 3 || bits == 4 || bits == 5 || bits == 6 || bits == 8, "bits", "2, 3, 4, 5, 6 or 8",
            bits);
    const bool in_sixteens = bits == 2 || bits == 3 || bits == 6 || mode == "nvfp4";
    require(group_size == 32 || group_size == 64 || group_size == 128 || (group_size == 16 && in_sixteens),
            "group_size", "32, 64 or 128, or 16 with 2, 3 or 6 bits", group_size);
    if (mode == "affine") return;
    const int table_bits = mode == "mxfp8" ? 8 : 4, table_group = mode == "nvfp4" ? 16 : 32;
    const std::string sizes = std::to_string(table_bits) + " bits in groups of " + std::to_string(table_group);
    require(bits == table_bits && group_size == table_group, mode.c_str(), sizes.c_str());
}

bool of_bytes(const AnyArray& x) { return x.dtype() == nb::dtype<uint8_t>(); }

// The type of scales, whose dtype follows from it where they are not float.
Type scale_type(const AnyArray& scales, const std::string& mode, bool blocks) {
    if (mode == "nvfp4") return Type::e4m3;
    if (mode == "mxfp4" || mode == "mxfp8") return Type::e8m0;
    if (blocks) return of_bytes(scales) ? Type::u4 : Type::i8;
    return type_of(scales, "scales");
}

bool holds(const AnyArray& x, const char* name, Type type) {
    if (type == Type::i8) return x.dtype() == nb::dtype<int8_t>();
    if (type == Type::u4 || type == Type::e8m0 || type == Type::e4m3) return of_bytes(x);
    return type_of(x, name) == type;
}

BoundMatrix quantized(const Codes& codes, const AnyArray& scales, const std::optional<AnyArray>& biases, int bits,
                      int group_size, const std::optional<AnyArray>& block_scales,
                      const std::optional<AnyArray>& block_biases, int zero, const std::string& mode) {
    const Mode kind = mode_of(mode);
    require_sizes(mode, bits, group_size);
    const Index out = codes.shape(0), words = codes.shape(1);
    const bool whole = entries({out, words, 32}) > 0 && words * 32 % bits == 0 && words * 32 / bits % group_size == 0;
    if (!whole) refuse("codes", "rows that are whole groups, found " + text({out, words}));
    require(zero >= 0 && zero <= 128, "zero", "0 to 128", zero);
    const Index in = words * 32 / bits;
    const Index groups = in / group_size;
    const Type type = scale_type(scales, mode, bool(block_scales));
    Matrix m = {codes.data(), scales.data(), nullptr, out, in, bits, group_size, type};
    require(kind == Mode::affine || (zero == 0 && !biases), mode.c_str(), "no biases and no zero");
    require(type != Type::u4 || !biases, "biases", "none beside scales of uint8");
    require(!block_scales || (type != Type::e8m0 && type != Type::e4m3), "block_scales", "none in this mode");
    m.mode = kind, m.zero = zero + table_zero(kind);
    BoundMatrix bound = {m, {nb::ndarray<nb::ro>(codes)}};
    // Points the matrix to numbers [out, columns] of a type, and keeps them.
    auto take = [&](const AnyArray& x, const char* name, Type expected, Index columns) {
        require(holds(x, name, expected), name, "the dtype that goes with the other arrays'");
        require_shape(x, name, {out, columns});
        require_aligned(x, name);
        bound.arrays.push_back(nb::ndarray<nb::ro>(x));
        return x.data();
    };
    require_aligned(codes, "codes");
    bound.matrix.scales = take(scales, "scales", type, groups);
    if (biases) bound.matrix.biases = take(*biases, "biases", type, groups);
    if (type == Type::u4) bound.matrix.biases = bound.matrix.scales;
    require(bool(block_biases) == (block_scales && bound.matrix.biases), "block_biases",
            "with biases and block_scales");
    if (block_scales) {
        const Index blocks = block_scales->shape(1);
        bound.matrix.block_shift = block_shift(groups, blocks);
        bound.matrix.block_scales =
            static_cast<const uint16_t*>(take(*block_scales, "block_scales", Type::f16, blocks));
        if (block_biases)
            bound.matrix.block_biases =
                static_cast<const uint16_t*>(take(*block_biases, "block_biases", Type::f16, blocks));
    }
    return bound;
}

BoundMatrix plain(const AnyArray& values) {
    require(entries({Index(values.shape(0)), Index(values.shape(1))}) > 0, "values", "at least one number");
    require_aligned(values, "values");
    const Index out = values.shape(0), in = values.shape(1);
    const Matrix m = {values.data(), nullptr, nullptr, out, in, 0, 0, type_of(values, "values")};
    return {m, {nb::ndarray<nb::ro>(values)}};
}

size_t nbytes(const BoundMatrix& m) {
    size_t total = 0;
    for (auto& x : m.arrays) total += x.nbytes();
    return total;
}

nb::tuple arrays_of(const BoundMatrix& w) {
    auto next = w.arrays.begin();
    auto taken = [&](bool there) -> nb::object {
        return there ? nb::cast(nb::ndarray<nb::numpy, nb::ro>(*next++)) : nb::none();
    };
    if (!w.matrix.bits) return nb::make_tuple(taken(true));
    nb::object codes = taken(true), scales = taken(true);
    nb::object biases = taken(w.matrix.biases && w.matrix.biases != w.matrix.scales);
    nb::object block_scales = taken(w.matrix.block_scales);
    return nb::make_tuple(codes, scales, biases, block_scales, taken(w.matrix.block_biases));
}

// --- operations ------------------------------------------------------------------------------------------------------

void check_product(const Input& x, const Matrix& w, const Output& y) {
    if (Index(x.shape(1)) != w.in)
        refuse("x", std::to_string(w.in) + " columns for a matrix " + text({w.out, w.in}) + ", found " + shape_of(x));
    require_shape(y, "out", {Index(x.shape(0)), w.out});
    require_aligned(y, "out");
}

void linear_one(const Input& x, const BoundMatrix& w, const Output& y) {
    require_aligned(x, "x");
    check_product(x, w.matrix, y);
    float* out = y.data();
    nb::gil_scoped_release release;
    linears(x.data(), x.shape(0), &w.matrix, 1, &out);
}

bool read_out_(const Input& x, const BoundMatrix& w, const Output& y) {
    require_aligned(x, "x");
    check_product(x, w.matrix, y);
    nb::gil_scoped_release release;
    return read_out(x.data(), x.shape(0), w.matrix, y.data());
}

void linear_several(const Input& x, nb::handle ws, nb::handle outs) {
    const nb::tuple weights = items_of(ws, "ws", "a list of matrices");
    const Index count = nb::len(weights);
    require(count > 0, "ws", "at least one matrix");
    const nb::tuple results = items_of(outs, "outs", "one array for each matrix", count);
    require_aligned(x, "x");
    std::vector<BoundMatrix> held;
    std::vector<Matrix> matrices;
    std::vector<Output> outputs;
    std::vector<float*> pointers;
    for (Index i = 0; i < count; i++) {
        held.push_back(matrix_of(weights[i], "ws"));
        matrices.push_back(held.back().matrix);
        outputs.push_back(item<Output>(results[i], "outs", "writable contiguous float32 arrays [T, out]"));
        check_product(x, matrices.back(), outputs.back());
        pointers.push_back(outputs.back().data());
    }
    nb::gil_scoped_release release;
    linears(x.data(), x.shape(0), matrices.data(), int(count), pointers.data());
}

void embed_checked(const BoundMatrix& table, const Ids& ids, const Output& y) {
    const Index count = ids.shape(0);
    require_shape(y, "out", {count, table.matrix.in});
    require_aligned(y, "out");
    require_aligned(ids, "ids");
    const std::vector<int32_t> rows(ids.data(), ids.data() + count);  // which nobody changes once they are checked
    for (int32_t row : rows)
        if (row < 0 || row >= table.matrix.out)
            refuse("ids", "0 to " + std::to_string(table.matrix.out - 1) + ", found " + std::to_string(row));
    nb::gil_scoped_release release;
    embed(table.matrix, rows.data(), count, y.data());
}

nb::list isas() {
    nb::list names;
    for (int i = 0; i < isa_count; i++)
        if (auto isa = static_cast<Isa>(i); isa_supported(isa)) names.append(isa_name(isa));
    return names;
}

void set_threads(int threads) {
    require(threads >= 1 && threads <= 1024, "threads", "1 to 1024", threads);
    set_thread_count(threads);
}

}  // namespace

void bind_linear(nb::module_& m) {
    nb::class_<BoundMatrix>(m, "Matrix", "A matrix [out, in] in the memory of the arrays that it is made of.")
        .def(nb::new_(&quantized), "codes"_a.noconvert(), "scales"_a.noconvert(), "biases"_a.noconvert().none(),
             "bits"_a, "group_size"_a, "block_scales"_a.noconvert() = nb::none(),
             "block_biases"_a.noconvert() = nb::none(), "zero"_a = 0, "mode"_a = "affine",
             "Group-quantized, see edgeq.weights.QMatrix; scales and biases float32, float16 or uint16 (bfloat16), or "
             "int8 in units of block_scales and block_biases, float16; or both in scales of uint8, in such units; or "
             "scales of uint8 in the modes that have such.")
        .def(nb::new_(&plain), "values"_a.noconvert(), "Plain: float32, float16 or uint16 (bfloat16) [out, in].")
        .def_prop_ro("shape", [](const BoundMatrix& w) { return nb::make_tuple(w.matrix.out, w.matrix.in); })
        .def_prop_ro(
            "bits", [](const BoundMatrix& w) { return w.matrix.bits; }, "0 for a plain matrix.")
        .def_prop_ro(
            "group_size", [](const BoundMatrix& w) { return w.matrix.group; }, "0 for a plain matrix.")
        .def_prop_ro("zero", [](const BoundMatrix& w) { return w.matrix.zero - table_zero(w.matrix.mode); })
        .def_prop_ro("mode", &mode_name)
        .def_prop_ro("arrays", &arrays_of,
                     "What it is made of: (values,), or codes, scales, biases, block_scales and block_biases, None for "
                     "what is not there.")
        .def_prop_ro("nbytes", &nbytes, "What one token reads of it.");
    m.def("linear", &linear_one, "x"_a.noconvert(), "w"_a, "out"_a.noconvert(),
          "out = x @ w^T: x float32 [T, in], w Matrix [out, in], out float32 [T, out].");
    m.def("read_out", &read_out_, "x"_a.noconvert(), "w"_a, "out"_a.noconvert(),
          "The same, and whether all of out is finite.");
    m.def("linears", &linear_several, "x"_a.noconvert(), "ws"_a, "outs"_a,
          "linear with several matrices of one input, quantizing it once and waking the threads once.");
    m.def("embed", &embed_checked, "table"_a, "ids"_a.noconvert(), "out"_a.noconvert(),
          "Rows of a matrix: ids int32 [T] -> out float32 [T, in].");
    m.def(
        "isa", [] { return isa_name(active_isa()); },
        "The instruction set whose kernels run; RuntimeError if EDGEQ_ISA names none that is here.");
    m.def("isas", &isas, "The instruction sets that this build and machine have, slowest first.");
    m.def("set_isa", &set_isa, "name"_a, "Force an instruction set; RuntimeError where it is not to be had.");
    m.def("thread_count", &thread_count, "Threads that an operation may use.");
    m.def("start_threads", &start_threads, nb::call_guard<nb::gil_scoped_release>(),
          "Start them; how many there are, which is fewer than asked for where the system gives no more.");
    m.def("set_thread_count", &set_threads, "threads"_a, "Set how many threads operations use, from the next one on.");
}
