// Native twin of edgeq.quant.search: the same float32 operations in the same order, so the same bits.
//
// Sixteen groups are searched side by side, one in each lane: x is transposed to [group_size][LANES] and every
// sum runs over the elements one after the other. Floating-point contraction must be off (see CMakeLists.txt).

#include "kernels/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

// Only this file's hot loop profits from wider registers than the baseline's; no FMA, so the results stay the same.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define EDGEQ_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EDGEQ_WIDE
#endif

namespace edgeq {
namespace {

constexpr int LANES = 16;
constexpr int MAX_GROUP = 128;
constexpr int STRETCHES = 13;
constexpr int ANCHORS = 5;
constexpr int DESCENTS = 2;
constexpr int NEIGHBOUR_ROUNDS = 2;
constexpr float MIN_SCALE = 1e-7f;
constexpr int MAX_EXPONENT = 100;

using Lanes = float[LANES];

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Round to `dropped` fewer bits of significand, ties to even; no thought of exponent limits.
float round_significand(float x, int dropped) {
    const uint32_t bits = bits_of(x);
    const uint32_t half = (1u << (dropped - 1)) - 1;
    return float_of((bits + half + ((bits >> dropped) & 1)) & ~((1u << dropped) - 1));
}

float round_stored(float x, Stored stored) {
    if (stored == Stored::float32 || !std::isfinite(x)) return x;
    if (stored == Stored::bfloat16) return round_significand(x, 16);
    if (std::fabs(x) < 0x1p-14f) return std::nearbyint(x * 0x1p24f) * 0x1p-24f;  // subnormal float16
    const float rounded = round_significand(x, 13);
    return std::fabs(rounded) > 65504.0f ? std::copysign(std::numeric_limits<float>::infinity(), x) : rounded;
}

// What one pass over the weights yields for every lane, given inverse scale, scale and bias.
struct Sums {
    Lanes error, q, qq, xq;
};

// Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even, for |v| < 2^22.
constexpr float ROUNDER = 12582912.0f;

inline float code(float x, float bias, float inverse, float levels) {
    float v = (x - bias) * inverse;
    v = v > 0.0f ? v : 0.0f;
    v = v < levels ? v : levels;
    return (v + ROUNDER) - ROUNDER;
}

EDGEQ_WIDE void pass(const float (*x)[LANES], int size, const float* inverse, const float* scale, const float* bias,
                     float levels, Sums& out) {
    Lanes error{}, sum_q{}, sum_qq{}, sum_xq{};
    for (int i = 0; i < size; ++i) {
        for (int l = 0; l < LANES; ++l) {
            const float q = code(x[i][l], bias[l], inverse[l], levels);
            const float difference = (scale[l] * q + bias[l]) - x[i][l];
            error[l] += difference * difference;
            sum_q[l] += q;
            sum_qq[l] += q * q;
            sum_xq[l] += x[i][l] * q;
        }
    }
    std::memcpy(out.error, error, sizeof error);
    std::memcpy(out.q, sum_q, sizeof sum_q);
    std::memcpy(out.qq, sum_qq, sizeof sum_qq);
    std::memcpy(out.xq, sum_xq, sizeof sum_xq);
}

struct Pair {
    Lanes scale, bias;
};

class Search {
public:
    Search(int bits, int group_size, Stored stored)
        : levels_(static_cast<float>((1 << bits) - 1)), size_(group_size), stored_(stored) {}

    // Quantize LANES groups of `size` weights, group l starting at groups[l].
    void run(const float* const* groups) {
        load(groups);
        Pair pair;
        Lanes error;
        min_max(pair);
        step(pair, error);
        for (int i = 0; i < STRETCHES; ++i) {
            const double stretch = -1 + 0.625 * i;
            descend(static_cast<float>(1 / (static_cast<double>(levels_) + stretch)));
        }
        for (int i = 0; i < NEIGHBOUR_ROUNDS; ++i) try_neighbours();
    }

    float scale(int lane) const { return scale_[lane] * unit_[lane]; }
    float bias(int lane) const { return bias_[lane] * unit_[lane]; }
    float error(int lane) const { return error_[lane] * unit_[lane] * unit_[lane]; }

    // The codes of lane's group, one byte each.
    void codes(int lane, uint8_t* out) const {
        const float inverse = reciprocal(scale_[lane]);
        for (int i = 0; i < size_; ++i) out[i] = static_cast<uint8_t>(code(x_[i][lane], bias_[lane], inverse, levels_));
    }

private:
    static float reciprocal(float scale) { return scale != 0.0f ? 1.0f / scale : 0.0f; }

    void load(const float* const* groups) {
        for (int l = 0; l < LANES; ++l) {
            float largest = 0.0f;
            for (int i = 0; i < size_; ++i) largest = std::max(largest, std::fabs(groups[l][i]));
            int exponent;
            std::frexp(largest, &exponent);
            exponent = std::clamp(exponent, -MAX_EXPONENT, MAX_EXPONENT);
            unit_[l] = std::ldexp(1.0f, exponent);
            const float shrink = std::ldexp(1.0f, -exponent);
            float sum = 0.0f;
            low_[l] = std::numeric_limits<float>::infinity();
            high_[l] = -low_[l];
            for (int i = 0; i < size_; ++i) {
                const float x = groups[l][i] * shrink;
                x_[i][l] = x;
                sum = i == 0 ? x : sum + x;
                low_[l] = std::min(low_[l], x);
                high_[l] = std::max(high_[l], x);
            }
            sum_[l] = sum;
            error_[l] = std::numeric_limits<float>::infinity();
            scale_[l] = bias_[l] = 0.0f;
        }
    }

