// The kernels of AMX; see kernels.h. Compiled with AVX-512 VNNI's flags, so nothing else may be defined here.
#include "kernels.h"
#include "matmul_kernels.h"
#include "simd_amx.h"

namespace dapji {

extern const TileKernels kAmx;
const TileKernels kAmx = {
    Amx::tokens,
    linear_q<Amx>,
    [](std::int64_t rounds, std::int32_t*) {
      Amx::start_tiles(64);
      for (std::int64_t round = 0; round < rounds; ++round) Amx::multiply_registers();
      Amx::end_tiles();
      return static_cast<double>(rounds) * 4 * 16 * 16 * 64 * 2;
    },
};

}  // namespace dapji
