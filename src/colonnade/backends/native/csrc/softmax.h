// The softmax: a step of the online softmax and its end (forward.h has the formulas), and the
// gradient.
//
// The fast exponentials turn NaN into some number. So we look for NaN where it cannot hide: forward
// in the largest score of a query, backward in the log-sum-exp.
#pragma once

#include <span>

#include "operands.h"

namespace colonnade {

// e^x. The result for NaN may be any number.
template <typename Op>
Vec fast_exp(const Vec& x) {
  if constexpr (kPair<Op> == 2) {
    return x.fexp_u20();  // good to the digits of bfloat16
  } else {
    return x.exp_u20();
  }
}

// Two vectors of weights in the operands' type.
template <typename Op>
void store_weights(const Vec& one, const Vec& two, Op* to) {
  if constexpr (kPair<Op> == 1) {
    one.store(to);
    two.store(to + kLanes);
  } else {
    at::vec::convert_from_float<Op>(one, two).store(to);
  }
}

// A query's peak may lag behind its largest score by this much. Weights stay below e^8, which is
// far from overflow, and what has been accumulated is seldom rescaled.
constexpr float kPeakLag = 8.0f;

// m and ℓ of one query: its weights are e^(score - peak), and `total` is their sum so far.
struct Softmax {
  float peak = -kInfinity;
  float total = 0.0f;
};

// The largest of count > 0 numbers, NaN if one is NaN.
inline float largest(const float* numbers, int64_t count) {
  const Vec low(-kInfinity);
  Vec one = low, two = low;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    one = at::vec::maximum(one, Vec::loadu(numbers + i));
    two = at::vec::maximum(two, Vec::loadu(numbers + i + kLanes));
  }
  for (; i < count; i += kLanes) {
    const Vec last = Vec::loadu(numbers + i);
    one = at::vec::maximum(one, count - i < kLanes ? Vec::set(low, last, count - i) : last);
  }
  return at::vec::vec_reduce_all<float>([](const Vec& x, const Vec& y) {
    return at::vec::maximum(x, y);
  }, at::vec::maximum(one, two));
}

// One step of a query's softmax: compute the weights of `width` keys, of which it sees the first
// `visible`; the others get 0. Their scores are factor · products. `accumulated` is the sum of
// weighted values so far, which a new peak rescales; it is empty at the first step. `weights` may
// overwrite `products`. `kept` holds the factors of the weights, which do not count in their sum,
// with finite numbers behind them; it is null if nothing is dropped.
template <typename Op>
void weigh_keys(const float* products, float factor, int64_t visible, int64_t width,
                Softmax& softmax, std::span<float> accumulated, const float* kept, Op* weights) {
  const float top = visible > 0 ? factor * largest(products, visible) : -kInfinity;
  if (!(top <= softmax.peak + kPeakLag)) {  // Written so that NaN passes.
    const float shrink = std::exp(softmax.peak - top);
    softmax.total *= shrink;
    store_row(accumulated.data(), accumulated.size(), shrink, accumulated.data());
    softmax.peak = top;
  }
  if (softmax.peak == -kInfinity) visible = 0;
  const Vec nothing(0.0f), by(factor), minus_peak(-softmax.peak);
  const auto weight = [&](int64_t i) {
    return fast_exp<Op>(at::vec::fmadd(Vec::loadu(products + i), by, minus_peak));
  };
  const auto store = [&](const Vec& one, const Vec& two, int64_t i) {
    if (kept == nullptr) {
      store_weights<Op>(one, two, weights + i);
    } else {
      store_weights<Op>(one * Vec::loadu(kept + i), two * Vec::loadu(kept + i + kLanes),
                        weights + i);
    }
  };
  Vec sum_one = nothing, sum_two = nothing;
  int64_t i = 0;
  for (; i + 2 * kLanes <= visible; i += 2 * kLanes) {
    const Vec one = weight(i), two = weight(i + kLanes);
    sum_one = sum_one + one;
    sum_two = sum_two + two;
    store(one, two, i);
  }
  for (; i < width; i += 2 * kLanes) {
    Vec one = nothing, two = nothing;
    if (i < visible) {
      one = weight(i);
      if (visible - i < kLanes) one = Vec::set(nothing, one, visible - i);
    }
    if (i + kLanes < visible) two = Vec::set(nothing, weight(i + kLanes), visible - i - kLanes);
    sum_one = sum_one + one;
    sum_two = sum_two + two;
    if (i < visible) {
      store(one, two, i);
    } else {
      store_weights<Op>(nothing, nothing, weights + i);
    }
  }
  softmax.total += sum_of(sum_one + sum_two);
}

// The end of a query's softmax: write accumulated / total, and return the log-sum-exp.
template <typename T>
float finish_softmax(const Softmax& softmax, const float* accumulated, int64_t width, T* out) {
  if (softmax.peak == -kInfinity) {  // It reads nothing.
    std::fill_n(out, width, T(0));
    return -kInfinity;
  }
  if (!std::isfinite(softmax.peak)) {  // There is NaN or infinity among its scores.
    std::fill_n(out, width, static_cast<T>(kNaN));
    return kNaN;
  }
  store_row(accumulated, width, 1 / softmax.total, out);
  return softmax.peak + std::log(softmax.total);
}

// What the gradient needs to know of queries that lie side by side: the log-sum-exp of each, and
// delta_i = Σ_j P_ij dP_ij.
struct QueryStatistics {
  const float* lse;
  const float* delta;
  float scale;
};

// The gradient for one key and the queries begin … end - 1, given products_i = q_i · k and
// weight_grads_i = dP_i. Queries from `seen_from` on see the key; for the others both are 0.
//
//     P_i = e^(scale · products_i - lse_i)      dS_i = P_i (f_i dP_i - delta_i)
//
// `kept` holds the factors f_i that dropout gives the weights, and the weights come out with them;
// it is null if nothing is dropped. `weights` may overwrite `products`, and `score_grads` overwrite
// `weight_grads`.
template <typename Op>
void differentiate_softmax(const float* products, const float* weight_grads, int64_t begin,
                           int64_t seen_from, int64_t end, const QueryStatistics& queries,
                           const float* kept, Op* weights, Op* score_grads) {
  const Vec nothing(0.0f), by(queries.scale);
  int64_t i = begin;
  for (; i + 2 * kLanes <= seen_from; i += 2 * kLanes) {
    store_weights<Op>(nothing, nothing, weights + i);
    store_weights<Op>(nothing, nothing, score_grads + i);
  }
  for (; i < end; i += 2 * kLanes) {
    Vec weight[2], grad[2];
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t at = i + half * kLanes;
      weight[half] =
          fast_exp<Op>(at::vec::fmsub(Vec::loadu(products + at), by, Vec::loadu(queries.lse + at)));
      Vec weight_grad = Vec::loadu(weight_grads + at);
      if (kept != nullptr) weight_grad = weight_grad * Vec::loadu(kept + at);
      grad[half] = weight[half] * (weight_grad - Vec::loadu(queries.delta + at));
      if (kept != nullptr) weight[half] = weight[half] * Vec::loadu(kept + at);
      if (at < seen_from) {
        const int64_t hidden = std::min(seen_from - at, kLanes);
        weight[half] = Vec::set(weight[half], nothing, hidden);
        grad[half] = Vec::set(grad[half], nothing, hidden);
      }
    }
    store_weights<Op>(weight[0], weight[1], weights + i);
    store_weights<Op>(grad[0], grad[1], score_grads + i);
  }
}

}  // namespace colonnade
