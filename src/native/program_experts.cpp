// Routed experts, an operation of a program. Of a step's tokens each expert that any of them chose is read once.
//
// Few tokens: every worker routes them and rounds what it needs for itself, takes an equal share of the bytes of the
// experts' first matrices, and, after one barrier, the same columns of all their second matrices, whose sum it can then
// make alone. Many tokens: the rows of each expert are gathered and rounded side by side, for the kernels of many
// tokens.
#include <algorithm>
#include <cstring>
#include <utility>

#include "program.h"

namespace dapji {
namespace {

constexpr int kSharesPerWorker = 12;  // of a matrix product of many tokens

}  // namespace

void Program::add_experts(int input, int logits, int output, ExpertMatrices matrices, Activation activation,
                          const Routing& routing, std::vector<float> selection_bias) {
  for (const int buffer : {input, logits, output}) check_buffer(buffer, "experts");
  check_routing(routing);
  const auto n = static_cast<std::size_t>(routing.n_experts);
  if (matrices.gate.size() != n || matrices.up.size() != n || matrices.down.size() != n ||
      width(logits) != routing.n_experts || !(selection_bias.empty() || selection_bias.size() == n)) {
    refuse("experts: there are not " + std::to_string(n) + " of everything");
  }
  if (input == output || width(input) != width(output)) refuse("experts: a buffer does not fit");
  const std::int64_t hidden = matrices.gate[0]->view().rows;
  Experts op{input,      logits,  output,  width(input), hidden, std::move(matrices), activation, routing,
             std::move(selection_bias), false, false};
  const auto fits = [](const std::vector<std::shared_ptr<const Panels>>& all, std::int64_t rows, std::int64_t cols) {
    return std::all_of(all.begin(), all.end(), [&](const auto& one) {
      const PanelsView &view = one->view(), &first = all[0]->view();
      return view.rows == rows && view.cols == cols && view.format == first.format;
    });
  };
  if (!fits(op.matrices.gate, op.hidden, op.dim) || !fits(op.matrices.up, op.hidden, op.dim) ||
      !fits(op.matrices.down, op.dim, op.hidden)) {
    refuse("experts: a matrix does not fit");
  }
  for (const auto* const all : {&op.matrices.gate, &op.matrices.up}) {
    (is_float((*all)[0]->view().format) ? op.floating : op.quantized) = true;
  }
  operations_.emplace_back(std::move(op));
}

void Program::prepare(const Experts& op, int n_tokens) {
  const auto rows = static_cast<std::size_t>(n_tokens) * op.routing.n_per_token;
  const auto rounded_floats = [&](int n) {
    const std::int64_t cols = std::max(op.dim, op.hidden);
    return Dispatch::rounded_bytes(n, op.routing, cols, kernels_.matmul.many_tile) / sizeof(float);
  };
  hidden_.reserve(rows * op.hidden);
  given_.reserve(rows * op.dim);
  if (n_tokens > kFew) {
    dispatch_.reserve(n_tokens, op.routing);
    quantized_.reserve(rounded_floats(n_tokens));
  }
  for (Worker& worker : workers_) {
    worker.routing.reserve(op.routing);
    worker.dispatch.reserve(kFew, op.routing);
    worker.quantized.reserve(rounded_floats(kFew));
    if (op.gathers()) worker.normed.reserve(static_cast<std::size_t>(kFew) * op.routing.n_per_token * op.dim);
  }
}

void Program::route(const Experts& op, int token, Dispatch& dispatch, Worker& mine) {
  kernels_.rows.scores(row(op.logits, token), op.routing.n_experts, op.routing.sigmoid, mine.routing.scores.data());
  choose(op.routing, op.selection_bias.empty() ? nullptr : op.selection_bias.data(), mine.routing,
         dispatch.experts(token), dispatch.weights(token));
}

// What the experts of the rows from <= row < to take: weighed, or gathered for float matrices, in `gathered` [rows, dim],
// and rounded.
void Program::take_rows(const Experts& op, const Dispatch& dispatch, const Rows& rows, float* gathered, void* rounded) {
  for (const Dispatch::Group& group : dispatch.groups()) {
    const Quantized quantized = rounded_rows(group, op.dim, group.taken_at, rounded);
    for (int i = std::max(rows.from, group.first); i < std::min(rows.to, group.first + group.n); ++i) {
      const float* x = row(op.input, dispatch.token(i));
      if (op.gathers()) {
        const float weight = op.routing.weighs_input ? dispatch.weight(i) : 1.0f;
        float* const to = gathered + static_cast<std::size_t>(i) * op.dim;
        for (std::int64_t column = 0; column < op.dim; ++column) to[column] = weight * x[column];
        x = to;
      }
      if (op.quantized) round_row(group, i, x, quantized);
    }
  }
}

void Program::round_hidden(const Experts& op, const Dispatch& dispatch, const Rows& rows, void* rounded) {
  if (is_float(op.matrices.down[0]->view().format)) return;
  for (const Dispatch::Group& group : dispatch.groups()) {
    const Quantized quantized = rounded_rows(group, op.hidden, group.hidden_at, rounded);
    for (int i = std::max(rows.from, group.first); i < std::min(rows.to, group.first + group.n); ++i) {
      round_row(group, i, hidden_.data() + static_cast<std::size_t>(i) * op.hidden, quantized);
    }
  }
}

Quantized Program::rounded_rows(const Dispatch::Group& group, std::int64_t cols, std::size_t at, void* rounded) const {
  return Quantized::in(static_cast<std::byte*>(rounded) + at, group.n, cols, kernels_.matmul.tile(group.n));
}

void Program::round_row(const Dispatch::Group& group, int index, const float* x, const Quantized& out) {
  kernels_.matmul.quantize(x, 0, index - group.first, index - group.first + 1, out);
  if (index == group.first + group.n - 1) out.clear_rest(group.n);
}

// hidden = activation(gate(x)) * up(x) of a group's rows, in some panels.
void Program::multiply_up(const Experts& op, const Dispatch::Group& group, std::int64_t from, std::int64_t to,
                          const float* gathered, void* rounded, Worker& mine) {
  const Quantized quantized = rounded_rows(group, op.dim, group.taken_at, rounded);
  const float* const x = gathered + static_cast<std::size_t>(group.first) * op.dim;
  float* const y = hidden_.data() + static_cast<std::size_t>(group.first) * op.hidden;
  const auto ldy = static_cast<std::size_t>(op.hidden);
  multiply(op.matrices.gate[group.expert]->view(), quantized, x, group.n, from, to, y, ldy, {}, mine);
  const Epilogue gate{Epilogue::Kind::gate, op.activation, nullptr};
  multiply(op.matrices.up[group.expert]->view(), quantized, x, group.n, from, to, y, ldy, gate, mine);
}

// given = down(hidden) of a group's rows, in some panels.
void Program::multiply_down(const Experts& op, const Dispatch::Group& group, std::int64_t from, std::int64_t to,
                            void* rounded, Worker& mine) {
  const Quantized quantized = rounded_rows(group, op.hidden, group.hidden_at, rounded);
  const float* const x = hidden_.data() + static_cast<std::size_t>(group.first) * op.hidden;
  float* const y = given_.data() + static_cast<std::size_t>(group.first) * op.dim;
  const auto ldy = static_cast<std::size_t>(op.dim);
  multiply(op.matrices.down[group.expert]->view(), quantized, x, group.n, from, to, y, ldy, {}, mine);
}

// Adds up what a token's experts gave, in some columns.
void Program::add_given(const Experts& op, Dispatch& dispatch, int token, std::int64_t from, std::int64_t to) {
  const float* const weights = op.routing.weighs_input ? nullptr : dispatch.weights(token);
  kernels_.rows.add_weighted(given_.data() + from, static_cast<std::size_t>(op.dim), dispatch.rows(token), weights,
                             op.routing.n_per_token, to - from, row(op.output, token) + from);
}

void Program::run(const Experts& op, std::size_t index, unsigned worker) {
  if (n_rows_ == 0) return;
  if (n_rows_ <= kFew) {
    run_few(op, worker);
  } else {
    run_many(op, index, worker);
  }
}

void Program::run_few(const Experts& op, unsigned worker) {
  Worker& mine = workers_[worker];
  Dispatch& dispatch = mine.dispatch;
  float* const gathered = mine.normed.data();
  void* const rounded = mine.quantized.data();
  const auto share = [&](std::int64_t n, unsigned of) { return n * of / pool_->size(); };

  for (int token = 0; token < n_rows_; ++token) route(op, token, dispatch, mine);
  dispatch.group(op.routing, n_rows_, op.dim, op.hidden, kernels_.matmul);
  const auto& groups = dispatch.groups();
  const std::int64_t n_panels = op.matrices.gate[0]->view().n_panels;
  const std::int64_t n_all = n_panels * static_cast<std::int64_t>(groups.size());
  const std::int64_t begin = share(n_all, worker), end = share(n_all, worker + 1);
  for (std::int64_t at = begin; at < end;) {
    const Dispatch::Group& group = groups[at / n_panels];
    const std::int64_t from = at % n_panels, to = std::min(n_panels, from + end - at);
    take_rows(op, dispatch, {group.first, group.first + group.n}, gathered, rounded);
    multiply_up(op, group, from, to, gathered, rounded, mine);
    at += to - from;
  }
  pool_->barrier();

  const std::int64_t n_down = op.matrices.down[0]->view().n_panels;
  const std::int64_t from = share(n_down, worker), to = share(n_down, worker + 1);
  if (from == to) return;
  round_hidden(op, dispatch, {0, dispatch.n_rows()}, rounded);
  for (const Dispatch::Group& group : groups) multiply_down(op, group, from, to, rounded, mine);
  for (int token = 0; token < n_rows_; ++token) {
    add_given(op, dispatch, token, from * kLanes, std::min(op.dim, to * kLanes));
  }
}

void Program::run_many(const Experts& op, std::size_t index, unsigned worker) {
  Worker& mine = workers_[worker];
  float* const gathered = given_.data();  // until something is given
  void* const rounded = quantized_.data();
  const int size = static_cast<int>(pool_->size());
  const auto share = [&](int n) {
    const std::int64_t all = n, own = worker;
    return Rows{static_cast<int>(all * own / size), static_cast<int>(all * (own + 1) / size)};
  };

  const Rows tokens = share(n_rows_);
  for (int token = tokens.from; token < tokens.to; ++token) route(op, token, dispatch_, mine);
  pool_->barrier();
  if (worker == 0) dispatch_.group(op.routing, n_rows_, op.dim, op.hidden, kernels_.matmul);
  pool_->barrier();

  const auto& groups = dispatch_.groups();
  const int n_groups = static_cast<int>(groups.size());
  // Each group's panels in as many pieces, whole tiles of the kernels of many tokens.
  const auto in_pieces = [&](int phase, std::int64_t n_panels, auto multiply_panels) {
    const auto most = static_cast<int>(std::max<std::int64_t>(1, n_panels / 4));
    const int n_pieces = std::clamp(size * kSharesPerWorker / n_groups, 1, most);
    for (int i; (i = take(index, phase, worker, n_groups * n_pieces)) >= 0;) {
      const int piece = i % n_pieces;
      const std::int64_t from = n_panels * piece / n_pieces / 2 * 2;
      const std::int64_t to = piece + 1 == n_pieces ? n_panels : n_panels * (piece + 1) / n_pieces / 2 * 2;
      multiply_panels(groups[i / n_pieces], from, to);
    }
    pool_->barrier();
  };

  const Rows rows = share(dispatch_.n_rows());
  take_rows(op, dispatch_, rows, gathered, rounded);
  pool_->barrier();
  in_pieces(0, op.matrices.gate[0]->view().n_panels, [&](const auto& group, std::int64_t from, std::int64_t to) {
    multiply_up(op, group, from, to, gathered, rounded, mine);
  });
  round_hidden(op, dispatch_, rows, rounded);
  pool_->barrier();
  in_pieces(1, op.matrices.down[0]->view().n_panels, [&](const auto& group, std::int64_t from, std::int64_t to) {
    multiply_down(op, group, from, to, rounded, mine);
  });
  for (int token = tokens.from; token < tokens.to; ++token) add_given(op, dispatch_, token, 0, op.dim);
}

std::string Program::line(const Experts& op) const {
  const auto of = [](const std::vector<std::shared_ptr<const Panels>>& all) { return " " + name(all[0]->view()); };
  return "experts, " + std::to_string(op.routing.n_per_token) + " of " + std::to_string(op.routing.n_experts) +
         " for a token:" + of(op.matrices.gate) + of(op.matrices.up) + " (gated)" + of(op.matrices.down) + " (added)";
}

}  // namespace dapji
