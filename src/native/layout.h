// Where the parts of a packed weight lie. Shared by the packer and the kernels; docs/panels.md draws it.
//
// A panel is 16 rows. Along the columns it is a sequence of units, one per block of the file's format (32 or 256
// columns). A unit of a quantised format:
//
//   scale    [16] f16
//   min      [16] f16                       affine formats
//   scales   [blocks * 32 / group][16]      formats with 256 columns: small integers that `scale` multiplies; signed
//                                           bytes, unsigned in affine formats. Q2_K: scale | min << 4
//   mins     [blocks][16]                   Q4_K, Q5_K: the same for `min`
//   codes    [blocks][planes]               blocks of 32 columns
//
// A code is an unsigned integer of up to 8 bits. Step s of a block (columns 4 s .. 4 s + 3) is a vector of 64 bytes,
// byte 4 r + j for row r and column 4 s + j. A plane keeps `width` bits of each code: byte i of its vector v holds the
// steps v n .. v n + n - 1, n = 8 / width, the first in the lowest bits.
//
// value = scale (code - offset)           symmetric formats
// value = scale code + min                affine formats; min is negative in K formats, where the file stores -min
#pragma once

#include "panels.h"

namespace dapji {

// Part of a code: `width` bits that belong at bit `shift`; width 0: none.
struct Plane {
  int width, shift;
  constexpr int bytes() const { return 64 * width; }
};

struct Layout {
  Plane low, high;  // planes
  int offset;       // subtracted from codes
  int group;        // columns that share a scale: 32 or 16
  int blocks;       // blocks of 32 columns in a unit: 1 or 8
  bool affine;      // has mins
  bool levels;      // codes are indices into kLevels, and stand for kLevels[code] + 128

  constexpr int bits() const { return levels ? 8 : low.width + high.width; }
  constexpr bool nested() const { return blocks > 1; }
  constexpr int min_at() const { return 32; }
  constexpr int scales_at() const { return affine ? 64 : 32; }
  constexpr int n_scales() const { return nested() ? blocks * 32 / group : 0; }
  constexpr int mins_at() const { return scales_at() + 16 * n_scales(); }
  constexpr int n_mins() const { return nested() && affine && group == 32 ? blocks : 0; }
  constexpr int codes_at() const { return mins_at() + 16 * n_mins(); }
  constexpr int block_bytes() const { return low.bytes() + high.bytes(); }
  constexpr int unit_bytes() const { return codes_at() + blocks * block_bytes(); }
};

constexpr Layout layout(Format format) {
  switch (format) {
    case Format::Q4_0:
      return {{4, 0}, {0, 0}, 8, 32, 1, false, false};
    case Format::Q4_1:
      return {{4, 0}, {0, 0}, 0, 32, 1, true, false};
    case Format::Q5_0:
      return {{4, 0}, {1, 4}, 16, 32, 1, false, false};
    case Format::Q5_1:
      return {{4, 0}, {1, 4}, 0, 32, 1, true, false};
    case Format::Q8_0:
      return {{8, 0}, {0, 0}, 128, 32, 1, false, false};
    case Format::Q2_K:
      return {{2, 0}, {0, 0}, 0, 16, 8, true, false};
    case Format::Q3_K:
      return {{2, 0}, {1, 2}, 4, 16, 8, false, false};
    case Format::Q4_K:
      return {{4, 0}, {0, 0}, 0, 32, 8, true, false};
    case Format::Q5_K:
      return {{4, 0}, {1, 4}, 0, 32, 8, true, false};
    case Format::Q6_K:
      return {{4, 0}, {2, 4}, 32, 16, 8, false, false};
    case Format::IQ4_NL:
      return {{4, 0}, {0, 0}, 128, 32, 1, false, true};
    case Format::IQ4_XS:
      return {{4, 0}, {0, 0}, 128, 32, 8, false, true};
    case Format::F32:
    case Format::F16:
    case Format::BF16:
      break;
  }
  return {};
}

constexpr int float_bytes(Format format) { return format == Format::F32 ? 4 : 2; }

// What the 4-bit codes of IQ4_NL and IQ4_XS stand for.
constexpr int8_t kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

}  // namespace dapji
