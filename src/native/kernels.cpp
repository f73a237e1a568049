#include "kernels.h"

namespace dapji {

extern const Kernels kGeneric;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512Vnni;
#endif

const Kernels& kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return kAvx2;
    case Isa::avx512vnni:
      return kAvx512Vnni;
#else
    case Isa::avx2:
    case Isa::avx512vnni:
#endif
    case Isa::generic:
      break;
  }
  return kGeneric;
}

}  // namespace dapji
