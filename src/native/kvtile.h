// The KV cache's tiles (kvcache.h) written and read, as a template over one instruction set's Simd struct.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kvcache.h"
#include "rowops.h"

namespace dapji {

template <class S>
struct KvTiles {
  using F = typename S::F;

  // ---- writing ----

  // The key and value [Dh] of the token at `position` of one kv head into its tile; the key is transformed. scratch:
  // [2 Dh].
  static void write_kv(const KvTile& tile, std::byte* data, int position, const float* k, const float* v,
                       const HeadTransform& key, float* scratch) {
    const int slot = position % kKvBlock;
    RowOps<S>::transform(key, k, position, tile.head_dim, 1.0f, scratch, scratch + tile.head_dim);
    for (int d = 0; d < tile.head_dim; d += kLanes) {
      const int n = tile.head_dim - d < kLanes ? tile.head_dim - d : kLanes;
      const std::size_t at = static_cast<std::size_t>(d) * kKvBlock + slot;
      const F values = S::load(scratch + d, n);
      if (tile.format == KvFormat::f32) {
        alignas(64) float column[kLanes];
        S::store(column, values);
        scatter(column, n, reinterpret_cast<float*>(data) + at);
      } else if (tile.format == KvFormat::f16) {
        alignas(64) std::uint16_t column[kLanes];
        S::store_f16(column, values);
        scatter(column, n, reinterpret_cast<std::uint16_t*>(data) + at);
      } else {
        float* const scale = reinterpret_cast<float*>(data + tile.k_scale) + d / kKvGroup * kKvBlock + slot;
        if (d % kKvGroup == 0) *scale = group_scale(tile, scratch, d);
        alignas(64) std::int8_t column[kLanes];
        S::narrow_s8(column, codes(values, *scale));
        scatter(column, n, reinterpret_cast<std::int8_t*>(data) + at);
      }
    }
    write_values(tile, data, slot, v);
  }

  // Latent attention: the normed latent and the rotated key k_rope [key.rope_dim] of the token at `position`, side by
  // side in its tile. scratch: [Dh].
  static void write_latent(const KvTile& tile, std::byte* data, int position, const float* latent, const float* k_rope,
                           const HeadTransform& key, float* scratch) {
    const int latent_dim = tile.head_dim - key.rope_dim;
    const std::int64_t angles = static_cast<std::int64_t>(position) * (key.rope_dim / 2);
    RowOps<S>::template norm<false>(latent, key.norm, key.eps, latent_dim, scratch);
    RowOps<S>::rotate(k_rope, key.cos + angles, key.sin + angles, key.rope_dim, key.rope_dim, 1.0f,
                      scratch + latent_dim);
    write_values(tile, data, position % kKvBlock, scratch);
  }

  // ---- reading ----

  // The columns of one block that a product takes: [n] vectors, of the 16 tokens by dimension (keys), or of 16
  // dimensions by token (values).
  struct Floats {
    const float* data;
    std::size_t stride;
    DAPJI_INLINE F operator[](int i) const { return S::load(data + i * stride); }
  };
  struct Halves {
    const std::uint16_t* data;
    DAPJI_INLINE F operator[](int i) const { return S::load_f16(data + i * kLanes); }
  };
  struct KeyCodes {
    const std::int8_t* data;
    const float* scales;  // [G][16]
    DAPJI_INLINE F operator[](int i) const {
      return S::mul(S::to_float(S::widen_s8(data + i * kLanes)), S::load(scales + i / kKvGroup * kKvBlock));
    }
  };
  struct ValueCodes {
    const std::int8_t* data;
    const float* scales;  // [16][G], from these dimensions' group on
    int groups;
    DAPJI_INLINE F operator[](int i) const {
      return S::mul(S::to_float(S::widen_s8(data + i * kLanes)), S::set(scales[i * groups]));
    }
  };

  // Into the second-level cache: what is fetched ahead, some 32 KB, would fill the first.
  static DAPJI_INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

  // Columns that, at the same pace, fetch what is read later: as many vectors from the vector `first` on.
  template <class Columns>
  struct Fetching {
    Columns columns;
    const std::byte* later;
    int first;
    DAPJI_INLINE F operator[](int i) const {
      prefetch(later + (first + i) * (sizeof(*columns.data) * kLanes));
      return columns[i];
    }
  };

