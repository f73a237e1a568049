#include "kvcache.h"

#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "memory.h"

namespace dapji {
namespace {

std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

KvTile kv_tile(KvFormat format, const KvShape& shape) {
  const int head_dim = shape.key_dim;
  if (head_dim < 1 || shape.n_kv_heads < 1) throw std::invalid_argument("empty kv head");
  if (shape.value_dim != 0 && shape.value_dim != head_dim) {
    throw std::invalid_argument("keys of " + std::to_string(head_dim) + " beside values of " +
                                std::to_string(shape.value_dim));
  }
  const std::size_t value = format == KvFormat::f32 ? 4 : format == KvFormat::f16 ? 2 : 1;
  KvTile tile{};
  tile.format = format;
  tile.head_dim = head_dim;
  tile.padded = static_cast<int>(round_up(head_dim, 16));
  tile.shared = shape.value_dim == 0;
  tile.groups = (head_dim + kKvGroup - 1) / kKvGroup;
  const std::size_t scales = format == KvFormat::q8 ? sizeof(float) * kKvBlock * tile.groups : 0;
  if (!tile.shared) {
    tile.k_scale = value * head_dim * kKvBlock;
    tile.v = round_up(tile.k_scale + scales, 64);
  }
  tile.v_scale = tile.v + value * kKvBlock * tile.padded;
  tile.bytes = round_up(tile.v_scale + scales, 64);
  return tile;
}

KvCache::KvCache(KvFormat format, const std::vector<KvShape>& layers, int n_blocks) : n_blocks_(n_blocks) {
  if (n_blocks < 1) throw std::invalid_argument("n_blocks must be at least 1");
  // Head dimensions and counts are int, so a tile stays far below 2^40 bytes; the sums are checked.
  const std::size_t most = std::numeric_limits<std::size_t>::max() / 2 / n_blocks;
  for (const KvShape& shape : layers) {
    const KvTile tile = kv_tile(format, shape);
    layers_.push_back({tile, shape.n_kv_heads, block_bytes_});
    if (tile.bytes * shape.n_kv_heads > most - block_bytes_) throw std::bad_alloc();
    block_bytes_ += tile.bytes * shape.n_kv_heads;
  }
  memory_ = allocate_zeros(bytes());
}

void KvCache::copy_block(int source, int target) {
  std::memcpy(at(0, target, 0), at(0, source, 0), block_bytes_);
}

}  // namespace dapji
