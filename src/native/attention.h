// Attention over the block-table KV cache, as a template over one instruction set's Simd struct.
//
// A query row's result has one order of operations, fixed by absolute positions alone: keys are taken in tiles of
// kKvTile positions (online softmax, Milakov & Gimelshein 2018; Dao et al. 2022), tiles in segments of kKvSegment,
// segments are merged in order. Keys that a row must not see enter as probability exactly 0, which changes nothing. So
// the bits depend neither on the batch, nor on how a prompt was cut, nor on threads, nor on where blocks lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "kvcache.h"
#include "rowops.h"

namespace dapji {

constexpr int kKvTile = 64;      // positions per step of the online softmax
constexpr int kKvSegment = 256;  // positions that one work item covers when a single row is split over threads

// The cache of one layer and kv head as one sequence sees it. Nothing is owned.
struct KvView {
  const KvTile* tile;
  std::byte* head;            // tile of (block 0, this kv head)
  std::size_t block_stride;   // bytes from block to block
  const std::int32_t* table;  // [n] the sequence's blocks by position / 16
};

// One work item: consecutive query rows of one sequence against one kv head.
struct AttentionItem {
  KvView kv;
  const float* q;      // first query row, first query head of this kv head; not yet rotated
  std::size_t stride;  // floats from query row to query row, in q and out
  float* out;          // like q; null: leave the state of the only segment in `partial`
  float* partial;      // see attention_partial_floats; used when out is null
  const float* cos;    // [context, rope_dim/2], by position
  const float* sin;
  int rope_dim;  // of each head, 0: no rotation
  int n_rows;    // query rows, n_rows * group <= kMaxQueryRows
  int group;     // query heads of this kv head, each Dh floats, side by side
  int position;  // of the first query row
  int window;    // a row sees itself and window - 1 positions before; 0: all
  int segment;   // the segment to compute when out is null
  float scale;   // of the scores
};

constexpr int kMaxQueryRows = 64;  // query rows x heads that share one pass over K and V

// The first segment with a key that a row at `position` sees.
DAPJI_INLINE int first_segment(int position, int window) {
  return window == 0 || position < window ? 0 : (position - window + 1) / kKvSegment;
}

// Floats of one partial state: (max, sum) of each row, then acc [rows][Dp].
DAPJI_INLINE std::size_t attention_partial_floats(int rows, int padded) {
  return static_cast<std::size_t>(rows) * (2 + padded);
}

// Floats of scratch that one worker needs for heads of this size.
inline std::size_t attention_scratch_floats(int head_dim, int padded) {
  const std::size_t rows = kMaxQueryRows;
  return rows * (head_dim + kKvTile + 2 * static_cast<std::size_t>(padded) + kLanes + 4) +
         static_cast<std::size_t>(kKvTile) * (head_dim + padded);
}

template <class S>
struct Attention {
  using F = typename S::F;

  // ---- the cache's layout ----

  // One token's key and value [Dh] of one kv head into `slot` of its tile; the key is rotated by cos, sin
  // [rope_dim/2]. Slot 0 clears the values of the other slots: what an earlier owner left there will be multiplied by
  // probability 0, which is not 0 for an infinity. scratch: [Dh].
  static void write_kv(const KvTile& tile, std::byte* data, int slot, const float* k, const float* v, const float* cos,
                       const float* sin, int rope_dim, float* scratch) {
    if (slot == 0) std::memset(data + tile.v, 0, tile.bytes - tile.v);
    RowOps<S>::rotate(k, cos, sin, rope_dim, tile.head_dim, 1.0f, scratch);
    const int n_panels = tile.padded / kLanes;
    for (int panel = 0; panel < n_panels; ++panel) {
      const int d = panel * kLanes;
      const int n = tile.head_dim - d < kLanes ? tile.head_dim - d : kLanes;
      const std::size_t k_at = static_cast<std::size_t>(d) * kKvBlock + slot;
      const std::size_t v_at = static_cast<std::size_t>(d) * kKvBlock + static_cast<std::size_t>(slot) * kLanes;
      const F key = S::load(scratch + d, n), value = S::load(v + d, n);
      if (tile.format == KvFormat::f32) {
        alignas(64) float column[kLanes];
        S::store(column, key);
        scatter(column, n, reinterpret_cast<float*>(data) + k_at);
        S::store(reinterpret_cast<float*>(data + tile.v) + v_at, value);
      } else if (tile.format == KvFormat::f16) {
        alignas(64) std::uint16_t column[kLanes];
        S::store_f16(column, key);
        scatter(column, n, reinterpret_cast<std::uint16_t*>(data) + k_at);
        S::store_f16(reinterpret_cast<std::uint16_t*>(data + tile.v) + v_at, value);
      } else {
        const int group = d / kKvGroup, in_group = group * kKvGroup;
        float* k_scale = reinterpret_cast<float*>(data + tile.k_scale) + group * kKvBlock + slot;
        float* v_scale = reinterpret_cast<float*>(data + tile.v_scale) + slot * tile.groups + group;
        if (d == in_group) {
          const int size = tile.head_dim - d < kKvGroup ? tile.head_dim - d : kKvGroup;
          *k_scale = largest(scratch + d, size) / 127.0f;
          *v_scale = largest(v + d, size) / 127.0f;
        }
        alignas(64) std::int8_t column[kLanes];
        S::narrow_s8(column, codes(key, *k_scale));
        scatter(column, n, reinterpret_cast<std::int8_t*>(data) + k_at);
        S::narrow_s8(reinterpret_cast<std::int8_t*>(data + tile.v) + v_at, codes(value, *v_scale));
      }
    }
  }

