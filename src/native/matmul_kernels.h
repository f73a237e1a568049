// The matrix kernels of matmul.h, written once over a Simd struct. Included by kernels_<isa>.cpp alone.
//
// The sum over columns goes block by block (32 columns). A block's sum of products is an exact integer, whichever
// instructions compute it; then, in float32, sum = fma(block, scale * activation scale, sum), and in affine formats
// sum = fma(min, activation sum, sum). That is the one order of every kernel here: few tokens take their codes from the
// panel in registers (Packed); many first unpack a stretch of a few panels to scratch (Unpacked), where it stays in the
// first-level cache, and then run register tiles of S::rows panels x S::tokens tokens over it.
#pragma once

#include <type_traits>
#include <utility>

#include "layout.h"
#include "matmul.h"

namespace dapji {
namespace {

constexpr int kStretch = 16;        // blocks of a panel that are unpacked at a time, at most
constexpr int kChunk = 768;         // tokens that share one unpacking, at most
constexpr size_t kPrefetch = 3072;  // bytes ahead of what a kernel reads of a panel

// Tokens that share one unpacking: as many as the second-level cache holds the codes of, in whole tiles of any size.
constexpr int64_t chunk_of(int64_t cols) {
  const int64_t fit = (size_t{768} << 10) / static_cast<size_t>(cols) / 48 * 48;
  return fit < 96 ? 96 : fit > kChunk ? kChunk : fit;
}

// Calls f(std::integral_constant) for 0 .. n - 1, unrolled.
template <class Function, int... i>
DAPJI_INLINE void unroll(Function f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>{}), ...);
}
template <int n, class Function>
DAPJI_INLINE void unroll(Function f) {
  unroll(f, std::make_integer_sequence<int, n>{});
}
#define DAPJI_LAMBDA(...) [&](__VA_ARGS__) __attribute__((always_inline))

// What the tile kernels need to know of a format; several formats share a shape.
struct Shape {
  int bits, group, offset;
  bool affine;
};

// Where dot products want signed codes, those of 8 bits are 128 less; the others are below 128 anyway.
template <class S>
constexpr int signed_by(Layout l) {
  return S::signed_codes && l.bits() == 8 ? 128 : 0;
}

template <class S>
constexpr Shape shape_of(Layout l) {
  return {l.bits(), l.group, l.offset - signed_by<S>(l), l.affine};
}

// The same once unpacked. With dot products, codes become 8-bit numbers that all symmetric formats share.
template <class S>
constexpr Shape unpacked_shape(Layout l) {
  if (!S::has_dot) return shape_of<S>(l);
  return {8, l.group, l.affine || S::signed_codes ? 0 : 128, l.affine};
}

// 64 times the same byte.
template <class S>
DAPJI_INLINE typename S::I same_bytes(int value) {
  return S::set_int(static_cast<int32_t>(0x01010101u * static_cast<uint8_t>(value)));
}

// Tokens of the next smaller tile: 6, 4, 2, 1.
constexpr int smaller(int tokens) { return tokens > 2 ? (tokens - 1) / 2 * 2 : 1; }

// An 8-bit code needs two digits of 4 bits where products are added in int16.
template <class S>
constexpr int digits(Shape s) {
  return !S::has_dot && s.bits == 8 ? 2 : 1;
}

// Steps whose products may be added in int16: steps * 2 * code * 127 < 2^15.
constexpr int steps_in_16_bits(Shape s) {
  const int bits = s.bits == 8 ? 4 : s.bits;
  const int steps = bits <= 4 ? 8 : bits == 5 ? 4 : 2;
  return steps < s.group / 4 ? steps : s.group / 4;
}

// One block of 16 rows in a panel, unpacked in registers.
//   code<s, digit>()   step s (columns 4 s .. 4 s + 3): unsigned bytes, signed with signed_codes
//   scale()            float32
//   min()              float32: of the block, or, in groups of 16, of the superblock
//   scales<h>()        groups of 16: integer scale of half h; float32 with has_dot, else int16 twice
//   offsets()          groups of 16 without has_dot: int16 -offset * scale of both halves
//   mins()             groups of 16, affine: int16 integer mins of both halves
template <class S, Format format>
struct Packed {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr Layout l = layout(format);
  static constexpr Shape shape = shape_of<S>(l);

  const uint8_t* unit;
  int block;  // in the unit

  DAPJI_INLINE const uint8_t* codes() const { return unit + l.codes_at() + block * l.block_bytes(); }

  // The bits of plane `p` of step s, in their place.
  template <int s, int width, int shift>
  static DAPJI_INLINE I bits(const uint8_t* plane) {
    constexpr int per_vector = 8 / width, at = s % per_vector * width;
    const I v = S::load_int(plane + 64 * (s / per_vector));
    if constexpr (width == 8) {
      return v;
    } else {
      const I mask = S::set_int(0x01010101 * (((1 << width) - 1) << shift));
      if constexpr (at > shift) {
        return S::and_(S::template shr16<at - shift>(v), mask);
      } else if constexpr (at < shift) {
        return S::and_(S::template shl16<shift - at>(v), mask);
      } else {
        return S::and_(v, mask);
      }
    }
  }

