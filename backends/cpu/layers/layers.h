// Everything of the seam that is no matrix product: one table of kernels per instruction set, and the two mixers that
// are built from them.
//
// The kernels are plain functions over rows of float32; they know nothing of threads. Their bodies are written once
// (layers-inl.h) over a handful of vector operations that each instruction set defines (isa/NAME-inl.h). Float sums run
// in a different order from set to set, so results agree within the bounds of tests/test_native_layers.py, not bit by
// bit. The specification is backends/numpy.
#pragma once

#include <cstdint>
#include <vector>

namespace edgeq {

using Index = long long;

// --- the cache of keys and values ------------------------------------------------------------------------------------
//
// A page holds `kv_page` tokens of all KV heads: first the keys, then the values, each [heads, kv_page, width] entries,
// width being the head's rounded up to kv_tile. Values are stored like that. Keys are stored in tiles of kv_tile
// tokens, [heads, kv_page / kv_tile, width, kv_tile]: the scores of a tile are sums over the width of whole vectors
// of tokens, without a horizontal sum.
//
// int8 entries are multiples of a scale of their token and head, whose largest entry is 127 of it; the scales follow
// the entries, float32 [heads, kv_page] for keys and then for values. A key's scale multiplies its score and a value's
// its weight, so the sums run over the plain integers.
//
// int4 entries are of the rotated vector (see LayerKernels::rotate): queries are rotated like keys, which leaves their
// products as they are, and the weighted sum of values is rotated back. kv_group entries share a float16 scale, an
// eighth of the one farthest from zero, which becomes -8. The page is that of an int8 cache of half the width: byte i
// of a group holds entry i and, in the upper half, entry i + kv_group / 2, both plus 8. The scales follow, float16
// [heads, groups, kv_page] for keys and then for values.

enum class KvType { f16, bf16, f32, int8, int4 };

constexpr int kv_page = 256;
constexpr int kv_tile = 16;
constexpr int kv_group = 32;

static inline Index kv_width(KvType type, Index dim) {
    const Index multiple = type == KvType::int4 ? kv_group : kv_tile;
    return (dim + multiple - 1) / multiple * multiple;
}

// What a page holds of a vector `width` entries wide: numbers of kv_size bytes; an int4 pair is one.
static inline Index kv_row(KvType type, Index width) { return type == KvType::int4 ? width / 2 : width; }
static inline Index kv_size(KvType type) {
    return type == KvType::f32 ? 4 : type == KvType::int8 || type == KvType::int4 ? 1 : 2;
}

// Bytes of a page's entries, of one head's scales for keys or for values, and of the whole page.
static inline Index kv_entries_nbytes(KvType type, Index heads, Index dim) {
    return 2 * heads * kv_page * kv_row(type, kv_width(type, dim)) * kv_size(type);
}
static inline Index kv_scales_nbytes(KvType type, Index dim) {
    if (type == KvType::int8) return kv_page * Index(sizeof(float));
    return type == KvType::int4 ? kv_width(type, dim) / kv_group * kv_page * Index(sizeof(uint16_t)) : 0;
}
static inline Index kv_page_nbytes(KvType type, Index heads, Index dim) {
    return kv_entries_nbytes(type, heads, dim) + 2 * heads * kv_scales_nbytes(type, dim);
}

// What some rows have summed of their softmax over some keys.
struct Sums {
    float* peak;   // [rows], largest score
    float* total;  // [rows], sum of exp(score - peak)
    float* out;    // [rows, width], sum of exp(score - peak) * value
};

// Some queries that share a KV head, over part of its keys. Rows do not influence each other, and a key that a row does
// not see adds nothing, not even a rounding.
struct Attend {
    KvType type;
    Index rows, width;            // rows is a multiple of attend_rows, width one of kv_tile (int4: kv_group)
    const float* q;               // [rows, width], already scaled by D^-0.5 (int4: and rotated), zero beyond the head's
                                  // width
    const Index* visible;         // [rows], how many keys (from the first of the sequence) each row may see
    const uint8_t* const* pages;  // of the sequence
    Index keys, values;           // where this head's begin in a page, in bytes
    Index key_scales, value_scales;  // likewise: float32 [kv_page] for int8, float16 [groups, kv_page] for int4
    Index begin, end;                // the keys to attend to; begin is a multiple of attend_keys
    Index follow;                    // up to here other calls go on after this one: end, or more
    Sums sums;                       // the result; a row that sees none of the keys has the total 0
    float* scores;                   // [rows, attend_keys] to work in
};

constexpr int attend_rows = 4;     // query rows at a time
constexpr int attend_keys = 64;    // keys at a time; divides kv_page
constexpr float no_peak = -1e30f;  // less than any score

// Two tokens of the delta rule, or the last one. Unrolled, with decays e1, e2 and the state S before them:
//
//     d1 = beta1 (v1 - e1 S k1)                                o1 = e1 S q1 + d1 (q1 . k1)
//     d2 = beta2 (v2 - e1 e2 S k2 - e2 d1 (k1 . k2))           o2 = e1 e2 S q2 + e2 d1 (q2 . k1) + d2 (q2 . k2)
//     S <- e1 e2 S + e2 d1 k1^T + d2 k2^T
//
// so that S is read once and written once for both, and only the small numbers d wait for one another. Even the product
// e1 e2 S is put off: what is stored is S / c, and c takes the decays up until it becomes small or the chunk ends.
struct DeltaStep {
    float beta[2];
    float decay[2];        // c e1, c e1 e2: makes the stored state the decayed one
    float own[2];          // q1 . k1, q2 . k2
    float recall, answer;  // e2 (k1 . k2), e2 (q2 . k1)
    float through;         // multiplies the stored state now; 1, or c e1 e2, after which c = 1
    float lift[2];         // e2 / c, 1 / c with the new c (for a single token 1 / c, -)
};

// The tokens of one chunk of the delta rule, one value head.
struct DeltaChunk {
    Index tokens, K;
    const float* q;  // [tokens, K], unit length times K^-0.5
    const float* k;  // [tokens, K], unit length
    const float* v;  // [tokens, v_stride]
    Index v_stride;
    float* o;  // [tokens, o_stride]
    Index o_stride;
    const DeltaStep* steps;  // one for two tokens
};

// What some tokens do to a state, one after another: S <- decay S + d k^T for each. First come the updates of tokens
// before, whose d is known and which the state lacks, then tokens that answer: d = beta (v - decay S k) and
// o = decay S q + d (q . k) of the state S before them. However the tokens are spread over calls and whatever the state
// lacks, every number is the same, to the bit.
struct DeltaSteps {
    Index K, before, tokens;
    const float* const* k;  // [before + tokens], each [K] and of unit length
    float* const* d;        // [before + tokens], each [rows]; the tokens' are written
    const float* decay;     // [before + tokens]
    const float* q;         // [tokens, K], unit length times K^-0.5
    const float* v;         // [tokens, v_stride]
    Index v_stride;
    float* o;  // [tokens, o_stride]
    Index o_stride;
    const float *beta, *own;  // [tokens]; own = q . k
    Index written;            // the state after so many of the tokens is wanted in `to`, or -1
    float* room;              // [delta_tile, K] to work in
};

constexpr Index delta_tile = 16;  // rows of a state that are worked on at a time
// Entries of a state that `delta_steps` asks memory for in advance; the caller asks for the first.
constexpr Index delta_ahead = 4096;
// Updates that a state may lack, and tokens that `delta_steps` is given, at most.
constexpr Index delta_most = 32;

constexpr Index conv_widest = 8;  // taps of the causal convolution in one pass; Qwen3.5 has 4

struct LayerKernels {
    // y = x + z
    void (*add)(float* y, const float* x, const float* z, Index n);
    // y = silu(gate) * up
    void (*silu_mul)(float* y, const float* gate, const float* up, Index n);
    // y = x * sigmoid(gate)
    void (*sigmoid_mul)(float* y, const float* x, const float* gate, Index n);
    // y = x / sqrt(mean(x^2) + eps) * gain, and times silu(gate) where there is a gate
    void (*rms_norm)(float* y, const float* x, const float* gain, const float* gate, Index n, float eps);
    // y = x / sqrt(sum(x^2) + eps) * scale
    void (*l2_norm)(float* y, const float* x, Index n, float eps, float scale);
    float (*dot)(const float* x, const float* y, Index n);
    // Pairs (i, i + pairs) turned by the angle; the rest of the n entries copied. y may be x.
    void (*rope)(float* y, const float* x, const float* cos, const float* sin, Index pairs, Index n);
    // silu of the causal convolution for tokens [t0, t1) and n channels. Token t is x + t * x_stride; before token 0
    // comes the tail [width - 1] rows of t_stride. w is [n, width], y the rows of [t0, t1).
    void (*conv_silu)(float* y, Index y_stride, const float* x, Index x_stride, const float* tail, Index t_stride,
                      const float* w, Index width, Index t0, Index t1, Index n);
    // Move `rows` rows of a state [rows, K] on by the chunk: from -> to, which may be the same.
    void (*delta)(float* to, const float* from, Index rows, const DeltaChunk& chunk);
    // The same token by token; `to` takes the state that is wanted.
    void (*delta_steps)(float* to, const float* from, Index rows, const DeltaSteps& steps);
    void (*attend)(const Attend& a);
    // Add the sums over more keys, `more`, to those over the keys before them, `all`. Before any keys the peak is
    // no_peak and the rest zero. A row that saw none of the keys stays as it is.
    void (*merge)(const Sums& all, const Sums& more, Index rows, Index width);
    // The orthonormal Walsh-Hadamard transform of x [n], in blocks of the largest power of two that divides n
    // (Qwen3.5's heads are one block of 256). It is its own inverse. A single large entry becomes many small ones, so
    // that 4 bits need not span what few channels reach (Ashkboos et al., "QuaRot", arXiv:2404.00456).
    void (*rotate)(float* x, Index n);
    void (*to_f16)(uint16_t* y, const float* x, Index n);  // nearest, ties to even; beyond +-65504 becomes that
};

extern const LayerKernels layers_scalar, layers_avx2, layers_avx512, layers_neon;

// The table of the active instruction set.
const LayerKernels& layer_kernels();

// --- the mixers, between their projections ---------------------------------------------------------------------------

// A matrix whose rows lie `stride` floats apart.
template <class T>
struct Rows {
    T* data = nullptr;
    Index stride = 0;
    T* operator[](Index row) const { return data + row * stride; }
};

// What a token did to the states of all heads: S <- decay S + d k^T.
struct DeltaUpdate {
    float *k, *d, *decay;  // [Hk, K], [Hv, V], [Hv]
};

// One sequence of a DeltaNet layer. Whole states are dear: 18 of the 0.8B's layers are 19 MB, the updates of a token
// 0.3 MB. So a state is one that was written at some time, and the updates since.
struct DeltaSequence {
    Index tokens, keep;
    const float* tail;                 // [width - 1, C]
    const float* state;                // [Hv, V, K]
    std::vector<DeltaUpdate> pending;  // which it lacks, at most delta_most
    // [width - 1 + keep, C]: a window of the inputs, of which width - 1 rows from row i on are the tail after all but
    // the last keep - i tokens.
    float* window;
    std::vector<float*> states_after;  // after all but the last keep tokens, delta_most tokens later, and so on
    std::vector<DeltaUpdate> updates;  // of the last keep tokens
};

// How many states a sequence writes.
static inline Index states_written(Index keep) { return keep ? 1 + (keep - 1) / delta_most : 1; }

// to [Hv, V, K] <- the state with all that it lacks; of the sequence only what comes in is read.
void apply_updates(Index Hk, Index Hv, Index K, Index V, const DeltaSequence& sequence, float* to);

struct DeltaNet {
    Index Hk, Hv, K, V, width;
    Rows<const float> qkv, z, b, a;          // [T, C], [T, Hv * V], [T, Hv], [T, Hv] with C = 2 * Hk * K + Hv * V
    const float *conv, *A, *dt_bias, *norm;  // [C, width], [Hv], [Hv], [V]
    float eps;
    Rows<float> out;  // [T, Hv * V]

