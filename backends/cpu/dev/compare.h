// What the test programs of vectors share: random numbers, and every instruction set of this machine against scalar.
// NMSE = sum of squared differences over sum of squares.
#pragma once

#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

#include "kernels/isa.h"

namespace edgeq {

using Vector = std::vector<float>;

inline int failures = 0;
inline std::mt19937 generator(7);

inline Vector normal(long long n, float scale = 1.0f) {
    std::normal_distribution<float> distribution(0.0f, scale);
    Vector x(n);
    for (float& v : x) v = distribution(generator);
    return x;
}

inline void check(bool right, const char* what, const char* isa, double nmse) {
    if (right) return;
    failures++;
    std::printf("FAILED %s: %s, NMSE %g\n", isa, what, nmse);
}

// Runs `compute` under every instruction set; it returns what is to be compared. `bound` is asked under each of them.
template <class Bound>
void compare(const char* what, Bound bound, const std::function<Vector()>& compute) {
    set_isa("scalar");
    const Vector expected = compute();
    for (int i = 1; i < isa_count; i++) {
        const Isa isa = static_cast<Isa>(i);
        if (!isa_supported(isa)) continue;
        set_isa(isa_name(isa));
        const Vector found = compute();
        double error = 0, power = 0;
        for (size_t j = 0; j < expected.size(); j++) {
            error += std::pow(double(expected[j]) - found[j], 2);
            power += std::pow(double(expected[j]), 2);
        }
        check(error <= bound() * power, what, isa_name(isa), error / power);
    }
}

inline void compare(const char* what, double bound, const std::function<Vector()>& compute) {
    compare(what, [bound] { return bound; }, compute);
}

}  // namespace edgeq