  // ---- one work item ----

  // scratch: attention_scratch_floats, 64-byte aligned.
  static void attend(const AttentionItem& item, float* scratch) {
    const KvTile& tile = *item.kv.tile;
    const int rows = item.n_rows * item.group;
    const State state(scratch, rows, tile);

    for (int row = 0; row < rows; ++row) {
      const int position = item.position + row / item.group;
      const std::size_t angles = static_cast<std::size_t>(position) * (item.rope_dim / 2);
      RowOps<S>::rotate(item.q + row / item.group * item.stride + static_cast<std::size_t>(row % item.group) * tile.head_dim,
                        item.cos + angles, item.sin + angles, item.rope_dim, tile.head_dim, item.scale,
                        state.q + static_cast<std::size_t>(row) * tile.head_dim);
    }

    if (item.out == nullptr) {
      attend_segment(item, item.segment, state);
      for (int row = 0; row < rows; ++row) {
        item.partial[row * 2] = state.max[row];
        item.partial[row * 2 + 1] = S::sum(S::load(state.sums + row * kLanes));
      }
      std::memcpy(item.partial + rows * 2, state.acc, sizeof(float) * rows * static_cast<std::size_t>(tile.padded));
      return;
    }
    const int last = (item.position + item.n_rows - 1) / kKvSegment;
    for (int segment = first_segment(item.position, item.window); segment <= last; ++segment) {
      attend_segment(item, segment, state);
      for (int row = 0; row < rows; ++row) {
        const std::size_t at = static_cast<std::size_t>(row) * tile.padded;
        merge(state.max[row], S::sum(S::load(state.sums + row * kLanes)), state.acc + at, tile.padded,
              state.total_max[row], state.total_sum[row], state.total + at);
      }
    }
    for (int row = 0; row < rows; ++row) {
      finish(state.total + static_cast<std::size_t>(row) * tile.padded, state.total_sum[row], tile.head_dim,
             item.out + row / item.group * item.stride + static_cast<std::size_t>(row % item.group) * tile.head_dim);
    }
  }

  // Merges the partial states of one query row, segments in order. partials: [n_segments] of
  // attention_partial_floats(group, Dp); out: [group, Dh]; scratch: [Dp].
  static void combine(const float* partials, int n_segments, int group, const KvTile& tile, float* out,
                      float* scratch) {
    const std::size_t size = attention_partial_floats(group, tile.padded);
    for (int row = 0; row < group; ++row) {
      float total_max = kLowest, total_sum = 0;
      std::memset(scratch, 0, sizeof(float) * tile.padded);
      for (int segment = 0; segment < n_segments; ++segment) {
        const float* partial = partials + segment * size;
        merge(partial[row * 2], partial[row * 2 + 1],
              partial + group * 2 + static_cast<std::size_t>(row) * tile.padded, tile.padded, total_max,
              total_sum, scratch);
      }
      finish(scratch, total_sum, tile.head_dim, out + static_cast<std::size_t>(row) * tile.head_dim);
    }
  }

