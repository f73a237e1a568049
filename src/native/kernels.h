// The table of kernels of each instruction set. Each kernels_<isa>.cpp compiles the same templates with its own flags.
#pragma once

#include "attention.h"
#include "isa.h"
#include "matmul.h"

namespace dapji {

struct Kernels {
  MatmulKernels matmul;
  RowKernels rows;  // row_kernels<S>() of attention.h
};

/// The kernels of `isa`, which must be available.
const Kernels& kernels(Isa isa);

}  // namespace dapji
