// y = x W^T: the interface of the matrix kernels. No kernel allocates, throws or starts a thread.
//
// Shapes: T tokens, K columns (inputs) of a weight matrix, N rows (outputs), in panels of 16 rows.
//
// Bits: each output has one fixed order of summation. It depends on neither T nor the range of panels, so a token's
// outputs are the same alone and in a crowd, and on any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "panels.h"
#include "simd.h"

namespace dapji {

constexpr int kBlock = 32;  // activations that share a scale
constexpr int kFew = 8;     // up to so many tokens take their weights straight from the panels

/// Activations rounded to int8 in blocks of 32 along K; a view of memory that the caller owns.
/// scale = max|x| / 127; code = x / scale rounded to nearest even; a block of zeros (or of numbers so small that the scale
/// would not be a normal float) has scale 0 and codes 0. A block that holds an infinity or a NaN has that as its scale,
/// so it reaches every output.
///
/// Tokens that a kernel takes together lie together: every array is [ceil(T / tile)][K / 32][tile] of what is named here.
/// Those beyond T count for nothing, but may be multiplied: `clear_rest` makes them zeros, since denormal numbers are slow.
struct Quantized {
  int64_t cols;          // K, a multiple of 32
  int tile;              // tokens side by side
  int8_t* codes;         // [32]
  float* scales;
  float* sums;           // scale * sum of the codes
  int32_t* starts;       // -128 * sum of the codes
  int32_t* half_starts;  // [2] the same of each 16 codes
  int16_t* halves;       // [2] sum of each 16 codes

  static int64_t blocks(int64_t tokens, int64_t cols, int tile) { return (tokens + tile - 1) / tile * tile * (cols / kBlock); }
  /// Bytes of memory for T tokens, a multiple of 64.
  static size_t bytes(int64_t tokens, int64_t cols, int tile) {
    return static_cast<size_t>((blocks(tokens, cols, tile) * (kBlock + 24) + 63) / 64 * 64);
  }
  /// Lays the arrays out in `memory`, which has bytes(tokens, cols, tile) bytes, 64-byte aligned.
  static Quantized in(void* memory, int64_t tokens, int64_t cols, int tile) {
    const int64_t n = blocks(tokens, cols, tile);
    int8_t* const codes = static_cast<int8_t*>(memory);
    float* const scales = reinterpret_cast<float*>(codes + n * kBlock);
    int32_t* const starts = reinterpret_cast<int32_t*>(scales + 2 * n);
    return {cols, tile, codes, scales, scales + n, starts, starts + n, reinterpret_cast<int16_t*>(starts + 3 * n)};
  }
  /// Where a token's block lies in the arrays.
  int64_t at(int64_t token, int64_t block) const {
    return (token / tile * (cols / kBlock) + block) * tile + token % tile;
  }
  /// Of T tokens, what the last tile has beyond them.
  void clear_rest(int64_t tokens) const {
    if (tokens % tile == 0) return;
    for (int64_t block = 0; block < cols / kBlock; ++block) {
      const int64_t last = at(tokens - 1, block);
      for (int64_t i = last + 1; i % tile != 0; ++i) scales[i] = sums[i] = 0.0f;
    }
  }
  /// The same activations from token t on, a multiple of the tile.
  Quantized from(int64_t t) const {
    const int64_t n = at(t, 0);
    return {cols, tile, codes + n * kBlock, scales + n, sums + n, starts + n, half_starts + 2 * n, halves + 2 * n};
  }
};

/// What an adapter makes of one token's products: r + term, or, with factors, (r + term) * factors before the bias.
struct RowChange {
  const float* term;     // from output Epilogue::terms_from on; null: nothing changes
  const float* factors;  // [N] or none
};

/// What happens to a finished product r (changed, with bias added) on its way to y.
struct Epilogue {
  enum class Kind : int {
    store,  // y = r
    add,    // y = y + r: a residual
    gate,   // y = activation(y) * r: `up` after `gate` has been stored to the same panels of y
  };
  Kind kind = Kind::store;
  Activation activation = Activation::silu;  // of Kind::gate
  const float* bias = nullptr;               // [N] or none
  const RowChange* changes = nullptr;        // [T] or none
  int64_t terms_from = 0;                    // output of the first value of their terms

  /// The same of the tokens from t on.
  Epilogue from(int64_t t) const { return {kind, activation, bias, changes == nullptr ? nullptr : changes + t, terms_from}; }
};

/// Bytes that `linear_q` needs per calling thread, 64-byte aligned; contents do not matter and do not survive.
constexpr size_t kScratchBytes = 320 * 1024;

/// The matrix kernels of one instruction set.
struct MatmulKernels {
  int many_tile;  // of more than kFew tokens
  /// Tokens side by side that linear_q wants for so many tokens.
  int tile(int64_t tokens) const { return tokens <= kFew ? static_cast<int>(tokens) : many_tile; }

  /// Rounds the tokens t0 <= t < t1 of x [T, K], row stride ldx floats, to the same tokens of `out`.
  void (*quantize)(const float* x, size_t ldx, int64_t t0, int64_t t1, const Quantized& out);

  /// y[t, n] for the rows n of panels p0 <= p < p1 and all T tokens. Quantised formats. x.tile: as `tile` says.
  /// y: [T, N], row stride ldy floats. scratch: kScratchBytes.
  void (*linear_q)(const PanelsView& w, const Quantized& x, int64_t tokens, int64_t p0, int64_t p1, float* y,
                   size_t ldy, const Epilogue& epilogue, void* scratch);

  /// The same for F32, F16 and BF16. x: [T, K] float32, row stride ldx floats.
  void (*linear_f)(const PanelsView& w, const float* x, size_t ldx, int64_t tokens, int64_t p0, int64_t p1, float* y,
                   size_t ldy, const Epilogue& epilogue);

  /// The same, y = r, for matrices of few rows or few columns, where sums of their own keep the processor busy. Of the
  /// panels p0 <= p < p1 the first is the first of y.
  void (*linear_thin)(const PanelsView& w, const float* x, size_t ldx, int64_t tokens, int64_t p0, int64_t p1, float* y,
                      size_t ldy);
};

}  // namespace dapji
