// Attention over the block-table KV cache, as a template over one instruction set's Simd struct.
//
// A query row's result has one order of operations, fixed by absolute positions alone: keys are taken in segments of
// kKvSegment positions; a segment is a softmax of its own, and segments are merged in order (online softmax, Milakov &
// Gimelshein 2018; Dao et al. 2022). Keys that a row must not see enter as probability exactly 0, which changes
// nothing. So the bits depend neither on the batch, nor on how a prompt was cut, nor on threads, nor on where blocks
// lie.
//
// Scores are in powers of two (queries are scaled by log2 e), and the maximum that a softmax subtracts is rounded up to
// an integer. So what a merge multiplies by is a power of two, exact and cheap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "isa.h"
#include "kvcache.h"
#include "kvtile.h"
#include "rowops.h"

namespace dapji {

constexpr int kKvSegment = 256;  // positions of one softmax
constexpr int kKvTile = 64;      // positions whose keys or values are unpacked together

// The cache of one layer and kv head as one sequence sees it. Nothing is owned.
struct KvView {
  const KvTile* tile;
  std::byte* head;            // tile of (block 0, this kv head)
  std::size_t block_stride;   // bytes from block to block
  const std::int32_t* table;  // [n] the sequence's blocks by position / 16
};

// How far back a row sees; 0: there is no such limit.
struct Reach {
  int window;  // itself and window - 1 positions before
  int chunk;   // those of its own chunk of so many positions, from position 0 on

