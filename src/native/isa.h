// Instruction sets: which ones this build contains, which the processor has, which one to use.
#pragma once

namespace dapji {

enum class Isa : int { generic, avx2, avx512vnni, amx, neon };  // of one processor, the better one later
constexpr int kIsas = 5;

const char* isa_name(Isa isa);

/// Whether this build contains kernels for `isa` and the processor (and the operating system) can run them.
bool isa_available(Isa isa);

/// The best available one, or what the environment variable DAPJI_ISA names.
/// Throws std::invalid_argument where DAPJI_ISA names an unknown or unavailable one.
Isa choose_isa();

/// By name; throws std::invalid_argument as above.
Isa parse_isa(const char* name);

}  // namespace dapji
