// The attention of a program: work on the KV cache, split over the workers.
#include <algorithm>
#include <utility>

#include "program.h"

namespace dapji {
namespace {

constexpr int kHeadRows = 96;  // rows that one head's matrix multiplies together

}  // namespace

void Program::add_attention(int q, int k, int v, int output, AttentionSettings settings) {
  for (const int buffer : {q, k, v, output}) check_buffer(buffer, "attention");
  const int layer = settings.layer, n_heads = settings.n_heads;
  if (layer < 0 || layer >= cache_.n_layers()) refuse("attention: no layer " + std::to_string(layer));
  const KvTile& tile = cache_.tile(layer);
  const int n_kv_heads = cache_.n_kv_heads(layer);
  if (n_heads < 1 || n_heads % n_kv_heads || n_heads / n_kv_heads > kMaxQueryRows) {
    refuse("attention: " + std::to_string(n_heads) + " heads over " + std::to_string(n_kv_heads) + " kv heads");
  }
  if (tile.shared || width(q) != n_heads * tile.head_dim || width(output) != width(q) ||
      width(k) != n_kv_heads * tile.head_dim || width(v) != width(k)) {
    refuse("attention: a buffer does not fit");
  }
  const int rope = settings.rope;
  if (rope < -1 || rope >= static_cast<int>(ropes_.size()) || (rope >= 0 && ropes_[rope].dim > tile.head_dim)) {
    refuse("attention: no rope table " + std::to_string(rope));
  }
  for (const std::optional<Norm>& norm : {settings.q_norm, settings.k_norm}) {
    if (norm && static_cast<int>(norm->weight.size()) != tile.head_dim) refuse("attention: a norm does not fit");
  }
  if (!settings.temperature.empty() && static_cast<int>(settings.temperature.size()) < context_) {
    refuse("attention: the temperatures do not fit");
  }
  add_attend({q, k, v, output, -1, n_kv_heads, tile.head_dim, tile.head_dim, std::move(settings)});
}

void Program::add_latent_attention(int q, int q_rope, int latent, int k_rope, int layer, int n_heads, int rope,
                                   float scale, Norm norm) {
  for (const int buffer : {q, q_rope, latent, k_rope}) check_buffer(buffer, "latent attention");
  if (layer < 0 || layer >= cache_.n_layers()) refuse("latent attention: no layer " + std::to_string(layer));
  if (rope < 0 || rope >= static_cast<int>(ropes_.size())) {
    refuse("latent attention: no rope table " + std::to_string(rope));
  }
  const KvTile& tile = cache_.tile(layer);
  const int latent_dim = width(latent), rope_dim = ropes_[rope].dim;
  if (n_heads < 1 || !tile.shared || cache_.n_kv_heads(layer) != 1 || tile.head_dim != latent_dim + rope_dim ||
      width(k_rope) != rope_dim || width(q) != n_heads * latent_dim || width(q_rope) != n_heads * rope_dim ||
      static_cast<int>(norm.weight.size()) != latent_dim) {
    refuse("latent attention: a buffer does not fit");
  }
  AttentionSettings settings{};
  settings.layer = layer;
  settings.n_heads = n_heads;
  settings.rope = rope;
  settings.scale = scale;
  settings.k_norm = std::move(norm);
  add_attend({q, latent, k_rope, q, q_rope, 1, tile.head_dim, latent_dim, std::move(settings)});
}

void Program::add_attend(Attend op) {
  attention_floats_ = std::max(attention_floats_, attention_scratch_floats(op.key_dim, op.value_dim));
  for (Worker& worker : workers_) worker.attention.reserve(attention_floats_);
  const int n = n_groups(op, 0), most = group(op, n - 1, n).n;
  query_rows_ = std::min(query_rows_, kMaxQueryRows / most);
  const Reach& reach = op.settings.reach;
  const auto same = [&](const Reach& other) { return other.window == reach.window && other.chunk == reach.chunk; };
  if (std::none_of(reaches_.begin(), reaches_.end(), same)) reaches_.push_back(reach);
  partial_floats_ = std::max(partial_floats_, attention_partial_floats(op.settings.n_heads, op.value_dim));
  operations_.emplace_back(std::move(op));
}

// In grouped attention one group for each kv head. In latent attention all heads read the same: the fewest groups that
// give every worker as much to do, each group having n_items items.
int Program::n_groups(const Attend& op, int n_items) const {
  if (!op.latent()) return op.n_kv_heads;
  const int n_heads = op.settings.n_heads, size = static_cast<int>(pool_->size());
  int n = (n_heads + kMaxQueryRows - 1) / kMaxQueryRows;
  while (n < n_heads && n * n_items % size != 0 && n * n_items < 4 * size) ++n;
  return n;
}

// Of the n groups that at `index`; the last is the largest.
Program::HeadGroup Program::group(const Attend& op, int index, int n) const {
  const int first = op.settings.n_heads * index / n;
  return {op.latent() ? 0 : index, first, op.settings.n_heads * (index + 1) / n - first};
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
  std::byte* const data = kv.head + static_cast<std::size_t>(kv.table[position / kKvBlock]) * kv.block_stride;
  const HeadTransform key = transform(op, op.settings.k_norm);
  if (op.latent()) {
    kernels_.rows.write_latent(*kv.tile, data, position, row(op.k, token), row(op.v, token), key,
                               mine.attention.data());
    return;
  }
  const std::size_t at = static_cast<std::size_t>(head) * op.key_dim;
  kernels_.rows.write_kv(*kv.tile, data, position, row(op.k, token) + at, row(op.v, token) + at, key,
                         mine.attention.data());
}

void Program::run(const Attend& op, std::size_t index, unsigned worker) {
  Worker& mine = workers_[worker];
  const AttentionSettings& settings = op.settings;
  const auto item = [&](int sequence, int first, int n, const HeadGroup& heads) {
    AttentionItem result{};
    result.kv = kv_view(op, sequence, heads.kv_head);
    result.value_dim = op.value_dim;
    result.q = row(op.q, first) + static_cast<std::size_t>(heads.first) * op.value_dim;
    result.stride = static_cast<std::size_t>(width(op.q));
    result.out = row(op.output, first) + static_cast<std::size_t>(heads.first) * op.value_dim;
    result.query = transform(op, settings.q_norm);
    if (op.latent()) {
      result.q_rope = row(op.q_rope, first) + static_cast<std::size_t>(heads.first) * result.query.rope_dim;
      result.rope_stride = static_cast<std::size_t>(width(op.q_rope));
    }
    result.n_rows = n;
    result.group = heads.n;
    result.position = batch_.positions[first];
    result.reach = settings.reach;
    result.scale = settings.scale;
    result.temperature = settings.temperature.empty() ? nullptr : settings.temperature.data();
    result.softcap = settings.softcap;
    result.segment = settings.reach.first(result.position) / kKvSegment;
    result.end_segment = (result.position + n - 1) / kKvSegment + 1;
    return result;
  };

  // Where several groups of heads read one token's key, it is written before any of them begins.
  if (!single_ || op.latent()) {
    for (std::size_t i = worker; i < writes_.size(); i += pool_->size()) {
      const TokenRange& write = writes_[i];
      for (int token = write.first; token < write.first + write.n; ++token) {
        for (int head = 0; head < op.n_kv_heads; ++head) write_kv(op, write.sequence, token, head, mine);
      }
    }
    pool_->barrier();
  }
  if (!single_) {
    const int groups = n_groups(op, static_cast<int>(tiles_.size()));
    const int n_items = static_cast<int>(tiles_.size()) * groups;
    // From the end: the last tiles of a prompt see most keys, and the longest work should begin first.
    for (int i; (i = next_[2 * index * pool_->size()].fetch_add(1, std::memory_order_relaxed)) < n_items;) {
      const TokenRange& tile = tiles_[tiles_.size() - 1 - static_cast<std::size_t>(i / groups)];
      kernels_.rows.attend(item(tile.sequence, tile.first, tile.n, group(op, i % groups, groups)),
                           mine.attention.data());
    }
    return;
  }

  const auto last_of = [&](int sequence) { return batch_.positions[sequence] / kKvSegment; };
  const auto first_of = [&](int sequence) {
    return segments_[sequence].n > 1 ? settings.reach.first(batch_.positions[sequence]) / kKvSegment
                                     : last_of(sequence);
  };
  // Every worker gets as many segments, those of a group of heads side by side, so that it can fetch ahead. A sequence's
  // row is one token: who computes the segment that holds it writes it first, in grouped attention.
  int n_segments = 0;
  for (int sequence = 0; sequence < batch_.n_sequences; ++sequence) {
    n_segments += last_of(sequence) - first_of(sequence) + 1;
  }
  const int groups = n_groups(op, n_segments);
  const std::int64_t total = static_cast<std::int64_t>(n_segments) * groups;
  std::int64_t begin = total * worker / pool_->size(), end = total * (worker + 1) / pool_->size();
  for (int sequence = 0; sequence < batch_.n_sequences; ++sequence) {
    const int first = first_of(sequence), last = last_of(sequence), n = last - first + 1;
    for (int i = 0; i < groups; ++i, begin -= n, end -= n) {
      const int from = first + static_cast<int>(std::max<std::int64_t>(begin, 0));
      const int to = first + static_cast<int>(std::min<std::int64_t>(end, n));
      if (from >= to) continue;
      const HeadGroup heads = group(op, i, groups);
      if (to > last && !op.latent()) write_kv(op, sequence, sequence, heads.kv_head, mine);
      AttentionItem one = item(sequence, sequence, 1, heads);
      if (n > 1) {
        one.out = nullptr;
        one.segment = from;
        one.end_segment = to;
        one.partials = partial(op, segments_[sequence], from, heads);
      }
      kernels_.rows.attend(one, mine.attention.data());
    }
  }
  if (n_partials_ == 0) return;
  pool_->barrier();
  for (int sequence = 0, work = 0; sequence < batch_.n_sequences; ++sequence) {
    const int first = first_of(sequence), n = last_of(sequence) - first + 1;
    for (int i = 0; n > 1 && i < groups; ++i) {
      const HeadGroup heads = group(op, i, groups);
      for (int head = 0; head < heads.n; ++head, ++work) {
        if (work % static_cast<int>(pool_->size()) != static_cast<int>(worker)) continue;
        kernels_.rows.combine(
            partial(op, segments_[sequence], first, heads), n, heads.n, head, op.value_dim,
            row(op.output, sequence) + static_cast<std::size_t>(heads.first + head) * op.value_dim,
            mine.attention.data());
      }
    }
  }
}

// Of one group of heads, segments lie side by side, as `combine` wants them.
float* Program::partial(const Attend& op, const Segments& segments, int segment, const HeadGroup& heads) {
  return partials_.data() + static_cast<std::size_t>(segments.at) * partial_floats_ +
         attention_partial_floats(heads.first, op.value_dim) * segments.n +
         attention_partial_floats(heads.n, op.value_dim) * segment;
}

std::string Program::line(const Attend& op) const {
  const AttentionSettings& settings = op.settings;
  const std::string heads = " attention of layer " + std::to_string(settings.layer) + ", " +
                            std::to_string(settings.n_heads) + " heads over ";
  if (op.latent()) {
    return "latent" + heads + std::to_string(op.value_dim) + " + " + std::to_string(op.key_dim - op.value_dim);
  }
  const auto limit = [](const char* name, int size) {
    return size == 0 ? "" : std::string(", ") + name + " " + std::to_string(size);
  };
  return heads.substr(1) + std::to_string(op.n_kv_heads) + " of " + std::to_string(op.key_dim) +
         limit("window", settings.reach.window) + limit("chunk", settings.reach.chunk);
}

// ---- products by head ----

void Program::add_head_linear(int input, std::vector<std::shared_ptr<const Panels>> matrices, int output) {
  check_buffer(input, "head linear");
  check_buffer(output, "head linear");
  if (matrices.empty()) refuse("head linear: no matrices");
  const PanelsView& first = matrices[0]->view();
  const auto n = static_cast<std::int64_t>(matrices.size());
  for (const auto& one : matrices) {
    const PanelsView& view = one->view();
    if (view.format != first.format || view.rows != first.rows || view.cols != first.cols) {
      refuse("head linear: matrices differ");
    }
  }
  if (input == output || width(input) != n * first.cols || width(output) != n * first.rows) {
    refuse("head linear: a buffer does not fit");
  }
  const std::size_t bytes = std::max(Quantized::bytes(kFew, first.cols, kFew),
                                     Quantized::bytes(kHeadRows, first.cols, kernels_.matmul.many_tile));
  if (!is_float(first.format)) {
    for (Worker& worker : workers_) worker.quantized.reserve(bytes / sizeof(float));
  }
  operations_.emplace_back(HeadLinear{input, output, std::move(matrices)});
}

void Program::run(const HeadLinear& op, std::size_t index, unsigned worker) {
  Worker& mine = workers_[worker];
  const int n = n_rows_, n_heads = static_cast<int>(op.matrices.size());
  const auto ldx = static_cast<std::size_t>(width(op.input)), ldy = static_cast<std::size_t>(width(op.output));
  const auto multiply = [&](int head, int first, int n_rows, std::int64_t from, std::int64_t to) {
    const PanelsView& w = op.matrices[head]->view();
    const float* const x = row(op.input, first) + head * w.cols;
    float* const y = row(op.output, first) + head * w.rows;
    if (is_float(w.format)) {
      kernels_.matmul.linear_f(w, x, ldx, n_rows, from, to, y, ldy, {});
      return;
    }
    const Quantized rounded =
        Quantized::in(mine.quantized.data(), n_rows, w.cols, kernels_.matmul.tile(n_rows));
    kernels_.matmul.quantize(x, ldx, 0, n_rows, rounded);
    rounded.clear_rest(n_rows);
    kernels_.matmul.linear_q(w, rounded, n_rows, from, to, y, ldy, {}, mine.matmul.data());
  };

  const std::int64_t n_panels = op.matrices[0]->view().n_panels;
  if (n <= kFew) {  // equal shares of all heads' panels
    const std::int64_t total = n_panels * n_heads, size = pool_->size(), end = total * (worker + 1) / size;
    for (std::int64_t at = total * worker / size, to; n > 0 && at < end; at = to) {
      const std::int64_t head = at / n_panels;
      to = std::min(end, (head + 1) * n_panels);
      multiply(static_cast<int>(head), 0, n, at % n_panels, to - head * n_panels);
    }
    return;
  }
  const int groups = (n + kHeadRows - 1) / kHeadRows;
  for (int i; (i = take(index, 0, worker, n_heads * groups)) >= 0;) {
    const int first = i % groups * kHeadRows;
    multiply(i / groups, first, std::min(kHeadRows, n - first), 0, n_panels);
  }
}

std::string Program::line(const HeadLinear& op) const {
  return "linear of " + std::to_string(op.matrices.size()) + " heads " + name(op.matrices[0]->view());
}

}  // namespace dapji
