// Row operations between the matrix products, written once over a Simd struct: RMS norm, rotary embedding, softcap, and
// what routed experts need around theirs.
//
// Each output has one fixed order of operations, whatever the number of rows or threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.h"

namespace dapji {

// What a head of q or k goes through before the two are multiplied: a norm, then a rotation. Nothing is owned.
struct HeadTransform {
  const float* norm;  // [Dh] weight; null: not normed
  float eps;
  const float* cos;  // [context, rope_dim/2], by position
  const float* sin;
  int rope_dim;  // rotated values, 0: none
};

template <class S>
struct RowOps {
  using F = typename S::F;

  // out = x / sqrt(mean(x^2) + eps) * weight, or, where `added`, out += the same; x, weight, out: [n]. out may be x.
  template <bool added>
  static void norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
    const int64_t whole = n / kLanes * kLanes;
    const int tail = static_cast<int>(n - whole);
    F squares[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= whole; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) {
        const F v = S::load(x + i + j * kLanes);
        squares[j] = S::fma(v, v, squares[j]);
      }
    }
    for (; i < whole; i += kLanes) {
      const F v = S::load(x + i);
      squares[0] = S::fma(v, v, squares[0]);
    }
    if (tail > 0) {
      const F v = S::load(x + i, tail);
      squares[0] = S::fma(v, v, squares[0]);
    }
    const float sum = S::sum(S::add(S::add(squares[0], squares[1]), S::add(squares[2], squares[3])));
    const F factor = S::div(S::set(1.0f), S::sqrt(S::set(sum / static_cast<float>(n) + eps)));
    for (i = 0; i < whole; i += kLanes) {
      F y = S::mul(S::mul(S::load(x + i), factor), S::load(weight + i));
      if constexpr (added) y = S::add(S::load(out + i), y);
      S::store(out + i, y);
    }
    if (tail > 0) {
      F y = S::mul(S::mul(S::load(x + i, tail), factor), S::load(weight + i, tail));
      if constexpr (added) y = S::add(S::load(out + i, tail), y);
      S::store(out + i, y, tail);
    }
  }

  // out = scale * x [head_dim] with the pairs (i, i + dim/2) of its first `dim` values rotated by cos, sin [dim/2].
  // dim may be 0: nothing is rotated. out is not x.
  DAPJI_INLINE static void rotate(const float* x, const float* cos, const float* sin, int dim, int head_dim,
                                  float scale, float* out) {
    const int half = dim / 2;
    const F s = S::set(scale);
    for (int i = 0; i < half; i += kLanes) {
      const int n = half - i < kLanes ? half - i : kLanes;
      const F a = S::load(x + i, n), b = S::load(x + half + i, n);
      const F c = S::load(cos + i, n), d = S::load(sin + i, n);
      S::store(out + i, S::mul(s, S::sub(S::mul(a, c), S::mul(b, d))), n);
      S::store(out + half + i, S::mul(s, S::add(S::mul(b, c), S::mul(a, d))), n);
    }
    for (int i = dim; i < head_dim; i += kLanes) {
      const int n = head_dim - i < kLanes ? head_dim - i : kLanes;
      S::store(out + i, S::mul(s, S::load(x + i, n)), n);
    }
  }

  // out = scale * the transformed x [head_dim] at `position`. scratch: [head_dim]; out and scratch are not x.
  DAPJI_INLINE static void transform(const HeadTransform& by, const float* x, int position, int head_dim, float scale,
                                     float* out, float* scratch) {
    if (by.norm != nullptr) {
      norm<false>(x, by.norm, by.eps, head_dim, scratch);
      x = scratch;
    }
    const std::int64_t angles = static_cast<std::int64_t>(position) * (by.rope_dim / 2);
    rotate(x, by.cos + angles, by.sin + angles, by.rope_dim, head_dim, scale, out);
  }

  // x = cap tanh(x / cap); x: [n]
  static void softcap(float cap, int64_t n, float* x) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const int lanes = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
      S::store(x + i, dapji::softcap<S>(S::load(x + i, lanes), S::set(cap), S::set(1.0f / cap)), lanes);
    }
  }

  // Scores of a router's logits, both [n]: the sigmoid of each or the softmax of all.
  static void scores(const float* logits, int64_t n, bool sigmoid, float* out) {
    float most = logits[0];
    for (int64_t i = 1; i < n; ++i) most = logits[i] > most ? logits[i] : most;
    for (int64_t i = 0; i < n; i += kLanes) {
      const int lanes = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
      const F x = S::load(logits + i, lanes);
      F score;
      if (sigmoid) {
        // e^min(x, 0) / (1 + e^-|x|): no power overflows. NaN stays, since min takes its second argument then.
        const F small = exp<S>(S::min(S::sub(S::zero(), x), x));
        score = S::div(exp<S>(S::min(S::zero(), x)), S::add(S::set(1.0f), small));
      } else {
        score = exp<S>(S::sub(x, S::set(most)));
      }
      S::store(out + i, score, lanes);
    }
    if (sigmoid) return;
    float sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) sum += out[i];
    for (int64_t i = 0; i < n; ++i) out[i] /= sum;
  }

  // x += the sum over k of weights[k] * row rows[k] of `given`, rows ldg apart, in that order; x: [n]. Without weights:
  // of the rows themselves.
  static void add_weighted(const float* given, size_t ldg, const int32_t* rows, const float* weights, int k, int64_t n,
                           float* x) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const int lanes = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
      F sum = S::zero();
      for (int j = 0; j < k; ++j) {
        const F row = S::load(given + static_cast<size_t>(rows[j]) * ldg + i, lanes);
        sum = weights == nullptr ? S::add(sum, row) : S::fma(S::set(weights[j]), row, sum);
      }
      S::store(x + i, S::add(S::load(x + i, lanes), sum), lanes);
    }
  }
};

}  // namespace dapji
