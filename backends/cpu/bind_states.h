// States of DeltaNet layers: never changed once they are made, and sharing what they can. To Python a state is a tuple
// (conv, matrix) of StateArray objects, which become arrays when somebody wants to read them.
#pragma once

#include <memory>
#include <vector>

#include "bind_layers.h"

namespace edgeq {

// One layer's state: a matrix that was written at some time, the updates that it lacks, and the convolution's tail.
// What is native lies in blocks that many states may share.
struct DeltaMemory {
    struct Update {
        std::shared_ptr<Owned> memory;
        DeltaUpdate update;
    };

    Index Hk, Hv, K, V, C, before;  // before = width - 1 rows of the tail
    std::shared_ptr<Owned> matrix_memory, tail_memory;
    const float *matrix, *tail;
    std::vector<Update> lacks;

    // What the matrix is, lacking nothing.
    void write_matrix(float* to) const;
};

// A state's `conv` or `matrix`.
struct StateArray {
    std::shared_ptr<const DeltaMemory> memory;
    bool conv;

    std::vector<size_t> shape() const;
    nb::object array() const;  // a new one
};

// Tells a mixer's sequence its state before, and makes room for the keep + 1 after: a tuple of tuples `kind`. What
// Python objects the sequence uses, `arrays` and `states` hold.
nb::tuple take_state(const DeltaNet& net, DeltaSequence& s, nb::handle state, nb::handle kind, std::vector<In>& arrays,
                     std::vector<std::shared_ptr<const DeltaMemory>>& states);

}  // namespace edgeq
