#include "program.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace dapji {
namespace {

constexpr int kSharesPerWorker = 12;  // of a linear operation on many rows
constexpr int kRowsApart = 96;        // so many rows of their own, and workers do not share a product's rows

}  // namespace

void refuse(const std::string& what) { throw std::invalid_argument(what); }

void Scratch::reserve(std::size_t n_floats) {
  if (n_floats <= size_) return;
  data_ = nullptr;
  memory_.reset();  // first, so that old and new memory never lie side by side
  size_ = 0;
  memory_.reset(new float[n_floats + 16]);
  void* start = memory_.get();
  std::size_t space = (n_floats + 16) * sizeof(float);
  data_ = static_cast<float*>(std::align(64, n_floats * sizeof(float), start, space));
  size_ = n_floats;
}

// ---- building ----

Program::Program(Isa isa, int threads, int context, int vocab, KvFormat kv, const std::vector<KvShape>& layers,
                 int n_blocks, const std::vector<int>& widths)
    : kernels_(kernels(isa)),
      context_(context),
      vocab_(vocab),
      cache_(kv, layers, n_blocks) {
  if (threads < 1) refuse("threads must be at least 1");
  if (context < 1 || vocab < 1) refuse("context and vocab must be at least 1");
  pool_ = std::make_unique<Pool>(static_cast<unsigned>(threads));
  for (const int width : widths) {
    if (width < 1) refuse("a buffer's width must be at least 1");
    buffers_.push_back({width, {}});
  }
  workers_.resize(pool_->size());
  for (Worker& worker : workers_) worker.matmul.reserve(kScratchBytes / sizeof(float));
  written_.assign(n_blocks, 0);
}

Program::~Program() {
  if (!pool_->alive()) pool_.release();  // its threads stayed in the parent: to wait for them would be for ever
}

int Program::width(int buffer) const { return buffer == kLogits ? vocab_ : buffers_[buffer].width; }

void Program::check_buffer(int buffer, const char* what) const {
  if (buffer < 0 || buffer >= static_cast<int>(buffers_.size())) {
    refuse(std::string(what) + ": no buffer " + std::to_string(buffer));
  }
}

void Program::add_linear(int input, std::optional<Norm> norm, std::vector<Product> products) {
  check_buffer(input, "linear");
  if (products.empty()) refuse("linear: no products");
  Linear op{};
  op.input = input;
  op.cols = width(input);
  if (norm && static_cast<std::int64_t>(norm->weight.size()) != op.cols) refuse("linear: the norm does not fit");
  for (std::size_t i = 0; i < products.size(); ++i) {
    const Product& product = products[i];
    const PanelsView& view = product.panels->view();
    if (product.output != kLogits) check_buffer(product.output, "linear");
    if (product.output == input) refuse("linear: in place");
    if (view.cols != op.cols || view.rows != width(product.output)) refuse("linear: a matrix does not fit");
    if (!product.bias.empty() && static_cast<std::int64_t>(product.bias.size()) != view.rows) {
      refuse("linear: a bias does not fit");
    }
    if (product.kind == Epilogue::Kind::gate &&
        (i == 0 || products[i - 1].kind != Epilogue::Kind::store || products[i - 1].output != product.output)) {
      refuse("linear: a gate wants a product before it, of the same output");
    }
    (is_float(view.format) ? op.floating : op.quantized) = true;
  }
  op.norm = std::move(norm);
  op.products = std::move(products);
  if (op.quantized) max_cols_ = std::max(max_cols_, op.cols);
  if (op.norm) max_normed_cols_ = std::max(max_normed_cols_, op.cols);

  // The two products of a gate are done together, panel by panel: the second reads what the first has stored.
  struct Part {
    int product;
    std::int64_t panels;
    std::size_t bytes;  // of one panel
  };
  std::vector<Part> parts;
  std::size_t total = 0;
  for (int i = 0; i < static_cast<int>(op.products.size()); ++i) {
    const PanelsView& view = op.products[i].panels->view();
    if (op.products[i].kind == Epilogue::Kind::gate) {
      parts.back().bytes += view.panel_bytes;
    } else {
      parts.push_back({i, view.n_panels, view.panel_bytes});
    }
    total += view.panel_bytes * static_cast<std::size_t>(view.n_panels);
  }
  const std::size_t n_workers = pool_->size();
  op.fair.resize(n_workers);
  std::size_t before = 0;  // bytes of the parts so far
  for (const Part& part : parts) {
    std::int64_t from = 0;
    for (std::size_t worker = 0; worker < n_workers && from < part.panels; ++worker) {
      const std::size_t end = total / n_workers * (worker + 1);
      std::int64_t to = part.panels;
      if (worker + 1 < n_workers) {
        to = end <= before ? 0 : std::min<std::int64_t>(part.panels, (end - before + part.bytes / 2) / part.bytes);
      }
      if (to > from) op.fair[worker].push_back({part.product, from, to});
      from = std::max(from, to);
    }
    before += part.bytes * static_cast<std::size_t>(part.panels);
  }
  const std::size_t share = total / (n_workers * kSharesPerWorker) + 1;
  for (const Part& part : parts) {
    const std::int64_t step = std::max<std::int64_t>(4, static_cast<std::int64_t>(share / part.bytes) / 4 * 4);
    for (std::int64_t from = 0; from < part.panels; from += step) {
      op.chunks.push_back({part.product, from, std::min(part.panels, from + step)});
    }
  }
  operations_.emplace_back(std::move(op));
}