  template <int s, int digit>
  DAPJI_INLINE I code() const {
    I v = bits<s, l.low.width, l.low.shift>(codes());
    if constexpr (l.high.width != 0) {
      v = S::or_(v, bits<s, l.high.width, l.high.shift>(codes() + l.low.bytes()));
    }
    if constexpr (l.levels && S::signed_codes) {
      return S::lookup(S::broadcast16(kLevels), v);
    } else if constexpr (l.levels) {
      alignas(16) static constexpr uint8_t whole[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                        129, 141, 153, 166, 181, 197, 217, 241};
      alignas(16) static constexpr uint8_t low[16] = {1, 8, 13, 15, 15, 13, 10, 6, 1, 13, 9, 6, 5, 5, 9, 1};
      alignas(16) static constexpr uint8_t high[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 13, 15};
      return S::lookup(S::broadcast16(digits<S>(shape) == 1 ? whole : digit == 0 ? low : high), v);
    } else if constexpr (digits<S>(shape) == 2) {
      const I mask = S::set_int(0x0f0f0f0f);
      return S::and_(digit == 0 ? v : S::template shr16<4>(v), mask);
    } else if constexpr (signed_by<S>(l) != 0) {
      return S::add8(v, same_bytes<S>(128));
    } else {
      return v;
    }
  }

  DAPJI_INLINE F scale() const {
    const F d = half(0);
    if constexpr (l.nested() && l.group == 32) {
      const uint8_t* const p = unit + l.scales_at() + 16 * block;
      return S::mul(d, S::to_float(l.affine ? S::widen_u8(p) : S::widen_s8(reinterpret_cast<const int8_t*>(p))));
    } else {
      return d;
    }
  }
  DAPJI_INLINE F min() const {
    const F m = half(l.min_at());
    if constexpr (l.nested() && l.group == 32) {
      return S::mul(m, S::to_float(S::widen_u8(unit + l.mins_at() + 16 * block)));
    } else {
      return m;
    }
  }
  template <int h>
  DAPJI_INLINE auto scales() const {
    if constexpr (S::has_dot) {
      return S::to_float(integer_scale(h));
    } else {
      return S::pair16(integer_scale(h), integer_scale(h));
    }
  }
  DAPJI_INLINE I offsets() const {
    const I factor = S::set_int(-l.offset & 0xffff);  // (-offset, 0)
    return S::pair16(S::madd16(integer_scale(0), factor), S::madd16(integer_scale(1), factor));
  }
  DAPJI_INLINE I mins() const {
    const uint8_t* const p = unit + l.scales_at() + 32 * block;
    return S::pair16(S::template shr32<4>(S::widen_u8(p)), S::template shr32<4>(S::widen_u8(p + 16)));
  }

 private:
  DAPJI_INLINE F half(int at) const { return S::load_f16(reinterpret_cast<const uint16_t*>(unit + at)); }
  DAPJI_INLINE I integer_scale(int h) const {
    const uint8_t* const p = unit + l.scales_at() + 32 * block + 16 * h;
    if constexpr (l.affine) {
      return S::and_(S::widen_u8(p), S::set_int(15));
    } else {
      return S::widen_s8(reinterpret_cast<const int8_t*>(p));
    }
  }
};

// The same block unpacked to memory, which several formats share: what differs between them is gone.
template <class S, int bits, int group, int offset_, bool affine>
struct Unpacked {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr Shape shape{bits, group, offset_, affine};
  static constexpr int n_digits = digits<S>(shape);
  static constexpr bool halved = group == 16;

  // Vectors of a block: codes [8][n_digits], scale, then what the shape has of the others.
  static constexpr int scale_at = 8 * n_digits;
  static constexpr int scales_at = scale_at + 1;
  static constexpr int min_at = scales_at + (halved ? 2 : 0);
  static constexpr int mins_at = min_at + (affine ? 1 : 0);
  static constexpr int offsets_at = mins_at + (halved && affine ? 1 : 0);
  static constexpr int vectors = offsets_at + (halved && offset_ != 0 && !S::has_dot ? 1 : 0);
  static constexpr int bytes = 64 * vectors;

  const uint8_t* data;

  template <class P>
  static DAPJI_INLINE void store(const P& packed, uint8_t* out) {
    constexpr int more = offset_ - P::shape.offset;
    unroll<8>(DAPJI_LAMBDA(auto s) {
      unroll<n_digits>(DAPJI_LAMBDA(auto digit) {
        I code = packed.template code<s, digit>();
        if constexpr (more != 0) code = S::add8(code, same_bytes<S>(more));
        S::store_int(out + 64 * (s * n_digits + digit), code);
      });
    });
    S::store(at(out, scale_at), packed.scale());
    if constexpr (halved) {
      if constexpr (S::has_dot) {
        S::store(at(out, scales_at), packed.template scales<0>());
        S::store(at(out, scales_at + 1), packed.template scales<1>());
      } else {
        S::store_int(out + 64 * scales_at, packed.template scales<0>());
        S::store_int(out + 64 * (scales_at + 1), packed.template scales<1>());
      }
    }
    if constexpr (affine) S::store(at(out, min_at), packed.min());
    if constexpr (halved && affine) S::store_int(out + 64 * mins_at, packed.mins());
    if constexpr (halved && offset_ != 0 && !S::has_dot) S::store_int(out + 64 * offsets_at, packed.offsets());
  }