  // The first position that a row at `position` sees.
  DAPJI_INLINE int first(int position) const {
    const int near = window == 0 || position < window ? 0 : position - window + 1;
    const int own = chunk == 0 ? 0 : position - position % chunk;
    return near > own ? near : own;
  }
};

// One work item: consecutive query rows of one sequence against one kv head.
struct AttentionItem {
  KvView kv;
  const float* q;      // first query row, first query head of this kv head; not yet transformed
  std::size_t stride;  // floats from query row to query row, in q and out
  float* out;          // like q, may be q; null: leave the segments unmerged in `partials`
  int value_dim;       // of a head in out, and in q
  // Latent attention: the part of the queries that is rotated, [group, query.rope_dim] of each row. The other part is
  // multiplied by the latents as it is.
  const float* q_rope;  // null: this is none
  std::size_t rope_stride;
  HeadTransform query;
  int n_rows;    // query rows, n_rows * group <= kMaxQueryRows
  int group;     // query heads of this kv head, side by side
  int position;  // of the first query row
  Reach reach;
  float scale;               // of the scores
  const float* temperature;  // [context] factor of the scores by the row's position, or null
  float softcap;             // of the scores, 0: none
  int segment, end_segment;  // to attend to; where there is an `out`, all that a row sees
  float* partials;           // [end_segment - segment] of attention_partial_floats, where there is no `out`
};

constexpr int kQueryPart = 64;      // dimensions that lie together of a transformed query
constexpr int kMaxQueryRows = 168;  // query rows x heads that share one pass over K and V

DAPJI_INLINE int padded(int dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

// Floats of one partial state: (max, sum) of each row, then acc [rows][Dp], Dp = padded(value_dim).
DAPJI_INLINE std::size_t attention_partial_floats(int rows, int value_dim) {
  return static_cast<std::size_t>(rows) * (2 + padded(value_dim));
}

// Floats of a transformed query.
DAPJI_INLINE std::size_t query_floats(int key_dim) {
  return static_cast<std::size_t>(key_dim + kQueryPart - 1) / kQueryPart * kQueryPart;
}

// Floats of scratch that one worker needs for heads of this size.
inline std::size_t attention_scratch_floats(int key_dim, int value_dim) {
  const std::size_t rows = kMaxQueryRows, values = padded(value_dim), keys = padded(key_dim);
  return rows * (query_floats(key_dim) + kKvSegment + 2 * values + 4) + kKvTile * (keys > values ? keys : values);
}

template <class S>
struct Attention {
  using F = typename S::F;
  using Tiles = KvTiles<S>;

  // ---- one work item ----

  // scratch: attention_scratch_floats, 64-byte aligned.
  static void attend(const AttentionItem& item, float* scratch) {
    switch (item.kv.tile->format) {
      case KvFormat::f32:
        return attend<typename Tiles::Float32>(item, scratch);
      case KvFormat::f16:
        return attend<typename Tiles::Float16>(item, scratch);
      case KvFormat::q8:
        return attend<typename Tiles::Codes8>(item, scratch);
    }
  }

  // Merges the partial states of one of n_rows rows, segments in order. partials: [n_segments] of
  // attention_partial_floats(n_rows, value_dim); out: [value_dim]; scratch: [Dp].
  static void combine(const float* partials, int n_segments, int n_rows, int row, int value_dim, float* out,
                      float* scratch) {
    const std::size_t size = attention_partial_floats(n_rows, value_dim), dim = padded(value_dim);
    float total_max = kLowest, total_sum = 0;
    std::memset(scratch, 0, sizeof(float) * dim);
    for (int segment = 0; segment < n_segments; ++segment) {
      const float* const partial = partials + segment * size;
      merge(partial[row], partial[n_rows + row], partial + n_rows * 2 + row * dim, static_cast<int>(dim), total_max,
            total_sum, scratch);
    }
    finish(scratch, total_sum, value_dim, out);
  }

 private:
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLowest = -1e30f;  // below every score; finite, so that differences are never NaN
  static constexpr int kSegmentBlocks = kKvSegment / kKvBlock, kTileBlocks = kKvTile / kKvBlock;
  // A product's tile of registers: kRows x kVectors sums, beside them the vectors of one factor and one of the other. A
  // vector is one of 32 registers with AVX-512, two of 16 with AVX2, four of 32 with NEON.
  static constexpr bool kOneRegister = alignof(F) == sizeof(F);
  static constexpr int kVectors = kOneRegister ? 4 : 1, kRows = S::isa == Isa::generic ? 2 : 6;
  // Up to so many rows multiply the cache as it lies, in one pass. For more it pays to unpack it first.
  static constexpr int kFewRows = kOneRegister ? 12 : kRows;
  static constexpr int vectors_beside(int rows) { return rows <= kRows ? kVectors : kVectors / 2; }

  // ---- the softmax ----

  // 2^x for x <= 0, within 1.7e-7 of it, 1 for 0; 0 from -127 on. Between -127 and -126 any number below 2^-126.
  static DAPJI_INLINE F exp2(F x) {
    x = S::max(S::set(-127.0f), x);
    const F magic = S::set(0x1.8p23f);  // a sum with it is rounded to an integer, which its lowest bits then hold
    const F n = S::add(x, magic);
    const F r = S::sub(x, S::sub(n, magic));
    F p = S::set(1.3264727e-3f);  // of the polynomials of degree 5 with p(0) = 1, that of least relative error
    p = S::fma(p, r, S::set(9.671513e-3f));
    p = S::fma(p, r, S::set(5.5507336e-2f));
    p = S::fma(p, r, S::set(0.24022242f));
    p = S::fma(p, r, S::set(0.693147f));
    p = S::fma(p, r, S::set(1.0f));
    return S::as_float(S::add_int(S::as_int(p), S::template shl32<23>(S::as_int(n))));
  }

  // 2^n for an integer n <= 0; 0 from -127 on, and for NaN.
  static DAPJI_INLINE float power_of_two(float n) {
    if (!(n > -127.0f)) return 0;
    const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  }

  // Turns scores [rows][blocks * 16 of kKvSegment] into probabilities relative to 2^max. Two passes, since that of one
  // row is a long chain: so the processor can work on several rows at once.
  static DAPJI_INLINE void softmax(float* scores, int rows, int blocks, float* max, float* sum) {
    for (int row = 0; row < rows; ++row) {
      F most = S::set(kLowest);
      for (int b = 0; b < blocks; ++b) most = S::max(most, S::load(scores + row * kKvSegment + b * kKvBlock));
      max[row] = __builtin_ceilf(S::max(most));
    }
    for (int row = 0; row < rows; ++row) {
      const F most = S::set(max[row]);
      F sums = S::zero();
      for (int b = 0; b < blocks; ++b) {
        float* const at = scores + row * kKvSegment + b * kKvBlock;
        const F p = exp2(S::sub(S::load(at), most));
        S::store(at, p);
        sums = S::add(sums, p);
      }
      sum[row] = S::sum(sums);
    }
  }

  // A row that sees nothing of a segment has the sum 0 there, and no acc.
  static DAPJI_INLINE void merge(float max, float sum, const float* acc, int padded, float& total_max,
                                 float& total_sum, float* total) {
    if (sum == 0) return;
    const float most = max > total_max ? max : total_max;
    const float keep = power_of_two(total_max - most), take = power_of_two(max - most);
    total_max = most;
    total_sum = total_sum * keep + sum * take;
    for (int d = 0; d < padded; d += kLanes) {
      S::store(total + d, S::fma(S::load(acc + d), S::set(take), S::mul(S::load(total + d), S::set(keep))));
    }
  }

  static DAPJI_INLINE void finish(const float* total, float sum, int value_dim, float* out) {
    const F divisor = S::set(sum);
    for (int d = 0; d < value_dim; d += kLanes) {
      const int n = value_dim - d < kLanes ? value_dim - d : kLanes;
      S::store(out + d, S::div(S::load(total + d), divisor), n);
    }
  }

  // ---- the products ----

  // Calls work(std::integral_constant<int, Rows>, row) for groups of `Most` rows and the rest.
  template <int Most, class Work>
  static DAPJI_INLINE void for_rows(int row, int rows, const Work& work) {
    for (; row + Most <= rows; row += Most) work(std::integral_constant<int, Most>{}, row);
    if constexpr (Most > 1) {
      if (row < rows) for_rows<Most - 1>(row, rows, work);
    }
  }

  // Calls work(std::integral_constant<int, Vectors>, i) for groups of `Most` vectors and the rest.
  template <int Most, class Work>
  static DAPJI_INLINE void for_vectors(int i, int end, const Work& work) {
    for (; i + Most <= end; i += Most) work(std::integral_constant<int, Most>{}, i);
    if constexpr (Most > 1) {
      if (i < end) for_vectors<Most / 2>(i, end, work);
    }
  }

  // How the factors of a product lie: in parts of `part` columns; all strides in floats.
  struct Factors {
    int row_stride, part, part_stride;
  };
  static constexpr Factors kQueries{kQueryPart, kQueryPart, kMaxQueryRows * kQueryPart};
  static constexpr Factors kProbabilities{kKvSegment, kKvBlock, kKvBlock};

  // out [Rows][Vectors * 16] = start + factors [Rows][n] columns [n][Vectors * 16]; start: 0 or, if `add`, out.
  // columns(part, vector): the vectors of one part.
  template <int Rows, int Vectors, const Factors& kFactors, class Columns>
  static DAPJI_INLINE void multiply(const float* factors, int n, const Columns& columns, bool add, float* out,
                                    std::size_t out_stride) {
    F sum[Rows][Vectors];
    DAPJI_UNROLL
    for (int row = 0; row < Rows; ++row) {
      DAPJI_UNROLL
      for (int v = 0; v < Vectors; ++v) sum[row][v] = add ? S::load(out + row * out_stride + v * kLanes) : S::zero();
    }
    for (int part = 0; n > 0; ++part, n -= kFactors.part, factors += kFactors.part_stride) {
      decltype(columns(0, 0)) column[Vectors];
      DAPJI_UNROLL
      for (int v = 0; v < Vectors; ++v) column[v] = columns(part, v);
      const int size = n < kFactors.part ? n : kFactors.part;
      for (int i = 0; i < size; ++i) {
        F x[Vectors];
        DAPJI_UNROLL
        for (int v = 0; v < Vectors; ++v) x[v] = column[v][i];
        DAPJI_UNROLL
        for (int row = 0; row < Rows; ++row) {
          const F factor = S::set(factors[row * kFactors.row_stride + i]);
          DAPJI_UNROLL
          for (int v = 0; v < Vectors; ++v) sum[row][v] = S::fma(factor, x[v], sum[row][v]);
        }
      }
    }
    DAPJI_UNROLL
    for (int row = 0; row < Rows; ++row) {
      DAPJI_UNROLL
      for (int v = 0; v < Vectors; ++v) S::store(out + row * out_stride + v * kLanes, sum[row][v]);
    }
  }

  // ---- putting them together ----

  // Views into a worker's scratch.
  struct State {
    float* unpacked;   // [kTileBlocks] blocks' keys or values
    float* scores;     // [rows][kKvSegment], then probabilities
    float* acc;        // [rows][Dp] of the current segment
    float* total;      // [rows][Dp] of the segments merged so far
    float* max;        // [rows] of the current segment
    float* sum;        // [rows]
    float* total_max;  // [rows]
    float* total_sum;  // [rows]
    float* q;          // [Dh / kQueryPart][kMaxQueryRows][kQueryPart] transformed and scaled
    int rows;
    int padded;  // Dp

    State(float* scratch, int n_rows, int key_dim, int value_dim) : rows(n_rows), padded(dapji::padded(value_dim)) {
      const auto take = [&](std::size_t n) {
        float* start = scratch;
        scratch += n;
        return start;
      };
      const std::size_t most = kMaxQueryRows;
      scores = take(most * kKvSegment);
      acc = take(most * padded);
      total = take(most * padded);
      max = take(most);
      sum = take(most);
      total_max = take(most);
      total_sum = take(most);
      q = take(most * query_floats(key_dim));
      unpacked = scratch;
    }
  };

  // Blocks of a segment, counted from its start.
  struct Blocks {
    int from, to;
    DAPJI_INLINE Blocks within(Blocks other) const {
      return {from > other.from ? from : other.from, to < other.to ? to : other.to};
    }
  };

  // What any of the rows sees. Blocks before all windows are not read: they may have been given back.
  static DAPJI_INLINE Blocks seen(const AttentionItem& item, int segment, int row, int n_rows) {
    const int first = item.position + row / item.group;
    const int last = item.position + (row + n_rows - 1) / item.group - segment * kKvSegment;
    const int oldest = item.reach.first(first) - segment * kKvSegment;
    return Blocks{oldest < 0 ? 0 : oldest / kKvBlock, last < 0 ? 0 : last / kKvBlock + 1}.within({0, kSegmentBlocks});
  }

  // Softcap of the scores of these blocks.
  static DAPJI_INLINE void cap(float softcap, int n_rows, Blocks blocks, float* scores) {
    const float scaled = softcap * kLog2E;
    const F most = S::set(scaled), inverse = S::set(1.0f / scaled);
    for (int i = 0; i < n_rows; ++i, scores += kKvSegment) {
      for (int b = blocks.from; b < blocks.to; ++b) {
        float* const at = scores + b * kKvBlock;
        S::store(at, dapji::softcap<S>(S::load(at), most, inverse));
      }
    }
  }

  // Hides what of the block at `position` a row does not see: its score becomes -infinity.
  static DAPJI_INLINE void mask(const AttentionItem& item, int position, int row, int n_rows, float* scores) {
    constexpr float inf = __builtin_inff();
    alignas(64) static constexpr float kEdges[3 * kLanes] = {
        -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf,
        inf,  inf,  inf,  inf,  inf,  inf,  inf,  inf,  inf,  inf,  inf,  inf,  inf,  inf,  inf,  inf,
        -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf};
    const int first = item.position + row / item.group, last = item.position + (row + n_rows - 1) / item.group;
    if (position + kKvBlock - 1 <= first && position >= item.reach.first(last)) return;
    const auto lane = [](int i) { return i < -1 ? -1 : i > kLanes - 1 ? kLanes - 1 : i; };
    for (int i = 0; i < n_rows; ++i, scores += kKvSegment) {
      const int own = item.position + (row + i) / item.group, oldest = item.reach.first(own);
      const F limit = S::min(S::load(kEdges + 2 * kLanes - 1 - lane(own - position)),
                             S::load(kEdges + kLanes - 1 - lane(oldest - 1 - position)));
      S::store(scores, S::min(S::load(scores), limit));
    }
  }

  template <class Format>
  static void attend(const AttentionItem& item, float* scratch) {
    const KvTile& tile = *item.kv.tile;
    const int rows = item.n_rows * item.group;
    const std::size_t dim = tile.head_dim, value_dim = item.value_dim;
    const State state(scratch, rows, tile.head_dim, item.value_dim);
    const std::size_t padded = state.padded;

    for (int row = 0; row < rows; ++row) {
      const int position = item.position + row / item.group;
      const float scale = item.scale * kLog2E * (item.temperature == nullptr ? 1.0f : item.temperature[position]);
      float* const query = state.scores;
      const std::size_t token = row / item.group, head = row % item.group;
      const float* const q = item.q + token * item.stride + head * value_dim;
      if (item.q_rope == nullptr) {
        RowOps<S>::transform(item.query, q, position, tile.head_dim, scale, query, query + query_floats(tile.head_dim));
      } else {
        RowOps<S>::rotate(q, nullptr, nullptr, 0, item.value_dim, scale, query);
        RowOps<S>::transform(item.query, item.q_rope + token * item.rope_stride + head * item.query.rope_dim, position,
                             item.query.rope_dim, scale, query + value_dim, nullptr);
      }
      for (std::size_t d = 0; d < dim; d += kQueryPart) {
        std::memcpy(state.q + d * kMaxQueryRows + row * kQueryPart, query + d, sizeof(float) * kQueryPart);
      }
    }

    const bool few = rows <= kFewRows && !tile.shared;
    const auto attend_segment = few ? Attention::attend_segment<Format, true> : Attention::attend_segment<Format, false>;
    if (item.out == nullptr) {
      float* partial = item.partials;
      for (int segment = item.segment; segment < item.end_segment; ++segment) {
        attend_segment(item, segment, state);
        std::memcpy(partial, state.max, sizeof(float) * rows);
        std::memcpy(partial + rows, state.sum, sizeof(float) * rows);
        std::memcpy(partial + 2 * rows, state.acc, sizeof(float) * rows * padded);
        partial += attention_partial_floats(rows, item.value_dim);
      }
      return;
    }
    for (int row = 0; row < rows; ++row) {
      state.total_max[row] = kLowest;
      state.total_sum[row] = 0;
    }
    std::memset(state.total, 0, sizeof(float) * rows * padded);
    for (int segment = item.segment; segment < item.end_segment; ++segment) {
      attend_segment(item, segment, state);
      for (int row = 0; row < rows; ++row) {
        merge(state.max[row], state.sum[row], state.acc + row * padded, state.padded, state.total_max[row],
              state.total_sum[row], state.total + row * padded);
      }
    }
    for (int row = 0; row < rows; ++row) {
      finish(state.total + row * padded, state.total_sum[row], item.value_dim,
             item.out + row / item.group * item.stride + row % item.group * value_dim);
    }
  }

  // The keys of one segment for all rows of the item, from an empty state. Few rows multiply the cache as it lies; for
  // many it is unpacked first, a tile at a time. While keys are read the values of the same blocks are fetched, while
  // values are read the keys of the next segment.
  template <class Format, bool kFew>
  static void attend_segment(const AttentionItem& item, int segment, const State& state) {
    constexpr int kMost = kFew ? kFewRows : kRows;
    const KvTile& tile = *item.kv.tile;
    const int rows = state.rows, dim = tile.head_dim, padded = state.padded;
    const std::int32_t* const table = item.kv.table + segment * kSegmentBlocks;
    const auto block = [&](int b) { return item.kv.head + table[b] * item.kv.block_stride; };
    const int end = Blocks{0, (item.position + item.n_rows - 1) / kKvBlock + 1}
                        .within({0, item.end_segment * kSegmentBlocks}).to - segment * kSegmentBlocks;
    const auto next = [&](int b) { return block(b + kSegmentBlocks < end ? b + kSegmentBlocks : b); };
    const Blocks all = seen(item, segment, 0, rows);
    const auto for_tiles = [&](const auto& work) {
      for (int b = all.from / kTileBlocks * kTileBlocks; b < all.to; b += kTileBlocks) {
        work(all.within({b, b + kTileBlocks}));
      }
    };
    const std::size_t key_bytes = tile.shared ? tile.bytes : tile.v;
    // Of the `bytes` at data(block), the part that falls to n rows.
    const auto fetch = [&](Blocks some, const auto& data, std::size_t bytes, int row, int n) {
      const int lines = static_cast<int>(bytes / 64), from = lines * row / rows, to = lines * (row + n) / rows;
      for (int b = some.from; b < some.to; ++b) {
        for (int i = from; i < to; ++i) Tiles::prefetch(data(b) + i * 64);
      }
    };

    for_tiles([&](Blocks some) {
      const auto unpacked = [&](int b) { return state.unpacked + (b - some.from) * kKvBlock; };  // [Dh][kKvTile]
      if constexpr (!kFew) {
        for (int b = some.from; b < some.to; ++b) {
          if (tile.shared) {
            Tiles::template unpack_shared_keys<Format>(tile, block(b), unpacked(b), kKvTile);
          } else {
            Tiles::unpack(Format::keys(tile, block(b), 0), dim, unpacked(b), kKvTile);
          }
        }
      }
      for_rows<kMost>(0, rows, [&](auto n, int row) {
        const Blocks mine = seen(item, segment, row, n).within(some);
        float* const scores = state.scores + row * kKvSegment;
        for_vectors<vectors_beside(n)>(mine.from, mine.to, [&](auto n_blocks, int first) {
          const auto keys = [&](int part, int i) {
            const int b = first + i, d = part * kQueryPart;
            if constexpr (kFew) {
              using Columns = typename Tiles::template Fetching<typename Format::Keys>;
              return Columns{Format::keys(tile, block(b), d), block(b) + tile.v, d};
            } else {
              return typename Tiles::Floats{unpacked(b) + d * kKvTile, kKvTile};
            }
          };
          multiply<n, n_blocks, kQueries>(state.q + row * kQueryPart, dim, keys, false, scores + first * kKvBlock,
                                          kKvSegment);
        });
        if (item.softcap != 0) cap(item.softcap, n, mine, scores);
        for (int b = mine.from; b < mine.to; ++b) {
          mask(item, (segment * kSegmentBlocks + b) * kKvBlock, row, n, scores + b * kKvBlock);
        }
        if constexpr (!kFew) {  // where values are keys they are here
          if (!tile.shared) fetch(some, [&](int b) { return block(b) + tile.v; }, tile.bytes - tile.v, row, n);
        }
      });
    });

    for_rows<kMost>(0, rows, [&](auto n, int row) {
      const Blocks mine = seen(item, segment, row, n);
      softmax(state.scores + row * kKvSegment + mine.from * kKvBlock, n, mine.to - mine.from, state.max + row,
              state.sum + row);
    });

    for_tiles([&](Blocks some) {
      const auto unpacked = [&](int b, int panel) {  // [kKvTile][Dp]
        return state.unpacked + (b - some.from) * kKvBlock * padded + panel * kLanes;
      };
      if constexpr (!kFew) {
        for (int b = some.from; b < some.to; ++b) {
          for (int panel = 0; panel < padded / kLanes; ++panel) {
            Tiles::unpack(Format::values(tile, block(b), panel), kKvBlock, unpacked(b, panel), padded);
          }
        }
      }
      for_rows<kMost>(0, rows, [&](auto n, int row) {
        const Blocks visible = seen(item, segment, row, n), mine = visible.within(some);
        if (mine.from >= mine.to) return;
        for_vectors<vectors_beside(n)>(0, padded / kLanes, [&](auto n_vectors, int panel) {
          const auto values = [&](int i, int v) {
            const int b = mine.from + i;
            if constexpr (kFew) {
              using Columns = typename Tiles::template Fetching<typename Format::Values>;
              return Columns{Format::values(tile, block(b), panel + v), next(b), (panel + v) * kKvBlock};
            } else {
              return typename Tiles::Floats{unpacked(b, panel + v), static_cast<std::size_t>(padded)};
            }
          };
          multiply<n, n_vectors, kProbabilities>(state.scores + row * kKvSegment + mine.from * kKvBlock,
                                                 (mine.to - mine.from) * kKvBlock, values, mine.from > visible.from,
                                                 state.acc + row * padded + panel * kLanes, padded);
        });
        if constexpr (!kFew) fetch(some, next, key_bytes, row, n);
      });
    });
  }
};

// What a program calls between its matrix products, of one instruction set. None allocates, throws or starts a thread.
struct RowKernels {
  void (*norm)(const float* x, const float* weight, float eps, std::int64_t n, float* out);
  void (*add_norm)(const float* x, const float* weight, float eps, std::int64_t n, float* out);
  void (*softcap)(float cap, std::int64_t n, float* x);
  void (*scores)(const float* logits, std::int64_t n, bool sigmoid, float* out);
  void (*add_weighted)(const float* given, std::size_t ldg, const std::int32_t* rows, const float* weights, int k,
                       std::int64_t n, float* x);
  void (*write_kv)(const KvTile& tile, std::byte* data, int position, const float* k, const float* v,
                   const HeadTransform& key, float* scratch);
  void (*write_latent)(const KvTile& tile, std::byte* data, int position, const float* latent, const float* k_rope,
                       const HeadTransform& key, float* scratch);
  void (*attend)(const AttentionItem& item, float* scratch);
  void (*combine)(const float* partials, int n_segments, int n_rows, int row, int value_dim, float* out,
                  float* scratch);
};

template <class S>
constexpr RowKernels row_kernels() {
  return {RowOps<S>::template norm<false>, RowOps<S>::template norm<true>, RowOps<S>::softcap, RowOps<S>::scores,
          RowOps<S>::add_weighted, KvTiles<S>::write_kv, KvTiles<S>::write_latent, Attention<S>::attend,
          Attention<S>::combine};
}

}  // namespace dapji
