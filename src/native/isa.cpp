#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace dapji {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return "generic";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512vnni:
      return "avx512vnni";
    case Isa::neon:
      return "neon";
  }
  return "";
}

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return true;
#if defined(__x86_64__)
    // The compiler's run time also asks whether the operating system saves the wide registers.
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512vnni:
      return isa_available(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni");
#else
    case Isa::avx2:
    case Isa::avx512vnni:
      return false;
#endif
    case Isa::neon:
#if defined(__aarch64__) && defined(__linux__)
      return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
      return true;  // every Mac with such a processor
#else
      return false;
#endif
  }
  return false;
}

Isa parse_isa(const char* name) {
  std::string available;
  for (int i = 0; i < kIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_available(isa)) continue;
    if (std::strcmp(isa_name(isa), name) == 0) return isa;
    available += std::string(available.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument(std::string("instruction set ") + name +
                              " is unknown or missing here; available: " + available);
}

Isa choose_isa() {
  if (const char* const name = std::getenv("DAPJI_ISA"); name && *name) return parse_isa(name);
  for (int i = kIsas - 1; i > 0; --i) {
    if (isa_available(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
  return Isa::generic;
}

}  // namespace dapji