  template <int s, int digit>
  DAPJI_INLINE I code() const {
    return S::load_int(data + 64 * (s * n_digits + digit));
  }
  DAPJI_INLINE F scale() const { return S::load(at(data, scale_at)); }
  DAPJI_INLINE F min() const { return S::load(at(data, min_at)); }
  template <int h>
  DAPJI_INLINE auto scales() const {
    if constexpr (S::has_dot) {
      return S::load(at(data, scales_at + h));
    } else {
      return S::load_int(data + 64 * (scales_at + h));
    }
  }
  DAPJI_INLINE I offsets() const { return S::load_int(data + 64 * offsets_at); }
  DAPJI_INLINE I mins() const { return S::load_int(data + 64 * mins_at); }

 private:
  static DAPJI_INLINE const float* at(const uint8_t* data, int vector) {
    return reinterpret_cast<const float*>(data + 64 * vector);
  }
  static DAPJI_INLINE float* at(uint8_t* data, int vector) { return reinterpret_cast<float*>(data + 64 * vector); }
};

// One block of the activations of a tile's tokens, as Quantized has them.
struct Activations {
  const int8_t* codes;
  const float* scales;
  const float* sums;
  const int32_t* starts;
  const int32_t* half_starts;
  const int16_t* halves;

  // at: of the first token, x.at(token, block)
  DAPJI_INLINE Activations(const Quantized& x, int64_t at) {
    codes = x.codes + at * kBlock;
    scales = x.scales + at;
    sums = x.sums + at;
    starts = x.starts + at;
    half_starts = x.half_starts + 2 * at;
    halves = x.halves + 2 * at;
  }
  DAPJI_INLINE void next_block(int tile) {
    codes += kBlock * tile;
    scales += tile;
    sums += tile;
    starts += tile;
    half_starts += 2 * tile;
    halves += 2 * tile;
  }
};

// The exact integer sum of products of steps `from` to `from + n - 1`, for R panels x T tokens, added to `sum`.
template <class S, int R, int T, int from, int n, class Block>
DAPJI_INLINE void products(const Block* w, const Activations& x, typename S::I (&sum)[R][T]) {
  using I = typename S::I;
  if constexpr (S::has_dot) {
    unroll<n>(DAPJI_LAMBDA(auto step) {
      constexpr int s = from + step;
      I code[R];
      for (int r = 0; r < R; ++r) code[r] = w[r].template code<s, 0>();
      for (int t = 0; t < T; ++t) {
        const I v = S::broadcast4(x.codes + t * kBlock + 4 * s);
        for (int r = 0; r < R; ++r) sum[r][t] = S::dot(sum[r][t], code[r], v);
      }
    });
  } else {
    constexpr int together = steps_in_16_bits(Block::shape);
    unroll<n / together * digits<S>(Block::shape)>(DAPJI_LAMBDA(auto i) {
      constexpr int digit = i % digits<S>(Block::shape), part = i / digits<S>(Block::shape);
      I narrow[R][T];
      unroll<together>(DAPJI_LAMBDA(auto step) {
        constexpr int s = from + part * together + step;
        I code[R];
        for (int r = 0; r < R; ++r) code[r] = w[r].template code<s, digit>();
        for (int t = 0; t < T; ++t) {
          const I v = S::broadcast4(x.codes + t * kBlock + 4 * s);
          for (int r = 0; r < R; ++r) {
            const I two = S::dot16(code[r], v);
            narrow[r][t] = step == 0 ? two : S::add16(narrow[r][t], two);
          }
        }
      });
      for (int r = 0; r < R; ++r) {
        I factor;
        if constexpr (Block::shape.group == 16) {
          factor = w[r].template scales<from / 4>();
        } else {
          factor = S::set_int(digit == 0 ? 0x00010001 : 0x00100010);
        }
        for (int t = 0; t < T; ++t) sum[r][t] = S::add_int(sum[r][t], S::madd16(narrow[r][t], factor));
      }
    });
  }
}

// -offset * sum of the codes, where `start` is -128 times it: offsets are powers of two.
template <class S, int offset>
DAPJI_INLINE typename S::I start_of(const int32_t* start) {
  if constexpr (offset == 0) {
    return S::set_int(0);
  } else if constexpr (offset == 128) {
    return S::broadcast4(start);
  } else {
    return S::template sra32<offset == 4 ? 5 : offset == 8 ? 4 : offset == 16 ? 3 : 2>(S::broadcast4(start));
  }
}

// The exact sums of a block's products, R panels x T tokens: of its 32 columns, or, with dot products in groups of 16, of
// one half.
template <class S, int R, int T, class Block>
struct Products {
  using I = typename S::I;
  static constexpr int offset = Block::shape.offset;

  const Block* w;
  const Activations& x;

