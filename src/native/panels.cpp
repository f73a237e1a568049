#include "panels.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "layout.h"
#include "simd_generic.h"

namespace dapji {

namespace {

constexpr FormatInfo info(const char* name, Format format, int block, int block_bytes) {
  const bool is_float = format <= Format::BF16;
  return {name, block, block_bytes, is_float ? 16 * float_bytes(format) : layout(format).unit_bytes()};
}

constexpr FormatInfo kInfo[kFormats] = {
    info("F32", Format::F32, 1, 4),           info("F16", Format::F16, 1, 2),
    info("BF16", Format::BF16, 1, 2),         info("Q4_0", Format::Q4_0, 32, 18),
    info("Q4_1", Format::Q4_1, 32, 20),       info("Q5_0", Format::Q5_0, 32, 22),
    info("Q5_1", Format::Q5_1, 32, 24),       info("Q8_0", Format::Q8_0, 32, 34),
    info("Q2_K", Format::Q2_K, 256, 84),      info("Q3_K", Format::Q3_K, 256, 110),
    info("Q4_K", Format::Q4_K, 256, 144),     info("Q5_K", Format::Q5_K, 256, 176),
    info("Q6_K", Format::Q6_K, 256, 210),     info("IQ4_NL", Format::IQ4_NL, 32, 18),
    info("IQ4_XS", Format::IQ4_XS, 256, 136),
};

// One block of one row as the file has it, taken apart.
struct Parts {
  uint8_t codes[256];
  uint8_t scales[16];  // as layout.h says
  uint8_t mins[8];
  uint8_t scale[2], min[2];  // f16
};

// Fields of `width` bits, `run` bytes at a time: the lowest of each byte, then the next. Added to out at bit `shift`.
template <int width, int run>
DAPJI_INLINE void fields(const uint8_t* data, int bytes, uint8_t* out, int shift = 0) {
  for (int start = 0; start < bytes; start += run) {
    for (int bit = 0; bit < 8; bit += width) {
      for (int i = 0; i < run; ++i) {
        *out++ |= static_cast<uint8_t>((data[start + i] >> bit & ((1 << width) - 1)) << shift);
      }
    }
  }
}

DAPJI_INLINE void half(const uint8_t* data, uint8_t* out) { std::memcpy(out, data, 2); }

// Q4_K, Q5_K: 8 scales and 8 mins of 6 bits in 12 bytes.
DAPJI_INLINE void scales_and_mins(const uint8_t* b, Parts& p) {
  for (int i = 0; i < 4; ++i) {
    p.scales[i] = b[i] & 63;
    p.mins[i] = b[4 + i] & 63;
    p.scales[4 + i] = static_cast<uint8_t>((b[8 + i] & 15) | (b[i] >> 2 & 48));
    p.mins[4 + i] = static_cast<uint8_t>(b[8 + i] >> 4 | (b[4 + i] >> 2 & 48));
  }
}

template <Format format>
DAPJI_INLINE void take_apart(const uint8_t* b, Parts& p) {
  std::memset(p.codes, 0, static_cast<size_t>(32 * layout(format).blocks));
  if constexpr (format == Format::Q4_0 || format == Format::IQ4_NL) {
    half(b, p.scale);
    fields<4, 16>(b + 2, 16, p.codes);
  } else if constexpr (format == Format::Q4_1) {
    half(b, p.scale);
    half(b + 2, p.min);
    fields<4, 16>(b + 4, 16, p.codes);
  } else if constexpr (format == Format::Q5_0) {
    half(b, p.scale);
    fields<1, 1>(b + 2, 4, p.codes, 4);
    fields<4, 16>(b + 6, 16, p.codes);
  } else if constexpr (format == Format::Q5_1) {
    half(b, p.scale);
    half(b + 2, p.min);
    fields<1, 1>(b + 4, 4, p.codes, 4);
    fields<4, 16>(b + 8, 16, p.codes);
  } else if constexpr (format == Format::Q8_0) {
    half(b, p.scale);
    for (int i = 0; i < 32; ++i) p.codes[i] = b[2 + i] ^ 0x80;
  } else if constexpr (format == Format::Q2_K) {
    std::memcpy(p.scales, b, 16);
    fields<2, 32>(b + 16, 64, p.codes);
    half(b + 80, p.scale);
    half(b + 82, p.min);
  } else if constexpr (format == Format::Q3_K) {
    fields<1, 32>(b, 32, p.codes, 2);
    fields<2, 32>(b + 32, 64, p.codes);
    std::memset(p.scales, 0, 16);
    fields<4, 8>(b + 96, 8, p.scales);
    fields<2, 4>(b + 104, 4, p.scales, 4);
    for (uint8_t& scale : p.scales) scale = static_cast<uint8_t>(scale - 32);
    half(b + 108, p.scale);
  } else if constexpr (format == Format::Q4_K) {
    half(b, p.scale);
    half(b + 2, p.min);
    scales_and_mins(b + 4, p);
    fields<4, 32>(b + 16, 128, p.codes);
  } else if constexpr (format == Format::Q5_K) {
    half(b, p.scale);
    half(b + 2, p.min);
    scales_and_mins(b + 4, p);
    fields<1, 32>(b + 16, 32, p.codes, 4);
    fields<4, 32>(b + 48, 128, p.codes);
  } else if constexpr (format == Format::Q6_K) {
    fields<4, 64>(b, 128, p.codes);
    fields<2, 32>(b + 128, 64, p.codes, 4);
    std::memcpy(p.scales, b + 192, 16);
    half(b + 208, p.scale);
  } else if constexpr (format == Format::IQ4_XS) {
    half(b, p.scale);
    std::memset(p.scales, 0, 8);
    fields<2, 1>(b + 2, 2, p.scales, 4);
    fields<4, 1>(b + 4, 4, p.scales);
    for (int i = 0; i < 8; ++i) p.scales[i] = static_cast<uint8_t>(p.scales[i] - 32);
    fields<4, 16>(b + 8, 128, p.codes);
  }
  if constexpr (layout(format).nested() && layout(format).affine) p.min[1] ^= 0x80;  // the file subtracts it
}

// steps: [8][64]. Writes the plane's vectors.
template <int width>
DAPJI_INLINE void pack_plane(const uint8_t (&steps)[8][64], int shift, uint8_t* out) {
  constexpr int per_vector = 8 / width;
  for (int v = 0; v < width; ++v, out += 64) {
    std::memset(out, 0, 64);
    for (int n = 0; n < per_vector; ++n) {
      for (int i = 0; i < 64; ++i) {
        out[i] |= static_cast<uint8_t>((steps[v * per_vector + n][i] >> shift & ((1 << width) - 1)) << n * width);
      }
    }
  }
}

// One unit of up to 16 rows; rows from n on become zeros.
template <Format format>
void pack_unit(const uint8_t* const (&rows)[16], int n, uint8_t* out) {
  constexpr Layout l = layout(format);
  Parts parts[16];
  if (n < 16) std::memset(parts + n, 0, sizeof(Parts) * static_cast<size_t>(16 - n));
  for (int r = 0; r < n; ++r) take_apart<format>(rows[r], parts[r]);
  for (int r = 0; r < 16; ++r) {
    std::memcpy(out + 2 * r, parts[r].scale, 2);
    if constexpr (l.affine) std::memcpy(out + l.min_at() + 2 * r, parts[r].min, 2);
    for (int i = 0; i < l.n_scales(); ++i) out[l.scales_at() + 16 * i + r] = parts[r].scales[i];
    for (int i = 0; i < l.n_mins(); ++i) out[l.mins_at() + 16 * i + r] = parts[r].mins[i];
  }
  for (int b = 0; b < l.blocks; ++b) {
    uint8_t steps[8][64];
    for (int s = 0; s < 8; ++s) {
      for (int r = 0; r < 16; ++r) std::memcpy(steps[s] + 4 * r, parts[r].codes + 32 * b + 4 * s, 4);
    }
    uint8_t* const codes = out + l.codes_at() + b * l.block_bytes();
    pack_plane<l.low.width>(steps, l.low.shift, codes);
    if constexpr (l.high.width) pack_plane<l.high.width>(steps, l.high.shift, codes + l.low.bytes());
  }
}

template <int bytes>
void pack_floats(const uint8_t* const (&rows)[16], int n, int64_t cols, uint8_t* out) {
  std::memset(out, 0, static_cast<size_t>(cols * 16 * bytes));
  constexpr int64_t kStrip = 16;  // columns at a time, so that lines are written while they are in the cache
  for (int64_t k0 = 0; k0 < cols; k0 += kStrip) {
    const int64_t k1 = std::min(cols, k0 + kStrip);
    for (int r = 0; r < n; ++r) {
      for (int64_t k = k0; k < k1; ++k) std::memcpy(out + (k * 16 + r) * bytes, rows[r] + k * bytes, bytes);
    }
  }
}

template <Format format>
void pack_panel(const uint8_t* const (&rows)[16], int n, int64_t cols, uint8_t* out) {
  if constexpr (format <= Format::BF16) {
    pack_floats<float_bytes(format)>(rows, n, cols, out);
  } else {
    constexpr FormatInfo i = kInfo[static_cast<int>(format)];
    const uint8_t* at[16];
    std::copy(rows, rows + 16, at);
    for (int64_t unit = 0; unit < cols / i.block; ++unit) {
      pack_unit<format>(at, n, out + unit * i.unit_bytes);
      for (int r = 0; r < n; ++r) at[r] += i.block_bytes;
    }
  }
}

DAPJI_INLINE float half_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return Generic::from_f16(bits);
}

DAPJI_INLINE int code_bits(const uint8_t* plane, int width, int shift, int step, int byte) {
  const int per_vector = 8 / width;
  return (plane[64 * (step / per_vector) + byte] >> step % per_vector * width & ((1 << width) - 1)) << shift;
}

template <Format format>
void dequantize(const uint8_t* panel, int row, int64_t cols, float* out) {
  if constexpr (format <= Format::BF16) {
    constexpr int bytes = float_bytes(format);
    for (int64_t k = 0; k < cols; ++k) {
      const uint8_t* const p = panel + (k * 16 + row) * bytes;
      uint32_t bits = 0;
      std::memcpy(format == Format::BF16 ? reinterpret_cast<uint8_t*>(&bits) + 2 : reinterpret_cast<uint8_t*>(&bits), p,
                  bytes);
      if constexpr (format == Format::F16) {
        out[k] = Generic::from_f16(static_cast<uint16_t>(bits));
      } else {
        std::memcpy(out + k, &bits, 4);
      }
    }
  } else {
    constexpr Layout l = layout(format);
    const int64_t units = cols / (32 * l.blocks);
    for (int64_t u = 0; u < units; ++u, panel += l.unit_bytes()) {
      const float d = half_at(panel + 2 * row), m = l.affine ? half_at(panel + l.min_at() + 2 * row) : 0.0f;
      for (int b = 0; b < l.blocks; ++b) {
        const uint8_t* const codes = panel + l.codes_at() + b * l.block_bytes();
        for (int i = 0; i < 32; ++i) {
          float scale = d, min = m;
          if constexpr (l.nested()) {
            const uint8_t s = panel[l.scales_at() + (32 * b + i) / l.group * 16 + row];
            if constexpr (l.affine && l.group == 16) {
              scale *= static_cast<float>(s & 15);
              min *= static_cast<float>(s >> 4);
            } else {
              scale *= l.affine ? static_cast<float>(s) : static_cast<float>(static_cast<int8_t>(s));
              if constexpr (l.affine) min *= static_cast<float>(panel[l.mins_at() + 16 * b + row]);
            }
          }
          const int step = i / 4, byte = 4 * row + i % 4;
          int code = code_bits(codes, l.low.width, l.low.shift, step, byte);
          if constexpr (l.high.width) {
            code |= code_bits(codes + l.low.bytes(), l.high.width, l.high.shift, step, byte);
          }
          code = l.levels ? kLevels[code] : code - l.offset;
          const float value = static_cast<float>(code) * scale;
          *out++ = l.affine ? value + min : value;
        }
      }
    }
  }
}

// Calls f(constant) with the format as a compile-time constant.
template <Format format>
struct Constant {
  static constexpr Format value = format;
};

template <class Function>
void with_format(Format format, Function f) {
  switch (format) {
    case Format::F32:
      return f(Constant<Format::F32>{});
    case Format::F16:
      return f(Constant<Format::F16>{});
    case Format::BF16:
      return f(Constant<Format::BF16>{});
    case Format::Q4_0:
      return f(Constant<Format::Q4_0>{});
    case Format::Q4_1:
      return f(Constant<Format::Q4_1>{});
    case Format::Q5_0:
      return f(Constant<Format::Q5_0>{});
    case Format::Q5_1:
      return f(Constant<Format::Q5_1>{});
    case Format::Q8_0:
      return f(Constant<Format::Q8_0>{});
    case Format::Q2_K:
      return f(Constant<Format::Q2_K>{});
    case Format::Q3_K:
      return f(Constant<Format::Q3_K>{});
    case Format::Q4_K:
      return f(Constant<Format::Q4_K>{});
    case Format::Q5_K:
      return f(Constant<Format::Q5_K>{});
    case Format::Q6_K:
      return f(Constant<Format::Q6_K>{});
    case Format::IQ4_NL:
      return f(Constant<Format::IQ4_NL>{});
    case Format::IQ4_XS:
      return f(Constant<Format::IQ4_XS>{});
  }
}

PanelsView view_of(Format format, int64_t rows, int64_t cols, const uint8_t* data) {
  const FormatInfo& info = kInfo[static_cast<int>(format)];
  if (rows <= 0 || cols <= 0 || cols % info.block) {
    throw std::invalid_argument(std::string(info.name) + " matrix of " + std::to_string(rows) + " x " +
                                std::to_string(cols) + ": sizes must be positive, columns a multiple of " +
                                std::to_string(info.block));
  }
  const size_t panel_bytes = (static_cast<size_t>(cols / info.block * info.unit_bytes) + 63) / 64 * 64;
  return {format, rows, cols, data, panel_bytes, (rows + 15) / 16};
}

}  // namespace

