// Adapters: what low-rank matrices add to the linear operations, for the rows of the sequences that chose them.
//
// h = a x is made once for each row, by all workers together; b h where a product is made, of the same panels. Each value
// has one order of operations, as everywhere, and a row without an adapter none of it.
#include <algorithm>
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
    worker.term_rows.resize(static_cast<std::size_t>(n));
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

const float* const* Program::terms(std::size_t index, int product, const Range& range, const Rows& rows, Worker& mine) {
  const std::int64_t n_panels = range.to - range.from, width = kLanes * n_panels;
  bool any = false;
  for (const Run& run : *runs_) {
    const int from = std::max(run.from, rows.from), to = std::min(run.to, rows.to);
    const LowRank* const low_rank = change(run, index);
    if (from >= to || low_rank == nullptr) continue;
    for (const LowRank::Part& part : low_rank->parts) {
      if (part.product != product) continue;
      if (!any) std::fill_n(mine.term_rows.begin(), rows.to - rows.from, nullptr);
      any = true;
      float* const y = mine.terms.data() + (from - rows.from) * width;
      kernels_.matmul.linear_thin(part.b->view(), projected_.data() + from * max_rank_ + part.from,
                                  static_cast<std::size_t>(max_rank_), to - from, range.from, range.to, y,
                                  static_cast<std::size_t>(width));
      for (int i = from; i < to; ++i) mine.term_rows[i - rows.from] = y + (i - from) * width;
    }
  }
  return any ? mine.term_rows.data() : nullptr;
}

}  // namespace dapji