  template <int half>
  DAPJI_INLINE void sums(I (&exact)[R][T]) const {
    for (int t = 0; t < T; ++t) {
      for (int r = 0; r < R; ++r) {
        if constexpr (Block::shape.group == 32) {
          exact[r][t] = start_of<S, offset>(x.starts + t);
        } else if constexpr (S::has_dot) {
          exact[r][t] = start_of<S, offset>(x.half_starts + 2 * t + half);
        } else if constexpr (offset != 0) {
          exact[r][t] = S::madd16(w[r].offsets(), S::broadcast4(x.halves + 2 * t));
        } else {
          exact[r][t] = S::set_int(0);
        }
      }
    }
    if constexpr (Block::shape.group == 32) {
      products<S, R, T, 0, 8>(w, x, exact);
    } else if constexpr (S::has_dot) {
      products<S, R, T, 4 * half, 4>(w, x, exact);
    } else {
      products<S, R, T, 0, 4>(w, x, exact);
      products<S, R, T, 4, 4>(w, x, exact);
    }
  }
};

// sum += one block, for R panels x T tokens. products: as Products.
template <class S, int R, int T, class Block, class Sums>
DAPJI_INLINE void add_block(const Block* w, const Activations& x, const Sums& products, typename S::F (&sum)[R][T]) {
  using F = typename S::F;
  using I = typename S::I;
  F block[R][T];
  if constexpr (Block::shape.group == 32 || !S::has_dot) {
    I exact[R][T];
    products.template sums<0>(exact);
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) block[r][t] = S::to_float(exact[r][t]);
    }
  } else {
    // An integer below 2^24 at every point, so that float32 holds it exactly.
    unroll<2>(DAPJI_LAMBDA(auto half) {
      I exact[R][T];
      products.template sums<half>(exact);
      for (int r = 0; r < R; ++r) {
        const F scale = w[r].template scales<half>();
        for (int t = 0; t < T; ++t) {
          const F product = S::to_float(exact[r][t]);
          block[r][t] = half == 0 ? S::mul(product, scale) : S::fma(product, scale, block[r][t]);
        }
      }
    });
  }
  for (int r = 0; r < R; ++r) {
    const F scale = w[r].scale();
    for (int t = 0; t < T; ++t) {
      const F both = S::mul(scale, S::set(x.scales[t]));
      sum[r][t] = S::fma(block[r][t], both, sum[r][t]);
    }
    if constexpr (Block::shape.affine && Block::shape.group == 32) {
      const F min = w[r].min();
      for (int t = 0; t < T; ++t) sum[r][t] = S::fma(min, S::set(x.sums[t]), sum[r][t]);
    } else if constexpr (Block::shape.affine) {
      const F min = w[r].min();
      const I mins = w[r].mins();
      for (int t = 0; t < T; ++t) {
        const I exact = S::madd16(mins, S::broadcast4(x.halves + 2 * t));
        sum[r][t] = S::fma(S::to_float(exact), S::mul(min, S::set(x.scales[t])), sum[r][t]);
      }
    }
  }
}

// Asks for as much as a block takes, further on in the panel. Into the second-level cache: the first one's few buffers for
// lines on their way would be full, and the loads between would wait.
template <Format format>
DAPJI_INLINE void prefetch_block(const uint8_t* unit, int block) {
  constexpr int bytes = layout(format).unit_bytes() / layout(format).blocks;
  const uint8_t* const from = unit + kPrefetch + block * bytes;
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
}

// A finished vector of 16 rows of panel p on its way to the row of token t of y.
template <class S>
DAPJI_INLINE void finish(typename S::F r, const PanelsView& w, int64_t p, const Epilogue& e, int64_t t, float* y,
                         size_t ldy) {
  const int64_t rest = w.rows - 16 * p;
  const int n = rest < 16 ? static_cast<int>(rest) : 16;
  float* const at = y + static_cast<size_t>(t) * ldy + 16 * p;
  const RowChange change = e.changes == nullptr ? RowChange{} : e.changes[t];
  const float* const term = change.term == nullptr ? nullptr : change.term + (16 * p - e.terms_from);
  if (change.factors != nullptr) r = S::mul(S::add(r, S::load(term, n)), S::load(change.factors + 16 * p, n));
  if (e.bias != nullptr) r = S::add(r, S::load(e.bias + 16 * p, n));
  if (term != nullptr && change.factors == nullptr) r = S::add(r, S::load(term, n));
  if (e.kind == Epilogue::Kind::add) {
    r = S::add(S::load(at, n), r);
  } else if (e.kind == Epilogue::Kind::gate) {
    r = S::mul(activate<S>(e.activation, S::load(at, n)), r);
  }
  S::store(at, r, n);
}

// ---- few tokens: codes straight from the panels, which a step reads from memory once ----