 private:
  static constexpr float kLowest = -1e30f;  // below every score; finite, so that differences are never NaN
  static constexpr int kTileBlocks = kKvTile / kKvBlock;
  static constexpr int kRegisterRows = S::isa == Isa::avx512vnni ? 12 : S::isa == Isa::generic ? 2 : 6;

  // Views into a worker's scratch.
  struct State {
    float* k;          // [kTileBlocks][Dh][16]
    float* v;          // [kTileBlocks][Dp/16][16][16]
    float* scores;     // [rows][kKvTile], then probabilities
    float* acc;        // [rows][Dp] of the current segment
    float* total;      // [rows][Dp] of the segments merged so far
    float* sums;       // [rows][16] of the current segment, by lane
    float* max;        // [rows] of the current segment
    float* factor;     // [rows] what the latest maximum makes of earlier sums
    float* total_max;  // [rows]
    float* total_sum;  // [rows]
    float* q;          // [rows][Dh] rotated and scaled
    int rows;

    State(float* scratch, int n_rows, const KvTile& tile) : rows(n_rows) {
      const auto take = [&](std::size_t n) {
        float* start = scratch;
        scratch += n;
        return start;
      };
      const std::size_t padded = tile.padded, dim = tile.head_dim, most = kMaxQueryRows;
      k = take(kKvTile * dim);
      v = take(kKvTile * padded);
      scores = take(most * kKvTile);
      acc = take(most * padded);
      total = take(most * padded);
      sums = take(most * kLanes);
      max = take(most);
      factor = take(most);
      total_max = take(most);
      total_sum = take(most);
      q = take(most * dim);
      std::memset(total, 0, sizeof(float) * rows * padded);
      for (int row = 0; row < rows; ++row) {
        total_max[row] = kLowest;
        total_sum[row] = 0;
      }
    }
  };

  template <class T>
  DAPJI_INLINE static void scatter(const T* column, int n, T* into) {
    for (int d = 0; d < n; ++d) into[d * kKvBlock] = column[d];
  }

  DAPJI_INLINE static float largest(const float* x, int n) {
    float most = 0;
    for (int d = 0; d < n; ++d) {
      const float size = x[d] < 0 ? -x[d] : x[d];
      most = size > most || size != size ? size : most;
    }
    return most;
  }

  // An infinity or a NaN is in the scale, which makes every value NaN; what is below normal numbers counts as zero.
  DAPJI_INLINE static typename S::I codes(F x, float scale) {
    return __builtin_isnormal(scale) ? S::to_int(S::mul(x, S::set(1.0f / scale))) : S::set_int(0);
  }

  // Keys of one tile as float32 [Dh][16]: in place, or unpacked to `into`.
  static const float* unpack_k(const KvTile& tile, const std::byte* data, float* into) {
    if (tile.format == KvFormat::f32) return reinterpret_cast<const float*>(data);
    if (tile.format == KvFormat::f16) return unpack_f16(data, tile.head_dim, into);
    const auto* codes = reinterpret_cast<const std::int8_t*>(data);
    const auto* scales = reinterpret_cast<const float*>(data + tile.k_scale);  // [G][16]
    for (int d = 0; d < tile.head_dim; ++d) {
      const F scale = S::load(scales + d / kKvGroup * kKvBlock);
      S::store(into + d * kKvBlock, S::mul(S::to_float(S::widen_s8(codes + d * kKvBlock)), scale));
    }
    return into;
  }

  // Values of one tile as float32 [Dp/16][16][16].
  static const float* unpack_v(const KvTile& tile, const std::byte* data, float* into) {
    if (tile.format == KvFormat::f32) return reinterpret_cast<const float*>(data + tile.v);
    if (tile.format == KvFormat::f16) return unpack_f16(data + tile.v, tile.padded, into);
    const auto* codes = reinterpret_cast<const std::int8_t*>(data + tile.v);
    const auto* scales = reinterpret_cast<const float*>(data + tile.v_scale);  // [16][G]
    for (int row = 0; row < tile.padded; ++row) {                              // row = panel * 16 + token
      const int group = row / kLanes * kLanes / kKvGroup;
      const F scale = S::set(scales[row % kKvBlock * tile.groups + group]);
      S::store(into + row * kLanes, S::mul(S::to_float(S::widen_s8(codes + row * kLanes)), scale));
    }
    return into;
  }