int Program::add_rope(const float* cos, const float* sin, int dim) {
  const std::size_t size = static_cast<std::size_t>(context_) * (dim / 2);
  ropes_.push_back({{cos, cos + size}, {sin, sin + size}, dim});
  return static_cast<int>(ropes_.size()) - 1;
}

// ---- running ----

void Program::check(const BatchView& batch) {
  const auto at = [](const char* what, int index) { return std::string(what) + "[" + std::to_string(index) + "]"; };
  if (batch.n_tokens < 1 || batch.n_sequences < 1) refuse("an empty batch");
  if (batch.starts[0] != 0 || batch.starts[batch.n_sequences] != batch.n_tokens) refuse("starts do not span the tokens");
  for (int i = 0; i < batch.n_tokens; ++i) {
    if (batch.tokens[i] < 0 || batch.tokens[i] >= vocab_) refuse(at("tokens", i) + " is outside the vocabulary");
    if (batch.positions[i] < 0 || batch.positions[i] >= context_) refuse(at("positions", i) + " is outside the context");
  }
  const auto check_rows = [&](const char* what, const std::int32_t* rows, int n) {
    for (int i = 0; i < n; ++i) {
      if (rows[i] < 0 || rows[i] >= batch.n_tokens || (i > 0 && rows[i] <= rows[i - 1])) {
        refuse(at(what, i) + " must rise within the tokens");
      }
    }
  };
  check_rows("rows", batch.rows, batch.n_rows);
  check_rows("hidden_rows", batch.hidden_rows, batch.n_hidden);
  ++n_steps_;
  for (int s = 0; s < batch.n_sequences; ++s) {
    const int first = batch.starts[s], end = batch.starts[s + 1];
    if (end <= first) refuse("sequence " + std::to_string(s) + " has no tokens");
    if (batch.adapters != nullptr && batch.adapters[s] != 0 && adapters_.count(batch.adapters[s]) == 0) {
      refuse("sequence " + std::to_string(s) + " has adapter " + std::to_string(batch.adapters[s]) + ", which is not there");
    }
    if (end > batch.n_tokens) refuse(at("starts", s + 1) + " is beyond the tokens");
    for (int i = first + 1; i < end; ++i) {
      if (batch.positions[i] != batch.positions[i - 1] + 1) refuse(at("positions", i) + " does not follow");
    }
    int oldest = batch.positions[first];
    for (const Reach& reach : reaches_) oldest = std::min(oldest, reach.first(batch.positions[first]));
    const int last = batch.positions[end - 1] / kKvBlock;
    if (last >= batch.n_columns) refuse("sequence " + std::to_string(s) + " lacks blocks");
    for (int column = oldest / kKvBlock; column <= last; ++column) {
      const std::int32_t block = batch.blocks[static_cast<std::size_t>(s) * batch.n_columns + column];
      if (block < 0 || block >= cache_.n_blocks()) refuse("sequence " + std::to_string(s) + " has a block outside the cache");
      if (column < batch.positions[first] / kKvBlock) continue;
      if (written_[block] == n_steps_) refuse("block " + std::to_string(block) + " is written twice");
      written_[block] = n_steps_;
    }
  }
}