// One panel for the tokens from `token` on; those after the first T find it in the cache.
template <class S, Format format, int T>
DAPJI_INLINE void few_tokens(const PanelsView& w, const Quantized& x, int64_t tokens, int64_t token, int64_t p, float* y,
                             size_t ldy, const Epilogue& epilogue) {
  constexpr Layout l = layout(format);
  const int64_t units = x.cols / kBlock / l.blocks;
  for (; token + T <= tokens; token += T) {
    const uint8_t* unit = w.data + static_cast<size_t>(p) * w.panel_bytes;
    typename S::F sum[1][T];
    for (int t = 0; t < T; ++t) sum[0][t] = S::zero();
    Activations a(x, token);  // of the only tile
    for (int64_t u = 0; u < units; ++u, unit += l.unit_bytes()) {
      for (int b = 0; b < l.blocks; ++b) {
        prefetch_block<format>(unit, b);
        const Packed<S, format> block{unit, b};
        add_block<S>(&block, a, Products<S, 1, T, Packed<S, format>>{&block, a}, sum);
        a.next_block(x.tile);
      }
    }
    for (int t = 0; t < T; ++t) finish<S>(sum[0][t], w, p, epilogue, token + t, y, ldy);
  }
  if constexpr (T > 1) {
    if (token < tokens) few_tokens<S, format, smaller(T)>(w, x, tokens, token, p, y, ldy, epilogue);
  }
}

// ---- many tokens: a stretch of R panels is unpacked once for all of them ----

// What all tiles of one stretch of a few panels share.
struct Stretch {
  const uint8_t* codes;  // [panels][kStretch] blocks, unpacked
  int n_blocks;
  int64_t first_block;
  bool first, last;  // of the panels' columns
  float* partials;   // [panels][kChunk][16] sums between stretches; float32 stores and loads change no bits
  const Quantized& x;
  int64_t tokens;
  const PanelsView& w;
  int64_t panel;
  const Epilogue& epilogue;
  float* y;
  size_t ldy;
};

// The sums so far of R panels from `panel` of the stretch on, and T tokens; those beyond the last do not matter.
template <class S, int R, int T>
DAPJI_INLINE void load_sums(const Stretch& s, int panel, int64_t token, typename S::F (&sum)[R][T]) {
  unroll<T>(DAPJI_LAMBDA(auto t) {
    // What will be written is fetched while the sums are made.
    if (s.last) __builtin_prefetch(s.y + static_cast<size_t>(token + t) * s.ldy + 16 * (s.panel + panel), 1);
    unroll<R>(DAPJI_LAMBDA(auto r) {
      sum[r][t] = s.first ? S::zero() : S::load(s.partials + ((panel + r) * kChunk + token + t) * kLanes);
    });
  });
}

template <class S, int R, int T>
DAPJI_INLINE void store_sums(const Stretch& s, int panel, int64_t token, const typename S::F (&sum)[R][T]) {
  if (!s.last) {
    unroll<T>(DAPJI_LAMBDA(auto t) {
      unroll<R>(DAPJI_LAMBDA(auto r) {
        S::store(s.partials + ((panel + r) * kChunk + token + t) * kLanes, sum[r][t]);
      });
    });
    return;
  }
  unroll<T>(DAPJI_LAMBDA(auto t) {
    if (token + t < s.tokens) {
      unroll<R>(DAPJI_LAMBDA(auto r) {
        finish<S>(sum[r][t], s.w, s.panel + panel + r, s.epilogue, token + t, s.y, s.ldy);
      });
    }
  });
}

template <class S, class Block, int R, int T>
void run_tokens(const Stretch& s, int64_t token) {
  for (; token + T <= s.tokens; token += T) {
    typename S::F sum[R][T];
    load_sums<S>(s, 0, token, sum);
    const int64_t tile = token / S::tokens * (s.x.cols / kBlock) + s.first_block;
    Activations a(s.x, tile * S::tokens + token % S::tokens);
    for (int b = 0; b < s.n_blocks; ++b) {
      Block w[R];
      for (int r = 0; r < R; ++r) w[r].data = s.codes + (r * kStretch + b) * Block::bytes;
      add_block<S>(w, a, Products<S, R, T, Block>{w, a}, sum);
      a.next_block(S::tokens);
    }
    store_sums<S>(s, 0, token, sum);
  }
  if constexpr (T > 1) {
    if (token < s.tokens) run_tokens<S, Block, R, smaller(T)>(s, token);
  }
}

// The products of one block that a matrix unit has left in memory, of T of its 16 tokens.
template <class S, int T>
struct TileProducts {
  const int32_t* tile;  // [halves][16 tokens][16 rows]
  template <int half>
  DAPJI_INLINE void sums(typename S::I (&exact)[1][T]) const {
    for (int t = 0; t < T; ++t) exact[0][t] = S::load_int(tile + (16 * half + t) * kLanes);
  }
};

// As run_tokens, by a matrix unit: the products of a stretch first, then their scales, since the two do not overlap well
// (docs/panels.md). The last tile may have fewer tokens than 16; what becomes of the others is not used.
template <class S, class Block, int R>
void run_tiles(const Stretch& s) {
  constexpr int halves = Block::halved ? 2 : 1, T = 8;
  alignas(64) int32_t products[kStretch][halves][16][kLanes];
  for (int64_t token = 0; token < s.tokens; token += 16) {
    const int64_t at = (token / 16 * (s.x.cols / kBlock) + s.first_block) * 16;
    for (int r = 0; r < R; ++r) {
      const uint8_t* const codes = s.codes + r * kStretch * Block::bytes;
      for (int b = 0; b < s.n_blocks; ++b) {
        for (int half = 0; half < halves; ++half) {
          S::multiply_tile(s.x.codes + (at + 16 * b) * kBlock + 16 * half, codes + b * Block::bytes + 256 * half,
                           products[b][half][0]);
        }
      }
      for (int t = 0; t < 16; t += T) {
        typename S::F sum[1][T];
        load_sums<S>(s, r, token + t, sum);
        Activations a(s.x, at + t);
        for (int b = 0; b < s.n_blocks; ++b) {
          const Block w{codes + b * Block::bytes};
          add_block<S>(&w, a, TileProducts<S, T>{products[b][0][t]}, sum);
          a.next_block(16);
        }
        store_sums<S>(s, r, token + t, sum);
      }
    }
  }
}

