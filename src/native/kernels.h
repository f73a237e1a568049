// The table of kernels of each instruction set. Each kernels_<isa>.cpp compiles the same templates with its own flags.
#pragma once

#include "attention.h"
#include "isa.h"
#include "matmul.h"

namespace dapji {

// What measures the machine's limits; see machine.h.
struct MachineKernels {
  /// Reads every byte of [data, data + bytes); bytes a multiple of 512.
  std::int32_t (*read)(const std::uint8_t* data, std::size_t bytes);
  /// Integer dot products of the kind that linear_q uses, from registers alone. Returns the operations done.
  double (*dots)(std::int64_t rounds, std::int32_t* sink);
};

struct Kernels {
  MatmulKernels matmul;
  RowKernels rows;
  MachineKernels machine;
};

/// What a matrix unit does instead of the vectors beside it: products of many tokens.
struct TileKernels {
  int tile;
  decltype(MatmulKernels::linear_q) linear_q;
  decltype(MachineKernels::dots) dots;
};

/// The kernels of `isa`, which must be available.
const Kernels& kernels(Isa isa);

}  // namespace dapji
