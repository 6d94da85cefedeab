// One sum at a time, in plain C++. The reference for the other files.
#include "layers/isa/scalar-inl.h"

namespace edgeq {
namespace {

using Code = int16_t;
using I = int32_t;
constexpr int step = 2, vectors = 4;

struct Pair {
    int16_t low, high;
};

inline I i_zero() { return 0; }
inline I i_add(I x, I y) { return x + y; }
inline V i_float(I x) { return float(x); }
inline Pair load_codes(const Code* p) { return {p[0], p[1]}; }
inline Pair spread_codes(const Code* p) { return {p[0], p[1]}; }
inline I dot_codes(I sum, Pair x, Pair y) { return sum + x.low * y.low + x.high * y.high; }
// To the nearest, ties to even, as vectors do; what is no number becomes 0.
inline Code rounded(V x) { return x == x ? Code(__builtin_rintf(x)) : Code(0); }
inline I store_codes(Code* p, V x) { return *p = rounded(x); }
inline void store_steps(Code* p, const V* x) { p[0] = rounded(x[0]), p[1] = rounded(x[1]); }
inline V fraction(V x) { return x - __builtin_floorf(x); }
inline V scale2(V x, V exponent) { return mul(x, pow2(__builtin_floorf(max_of(-126.0f, exponent)))); }
void transpose_steps(const Code* from, Index, Code* to, Index) { to[0] = from[0], to[1] = from[1]; }

}  // namespace
}  // namespace edgeq

#define VISION vision_scalar
#include "vision/vision-inl.h"
