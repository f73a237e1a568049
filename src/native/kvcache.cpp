#include "kvcache.h"

#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

namespace dapji {
namespace {

std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

KvTile kv_tile(KvFormat format, int head_dim) {
  const std::size_t value = format == KvFormat::f32 ? 4 : format == KvFormat::f16 ? 2 : 1;
  KvTile tile{};
  tile.format = format;
  tile.head_dim = head_dim;
  tile.padded = static_cast<int>(round_up(head_dim, 16));
  tile.groups = (head_dim + kKvGroup - 1) / kKvGroup;
  const std::size_t scales = format == KvFormat::q8 ? sizeof(float) * kKvBlock * tile.groups : 0;
  tile.k_scale = value * head_dim * kKvBlock;
  tile.v = round_up(tile.k_scale + scales, 64);
  tile.v_scale = tile.v + value * kKvBlock * tile.padded;
  tile.bytes = round_up(tile.v_scale + scales, 64);
  return tile;
}

KvCache::KvCache(KvFormat format, const std::vector<KvShape>& layers, int n_blocks) : n_blocks_(n_blocks) {
  if (n_blocks < 1) throw std::invalid_argument("n_blocks must be at least 1");
  // Head dimensions and counts are int, so a tile stays far below 2^40 bytes; the products are checked.
  std::vector<std::size_t> offsets;
  for (const KvShape& shape : layers) {
    if (shape.head_dim < 1 || shape.n_kv_heads < 1) throw std::invalid_argument("empty kv head");
    const KvTile tile = kv_tile(format, shape.head_dim);
    const std::size_t block = tile.bytes * shape.n_kv_heads;
    const std::size_t room = std::numeric_limits<std::size_t>::max() / 2 - bytes_;
    if (block > room / n_blocks) throw std::bad_alloc();
    offsets.push_back(bytes_);
    layers_.push_back({tile, shape.n_kv_heads, nullptr});
    bytes_ += block * n_blocks;
  }
  memory_.reset(std::calloc(bytes_ + 64, 1));
  if (!memory_) throw std::bad_alloc();
  void* start = memory_.get();
  std::size_t space = bytes_ + 64;
  std::align(64, bytes_, start, space);
  for (std::size_t i = 0; i < layers_.size(); ++i) layers_[i].data = static_cast<std::byte*>(start) + offsets[i];
}

void KvCache::Free::operator()(void* memory) const { std::free(memory); }

void KvCache::copy_block(int source, int target) {
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const int layer = static_cast<int>(i);
    std::memcpy(at(layer, target, 0), at(layer, source, 0), layers_[i].tile.bytes * layers_[i].n_kv_heads);
  }
}

}  // namespace dapji
