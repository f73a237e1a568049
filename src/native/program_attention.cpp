// The attention of a program: work on the KV cache, split over the workers.
#include <algorithm>
#include <utility>

#include "program.h"

namespace dapji {

void Program::add_attention(int q, int k, int v, int output, AttentionSettings settings) {
  const int layer = settings.layer, n_heads = settings.n_heads, rope = settings.rope;
  for (const int buffer : {q, k, v, output}) check_buffer(buffer, "attention");
  if (layer < 0 || layer >= cache_.n_layers()) refuse("attention: no layer " + std::to_string(layer));
  const KvTile& tile = cache_.tile(layer);
  const int n_kv_heads = cache_.n_kv_heads(layer);
  if (n_heads < 1 || n_heads % n_kv_heads || n_heads / n_kv_heads > kMaxQueryRows) {
    refuse("attention: " + std::to_string(n_heads) + " heads over " + std::to_string(n_kv_heads) + " kv heads");
  }
  if (width(q) != n_heads * tile.head_dim || width(output) != width(q) || width(k) != n_kv_heads * tile.head_dim ||
      width(v) != width(k)) {
    refuse("attention: a buffer does not fit");
  }
  if (rope < -1 || rope >= static_cast<int>(ropes_.size()) || (rope >= 0 && ropes_[rope].dim > tile.head_dim)) {
    refuse("attention: no rope table " + std::to_string(rope));
  }
  for (const std::optional<Norm>& norm : {settings.q_norm, settings.k_norm}) {
    if (norm && static_cast<int>(norm->weight.size()) != tile.head_dim) refuse("attention: a norm does not fit");
  }
  if (!settings.temperature.empty() && static_cast<int>(settings.temperature.size()) < context_) {
    refuse("attention: the temperatures do not fit");
  }
  attention_floats_ = std::max(attention_floats_, attention_scratch_floats(tile.head_dim, tile.padded));
  for (Worker& worker : workers_) worker.attention.reserve(attention_floats_);
  query_rows_ = std::min(query_rows_, kMaxQueryRows / (n_heads / n_kv_heads));
  const auto same = [&](const Reach& reach) {
    return reach.window == settings.reach.window && reach.chunk == settings.reach.chunk;
  };
  if (std::none_of(reaches_.begin(), reaches_.end(), same)) reaches_.push_back(settings.reach);
  partial_floats_ = std::max(partial_floats_, static_cast<std::size_t>(n_kv_heads) *
                                                  attention_partial_floats(n_heads / n_kv_heads, tile.padded));
  operations_.emplace_back(Attend{q, k, v, output, n_kv_heads, tile.head_dim, std::move(settings)});
}

HeadTransform Program::transform(const Attend& op, const std::optional<Norm>& norm) const {
  HeadTransform result{};
  if (norm) {
    result.norm = norm->weight.data();
    result.eps = norm->eps;
  }
  if (op.settings.rope >= 0) {
    const RopeTable& rope = ropes_[op.settings.rope];
    result.cos = rope.cos.data();
    result.sin = rope.sin.data();
    result.rope_dim = rope.dim;
  }
  return result;
}

KvView Program::kv_view(const Attend& op, int sequence, int head) {
  return {&cache_.tile(op.settings.layer), cache_.at(op.settings.layer, 0, head), cache_.block_stride(),
          batch_.blocks + static_cast<std::size_t>(sequence) * batch_.n_columns};
}

void Program::write_kv(const Attend& op, int sequence, int token, int head, Worker& mine) {
  const KvView kv = kv_view(op, sequence, head);
  const int position = batch_.positions[token];
  const std::size_t at = static_cast<std::size_t>(head) * op.head_dim;
  std::byte* const data =
      kv.head + static_cast<std::size_t>(kv.table[position / kKvBlock]) * kv.block_stride;
  kernels_.rows.write_kv(*kv.tile, data, position, row(op.k, token) + at, row(op.v, token) + at,
                         transform(op, op.settings.k_norm), mine.attention.data());
}

void Program::run(const Attend& op, std::size_t index, unsigned worker) {
  Worker& mine = workers_[worker];
  const AttentionSettings& settings = op.settings;
  const int group = settings.n_heads / op.n_kv_heads;
  const auto item = [&](int sequence, int first, int n, int head) {
    AttentionItem result{};
    const std::size_t at = static_cast<std::size_t>(head) * group * op.head_dim;
    result.kv = kv_view(op, sequence, head);
    result.q = row(op.q, first) + at;
    result.stride = static_cast<std::size_t>(width(op.q));
    result.out = row(op.output, first) + at;
    result.query = transform(op, settings.q_norm);
    result.n_rows = n;
    result.group = group;
    result.position = batch_.positions[first];
    result.reach = settings.reach;
    result.scale = settings.scale;
    result.temperature = settings.temperature.empty() ? nullptr : settings.temperature.data();
    result.softcap = settings.softcap;
    result.segment = settings.reach.first(result.position) / kKvSegment;
    result.end_segment = (result.position + n - 1) / kKvSegment + 1;
    return result;
  };

  if (!single_) {
    for (std::size_t i = worker; i < writes_.size(); i += pool_->size()) {
      const TokenRange& write = writes_[i];
      for (int token = write.first; token < write.first + write.n; ++token) {
        for (int head = 0; head < op.n_kv_heads; ++head) write_kv(op, write.sequence, token, head, mine);
      }
    }
    pool_->barrier();
    const int n_items = static_cast<int>(tiles_.size()) * op.n_kv_heads;
    // From the end: the last tiles of a prompt see most keys, and the longest work should begin first.
    for (int i; (i = next_[2 * index * pool_->size()].fetch_add(1, std::memory_order_relaxed)) < n_items;) {
      const TokenRange& tile = tiles_[tiles_.size() - 1 - static_cast<std::size_t>(i / op.n_kv_heads)];
      kernels_.rows.attend(item(tile.sequence, tile.first, tile.n, i % op.n_kv_heads), mine.attention.data());
    }
    return;
  }

  const KvTile& tile = cache_.tile(settings.layer);
  const std::size_t size = attention_partial_floats(group, tile.padded);
  const auto last_of = [&](int sequence) { return batch_.positions[sequence] / kKvSegment; };
  const auto first_of = [&](int sequence) {
    return segments_[sequence].n > 1 ? settings.reach.first(batch_.positions[sequence]) / kKvSegment
                                     : last_of(sequence);
  };
  // Every worker gets as many segments, those of a head side by side, so that it can fetch ahead. A sequence's row is
  // one token: who computes the segment that holds it writes it first.
  std::int64_t total = 0;
  for (int sequence = 0; sequence < batch_.n_sequences; ++sequence) {
    total += static_cast<std::int64_t>(last_of(sequence) - first_of(sequence) + 1) * op.n_kv_heads;
  }
  std::int64_t begin = total * worker / pool_->size(), end = total * (worker + 1) / pool_->size();
  for (int sequence = 0; sequence < batch_.n_sequences; ++sequence) {
    const int first = first_of(sequence), last = last_of(sequence), n = last - first + 1;
    for (int head = 0; head < op.n_kv_heads; ++head, begin -= n, end -= n) {
      const int from = first + static_cast<int>(std::max<std::int64_t>(begin, 0));
      const int to = first + static_cast<int>(std::min<std::int64_t>(end, n));
      if (from >= to) continue;
      if (to > last) write_kv(op, sequence, sequence, head, mine);
      AttentionItem one = item(sequence, sequence, 1, head);
      if (n > 1) {
        one.out = nullptr;
        one.segment = from;
        one.end_segment = to;
        one.partials = partial(segments_[sequence], from, head, size);
      }
      kernels_.rows.attend(one, mine.attention.data());
    }
  }
  if (n_partials_ == 0) return;
  pool_->barrier();
  for (int sequence = 0, work = 0; sequence < batch_.n_sequences; ++sequence) {
    const int first = first_of(sequence), n = last_of(sequence) - first + 1;
    for (int head = 0; n > 1 && head < op.n_kv_heads; ++head, ++work) {
      if (work % static_cast<int>(pool_->size()) != static_cast<int>(worker)) continue;
      kernels_.rows.combine(partial(segments_[sequence], first, head, size), n, group, tile,
                            row(op.output, sequence) + static_cast<std::size_t>(head) * group * op.head_dim,
                            mine.attention.data());
    }
  }
}

// Of one kv head, segments lie side by side, as `combine` wants them.
float* Program::partial(const Segments& segments, int segment, int head, std::size_t size) {
  return partials_.data() + static_cast<std::size_t>(segments.at) * partial_floats_ +
         (static_cast<std::size_t>(head) * segments.n + segment) * size;
}

std::string Program::line(const Attend& op) const {
  const AttentionSettings& settings = op.settings;
  const auto limit = [](const char* name, int size) {
    return size == 0 ? "" : std::string(", ") + name + " " + std::to_string(size);
  };
  return "attention of layer " + std::to_string(settings.layer) + ", " + std::to_string(settings.n_heads) +
         " heads over " + std::to_string(op.n_kv_heads) + " of " + std::to_string(op.head_dim) +
         limit("window", settings.reach.window) + limit("chunk", settings.reach.chunk);
}

}  // namespace dapji