    Index channels() const { return 2 * Hk * K + Hv * V; }
};

// Convolution, SiLU, normalisation, gates, delta rule and gated norm of all heads, in one parallel_for.
void delta_net(const DeltaNet& net, const std::vector<DeltaSequence>& sequences);

// The delta rule alone, of one sequence whose q, k [T, Hk * K] are normalised, with gates g, beta [T, Hv].
struct DeltaRule {
    Index Hk, Hv, K, V;
    Rows<const float> q, k, v, g, beta;
    Rows<float> out;
};
void delta_rule(const DeltaRule& rule, const DeltaSequence& sequence);

// One sequence of an attention layer: its pages have room for past + tokens.
struct KvSequence {
    Index tokens, past;
    std::vector<uint8_t*> pages;
};

// Vectors of every token and head.
struct Heads {
    const float* data = nullptr;
    Index stride = 0, head_stride = 0;
    const float* at(Index token, Index head) const { return data + token * stride + head * head_stride; }
};

struct Attention {
    Index Hq, Hkv, D;
    KvType type;
    Heads q, k, v;
    Heads gate;                    // or without data: out *= sigmoid(gate)
    const float *q_norm, *k_norm;  // gains [D], or null: q and k come normalised and rotated
    float eps;
    const float *cos, *sin;  // [T, pairs], or null
    Index pairs;
    float* out;  // [T, Hq, D]
};

// Norm and rotate, append to the pages, attend causally with scale D^-0.5, and gate.
void attention(const Attention& a, const std::vector<KvSequence>& sequences);

// Appending alone: keys and values of rows start ... start + s.tokens - 1.
void append_kv(const Attention& a, const KvSequence& s, Index start);

// Cosines and sines of interleaved mRoPE times `factor`, each [T, pairs]: a frequency follows the time, or the height
// or the width where its number modulo 3 is 1 or 2 and less than 3 * sections[1] or [2]. Position of token t on an
// axis: positions[axis * axis_stride + t * stride].
void rope_angles(const int32_t* positions, Index axis_stride, Index stride, Index T, const float* frequencies,
                 float factor, const int* sections, Index pairs, float* cos, float* sin);

// The first `tokens` tokens of a page as float32 keys and values, each [tokens, heads, D].
void read_page(const uint8_t* page, KvType type, Index heads, Index D, Index tokens, float* keys, float* values);

// Copy the first `tokens` tokens of a page into another.
void copy_tokens(const uint8_t* from, uint8_t* to, KvType type, Index heads, Index D, Index tokens);

}  // namespace edgeq
