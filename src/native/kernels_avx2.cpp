// The kernels of AVX2; see kernels.h. Compiled with that instruction set's flags, so nothing else may be defined here.
#include "kernels.h"
#include "machine_kernels.h"
#include "matmul_kernels.h"
#include "simd_avx2.h"

namespace dapji {

extern const Kernels kAvx2;
const Kernels kAvx2 = {matmul_kernels<Avx2>(), row_kernels<Avx2>(), machine_kernels<Avx2>()};

}  // namespace dapji
