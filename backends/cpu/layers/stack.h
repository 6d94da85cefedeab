// The larger pieces of the model with their projections, and whole decoder layers one after another. What lies between
// the projections stays in memory of the calling thread.
#pragma once

#include <functional>
#include <variant>
#include <vector>

#include "kernels/kernels.h"
#include "layers/layers.h"

namespace edgeq {

// SwiGLU: gate, up [intermediate, hidden], down [hidden, intermediate].
struct FeedForward {
    Matrix gate, up, down;
};

// Gated DeltaNet; `between` has the sizes, vectors and eps of what lies between the projections.
struct DeltaNetMixer {
    Matrix qkv, z, b, a, out;
    DeltaNet between;
    std::vector<DeltaSequence> sequences;
};

// Gated attention; rows of q are [query | gate] for each head in turn. `between` as above, and with the angles.
struct AttentionMixer {
    Matrix q, k, v, out;
    Attention between;
    std::vector<KvSequence> sequences;
};

struct DecoderLayer {
    const float *input_norm, *post_norm;  // gains [hidden]
    std::variant<DeltaNetMixer, AttentionMixer> mixer;
    FeedForward mlp;
};

// x [T, hidden] -> y [T, hidden], which may be x.
void run_mlp(const FeedForward& mlp, const float* x, Index T, float* y);
void run_mixer(const DeltaNetMixer& mixer, const float* x, Index T, float* y);
void run_mixer(const AttentionMixer& mixer, const float* x, Index T, float* y);

// Frees what of it the calling thread has kept.
void release_workspace();

// x [T, hidden] through the layers, in place: x += mixer(norm(x)), x += mlp(norm(x)). After every layer `go_on` may
// stop it; then the result is false and x worth nothing.
bool run_layers(const std::vector<DecoderLayer>& layers, Index T, Index hidden, float eps, float* x,
                const std::function<bool()>& go_on);

}  // namespace edgeq