void Program::prepare(const BatchView& batch) {
  const std::size_t n = batch.n_tokens;
  for (Buffer& buffer : buffers_) buffer.memory.reserve(n * buffer.width);
  quantized_.reserve(Quantized::bytes(batch.n_tokens, max_cols_, kernels_.matmul.many_tile) / sizeof(float));
  normed_.reserve(n * max_normed_cols_);
  for (Worker& worker : workers_) {
    worker.quantized.reserve(Quantized::bytes(kFew, max_cols_, kFew) / sizeof(float));
    worker.normed.reserve(static_cast<std::size_t>(kFew * max_normed_cols_));
  }
  for (const Operation& op : operations_) {
    if (const auto* const experts = std::get_if<Experts>(&op)) prepare(*experts, batch.n_tokens);
  }
  if (n_counters_ != operations_.size()) {
    n_counters_ = operations_.size();
    next_.reset(new std::atomic<int>[2 * n_counters_ * pool_->size()]);
    times_.assign(n_counters_, 0);
  }
  for (std::size_t i = 0; i < 2 * n_counters_ * pool_->size(); ++i) next_[i].store(0, std::memory_order_relaxed);

  single_ = batch.n_tokens == batch.n_sequences;
  tiles_.clear();
  writes_.clear();
  segments_.clear();
  n_partials_ = 0;
  for (int s = 0; s < batch.n_sequences; ++s) {
    const int first = batch.starts[s], end = batch.starts[s + 1];
    if (single_) {
      // A single row is split over its segments where that gives every worker something to do.
      const int last = batch.positions[first] / kKvSegment;
      const int n_segments = pool_->size() > 1 ? last + 1 : 1;
      segments_.push_back({n_partials_, n_segments});
      n_partials_ += n_segments > 1 ? n_segments : 0;
    }
    // Query tiles alike, so that the workers end together.
    const int n_tiles = (end - first + query_rows_ - 1) / query_rows_, size = (end - first + n_tiles - 1) / n_tiles;
    for (int i = first; i < end; i += size) tiles_.push_back({s, i, std::min(size, end - i)});
    // The tokens of a block stay together: the first one clears the block for the others.
    for (int i = first, n; i < end; i += n) {
      n = std::min(end - i, kKvBlock - batch.positions[i] % kKvBlock);
      writes_.push_back({s, i, n});
    }
  }
  partials_.reserve(static_cast<std::size_t>(n_partials_) * partial_floats_);
}

void Program::check_alive() const {
  if (!pool_->alive()) throw std::runtime_error("the model's threads stayed behind when the process was forked");
}

void Program::step(const BatchView& batch, float* logits, float* hidden) {
  check_alive();
  const std::lock_guard<std::mutex> lock(mutex_);
  check(batch);
  prepare(batch);
  batch_ = batch;
  logits_ = logits;
  hidden_states_ = hidden;
  n_rows_ = batch.n_tokens;
  prepare_adapters();
  pool_->run([this](unsigned worker) { run(worker); });
}

void Program::copy_block(int source, int target) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const int block : {source, target}) {
    if (block < 0 || block >= cache_.n_blocks()) refuse("no block " + std::to_string(block));
  }
  if (source != target) cache_.copy_block(source, target);
}

void Program::run(unsigned worker) {
  auto before = std::chrono::steady_clock::now();
  for (std::size_t i = 0; i < operations_.size(); ++i) {
    if (batch_.n_hidden == 0 && std::holds_alternative<Hidden>(operations_[i])) continue;  // no barrier for nothing
    std::visit([&](const auto& op) { run(op, i, worker); }, operations_[i]);
    pool_->barrier();
    if (profiling_ && worker == 0) {
      const auto now = std::chrono::steady_clock::now();
      times_[i] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - before).count();
      before = now;
    }
  }
}

float* Program::row(int buffer, int index) {
  return buffers_[buffer].memory.data() + static_cast<std::size_t>(index) * buffers_[buffer].width;
}