    // The rule of mx.quantize: the larger extreme and zero are met exactly.
    void min_max(Pair& out) const {
        for (int l = 0; l < LANES; ++l) {
            float scale = std::max((high_[l] - low_[l]) / levels_, MIN_SCALE / unit_[l]);
            const bool from_low = std::fabs(low_[l]) > std::fabs(high_[l]);
            scale = from_low ? scale : -scale;
            const float edge = from_low ? low_[l] : high_[l];
            const float steps = std::nearbyint(edge / scale);
            out.scale[l] = steps != 0.0f ? edge / steps : scale;
            out.bias[l] = steps != 0.0f ? edge : 0.0f;
        }
    }

    // Try a candidate: `error` is its error; `pair` becomes the least-squares fit to its codes.
    void step(Pair& pair, Lanes& error) {
        Lanes inverse;
        for (int l = 0; l < LANES; ++l) {
            pair.scale[l] = round_stored(pair.scale[l] * unit_[l], stored_) / unit_[l];
            pair.bias[l] = round_stored(pair.bias[l] * unit_[l], stored_) / unit_[l];
            inverse[l] = reciprocal(pair.scale[l]);
        }
        Sums sums;
        pass(x_, size_, inverse, pair.scale, pair.bias, levels_, sums);
        const float size = static_cast<float>(size_);
        for (int l = 0; l < LANES; ++l) {
            error[l] = sums.error[l];
            if (sums.error[l] < error_[l]) {
                error_[l] = sums.error[l];
                scale_[l] = pair.scale[l];
                bias_[l] = pair.bias[l];
            }
            const float determinant = size * sums.qq[l] - sums.q[l] * sums.q[l];
            if (determinant > 0.0f) pair.scale[l] = (size * sums.xq[l] - sum_[l] * sums.q[l]) / determinant;
            pair.bias[l] = (sum_[l] - pair.scale[l] * sums.q[l]) / size;
        }
    }

    // From the best start grid with scale = range * shrink, alternate between codes and least squares.
    void descend(float shrink) {
        Pair best{}, start;
        Lanes best_error{}, error;
        for (int a = 0; a < ANCHORS; ++a) {
            for (int l = 0; l < LANES; ++l) {
                const float span = high_[l] - low_[l];
                start.scale[l] = span * shrink;
                start.bias[l] = low_[l] + (span - start.scale[l] * levels_) * (0.25f * static_cast<float>(a));
            }
            step(start, error);
            for (int l = 0; l < LANES; ++l) {
                if (a != 0 && !(error[l] < best_error[l])) continue;
                best_error[l] = error[l];
                best.scale[l] = start.scale[l];
                best.bias[l] = start.bias[l];
            }
        }
        for (int i = 0; i < DESCENTS; ++i) step(best, error);
    }

    // Move the best scale and bias by one unit in the last place of what is stored.
    void try_neighbours() {
        const double nudge = 1.2 * (stored_ == Stored::bfloat16 ? 0x1p-8 : 0x1p-11);
        const float factors[3] = {static_cast<float>(1 - nudge), 1.0f, static_cast<float>(1 + nudge)};
        Pair centre;
        std::memcpy(centre.scale, scale_, sizeof scale_);
        std::memcpy(centre.bias, bias_, sizeof bias_);
        for (int i = 0; i < 3; ++i) {
            for (int j = 0; j < 3; ++j) {
                if (i == 1 && j == 1) continue;
                Pair pair;
                Lanes error;
                for (int l = 0; l < LANES; ++l) {
                    pair.scale[l] = centre.scale[l] * factors[i];
                    pair.bias[l] = centre.bias[l] * factors[j];
                }
                step(pair, error);
            }
        }
    }

    float levels_;
    int size_;
    Stored stored_;
    alignas(64) float x_[MAX_GROUP][LANES];
    Lanes low_, high_, sum_, unit_, error_, scale_, bias_;
};

// Append `count` codes (a multiple of 32) to a little-endian bit stream.
void pack(const uint8_t* codes, int count, int bits, uint32_t* words) {
    uint64_t pending = 0;
    int held = 0;
    for (int i = 0; i < count; ++i) {
        pending |= static_cast<uint64_t>(codes[i]) << held;
        held += bits;
        if (held >= 32) {
            *words++ = static_cast<uint32_t>(pending);
            pending >>= 32;
            held -= 32;
        }
    }
}

}  // namespace

void quantize(const QuantizeShape& shape, const float* x, uint32_t* words, float* scales, float* biases,
              float* errors) {
    const int64_t groups = shape.rows * (shape.columns / shape.group_size);
    const int group_words = shape.group_size * shape.bits / 32;
    Search search(shape.bits, shape.group_size, shape.stored);
    uint8_t codes[MAX_GROUP];
    for (int64_t g = 0; g < groups; g += LANES) {
        const float* starts[LANES];  // the last group fills up the lanes if need be
        for (int l = 0; l < LANES; ++l) starts[l] = x + std::min(g + l, groups - 1) * shape.group_size;
        search.run(starts);
        for (int l = 0; l < LANES && g + l < groups; ++l) {
            scales[g + l] = search.scale(l);
            biases[g + l] = search.bias(l);
            errors[g + l] = search.error(l);
            search.codes(l, codes);
            pack(codes, shape.group_size, shape.bits, words + (g + l) * group_words);
        }
    }
}

}  // namespace edgeq
