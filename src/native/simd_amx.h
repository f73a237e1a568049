// Simd for AMX, the matrix unit of Intel's servers: AVX-512 VNNI and tiles of 16 tokens x 16 rows. For many tokens alone.
//
// The instructions are written out: gcc's own functions for them (up to 12 at least) do not tell the compiler that they
// read memory, so that what was stored before could be left out.
#pragma once

#include "simd_avx512.h"

namespace dapji {

struct Amx : Avx512Vnni {
  static constexpr Isa isa = Isa::amx;
  static constexpr int rows = 2, tokens = 16;
  static constexpr bool signed_codes = true, has_tiles = true;

  // Before multiply_tile, for blocks of 16 or 32 columns; end_tiles gives the unit back.
  static DAPJI_INLINE void start_tiles(int columns) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, unused[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (const int sums : {0, 3, 4, 5}) {
      shape.rows[sums] = 16;
      shape.row_bytes[sums] = 64;
    }
    shape.rows[1] = 16;
    shape.row_bytes[1] = static_cast<uint16_t>(columns);
    shape.rows[2] = static_cast<uint8_t>(columns / 4);
    shape.row_bytes[2] = 64;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  static DAPJI_INLINE void end_tiles() { asm volatile("tilerelease" ::: "memory"); }

  // products [16 tokens][16 rows] = x [16 tokens][columns], tokens 32 bytes apart, times codes [columns / 4][16 rows][4].
  static DAPJI_INLINE void multiply_tile(const int8_t* x, const uint8_t* codes, int32_t* products) {
    const int64_t token = 32, vector = 64;
    asm volatile(
        "tilezero %%tmm0\n\t"
        "tileloadd (%0,%3,1), %%tmm1\n\t"
        "tileloadd (%1,%4,1), %%tmm2\n\t"
        "tdpbssd %%tmm2, %%tmm1, %%tmm0\n\t"
        "tilestored %%tmm0, (%2,%4,1)"
        :
        : "r"(x), "r"(codes), "r"(products), "r"(token), "r"(vector)
        : "memory");
  }

  // Four independent products, after start_tiles(64), of whatever is in the unit: what it can do at most.
  static DAPJI_INLINE void multiply_registers() {
    asm volatile(
        "tdpbssd %tmm2, %tmm1, %tmm0\n\t"
        "tdpbssd %tmm2, %tmm1, %tmm3\n\t"
        "tdpbssd %tmm2, %tmm1, %tmm4\n\t"
        "tdpbssd %tmm2, %tmm1, %tmm5");
  }
};

}  // namespace dapji
