// Instruction sets: which ones this program was built with, which ones this machine has, and which one runs.
//
// Every family of kernels keeps one table of function pointers per instruction set (kernels/kernels.h,
// layers/...) and picks its row with active_isa().
#pragma once

namespace edgeq {

enum class Isa { scalar, avx2, avxvnni, avx512vnni, neon, neon_dotprod, neon_i8mm };

constexpr int isa_count = 7;

const char* isa_name(Isa isa);

// Built in, and this machine (with its operating system) can run it.
bool isa_supported(Isa isa);

// The best supported set, or the one that EDGEQ_ISA names. Throws std::runtime_error where that is unknown or
// not supported, and names the choices.
Isa active_isa();

// Forces one by its name, as EDGEQ_ISA does; for tests and comparisons, while no kernel runs.
void set_isa(const char* name);

}  // namespace edgeq
