// States of DeltaNet layers on their way between Python and the mixers.
#include "bind_states.h"

#include "kernels/linear.h"

using namespace nanobind::literals;
using namespace edgeq;

namespace edgeq {
namespace {

nb::object array_out(float* data, const std::vector<size_t>& shape, const nb::capsule& owner) {
    return nb::cast(nb::ndarray<nb::numpy, float>(data, shape.size(), shape.data(), owner));
}

nb::object new_array(std::shared_ptr<const DeltaMemory> memory, bool conv) {
    nb::object made = nb::inst_alloc(nb::type<StateArray>());
    new (nb::inst_ptr<StateArray>(made)) StateArray{std::move(memory), conv};
    nb::inst_mark_ready(made);
    return made;
}

// Sizes of blocks are few, so that those of one call fit the next.
Index rounded(Index tokens) {
    Index n = tokens ? 1 : 0;
    while (n < tokens) n *= 2;
    return n;
}

// A part of a state as somebody has made it: an array, or taken from another state.
const float* part(nb::handle of, const char* name, std::initializer_list<Index> shape, std::vector<In>& arrays) {
    nb::object array = nb::borrow(of);
    if (StateArray* lazy; nb::try_cast<StateArray*>(of, lazy, false) && lazy) array = lazy->array();
    arrays.push_back(item<In>(array, name, "a float32 array"));
    require_shape(arrays.back(), name, shape);
    require_contiguous(arrays.back(), name);
    return arrays.back().data();
}

// The state before: itself, where it is one of ours.
std::shared_ptr<const DeltaMemory> state_in(const DeltaNet& net, nb::handle state, std::vector<In>& arrays) {
    const nb::tuple parts = items_of(state, "states", "(conv, matrix)", 2);
    StateArray *conv = nullptr, *matrix = nullptr;
    const bool ours = nb::try_cast<StateArray*>(parts[0], conv, false) && conv && conv->conv &&
                      nb::try_cast<StateArray*>(parts[1], matrix, false) && matrix && !matrix->conv &&
                      conv->memory == matrix->memory;
    if (ours) {
        const DeltaMemory& m = *conv->memory;
        require(m.Hk == net.Hk && m.Hv == net.Hv && m.K == net.K && m.V == net.V && m.C == net.channels() &&
                    m.before == net.width - 1,
                "states", "those of this layer");
        return conv->memory;
    }
    DeltaMemory m{net.Hk, net.Hv, net.K, net.V, net.channels(), net.width - 1, {}, {}, nullptr, nullptr, {}};
    m.tail = part(parts[0], "conv", {m.before, m.C}, arrays);
    m.matrix = part(parts[1], "matrix", {m.Hv, m.V, m.K}, arrays);
    return std::make_shared<const DeltaMemory>(std::move(m));
}

std::shared_ptr<Owned> new_block(Index floats) { return std::make_shared<Owned>(floats * sizeof(float)); }

float* floats_of(const std::shared_ptr<Owned>& memory) { return reinterpret_cast<float*>(memory->block.data); }

}  // namespace

void DeltaMemory::write_matrix(float* to) const {
    DeltaSequence s{};
    s.state = matrix;
    for (const Update& u : lacks) s.pending.push_back(u.update);
    nb::gil_scoped_release release;
    apply_updates(Hk, Hv, K, V, s, to);
}

std::vector<size_t> StateArray::shape() const {
    const DeltaMemory& m = *memory;
    if (conv) return {size_t(m.before), size_t(m.C)};
    return {size_t(m.Hv), size_t(m.V), size_t(m.K)};
}

nb::object StateArray::array() const {
    const DeltaMemory& m = *memory;
    const Index size = conv ? m.before * m.C : m.Hv * m.V * m.K;
    const auto [data, owner] = owned_block(size * sizeof(float));
    float* to = reinterpret_cast<float*>(data);
    if (conv)
        std::memcpy(to, m.tail, size * sizeof(float));
    else
        m.write_matrix(to);
    return array_out(to, shape(), owner);
}

nb::tuple take_state(const DeltaNet& net, DeltaSequence& s, nb::handle state, nb::handle kind, std::vector<In>& arrays,
                     std::vector<std::shared_ptr<const DeltaMemory>>& states) {
    const std::shared_ptr<const DeltaMemory> old = state_in(net, state, arrays);
    states.push_back(old);
    s.tail = old->tail, s.state = old->matrix;
    for (const auto& u : old->lacks) s.pending.push_back(u.update);

    const Index before = net.width - 1, C = net.channels();
    std::vector<std::shared_ptr<Owned>> matrices;
    for (Index i = 0; i < states_written(s.keep); i++) {
        matrices.push_back(new_block(entries({net.Hv, net.V, net.K})));
        s.states_after.push_back(floats_of(matrices.back()));
    }
    const Index k_size = net.Hk * net.K, d_size = net.Hv * net.V, update_size = k_size + d_size + net.Hv;
    const Index room = rounded(s.keep), window_size = entries({before + room, C});
    const auto memory = new_block(window_size + entries({room, update_size}));
    s.window = floats_of(memory);
    for (Index i = 0; i < s.keep; i++) {
        float* at = s.window + window_size + i * update_size;
        s.updates.push_back({at, at + k_size, at + k_size + d_size});
    }

    nb::list after;
    for (Index i = 0; i <= s.keep; i++) {
        DeltaMemory m{net.Hk, net.Hv, net.K, net.V, C, before, {}, memory, nullptr, s.window + i * C, {}};
        const Index of = i ? (i - 1) / delta_most : 0;  // the last that was written before
        m.matrix_memory = matrices[of], m.matrix = s.states_after[of];
        for (Index u = of * delta_most; u < i; u++) m.lacks.push_back({memory, s.updates[u]});
        auto shared = std::make_shared<const DeltaMemory>(std::move(m));
        nb::tuple parts = nb::make_tuple(new_array(shared, true), new_array(shared, false));
        after.append(nb::handle(reinterpret_cast<PyObject*>(&PyTuple_Type)).attr("__new__")(kind, parts));
    }
    return nb::tuple(after);
}

}  // namespace edgeq

