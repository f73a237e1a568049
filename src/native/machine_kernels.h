// What measures the limits of a processor, written once over a Simd struct. Included by kernels_<isa>.cpp alone.
#pragma once

#include "kernels.h"

namespace dapji {

template <class S>
constexpr MachineKernels machine_kernels() {
  using I = typename S::I;
  return {
      [](const std::uint8_t* data, std::size_t bytes) {
        I sums[8];
        for (I& sum : sums) sum = S::set_int(0);
        for (std::size_t at = 0; at < bytes; at += 8 * 64) {
          __builtin_prefetch(data + at + 4096);
          for (int i = 0; i < 8; ++i) sums[i] = S::max_int(sums[i], S::load_int(data + at + 64 * i));
        }
        for (int i = 1; i < 8; ++i) sums[0] = S::max_int(sums[0], sums[i]);
        return S::max_int(sums[0]);
      },
      [](std::int64_t rounds, std::int32_t* sink) {
        constexpr int chains = S::isa == Isa::avx512vnni ? 12 : S::isa == Isa::avx2 ? 5 : S::isa == Isa::neon ? 6 : 1;
        const I weights = S::set_int(0x01020304), activations = S::set_int(sink[0] | 0x04030201);
        I sums[chains];
        for (I& sum : sums) sum = S::set_int(0);
        for (std::int64_t round = 0; round < rounds; ++round) {
          for (int i = 0; i < chains; ++i) {
            if constexpr (S::has_dot) {
              sums[i] = S::dot(sums[i], weights, activations);
            } else {
              sums[i] = S::add16(sums[i], S::dot16(weights, S::add16(activations, sums[i])));
            }
          }
        }
        for (int i = 1; i < chains; ++i) sums[0] = S::max_int(sums[0], sums[i]);
        sink[0] = S::max_int(sums[0]);
        return static_cast<double>(rounds) * chains * 64 * 2;
      },
  };
}

}  // namespace dapji
