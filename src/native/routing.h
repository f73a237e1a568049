// Which experts each token goes to, and each expert's tokens side by side. src/dapji/ops/routing.py is the truth.
//
// Shapes: T tokens, E experts, k of them for each token. A row is one token at one of its experts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "matmul.h"

namespace dapji {

struct Routing {
  int n_experts, n_per_token;
  bool sigmoid;  // scores of the router's logits; else softmax
  int n_groups, n_groups_per_token;
  bool top2;  // a group counts as the sum of its two best experts; else as its best
  bool normalized;
  float scale;
  bool weighs_input;  // a weight multiplies what an expert takes; else what it gives
};

// Throws std::invalid_argument where the numbers do not fit each other.
void check_routing(const Routing& routing);

// Memory of `choose`, for one thread.
struct RoutingScratch {
  std::vector<float> scores, choice, groups;
  std::vector<std::int32_t> chosen_groups;
  void reserve(const Routing& routing);  // throws std::bad_alloc
};

// scratch.scores [E] -> the chosen experts [k], best first, and their weights [k]. bias [E] is added to the scores for
// the choice alone; or none. Of equal experts, and groups, the first is chosen; NaN counts as the least.
void choose(const Routing& routing, const float* bias, RoutingScratch& scratch, std::int32_t* experts, float* weights);

// The rows of a step: those of an expert side by side, in the order of tokens.
class Dispatch {
 public:
  struct Group {
    int expert, first, n;             // its rows
    std::size_t taken_at, hidden_at;  // bytes, of its rounded inputs of either kind in memory that all groups share
  };

  // For so many tokens, by each of several routings; throws std::bad_alloc.
  void reserve(std::int64_t n_tokens, const Routing& routing);
  // Bytes of the memory that the groups share, at most. many_tile: as in MatmulKernels.
  static std::size_t rounded_bytes(std::int64_t n_tokens, const Routing& routing, std::int64_t cols, int many_tile);

  // [k] of a token: written by `choose`, read by `group`.
  std::int32_t* experts(int token) { return experts_.data() + static_cast<std::size_t>(token) * stride_; }
  float* weights(int token) { return weights_.data() + static_cast<std::size_t>(token) * stride_; }

  // dim, hidden: columns of what experts take, and of what lies between their matrices.
  void group(const Routing& routing, int n_tokens, std::int64_t dim, std::int64_t hidden, const MatmulKernels& kernels);

  const std::vector<Group>& groups() const { return groups_; }
  // Of all groups.
  int n_rows() const { return groups_.empty() ? 0 : groups_.back().first + groups_.back().n; }
  // [k]: where a token's experts leave what they give.
  const std::int32_t* rows(int token) const { return rows_.data() + static_cast<std::size_t>(token) * stride_; }
  int token(int row) const { return pairs_[row] / stride_; }
  float weight(int row) const { return weights_[pairs_[row]]; }

 private:
  int stride_ = 0;                            // the largest k
  std::vector<std::int32_t> experts_, rows_;  // [T, stride]
  std::vector<float> weights_;                // [T, stride]
  std::vector<std::int32_t> pairs_;           // per row: token * stride + choice
  std::vector<std::int32_t> ends_;            // per expert: where its next row comes
  std::vector<Group> groups_;                 // of experts that have rows
};

}  // namespace dapji