  static const float* unpack_f16(const std::byte* data, int rows, float* into) {
    const auto* halves = reinterpret_cast<const std::uint16_t*>(data);
    for (int row = 0; row < rows; ++row) S::store(into + row * kLanes, S::load_f16(halves + row * kLanes));
    return into;
  }

  static void merge(float max, float sum, const float* acc, int padded, float& total_max, float& total_sum,
                    float* total) {
    const float most = max > total_max ? max : total_max;
    const float keep = exp_of(total_max - most), take = exp_of(max - most);
    total_max = most;
    total_sum = total_sum * keep + sum * take;
    for (int d = 0; d < padded; d += kLanes) {
      const F kept = S::mul(S::load(total + d), S::set(keep));
      S::store(total + d, S::add(kept, S::mul(S::load(acc + d), S::set(take))));
    }
  }

  static void finish(const float* total, float sum, int head_dim, float* out) {
    const F divisor = S::set(sum);
    for (int d = 0; d < head_dim; d += kLanes) {
      const int n = head_dim - d < kLanes ? head_dim - d : kLanes;
      S::store(out + d, S::div(S::load(total + d), divisor), n);
    }
  }

  // Calls work.run<Rows>(row) for groups of as many rows as fit the registers.
  template <int Rows = kRegisterRows, class Work>
  static void for_rows(int row, int rows, const Work& work) {
    for (; row + Rows <= rows; row += Rows) work.template run<Rows>(row);
    if constexpr (Rows > 1) {
      if (row < rows) for_rows<Rows - 1>(row, rows, work);
    }
  }

  // scores [rows][16 of kKvTile] = q [rows][Dh] k [Dh][16]
  struct Scores {
    const float* q;
    const float* k;
    std::size_t dim;
    float* scores;

    template <int Rows>
    void run(int first) const {
      const float* from = q + first * dim;
      F sum[Rows];
      for (int row = 0; row < Rows; ++row) sum[row] = S::zero();
      for (std::size_t d = 0; d < dim; ++d) {
        const F key = S::load(k + d * kKvBlock);
        for (int row = 0; row < Rows; ++row) sum[row] = S::fma(S::set(from[row * dim + d]), key, sum[row]);
      }
      for (int row = 0; row < Rows; ++row) S::store(scores + (first + row) * kKvTile, sum[row]);
    }
  };

  // acc [rows][16 of Dp] = factor * acc + probabilities [rows][blocks * 16] values [blocks][16][16]
  struct Mix {
    const float* probabilities;
    const float* const* values;  // [blocks]
    std::size_t panel;           // offset of the 16 columns within them
    int blocks;
    const float* factor;
    float* acc;
    std::size_t stride;

    template <int Rows>
    void run(int first) const {
      float* into = acc + first * stride;
      F sum[Rows];
      for (int row = 0; row < Rows; ++row) sum[row] = S::mul(S::load(into + row * stride), S::set(factor[first + row]));
      for (int b = 0; b < blocks; ++b) {
        const float* from = probabilities + first * kKvTile + b * kKvBlock;
        const float* value = values[b] + panel;
        for (int t = 0; t < kKvBlock; ++t) {
          const F column = S::load(value + t * kLanes);
          for (int row = 0; row < Rows; ++row) sum[row] = S::fma(S::set(from[row * kKvTile + t]), column, sum[row]);
        }
      }
      for (int row = 0; row < Rows; ++row) S::store(into + row * stride, sum[row]);
    }
  };

  // Sets the scores of one block, from `position` on, that a row does not see.
  static void mask(const AttentionItem& item, int position, float value, float* scores) {
    const int rows = item.n_rows * item.group;
    for (int row = 0; row < rows; ++row) {
      const int own = item.position + row / item.group - position;  // lane of the row's own token
      for (int t = 0; t < kKvBlock; ++t) {
        if (t > own || (item.window != 0 && t <= own - item.window)) scores[row * kKvTile + t] = value;
      }
    }
  }

