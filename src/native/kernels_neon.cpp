// The kernels of NEON with dot products; see kernels.h. Compiled with that instruction set's flags, so nothing else may
// be defined here.
#include "kernels.h"
#include "machine_kernels.h"
#include "matmul_kernels.h"
#include "simd_neon.h"

namespace dapji {

extern const Kernels kNeon;
const Kernels kNeon = {matmul_kernels<Neon>(), row_kernels<Neon>(), machine_kernels<Neon>()};

}  // namespace dapji
