// The operations of a program on rows alone: embedding, norms, hidden states, selection, the logits' cap.
#include <algorithm>
#include <cstring>
#include <utility>

#include "program.h"

namespace dapji {

// ---- embed ----

void Program::add_embed(std::shared_ptr<const Panels> table, float scale, int output) {
  check_buffer(output, "embed");
  const PanelsView& view = table->view();
  if (view.rows < vocab_ || view.cols != width(output)) refuse("embed: the table does not fit");
  operations_.emplace_back(Embed{std::move(table), scale, output});
}

void Program::run(const Embed& op, std::size_t, unsigned worker) {
  for (int i = static_cast<int>(worker); i < batch_.n_tokens; i += static_cast<int>(pool_->size())) {
    float* const out = row(op.output, i);
    dequantize_row(op.table->view(), batch_.tokens[i], out);
    if (op.scale == 1.0f) continue;
    for (int column = 0; column < width(op.output); ++column) out[column] *= op.scale;
  }
}

std::string Program::line(const Embed& op) const {
  return "embed " + name(op.table->view()) + (op.scale == 1.0f ? "" : ", scaled");
}

// ---- norm ----

void Program::add_norm(int input, Norm norm, int output, bool added) {
  for (const int buffer : {input, output}) check_buffer(buffer, "norm");
  if (input == output) refuse("norm: in place");
  if (width(input) != width(output) || static_cast<int>(norm.weight.size()) != width(input)) {
    refuse("norm: a width does not fit");
  }
  operations_.emplace_back(Normed{input, std::move(norm), output, added});
}

void Program::run(const Normed& op, std::size_t, unsigned worker) {
  const auto norm = op.added ? kernels_.rows.add_norm : kernels_.rows.norm;
  for (int i = static_cast<int>(worker); i < n_rows_; i += static_cast<int>(pool_->size())) {
    norm(row(op.input, i), op.norm.weight.data(), op.norm.eps, width(op.input), row(op.output, i));
  }
}

std::string Program::line(const Normed& op) const { return op.added ? "norm (added)" : "norm"; }

// ---- hidden ----

void Program::add_hidden(int input, Norm norm) {
  check_buffer(input, "hidden");
  if (hidden_width_) refuse("hidden: twice");
  if (static_cast<int>(norm.weight.size()) != width(input)) refuse("hidden: the norm does not fit");
  hidden_width_ = width(input);
  operations_.emplace_back(Hidden{input, std::move(norm)});
}

void Program::run(const Hidden& op, std::size_t, unsigned worker) {
  for (int i = static_cast<int>(worker); i < batch_.n_hidden; i += static_cast<int>(pool_->size())) {
    float* const out = hidden_states_ + static_cast<std::size_t>(i) * hidden_width_;
    kernels_.rows.norm(row(op.input, batch_.hidden_rows[i]), op.norm.weight.data(), op.norm.eps, hidden_width_, out);
  }
}

std::string Program::line(const Hidden&) const { return "norm of hidden rows"; }

// ---- select ----

void Program::add_select(std::vector<int> buffers) {
  for (const int buffer : buffers) check_buffer(buffer, "select");
  operations_.emplace_back(Select{std::move(buffers)});
}

void Program::run(const Select& op, std::size_t, unsigned worker) {
  if (worker != 0) return;
  if (batch_.n_rows != batch_.n_tokens) {
    for (const int buffer : op.buffers) {
      const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(width(buffer));
      for (int i = 0; i < batch_.n_rows; ++i) {
        if (batch_.rows[i] != i) std::memcpy(row(buffer, i), row(buffer, batch_.rows[i]), bytes);
      }
    }
  }
  n_rows_ = batch_.n_rows;
  runs_ = &row_runs_;
}

std::string Program::line(const Select&) const { return "select rows"; }


// ---- softcap ----

void Program::add_softcap(float cap) {
  if (!(cap > 0)) refuse("softcap: the cap must be positive");
  operations_.emplace_back(Softcap{cap});
}

void Program::run(const Softcap& op, std::size_t, unsigned worker) {
  // All logits lie side by side, and each is capped for itself.
  const std::size_t n = static_cast<std::size_t>(n_rows_) * vocab_, share = (n / pool_->size() + 15) / 16 * 16;
  const std::size_t from = std::min(n, share * worker), to = std::min(n, from + share);
  kernels_.rows.softcap(op.cap, static_cast<std::int64_t>(to - from), logits_ + from);
}

std::string Program::line(const Softcap&) const { return "softcap of the logits"; }

}  // namespace dapji
