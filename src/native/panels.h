// Weights as the kernels read them: panels of 16 rows. docs/panels.md draws the layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace dapji {

/// Of the layout that packing gives; one more whenever that changes, so that panels kept in files are packed anew.
constexpr int kPanelsVersion = 1;

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

/// Bytes that the panels of a matrix take. Throws std::invalid_argument unless rows, cols > 0 and cols is a multiple of
/// the format's block.
size_t panels_bytes(Format format, int64_t rows, int64_t cols);

/// Packs `rows_data`, [rows, row_bytes] as in the file, into `out`, panels_bytes of zeros. Row r is there the row order[r]
/// or, without an order, r. Exact. Throws as panels_bytes.
void pack(Format format, int64_t rows, int64_t cols, const uint8_t* rows_data, const int64_t* order, uint8_t* out);

/// A packed matrix, wherever it lies. Immutable.
class Panels {
 public:
  /// `memory`: panels_bytes, packed, 64-byte aligned; kept as long as this is. Throws std::invalid_argument as
  /// panels_bytes.
  Panels(Format format, int64_t rows, int64_t cols, std::shared_ptr<const uint8_t> memory);

  const PanelsView& view() const { return view_; }

 private:
  PanelsView view_;
  std::shared_ptr<const uint8_t> memory_;
};

/// Row `row` as float32, the bits that the format's own dequantising gives. out: [cols].
void dequantize_row(const PanelsView& panels, int64_t row, float* out);

}  // namespace dapji