namespace {

nb::object as_array(const StateArray& x, nb::object dtype, nb::object copy) {
    if (copy.is(nb::handle(Py_False))) refuse("copy", "None or True: a state is written out into a new array");
    nb::object made = x.array();
    return dtype.is_none() ? made : made.attr("astype")(dtype, "copy"_a = false);
}

nb::tuple shape_tuple(const StateArray& x) {
    const DeltaMemory& m = *x.memory;
    return x.conv ? nb::make_tuple(m.before, m.C) : nb::make_tuple(m.Hv, m.V, m.K);
}

// What else an array has; protocols, which ask for names like __array_struct__, are given __array__ alone.
nb::object attribute_of(const StateArray& x, const char* name) {
    if (std::string(name).rfind("__", 0) == 0) throw nb::attribute_error(name);
    return x.array().attr(name);
}

// Pieces of memory that it holds: what tells one from others, and its bytes.
nb::list memory_of(const StateArray& x) {
    nb::list pieces;
    const DeltaMemory& m = *x.memory;
    auto piece = [&](const std::shared_ptr<Owned>& owned) {
        if (owned) pieces.append(nb::make_tuple(reinterpret_cast<uintptr_t>(owned.get()), owned->nbytes));
    };
    if (x.conv) return piece(m.tail_memory), pieces;
    piece(m.matrix_memory);
    for (const auto& u : m.lacks) piece(u.memory);
    return pieces;
}

}  // namespace

void bind_states(nb::module_& m) {
    nb::class_<StateArray> array(
        m, "StateArray",
        "The float32 conv or matrix of a DeltaNet layer's state, as an array: each time that somebody reads it, it is "
        "written out into a new one.");
    array.def_prop_ro("shape", &shape_tuple)
        .def("memory", &memory_of,
             "Pieces of memory that it holds, shared with other states: what tells each from others, and its bytes.")
        .def("__array__", &as_array, "dtype"_a = nb::none(), "copy"_a = nb::none())
        .def("__len__", [](const StateArray& x) { return x.shape()[0]; })
        .def("__getattr__", &attribute_of);
    for (const char* name :
         {"__getitem__", "__iter__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__add__", "__radd__",
          "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__pow__", "__neg__", "__abs__"})
        array.def(name, [name](const StateArray& x, nb::args with) { return x.array().attr(name)(*with); });
    array.attr("__hash__") = nb::none();
}
