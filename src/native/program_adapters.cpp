// Adapters: what low-rank matrices add to the linear operations, for the rows of the sequences that chose them.
//
// h = a x is made once for each row, by all workers together; b h where a product is made, of the same panels, and there
// both are multiplied by what gives the rows of the matrix their lengths. Each value has one order of operations, as
// everywhere, and a row without an adapter none of it.
#include <algorithm>
#include <cmath>
#include <utility>

#include "program.h"

namespace dapji {
namespace {

constexpr int kProjectedRows = 32;  // so many rows of a run are projected together

}  // namespace

void Program::add_adapter(int number, std::vector<LowRank> changes) {
  Adapter adapter(operations_.size());
  const std::lock_guard<std::mutex> lock(mutex_);
  if (number < 1 || adapters_.count(number) != 0) refuse("adapter " + std::to_string(number) + " is no new number");
  std::int64_t rank = max_rank_, few = max_few_panels_, many = max_many_panels_;
  for (LowRank& change : changes) {
    if (change.parts.empty()) refuse("adapter: a change of nothing");
    const std::size_t index = static_cast<std::size_t>(change.operation);
    const Linear* const op = index < operations_.size() ? std::get_if<Linear>(&operations_[index]) : nullptr;
    if (op == nullptr || !adapter[index].parts.empty()) refuse("adapter: no linear operation, or one twice");
    const PanelsView& a = change.a->view();
    if (!is_float(a.format) || a.cols != op->cols || static_cast<std::int64_t>(change.scales.size()) != a.rows) {
      refuse("adapter: a matrix a does not fit");
    }
    for (const LowRank::Part& part : change.parts) {
      if (part.product < 0 || part.product >= static_cast<int>(op->products.size())) refuse("adapter: no such product");
      const PanelsView& b = part.b->view();
      if (!is_float(b.format) || b.rows != op->products[part.product].panels->view().rows || part.from < 0 ||
          part.from + b.cols > a.rows) {
        refuse("adapter: a matrix b does not fit");
      }
    }
    rank = std::max(rank, a.rows);
    for (const auto& ranges : op->fair) {
      for (const Range& range : ranges) few = std::max(few, range.to - range.from);
    }
    for (const Range& range : op->chunks) many = std::max(many, range.to - range.from);
    adapter[index] = std::move(change);
  }
  adapters_.emplace(number, std::move(adapter));
  max_rank_ = rank;
  max_few_panels_ = few;
  max_many_panels_ = many;
}

void Program::set_magnitude(int number, int operation, int product, const std::vector<float>& magnitude) {
  check_alive();
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = adapters_.find(number);
  const bool there = found != adapters_.end() && operation >= 0 && operation < static_cast<int>(found->second.size());
  LowRank* const change = there ? &found->second[operation] : nullptr;
  LowRank::Part* part = nullptr;
  for (std::size_t i = 0; change != nullptr && i < change->parts.size(); ++i) {
    if (change->parts[i].product == product) part = &change->parts[i];
  }
  if (part == nullptr) refuse("magnitude: no such change");
  const PanelsView& w = std::get<Linear>(operations_[operation]).products[product].panels->view();
  const PanelsView& b = part->b->view();
  if (static_cast<std::int64_t>(magnitude.size()) != w.rows) refuse("magnitude: it does not fit");
  const auto cols = static_cast<std::size_t>(w.cols), rank = static_cast<std::size_t>(b.cols);
  std::vector<float> a(rank * cols);  // scaled
  for (std::size_t k = 0; k < rank; ++k) {
    dequantize_row(change->a->view(), part->from + static_cast<std::int64_t>(k), &a[k * cols]);
    for (std::size_t i = 0; i < cols; ++i) a[k * cols + i] *= change->scales[part->from + k];
  }
  std::vector<float> factors(magnitude.size()), scratch(pool_->size() * (cols + rank));
  pool_->run([&](unsigned worker) {
    float *const row = &scratch[worker * (cols + rank)], *const by = row + cols;
    const std::int64_t n = static_cast<std::int64_t>(pool_->size());
    for (std::int64_t r = w.rows * worker / n; r < w.rows * (worker + 1) / n; ++r) {
      dequantize_row(w, r, row);
      dequantize_row(b, r, by);
      for (std::size_t k = 0; k < rank; ++k) {
        for (std::size_t i = 0; i < cols; ++i) row[i] += by[k] * a[k * cols + i];
      }
      double squares[8] = {};  // side by side, to keep the processor busy
      for (std::size_t i = 0; i < cols; ++i) squares[i % 8] += static_cast<double>(row[i]) * row[i];
      double sum = 0;
      for (const double square : squares) sum += square;
      factors[r] = sum > 0 ? static_cast<float>(magnitude[r] / std::sqrt(sum)) : 0.0f;
    }
  });
  part->factors = std::move(factors);
}

void Program::remove_adapter(int number) {
  Adapter removed;  // freed after the lock: memory may belong to Python, which has a lock of its own
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = adapters_.find(number);
  if (found == adapters_.end()) refuse("no adapter " + std::to_string(number));
  removed = std::move(found->second);
  adapters_.erase(found);
}

void Program::prepare_adapters() {
  token_runs_.clear();
  row_runs_.clear();
  runs_ = &token_runs_;
  if (batch_.adapters == nullptr) return;
  const auto add = [this](std::vector<Run>& runs, int number, int from, int to) {
    if (number == 0 || from == to) return;
    const Adapter* const adapter = &adapters_.at(number);
    if (!runs.empty() && runs.back().adapter == adapter && runs.back().to == from) {
      runs.back().to = to;
    } else {
      runs.push_back({adapter, from, to});
    }
  };
  int row = 0;
  for (int s = 0; s < batch_.n_sequences; ++s) {
    const int first_row = row;
    while (row < batch_.n_rows && batch_.rows[row] < batch_.starts[s + 1]) ++row;
    add(token_runs_, batch_.adapters[s], batch_.starts[s], batch_.starts[s + 1]);
    add(row_runs_, batch_.adapters[s], first_row, row);
  }
  if (token_runs_.empty()) return;
  const std::int64_t n = batch_.n_tokens, few = std::min<std::int64_t>(n, kFew);
  projected_.reserve(static_cast<std::size_t>(n * max_rank_));
  for (Worker& worker : workers_) {
    worker.terms.reserve(static_cast<std::size_t>(kLanes * std::max(few * max_few_panels_, n * max_many_panels_)));
    worker.changes.resize(static_cast<std::size_t>(n));
  }
}

bool Program::adapts(std::size_t index) const {
  return std::any_of(runs_->begin(), runs_->end(), [&](const Run& run) { return change(run, index) != nullptr; });
}

void Program::project(std::size_t index, const float* x, unsigned worker) {
  const std::int64_t n_workers = static_cast<std::int64_t>(pool_->size());
  std::int64_t turn = worker;  // who takes the first share of panels, since there may be fewer than workers
  for (const Run& run : *runs_) {
    const LowRank* const low_rank = change(run, index);
    if (low_rank == nullptr) continue;
    const PanelsView& a = low_rank->a->view();
    for (int from = run.from; from < run.to; from += kProjectedRows, ++turn) {
      const int to = std::min(run.to, from + kProjectedRows);
      const std::int64_t share = turn % n_workers;
      const std::int64_t p0 = a.n_panels * share / n_workers, p1 = a.n_panels * (share + 1) / n_workers;
      if (p0 == p1) continue;
      float* const h = projected_.data() + from * max_rank_ + kLanes * p0;
      kernels_.matmul.linear_thin(a, x + from * a.cols, static_cast<std::size_t>(a.cols), to - from, p0, p1, h,
                                  static_cast<std::size_t>(max_rank_));
      const float* const scales = low_rank->scales.data() + kLanes * p0;
      const std::int64_t n = std::min(a.rows, kLanes * p1) - kLanes * p0;
      for (int i = 0; i < to - from; ++i) {
        for (std::int64_t k = 0; k < n; ++k) h[i * max_rank_ + k] *= scales[k];
      }
    }
  }
}

const RowChange* Program::changes(std::size_t index, int product, const Range& range, const Rows& rows, Worker& mine) {
  const std::int64_t n_panels = range.to - range.from, width = kLanes * n_panels;
  bool any = false;
  for (const Run& run : *runs_) {
    const int from = std::max(run.from, rows.from), to = std::min(run.to, rows.to);
    const LowRank* const low_rank = change(run, index);
    if (from >= to || low_rank == nullptr) continue;
    for (const LowRank::Part& part : low_rank->parts) {
      if (part.product != product) continue;
      if (!any) std::fill_n(mine.changes.begin(), rows.to - rows.from, RowChange{});
      any = true;
      float* const y = mine.terms.data() + (from - rows.from) * width;
      kernels_.matmul.linear_thin(part.b->view(), projected_.data() + from * max_rank_ + part.from,
                                  static_cast<std::size_t>(max_rank_), to - from, range.from, range.to, y,
                                  static_cast<std::size_t>(width));
      const float* const factors = part.factors.empty() ? nullptr : part.factors.data();
      for (int i = from; i < to; ++i) mine.changes[i - rows.from] = {y + (i - from) * width, factors};
    }
  }
  return any ? mine.changes.data() : nullptr;
}

}  // namespace dapji
