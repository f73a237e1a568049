#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(DAPJI_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dapji {

#if defined(DAPJI_AMX)
// Whether there are tiles of bytes and Linux lets this process use them: their registers are so large that it wants to be
// asked (arch_prctl, ARCH_REQ_XCOMP_PERM for the state XTILEDATA).
static bool request_amx() {
  unsigned a, b, c, d;
  constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tile) && (d & int8) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#endif

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return "generic";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512vnni:
      return "avx512vnni";
    case Isa::amx:
      return "amx";
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
    case Isa::amx: {
#if defined(DAPJI_AMX)
      static const bool granted = isa_available(Isa::avx512vnni) && request_amx();
      return granted;
#else
      return false;
#endif
    }
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
