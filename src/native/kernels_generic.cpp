// The kernels in plain C++; see kernels.h. Compiled with that instruction set's flags, so nothing else may be defined here.
#include "kernels.h"
#include "machine_kernels.h"
#include "matmul_kernels.h"
#include "simd_generic.h"

namespace dapji {

extern const Kernels kGeneric;
const Kernels kGeneric = {matmul_kernels<Generic>(), row_kernels<Generic>(), machine_kernels<Generic>()};

}  // namespace dapji
