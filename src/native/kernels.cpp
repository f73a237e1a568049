#include "kernels.h"

namespace dapji {

extern const Kernels kGeneric;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512Vnni;
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif

const Kernels& kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return kAvx2;
    case Isa::avx512vnni:
      return kAvx512Vnni;
#elif defined(__aarch64__)
    case Isa::neon:
      return kNeon;
#endif
    default:
      return kGeneric;
  }
}

}  // namespace dapji