const FormatInfo& format_info(Format format) { return kInfo[static_cast<int>(format)]; }

Format parse_format(const char* name) {
  for (int i = 0; i < kFormats; ++i) {
    if (std::strcmp(kInfo[i].name, name) == 0) return static_cast<Format>(i);
  }
  throw std::invalid_argument(std::string("unknown weight format ") + name);
}

size_t panels_bytes(Format format, int64_t rows, int64_t cols) {
  const PanelsView view = view_of(format, rows, cols, nullptr);
  return static_cast<size_t>(view.n_panels) * view.panel_bytes;
}

void pack(Format format, int64_t rows, int64_t cols, const uint8_t* rows_data, const int64_t* order, uint8_t* out) {
  const PanelsView view = view_of(format, rows, cols, out);
  const FormatInfo& info = format_info(format);
  const size_t row_bytes = static_cast<size_t>(cols / info.block * info.block_bytes);
  with_format(format, [&](auto constant) {
    for (int64_t p = 0; p < view.n_panels; ++p) {
      const int n = static_cast<int>(std::min<int64_t>(16, rows - 16 * p));
      const uint8_t* at[16];
      for (int r = 0; r < 16; ++r) {
        const int64_t row = 16 * p + std::min(r, n - 1);
        at[r] = rows_data + static_cast<size_t>(order ? order[row] : row) * row_bytes;
      }
      pack_panel<decltype(constant)::value>(at, n, cols, out + static_cast<size_t>(p) * view.panel_bytes);
    }
  });
}

Panels::Panels(Format format, int64_t rows, int64_t cols, std::shared_ptr<const uint8_t> memory)
    : view_(view_of(format, rows, cols, memory.get())), memory_(std::move(memory)) {}

void dequantize_row(const PanelsView& panels, int64_t row, float* out) {
  const uint8_t* const panel = panels.data + static_cast<size_t>(row / 16) * panels.panel_bytes;
  with_format(panels.format, [&](auto constant) {
    dequantize<decltype(constant)::value>(panel, static_cast<int>(row % 16), panels.cols, out);
  });
}

}  // namespace dapji
