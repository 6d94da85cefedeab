// Armv8.6 integer matrix products: Apple M2 and later, Neoverse N2.
#include "kernels/kernels.h"

namespace edgeq {
namespace {
constexpr bool signed_bytes = false;  // usdot and usmmla multiply unsigned by signed
constexpr int row_bytes = 8;
}  // namespace
}  // namespace edgeq

#include "kernels/isa/neon-inl.h"

namespace edgeq {
namespace {

I dot(I acc, B w, B a) { return vdotq_s32(acc, w, a); }
I dot8(I acc, B w, B a) { return vusdotq_s32(acc, vreinterpretq_u8_s8(w), a); }
I dot_apart(I acc, B w, B a) { return dot(acc, w, a); }

// 8 codes each of two rows times 8 of two tokens: usmmla gives all four sums. Tokens go in pairs, the last one alone if
// it must; at the end the sums of a token are gathered from those of its rows' pairs.
template <int bits, int tokens>
EDGEQ_INLINE void dot_group(const uint8_t* codes, int distance, const int8_t* q, int64_t stride, int group,
                            I (*d)[tokens]) {
    constexpr int pairs = (tokens + 1) / 2;
    I sums[row_vectors][2][pairs];
    for (int v = 0; v < row_vectors; v++)
        for (int p = 0; p < pairs; p++) sums[v][0][p] = sums[v][1][p] = i_zero();
    for (int k = 0; k < group; k += 16) {
        B x[2][pairs];  // the first and the last 8 codes of both tokens
        for (int p = 0; p < pairs; p++) {
            const int64x2_t a = vreinterpretq_s64_s8(b_load(q + 2 * p * stride + k));
            const int64x2_t b = 2 * p + 1 < tokens ? vreinterpretq_s64_s8(b_load(q + (2 * p + 1) * stride + k)) : a;
            x[0][p] = vreinterpretq_s8_s64(vtrn1q_s64(a, b));
            x[1][p] = vreinterpretq_s8_s64(vtrn2q_s64(a, b));
        }
        for (int half = 0; half < 2; half++) {
            for (int v = 0; v < row_vectors; v++) {
                for (int r = 0; r < 2; r++) {
                    const uint8x16_t w = vld1q_u8(codes + v * distance + (k + 8 * half) * lanes + 16 * r);
                    for (int p = 0; p < pairs; p++) sums[v][r][p] = vusmmlaq_s32(sums[v][r][p], w, x[half][p]);
                }
            }
        }
    }
    for (int v = 0; v < row_vectors; v++) {
        for (int t = 0; t < tokens; t++) {
            const I low = sums[v][0][t / 2], high = sums[v][1][t / 2];
            d[v][t] = vaddq_s32(d[v][t], t % 2 ? vuzp2q_s32(low, high) : vuzp1q_s32(low, high));
        }
    }
}

}  // namespace
}  // namespace edgeq

#include "kernels/linear-inl.h"

const edgeq::LinearKernels edgeq::linear_neon_i8mm = {quantize, gemv, gemm, tile_rows};