  // Turns the scores of a tile into probabilities relative to the largest score so far.
  static void exponentiate(const State& state, int blocks) {
    for (int row = 0; row < state.rows; ++row) {
      float* scores = state.scores + row * kKvTile;
      F most = S::load(scores);
      for (int b = 1; b < blocks; ++b) most = S::max(most, S::load(scores + b * kKvBlock));
      const float tile_max = S::max(most), before = state.max[row];
      const float after = tile_max > before ? tile_max : before;
      state.max[row] = after;
      state.factor[row] = before == after ? 1.0f : exp_of(before - after);
      for (int b = 0; b < blocks; ++b) {
        // Below e^-87 results leave the normal floats, where many processors are slow; a sum of at least 1 hides it.
        const F below = S::sub(S::load(scores + b * kKvBlock), S::set(after));
        S::store(scores + b * kKvBlock, exp<S>(S::max(S::set(-87.0f), below)));
      }
    }
  }

  static void add_up(const State& state, int blocks) {
    for (int row = 0; row < state.rows; ++row) {
      F sum = S::mul(S::load(state.sums + row * kLanes), S::set(state.factor[row]));
      for (int b = 0; b < blocks; ++b) sum = S::add(sum, S::load(state.scores + row * kKvTile + b * kKvBlock));
      S::store(state.sums + row * kLanes, sum);
    }
  }

  static float exp_of(float x) {
    alignas(64) float lanes[kLanes];
    S::store(lanes, exp<S>(S::set(x)));
    return lanes[0];
  }

  // The keys of one segment for all rows of the item, from an empty state.
  static void attend_segment(const AttentionItem& item, int segment, const State& state) {
    const KvTile& tile = *item.kv.tile;
    const int rows = state.rows, first = item.position, last = item.position + item.n_rows - 1;
    const std::size_t dim = tile.head_dim, padded = tile.padded;
    std::memset(state.acc, 0, sizeof(float) * rows * padded);
    std::memset(state.sums, 0, sizeof(float) * rows * kLanes);
    for (int row = 0; row < rows; ++row) state.max[row] = kLowest;

    // Blocks that lie before every row's window are not read: they may have been given back.
    const int seen = item.window == 0 || first < item.window ? 0 : (first - item.window + 1) / kKvBlock * kKvBlock;
    const int start = segment * kKvSegment > seen ? segment * kKvSegment : seen;
    const int end = last + 1 < (segment + 1) * kKvSegment ? last + 1 : (segment + 1) * kKvSegment;
    for (int base = start; base < end; base = (base / kKvTile + 1) * kKvTile) {
      const int tile_end = (base / kKvTile + 1) * kKvTile;
      const int blocks = ((end < tile_end ? end : tile_end) - base + kKvBlock - 1) / kKvBlock;
      const float* values[kTileBlocks];
      bool edge[kTileBlocks];  // some row does not see all of the block
      for (int b = 0; b < blocks; ++b) {
        const int position = base + b * kKvBlock;
        const std::byte* data = item.kv.head + item.kv.table[position / kKvBlock] * item.kv.block_stride;
        const float* keys = unpack_k(tile, data, state.k + b * dim * kKvBlock);
        values[b] = unpack_v(tile, data, state.v + b * padded * kKvBlock);
        float* const scores = state.scores + b * kKvBlock;
        for_rows(0, rows, Scores{state.q, keys, dim, scores});
        edge[b] = position + kKvBlock - 1 > first || (item.window != 0 && position <= last - item.window);
        if (edge[b]) mask(item, position, kLowest, scores);
      }
      exponentiate(state, blocks);
      for (int b = 0; b < blocks; ++b) {
        if (edge[b]) mask(item, base + b * kKvBlock, 0.0f, state.scores + b * kKvBlock);
      }
      add_up(state, blocks);
      for (std::size_t panel = 0; panel < padded; panel += kLanes) {
        for_rows(0, rows, Mix{state.scores, values, panel * kKvBlock, blocks, state.factor, state.acc + panel, padded});
      }
    }
  }
};

// What a program calls between its matrix products, of one instruction set. None allocates, throws or starts a thread.
struct RowKernels {
  void (*norm)(const float* x, const float* weight, float eps, std::int64_t n, float* out);
  void (*write_kv)(const KvTile& tile, std::byte* data, int slot, const float* k, const float* v, const float* cos,
                   const float* sin, int rope_dim, float* scratch);
  void (*attend)(const AttentionItem& item, float* scratch);
  void (*combine)(const float* partials, int n_segments, int group, const KvTile& tile, float* out, float* scratch);
};

template <class S>
constexpr RowKernels row_kernels() {
  return {RowOps<S>::norm, Attention<S>::write_kv, Attention<S>::attend, Attention<S>::combine};
}

}  // namespace dapji