  // Of one block's tile: the keys from dimension d on, the values of a panel of 16 dimensions.
  struct Float32 {
    using Keys = Floats;
    using Values = Floats;
    static DAPJI_INLINE Keys keys(const KvTile&, const std::byte* data, int d) {
      return {as<float>(data) + d * kKvBlock, kKvBlock};
    }
    static DAPJI_INLINE Values values(const KvTile& tile, const std::byte* data, int panel) {
      return {as<float>(data + tile.v) + panel * kKvBlock * kLanes, kLanes};
    }
  };
  struct Float16 {
    using Keys = Halves;
    using Values = Halves;
    static DAPJI_INLINE Keys keys(const KvTile&, const std::byte* data, int d) {
      return {as<std::uint16_t>(data) + d * kKvBlock};
    }
    static DAPJI_INLINE Values values(const KvTile& tile, const std::byte* data, int panel) {
      return {as<std::uint16_t>(data + tile.v) + panel * kKvBlock * kLanes};
    }
  };
  struct Codes8 {
    using Keys = KeyCodes;
    using Values = ValueCodes;
    static DAPJI_INLINE Keys keys(const KvTile& tile, const std::byte* data, int d) {
      return {as<std::int8_t>(data) + d * kKvBlock, as<float>(data + tile.k_scale) + d / kKvGroup * kKvBlock};
    }
    static DAPJI_INLINE Values values(const KvTile& tile, const std::byte* data, int panel) {
      return {as<std::int8_t>(data + tile.v) + panel * kKvBlock * kLanes,
              as<float>(data + tile.v_scale) + panel * kLanes / kKvGroup, tile.groups};
    }
  };

  template <class T>
  static DAPJI_INLINE const T* as(const std::byte* data) {
    return reinterpret_cast<const T*>(data);
  }

  template <class Columns>
  static DAPJI_INLINE void unpack(const Columns& columns, int n, float* into, std::size_t stride) {
    for (int i = 0; i < n; ++i) S::store(into + i * stride, columns[i]);
  }

  // Keys that lie as values do, of one block: from dimension 0 on, as Format::keys would have them.
  template <class Format>
  static DAPJI_INLINE void unpack_shared_keys(const KvTile& tile, const std::byte* data, float* into,
                                              std::size_t stride) {
    for (int d = 0; d < tile.head_dim; d += kLanes) {
      const auto tokens = Format::values(tile, data, d / kLanes);
      F x[kLanes];
      DAPJI_UNROLL
      for (int i = 0; i < kLanes; ++i) x[i] = tokens[i];
      S::transpose(x);
      const int n = tile.head_dim - d < kLanes ? tile.head_dim - d : kLanes;
      for (int i = 0; i < n; ++i) S::store(into + (d + i) * stride, x[i]);
    }
  }

 private:
  template <class T>
  DAPJI_INLINE static void scatter(const T* column, int n, T* into) {
    for (int d = 0; d < n; ++d) into[d * kKvBlock] = column[d];
  }

  // [Dh] by token. A tile's first token clears the others': what an earlier owner left there will be multiplied by
  // probability 0, which is not 0 for an infinity.
  static DAPJI_INLINE void write_values(const KvTile& tile, std::byte* data, int slot, const float* v) {
    if (slot == 0) std::memset(data + tile.v, 0, tile.bytes - tile.v);
    for (int d = 0; d < tile.head_dim; d += kLanes) {
      const std::size_t at = static_cast<std::size_t>(d) * kKvBlock + static_cast<std::size_t>(slot) * kLanes;
      const F values = S::load(v + d, tile.head_dim - d < kLanes ? tile.head_dim - d : kLanes);
      if (tile.format == KvFormat::f32) {
        S::store(reinterpret_cast<float*>(data + tile.v) + at, values);
      } else if (tile.format == KvFormat::f16) {
        S::store_f16(reinterpret_cast<std::uint16_t*>(data + tile.v) + at, values);
      } else {
        float* const scale = reinterpret_cast<float*>(data + tile.v_scale) + slot * tile.groups + d / kKvGroup;
        if (d % kKvGroup == 0) *scale = group_scale(tile, v, d);
        S::narrow_s8(reinterpret_cast<std::int8_t*>(data + tile.v) + at, codes(values, *scale));
      }
    }
  }

  // Of the group of dimensions from d on.
  static DAPJI_INLINE float group_scale(const KvTile& tile, const float* x, int d) {
    return largest(x + d, tile.head_dim - d < kKvGroup ? tile.head_dim - d : kKvGroup) / 127.0f;
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
};

}  // namespace dapji
