#include "kernels.h"

namespace dapji {

extern const Kernels kGeneric;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512Vnni;
#if defined(DAPJI_AMX)
extern const TileKernels kAmx;

static Kernels with_amx() {
  Kernels all = kAvx512Vnni;
  all.machine.dots = kAmx.dots;
  all.matmul.many_tile = kAmx.tile;
  all.matmul.linear_q = [](const PanelsView& w, const Quantized& x, std::int64_t tokens, std::int64_t p0,
                           std::int64_t p1, float* y, std::size_t ldy, const Epilogue& epilogue, void* scratch) {
    const auto linear_q = tokens <= kFew ? kAvx512Vnni.matmul.linear_q : kAmx.linear_q;
    linear_q(w, x, tokens, p0, p1, y, ldy, epilogue, scratch);
  };
  return all;
}
#endif
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
#if defined(DAPJI_AMX)
    case Isa::amx: {
      static const Kernels all = with_amx();
      return all;
    }
#endif
#elif defined(__aarch64__)
    case Isa::neon:
      return kNeon;
#endif
    default:
      return kGeneric;
  }
}

}  // namespace dapji
