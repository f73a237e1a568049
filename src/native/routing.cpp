#include "routing.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace dapji {
namespace {

// In the order that numpy's argsort gives: NaN after everything.
bool better(float a, float b) { return a > b || (a == a && b != b); }

// Indices of the k best of n values, best first.
void best(const float* values, int n, int k, std::int32_t* out) {
  int found = 0;
  for (int i = 0; i < n; ++i) {
    if (found == k && !better(values[i], values[out[k - 1]])) continue;
    int at = found < k ? found++ : k - 1;
    for (; at > 0 && better(values[i], values[out[at - 1]]); --at) out[at] = out[at - 1];
    out[at] = i;
  }
}

float group_score(const float* values, int n, bool top2) {
  float first = -std::numeric_limits<float>::infinity(), second = first;
  for (int i = 0; i < n; ++i) {
    if (values[i] != values[i]) return values[i];
    second = std::max(second, std::min(first, values[i]));
    first = std::max(first, values[i]);
  }
  return top2 ? second + first : first;
}

}  // namespace

void check_routing(const Routing& r) {
  const bool fits = r.n_experts > 0 && r.n_groups > 0 && r.n_experts % r.n_groups == 0 && r.n_groups_per_token > 0 &&
                    r.n_groups_per_token <= r.n_groups && r.n_per_token > 0 &&
                    r.n_per_token <= r.n_groups_per_token * (r.n_experts / r.n_groups);
  if (!fits) throw std::invalid_argument("experts: the routing's numbers do not fit each other");
}

void RoutingScratch::reserve(const Routing& r) {
  const auto n_experts = static_cast<std::size_t>(r.n_experts), n_groups = static_cast<std::size_t>(r.n_groups);
  scores.resize(std::max(scores.size(), n_experts));
  choice.resize(std::max(choice.size(), n_experts));
  groups.resize(std::max(groups.size(), n_groups));
  chosen_groups.resize(std::max(chosen_groups.size(), n_groups));
}

void choose(const Routing& r, const float* bias, RoutingScratch& scratch, std::int32_t* experts, float* weights) {
  const float* const scores = scratch.scores.data();
  float* const choice = scratch.choice.data();
  for (int i = 0; i < r.n_experts; ++i) choice[i] = bias == nullptr ? scores[i] : scores[i] + bias[i];
  if (r.n_groups > 1) {
    const int size = r.n_experts / r.n_groups;
    float* const groups = scratch.groups.data();
    std::int32_t* const chosen = scratch.chosen_groups.data();
    for (int i = 0; i < r.n_groups; ++i) groups[i] = group_score(choice + i * size, size, r.top2);
    best(groups, r.n_groups, r.n_groups_per_token, chosen);
    for (int i = 0; i < r.n_groups; ++i) {
      if (std::find(chosen, chosen + r.n_groups_per_token, i) != chosen + r.n_groups_per_token) continue;
      std::fill_n(choice + i * size, size, -std::numeric_limits<float>::infinity());
    }
  }
  best(choice, r.n_experts, r.n_per_token, experts);
  float sum = 0.0f;
  for (int i = 0; i < r.n_per_token; ++i) {
    weights[i] = scores[experts[i]];
    sum += weights[i];
  }
  for (int i = 0; i < r.n_per_token; ++i) {
    if (r.normalized) weights[i] /= sum + 1e-20f;
    weights[i] *= r.scale;
  }
}

void Dispatch::reserve(std::int64_t n_tokens, const Routing& r) {
  stride_ = std::max(stride_, r.n_per_token);
  const auto n = static_cast<std::size_t>(n_tokens * stride_);
  for (auto* const values : {&experts_, &rows_, &pairs_}) values->resize(std::max(values->size(), n));
  weights_.resize(std::max(weights_.size(), n));
  ends_.resize(std::max(ends_.size(), static_cast<std::size_t>(r.n_experts)));
  groups_.reserve(static_cast<std::size_t>(r.n_experts));
}

std::size_t Dispatch::rounded_bytes(std::int64_t n_tokens, const Routing& r, std::int64_t cols, int many_tile) {
  const std::int64_t rows = n_tokens * r.n_per_token, n_groups = std::min<std::int64_t>(r.n_experts, rows);
  // The last tile of a group of more than kFew may be part empty; each group ends at a multiple of 64 bytes.
  const std::int64_t empty = std::min(n_groups, rows / (kFew + 1)) * (many_tile - 1);
  return Quantized::bytes(rows + empty, cols, 1) + static_cast<std::size_t>(n_groups) * 64;
}

void Dispatch::group(const Routing& r, int n_tokens, std::int64_t dim, std::int64_t hidden,
                     const MatmulKernels& kernels) {
  std::fill_n(ends_.begin(), r.n_experts, 0);
  for (int token = 0; token < n_tokens; ++token) {
    for (int i = 0; i < r.n_per_token; ++i) ++ends_[experts(token)[i]];
  }
  groups_.clear();
  std::size_t taken_at = 0, hidden_at = 0;
  for (int expert = 0, first = 0; expert < r.n_experts; ++expert) {
    const int n = ends_[expert];
    ends_[expert] = first;
    if (n == 0) continue;
    groups_.push_back({expert, first, n, taken_at, hidden_at});
    taken_at += Quantized::bytes(n, dim, kernels.tile(n));
    hidden_at += Quantized::bytes(n, hidden, kernels.tile(n));
    first += n;
  }
  for (int token = 0; token < n_tokens; ++token) {
    for (int i = token * stride_; i < token * stride_ + r.n_per_token; ++i) {
      rows_[i] = ends_[experts_[i]]++;
      pairs_[rows_[i]] = i;
    }
  }
}

}  // namespace dapji