template <class S, Format format, int R>
void some_panels(const PanelsView& w, const Quantized& x, int64_t tokens, int64_t p, float* y, size_t ldy,
                 const Epilogue& epilogue, uint8_t* scratch) {
  constexpr Layout l = layout(format);
  constexpr Shape shape = unpacked_shape<S>(l);
  using Block = Unpacked<S, shape.bits, shape.group, shape.offset, shape.affine>;
  static_assert(S::rows * (kStretch * Block::bytes + kChunk * kLanes * 4) <= kScratchBytes);
  float* const partials = reinterpret_cast<float*>(scratch + R * kStretch * Block::bytes);
  constexpr int stretch_blocks = S::has_tiles && Block::halved ? kStretch / 2 : kStretch;
  const int64_t n_blocks = x.cols / kBlock, n_stretches = (n_blocks + stretch_blocks - 1) / stretch_blocks;
  int64_t first_block = 0;
  for (int64_t stretch = 0; stretch < n_stretches; ++stretch) {
    const int n = static_cast<int>((stretch + 1) * n_blocks / n_stretches - first_block);
    for (int r = 0; r < R; ++r) {
      const uint8_t* const panel = w.data + static_cast<size_t>(p + r) * w.panel_bytes;
      for (int b = 0; b < n; ++b) {
        const int64_t block = first_block + b;
        const uint8_t* const unit = panel + block / l.blocks * l.unit_bytes();
        const int in_unit = static_cast<int>(block % l.blocks);
        prefetch_block<format>(unit, in_unit);
        Block::store(Packed<S, format>{unit, in_unit}, scratch + (r * kStretch + b) * Block::bytes);
      }
    }
    const Stretch s{scratch,  n, first_block, stretch == 0, stretch == n_stretches - 1, partials, x,
                    tokens,   w, p,           epilogue,     y,                          ldy};
    if constexpr (S::has_tiles) {
      run_tiles<S, Block, R>(s);
    } else {
      run_tokens<S, Block, R, S::tokens>(s, 0);
    }
    first_block += n;
  }
}

template <class S, Format format>
void linear_format(const PanelsView& w, const Quantized& x, int64_t tokens, int64_t p0, int64_t p1, float* y,
                   size_t ldy, const Epilogue& epilogue, void* scratch) {
  if constexpr (S::has_tiles) {
    S::start_tiles(layout(format).group);
  } else if (tokens <= kFew) {
    constexpr int most = S::rows * S::tokens < kFew ? S::rows * S::tokens : kFew;  // sums that fit the registers
    for (int64_t p = p0; p < p1; ++p) few_tokens<S, format, most>(w, x, tokens, 0, p, y, ldy, epilogue);
    return;
  }
  const int64_t chunk = chunk_of(x.cols);
  for (int64_t t0 = 0; t0 < tokens; t0 += chunk) {
    const int64_t n = tokens - t0 < chunk ? tokens - t0 : chunk;
    const Quantized some = x.from(t0);
    const Epilogue own = epilogue.from(t0);
    float* const out = y + static_cast<size_t>(t0) * ldy;
    uint8_t* const memory = static_cast<uint8_t*>(scratch);
    int64_t p = p0;
    for (; p + S::rows <= p1; p += S::rows) {
      some_panels<S, format, S::rows>(w, some, n, p, out, ldy, own, memory);
    }
    for (; p < p1; ++p) some_panels<S, format, 1>(w, some, n, p, out, ldy, own, memory);
  }
  if constexpr (S::has_tiles) S::end_tiles();
}

template <class S>
void linear_q(const PanelsView& w, const Quantized& x, int64_t tokens, int64_t p0, int64_t p1, float* y, size_t ldy,
              const Epilogue& epilogue, void* scratch) {
  using Linear = void (*)(const PanelsView&, const Quantized&, int64_t, int64_t, int64_t, float*, size_t,
                          const Epilogue&, void*);
  static constexpr Linear of_format[kFormats] = {
      nullptr,
      nullptr,
      nullptr,
      linear_format<S, Format::Q4_0>,
      linear_format<S, Format::Q4_1>,
      linear_format<S, Format::Q5_0>,
      linear_format<S, Format::Q5_1>,
      linear_format<S, Format::Q8_0>,
      linear_format<S, Format::Q2_K>,
      linear_format<S, Format::Q3_K>,
      linear_format<S, Format::Q4_K>,
      linear_format<S, Format::Q5_K>,
      linear_format<S, Format::Q6_K>,
      linear_format<S, Format::IQ4_NL>,
      linear_format<S, Format::IQ4_XS>,
  };
  of_format[static_cast<int>(w.format)](w, x, tokens, p0, p1, y, ldy, epilogue, scratch);
}

