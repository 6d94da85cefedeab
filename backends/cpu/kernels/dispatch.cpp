#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/isa.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace edgeq {
namespace {

constexpr const char* names[isa_count] = {"scalar", "avx2",         "avxvnni",  "avx512vnni",
                                          "neon",   "neon_dotprod", "neon_i8mm"};

#if defined(__x86_64__)

// The compiler's run-time checks include the operating system's (XGETBV).
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avxvnni() {
    unsigned eax = 7, ebx, ecx = 1, edx;  // GCC 12 knows no "avxvnni": CPUID leaf 7, subleaf 1, EAX bit 4
    __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    return has_avx2() && (eax >> 4 & 1);
}

bool has_avx512vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

#elif defined(__aarch64__) && defined(__linux__)

bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }

bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1); }

#elif defined(__aarch64__) && defined(__APPLE__)

bool has_feature(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}

bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }

bool has_i8mm() { return has_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM"); }

#endif

Isa parse(const char* name) {
    std::string choices;
    for (int i = 0; i < isa_count; i++) {
        Isa isa = static_cast<Isa>(i);
        if (std::strcmp(names[i], name) == 0) {
            if (isa_supported(isa)) return isa;
            throw std::runtime_error(std::string("EDGEQ_ISA: this machine or build has no ") + name);
        }
        if (isa_supported(isa)) choices += std::string(choices.empty() ? "" : ", ") + names[i];
    }
    throw std::runtime_error(std::string("EDGEQ_ISA: unknown instruction set '") + name + "'; here: " + choices);
}

Isa choose() {
    if (const char* forced = std::getenv("EDGEQ_ISA"); forced && *forced) return parse(forced);
    int best = isa_count - 1;
    while (!isa_supported(static_cast<Isa>(best))) best--;
    return static_cast<Isa>(best);
}

std::atomic<int> active{-1};

}  // namespace

const char* isa_name(Isa isa) { return names[static_cast<int>(isa)]; }

bool isa_supported(Isa isa) {
    switch (isa) {
        case Isa::scalar: return true;
#if defined(__x86_64__)
        case Isa::avx2: return has_avx2();
        case Isa::avxvnni: return has_avxvnni();
        case Isa::avx512vnni: return has_avx512vnni();
#elif defined(__aarch64__) && (defined(__linux__) || defined(__APPLE__))
        case Isa::neon: return true;
        case Isa::neon_dotprod: return has_dotprod();
        case Isa::neon_i8mm: return has_i8mm();
#endif
        default: return false;
    }
}

Isa active_isa() {
    int isa = active.load(std::memory_order_relaxed);
    if (isa < 0) active = isa = static_cast<int>(choose());
    return static_cast<Isa>(isa);
}

void set_isa(const char* name) { active = static_cast<int>(parse(name)); }

}  // namespace edgeq
