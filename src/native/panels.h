// Weights as the kernels read them: panels of 16 rows. docs/panels.md draws the layout.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dapji {

/// Weight formats, named as in GGUF; FORMATS in ops/formats.py describes them.
enum class Format : int { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS };
constexpr int kFormats = 15;

struct FormatInfo {
  const char* name;
  int block;        // values in a block of the file; cols is a multiple of it
  int block_bytes;  // bytes of a block of the file
  int unit_bytes;   // bytes of one block of 16 rows in a panel, a multiple of 32
};

const FormatInfo& format_info(Format format);

/// By name; throws std::invalid_argument for an unknown one.
Format parse_format(const char* name);

inline bool is_float(Format format) { return format <= Format::BF16; }

/// What a kernel needs to know of a packed matrix [rows, cols]; owns nothing.
struct PanelsView {
  Format format;
  int64_t rows, cols;
  const uint8_t* data;  // [n_panels, panel_bytes], 64-byte aligned
  size_t panel_bytes;   // a multiple of 64
  int64_t n_panels;     // ceil(rows / 16); rows beyond the last are zeros
};

/// A packed matrix; owns its memory. Immutable once every panel has been packed.
class Panels {
 public:
  /// Allocates, packs nothing. Throws std::invalid_argument unless rows, cols > 0 and cols is a
  /// multiple of the format's block, std::bad_alloc where memory is short.
  Panels(Format format, int64_t rows, int64_t cols);
  ~Panels();
  Panels(const Panels&) = delete;
  Panels& operator=(const Panels&) = delete;

  /// Packs the panels p0 <= p < p1 from `rows_data`, [rows, row_bytes] as in the file. Exact. Ranges may be packed
  /// at once on several threads.
  void pack(const uint8_t* rows_data, int64_t p0, int64_t p1);

  const PanelsView& view() const { return view_; }
  size_t nbytes() const { return static_cast<size_t>(view_.n_panels) * view_.panel_bytes; }

 private:
  PanelsView view_;
  uint8_t* memory_;
};

/// Row `row` as float32, the bits that the format's own dequantising gives. out: [cols].
void dequantize_row(const PanelsView& panels, int64_t row, float* out);

}  // namespace dapji