// ---- float weights ----

constexpr int64_t kFloatBlock = 64;  // columns whose products are summed before they join the total: keeps it precise

template <class S, Format format>
DAPJI_INLINE typename S::F load_weights(const uint8_t* p) {
  if constexpr (format == Format::F32) {
    return S::load(reinterpret_cast<const float*>(p));
  } else if constexpr (format == Format::F16) {
    return S::load_f16(reinterpret_cast<const uint16_t*>(p));
  } else {
    return S::load_bf16(reinterpret_cast<const uint16_t*>(p));
  }
}

template <class S, Format format, int R, int T>
void float_tile(const PanelsView& w, const float* x, size_t ldx, int64_t token, int64_t p, float* y, size_t ldy,
                const Epilogue& epilogue) {
  using F = typename S::F;
  constexpr int bytes = 16 * float_bytes(format);
  F total[R][T];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) total[r][t] = S::zero();
  }
  const uint8_t* const panel = w.data + static_cast<size_t>(p) * w.panel_bytes;
  for (int64_t k0 = 0; k0 < w.cols; k0 += kFloatBlock) {
    const int64_t k1 = k0 + kFloatBlock < w.cols ? k0 + kFloatBlock : w.cols;
    F sum[R][T];
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) sum[r][t] = S::zero();
    }
    for (int64_t k = k0; k < k1; ++k) {
      F column[R];
      for (int r = 0; r < R; ++r) {
        column[r] = load_weights<S, format>(panel + static_cast<size_t>(r) * w.panel_bytes + k * bytes);
      }
      for (int t = 0; t < T; ++t) {
        const F v = S::set(x[static_cast<size_t>(t) * ldx + k]);
        for (int r = 0; r < R; ++r) sum[r][t] = S::fma(column[r], v, sum[r][t]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) total[r][t] = S::add(total[r][t], sum[r][t]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) finish<S>(total[r][t], w, p + r, epilogue, token + t, y, ldy);
  }
}

template <class S, Format format, int R, int T>
void float_tokens(const PanelsView& w, const float* x, size_t ldx, int64_t tokens, int64_t token, int64_t p, float* y,
                  size_t ldy, const Epilogue& epilogue) {
  for (; token + T <= tokens; token += T) {
    float_tile<S, format, R, T>(w, x + static_cast<size_t>(token) * ldx, ldx, token, p, y, ldy, epilogue);
  }
  if constexpr (T > 1) {
    if (token < tokens) float_tokens<S, format, R, smaller(T)>(w, x, ldx, tokens, token, p, y, ldy, epilogue);
  }
}

template <class S, Format format>
void linear_float(const PanelsView& w, const float* x, size_t ldx, int64_t tokens, int64_t p0, int64_t p1, float* y,
                  size_t ldy, const Epilogue& epilogue) {
  int64_t p = p0;
  for (; p + S::rows <= p1; p += S::rows) {
    float_tokens<S, format, S::rows, S::tokens>(w, x, ldx, tokens, 0, p, y, ldy, epilogue);
  }
  for (; p < p1; ++p) float_tokens<S, format, 1, S::tokens>(w, x, ldx, tokens, 0, p, y, ldy, epilogue);
}

template <class S>
void linear_f(const PanelsView& w, const float* x, size_t ldx, int64_t tokens, int64_t p0, int64_t p1, float* y,
              size_t ldy, const Epilogue& epilogue) {
  switch (w.format) {
    case Format::F32:
      return linear_float<S, Format::F32>(w, x, ldx, tokens, p0, p1, y, ldy, epilogue);
    case Format::F16:
      return linear_float<S, Format::F16>(w, x, ldx, tokens, p0, p1, y, ldy, epilogue);
    case Format::BF16:
      return linear_float<S, Format::BF16>(w, x, ldx, tokens, p0, p1, y, ldy, epilogue);
    default:
      __builtin_unreachable();
  }
}

// ---- thin matrices ----

constexpr int kChains = 4;  // column k joins the sum k % 4 of its output; the four are added in the end

template <class S, Format format, int R, int T>
void thin_tile(const PanelsView& w, const float* x, size_t ldx, int64_t p, float* y, size_t ldy) {
  using F = typename S::F;
  constexpr int bytes = 16 * float_bytes(format);
  const uint8_t* const panel = w.data + static_cast<size_t>(p) * w.panel_bytes;
  F sum[kChains][R][T];
  for (int c = 0; c < kChains; ++c) {
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) sum[c][r][t] = S::zero();
    }
  }
  const auto add = DAPJI_LAMBDA(auto c, int64_t k) {
    for (int r = 0; r < R; ++r) {
      const F column = load_weights<S, format>(panel + static_cast<size_t>(r) * w.panel_bytes + k * bytes);
      for (int t = 0; t < T; ++t) {
        sum[c][r][t] = S::fma(column, S::set(x[static_cast<size_t>(t) * ldx + k]), sum[c][r][t]);
      }
    }
  };
  int64_t k = 0;
  for (; k + kChains <= w.cols; k += kChains) {
    unroll<kChains>(DAPJI_LAMBDA(auto c) { add(c, k + c); });
  }
  unroll<kChains - 1>(DAPJI_LAMBDA(auto c) {
    if (k + c < w.cols) add(c, k + c);
  });
  for (int r = 0; r < R; ++r) {
    const int64_t rest = w.rows - 16 * (p + r);
    const int n = rest < 16 ? static_cast<int>(rest) : 16;
    for (int t = 0; t < T; ++t) {
      const F total = S::add(S::add(sum[0][r][t], sum[1][r][t]), S::add(sum[2][r][t], sum[3][r][t]));
      S::store(y + static_cast<size_t>(t) * ldy + 16 * r, total, n);
    }
  }
}