void Program::run(const Linear& op, std::size_t index, unsigned worker) {
  const int n = n_rows_;
  if (n == 0) return;
  Worker& mine = workers_[worker];
  const bool few = n <= kFew;  // every worker norms and rounds the input for itself
  const float* x = row(op.input, 0);
  const std::size_t cols = static_cast<std::size_t>(op.cols);
  float* const normed = few ? mine.normed.data() : normed_.data();
  const Quantized quantized =
      Quantized::in(few ? mine.quantized.data() : quantized_.data(), n, op.cols, kernels_.matmul.tile(n));
  const auto prepare_rows = [&](int from, int to) {
    for (int i = from; op.norm && i < to; ++i) {
      kernels_.rows.norm(x + i * cols, op.norm->weight.data(), op.norm->eps, op.cols, normed + i * cols);
    }
    if (op.quantized) kernels_.matmul.quantize(op.norm ? normed : x, cols, from, to, quantized);
    if (op.quantized && to == n) quantized.clear_rest(n);
  };

  const bool adapted = adapts(index);
  if (few) {
    prepare_rows(0, n);
    if (adapted) {
      project(index, op.norm ? normed : x, worker);
      pool_->barrier();
    }
    for (const Range& range : op.fair[worker]) {
      multiply(op, index, range, {0, n}, quantized, op.norm ? normed : x, mine);
    }
    return;
  }
  constexpr int kTogether = 16;
  if (op.norm || op.quantized) {
    for (int i; (i = take(index, 0, worker, (n + kTogether - 1) / kTogether)) >= 0;) {
      prepare_rows(i * kTogether, std::min(n, (i + 1) * kTogether));
    }
    pool_->barrier();
  }
  if (adapted) {
    project(index, op.norm ? normed : x, worker);
    pool_->barrier();
  }
  // Rows apart, so that what a worker wrote to its caches it reads from there; all panels pass by each group of rows.
  const int n_chunks = static_cast<int>(op.chunks.size()), tile = kernels_.matmul.many_tile;
  const int n_tiles = (n + tile - 1) / tile;
  const int groups = std::clamp(n / kRowsApart, 1, static_cast<int>(pool_->size()));
  for (int i; (i = take(index, 1, worker, groups * n_chunks)) >= 0;) {
    const int group = i / n_chunks;
    const int from = n_tiles * group / groups * tile, to = std::min(n, n_tiles * (group + 1) / groups * tile);
    multiply(op, index, op.chunks[i % n_chunks], {from, to}, quantized, op.norm ? normed : x, mine);
  }
}

int Program::take(std::size_t index, int phase, unsigned worker, int n) {
  const int size = static_cast<int>(pool_->size());
  for (int k = 0; k < size; ++k) {
    const int owner = (static_cast<int>(worker) + k) % size;
    const int from = n * owner / size, count = n * (owner + 1) / size - from;
    std::atomic<int>& next = next_[(2 * index + static_cast<std::size_t>(phase)) * pool_->size() + owner];
    if (next.load(std::memory_order_relaxed) >= count) continue;
    const int i = next.fetch_add(1, std::memory_order_relaxed);
    if (i < count) return from + i;
  }
  return -1;
}

void Program::multiply(const Linear& op, std::size_t index, const Range& range, const Rows& rows,
                       const Quantized& quantized, const float* x, Worker& mine) {
  const int n = rows.to - rows.from;
  const auto ldx = static_cast<std::size_t>(op.cols);
  std::size_t i = static_cast<std::size_t>(range.product);
  do {
    const Product& product = op.products[i];
    const PanelsView& w = product.panels->view();
    Epilogue epilogue{product.kind, product.activation, product.bias.empty() ? nullptr : product.bias.data()};
    epilogue.changes = changes(index, static_cast<int>(i), range, rows, mine);
    epilogue.terms_from = kLanes * range.from;
    const std::size_t ldy = static_cast<std::size_t>(width(product.output));
    float* const y = (product.output == kLogits ? logits_ : row(product.output, 0)) + rows.from * ldy;
    multiply(w, quantized.from(rows.from), x + rows.from * ldx, n, range.from, range.to, y, ldy, epilogue, mine);
  } while (++i < op.products.size() && op.products[i].kind == Epilogue::Kind::gate);
}

void Program::multiply(const PanelsView& w, const Quantized& quantized, const float* x, std::int64_t n_rows,
                       std::int64_t from, std::int64_t to, float* y, std::size_t ldy, const Epilogue& epilogue,
                       Worker& mine) {
  if (is_float(w.format)) {
    kernels_.matmul.linear_f(w, x, static_cast<std::size_t>(w.cols), n_rows, from, to, y, ldy, epilogue);
  } else {
    kernels_.matmul.linear_q(w, quantized, n_rows, from, to, y, ldy, epilogue, mine.matmul.data());
  }
}

// ---- inspection ----

void Program::profile(bool on) {
  const std::lock_guard<std::mutex> lock(mutex_);
  profiling_ = on;
  times_.assign(operations_.size(), 0);
}

std::vector<std::int64_t> Program::times() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return times_;
}

std::vector<std::string> Program::describe() const {
  std::vector<std::string> lines;
  for (const Operation& op : operations_) {
    lines.push_back(std::visit([this](const auto& one) { return line(one); }, op));
  }
  return lines;
}

std::string Program::line(const Linear& op) const {
  std::string text = op.norm ? "norm, linear" : "linear";
  for (const Product& product : op.products) {
    text += " " + name(product.panels->view());
    if (product.kind == Epilogue::Kind::add) text += " (added)";
    if (product.kind == Epilogue::Kind::gate) text += " (gated)";
  }
  return text;
}


std::string Program::name(const PanelsView& view) {
  return std::string(format_info(view.format).name) + " " + std::to_string(view.rows) + "x" + std::to_string(view.cols);
}

}  // namespace dapji
