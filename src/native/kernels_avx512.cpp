// The kernels of AVX-512 VNNI; see kernels.h. Compiled with that instruction set's flags, so nothing else may be defined here.
#include "kernels.h"
#include "machine_kernels.h"
#include "matmul_kernels.h"
#include "simd_avx512.h"

namespace dapji {

extern const Kernels kAvx512Vnni;
const Kernels kAvx512Vnni = {matmul_kernels<Avx512Vnni>(), row_kernels<Avx512Vnni>(), machine_kernels<Avx512Vnni>()};

}  // namespace dapji