// As many sums as the registers hold.
template <class S, Format format, int R, int T>
void thin_panels(const PanelsView& w, const float* x, size_t ldx, int64_t p0, int64_t p1, float* y, size_t ldy) {
  int64_t p = p0;
  for (; p + R <= p1; p += R) thin_tile<S, format, R, T>(w, x, ldx, p, y + 16 * (p - p0), ldy);
  if constexpr (R > 1) {
    if (p < p1) thin_panels<S, format, R / 2, T>(w, x, ldx, p, p1, y + 16 * (p - p0), ldy);
  }
}

template <class S, Format format>
void thin_format(const PanelsView& w, const float* x, size_t ldx, int64_t tokens, int64_t p0, int64_t p1, float* y,
                 size_t ldy) {
  constexpr int most = S::rows > 1 ? 4 : 1;
  int64_t t = 0;
  for (; t + most <= tokens; t += most) {
    thin_panels<S, format, 1, most>(w, x + static_cast<size_t>(t) * ldx, ldx, p0, p1, y + static_cast<size_t>(t) * ldy,
                                    ldy);
  }
  for (; t < tokens; ++t) {
    thin_panels<S, format, most, 1>(w, x + static_cast<size_t>(t) * ldx, ldx, p0, p1, y + static_cast<size_t>(t) * ldy,
                                    ldy);
  }
}

template <class S>
void linear_thin(const PanelsView& w, const float* x, size_t ldx, int64_t tokens, int64_t p0, int64_t p1, float* y,
                 size_t ldy) {
  switch (w.format) {
    case Format::F32:
      return thin_format<S, Format::F32>(w, x, ldx, tokens, p0, p1, y, ldy);
    case Format::F16:
      return thin_format<S, Format::F16>(w, x, ldx, tokens, p0, p1, y, ldy);
    case Format::BF16:
      return thin_format<S, Format::BF16>(w, x, ldx, tokens, p0, p1, y, ldy);
    default:
      __builtin_unreachable();
  }
}

// ---- activations ----

constexpr float kSmallest = 0x1p-126f, kLargest = 0x1.fffffep127f;  // normal numbers

template <class S>
void quantize(const float* x, size_t ldx, int64_t t0, int64_t t1, const Quantized& out) {
  using F = typename S::F;
  using I = typename S::I;
  const int64_t blocks = out.cols / kBlock;
  const I magnitude = S::set_int(0x7fffffff);
  for (int64_t t = t0; t < t1; ++t) {
    const float* from = x + static_cast<size_t>(t) * ldx;
    int64_t at = out.at(t, 0);
    for (int64_t b = 0; b < blocks; ++b, from += kBlock, at += out.tile) {
      const F first = S::load(from), second = S::load(from + kLanes);
      // Bit patterns of magnitudes are in the order of the numbers, with infinity and then NaN above all.
      const int32_t bits = S::max_int(
          S::max_int(S::and_(S::as_int(first), magnitude), S::and_(S::as_int(second), magnitude)));
      float most;
      __builtin_memcpy(&most, &bits, 4);
      float scale = most / 127.0f;
      if (scale < kSmallest) scale = 0.0f;
      int8_t* const codes = out.codes + at * kBlock;
      float sums[2] = {0, 0};
      if (scale > 0.0f && scale <= kLargest) {
        const I low = S::to_int(S::div(first, S::set(scale))), high = S::to_int(S::div(second, S::set(scale)));
        S::narrow_s8(codes, low);
        S::narrow_s8(codes + kLanes, high);
        sums[0] = S::sum(S::to_float(low));
        sums[1] = S::sum(S::to_float(high));
      } else {
        __builtin_memset(codes, 0, kBlock);
      }
      out.scales[at] = scale;
      out.sums[at] = scale * (sums[0] + sums[1]);
      out.starts[at] = 0;
      for (int half = 0; half < 2; ++half) {
        const int32_t sum = static_cast<int32_t>(sums[half]);
        out.halves[2 * at + half] = static_cast<int16_t>(sum);
        out.half_starts[2 * at + half] = -128 * sum;
        out.starts[at] -= 128 * sum;
      }
    }
  }
}

}  // namespace

template <class S>
constexpr MatmulKernels matmul_kernels() {
  return {S::tokens, quantize<S>, linear_q<S>, linear_f<S>, linear_thin<S>};
}

}  // namespace dapji
