// KvCache: the keys and values of every cached token, in blocks of kKvBlock tokens. The layers of a block lie together,
// so that huge pages, which save TLB misses, cost no more memory than the tokens need.
//
// A block holds, per layer and kv head, one "tile" laid out for attention.h:
//   K  [Dh][16]   transposed: one vector of 16 tokens per dimension, so that 16 scores need no horizontal sum
//   V  [Dp/16][16][16]  per 16 dimensions, 16 tokens of 16 values; Dp = Dh rounded up to 16, the padding zero
// Latent attention has one vector per token, whose beginning is the value: it is stored once, as V is.
//
// In q8 the codes are int8 and the floats follow: K scales [G][16], V scales [16][G], G = ceil(Dh / 32): one scale per
// token, kv head and 32 dimensions, because keys of models with a bias have outliers in single dimensions that would
// cost a whole head its precision.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace dapji {

constexpr int kKvBlock = 16;  // tokens per block, KV_BLOCK of dapji.ops.batch
constexpr int kKvGroup = 32;  // dimensions per scale of q8

enum class KvFormat { f32, f16, q8 };

// Where the parts of one tile lie, in bytes from its start.
struct KvTile {
  KvFormat format;
  int head_dim;         // Dh, of a key
  int padded;           // Dp
  bool shared;          // no K: the values' vectors are the keys
  int groups;           // G
  std::size_t k_scale;  // q8 only
  std::size_t v;
  std::size_t v_scale;  // q8 only
  std::size_t bytes;    // a multiple of 64
};

struct KvShape {
  int n_kv_heads;
  int key_dim;
  int value_dim;  // key_dim, or 0: the values are the beginning of the keys
};

// Throws std::invalid_argument.
KvTile kv_tile(KvFormat format, const KvShape& shape);

class KvCache {
 public:
  // Owns the memory, zeroed; untouched blocks cost address space only. Throws std::invalid_argument, std::bad_alloc.
  KvCache(KvFormat format, const std::vector<KvShape>& layers, int n_blocks);

  int n_blocks() const { return n_blocks_; }
  std::size_t bytes() const { return block_bytes_ * n_blocks_; }
  int n_layers() const { return static_cast<int>(layers_.size()); }
  int n_kv_heads(int layer) const { return layers_[layer].n_kv_heads; }
  const KvTile& tile(int layer) const { return layers_[layer].tile; }
  // Bytes from a tile to that of the same layer and head in the next block.
  std::size_t block_stride() const { return block_bytes_; }

  std::byte* at(int layer, int block, int head) {
    const Layer& shape = layers_[layer];
    return reinterpret_cast<std::byte*>(memory_.get()) + block * block_bytes_ + shape.offset + head * shape.tile.bytes;
  }

  // All layers of block `source` over block `target`; both in range.
  void copy_block(int source, int target);

 private:
  struct Layer {
    KvTile tile;
    int n_kv_heads;
    std::size_t offset;  // of its tiles in a block
  };
  int n_blocks_;
  std::size_t block_bytes_ = 0;
  std::shared_ptr<std::uint8_t> memory_;
  std::vector<Layer> layers_;
};

}  // namespace dapji
