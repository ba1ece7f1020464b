// The time that the matrix products of the kernel's own tiles and the exponentials take, without
// anything else: what forward and backward could reach at best.
#pragma once

#include <chrono>

#include "backward.h"
#include "forward.h"

namespace colonnade {

// Rounds between two looks at the clock.
constexpr int64_t kRounds = 16;

// Measures the seconds that one pair of query and key takes on one thread, while all threads work.
template <typename Op>
class Ceiling {
 public:
  Ceiling(int64_t qk_dim, int64_t v_dim)
      : qk_width_(padded<Op>(qk_dim)), v_width_(padded<Op>(v_dim)) {}

  double forward(double seconds) const {
    return measure(kTileQueries * kTileKeys, seconds, [&](const Operands& o) {
      const Op *left = o.left.get(), *right = o.right.get();
      float* result = o.result.get();
      for (int64_t j = 0; j < kTileKeys; j += kGranule) {
        multiply<Op>({kTileQueries, kGranule, qk_width_}, {left, qk_width_}, {right, kGranule},
                     {result + j, kTileKeys});
      }
      exponentials(kTileQueries * kTileKeys, o);
      multiply<Op>({kTileQueries, v_width_, kTileKeys}, {left, kTileKeys}, {right, v_width_},
                   {result, v_width_}, /*add=*/true);
    });
  }

  double backward(double seconds) const {
    constexpr int64_t queries = kPieceQueries, keys = kGranule;
    return measure(keys * queries, seconds, [&](const Operands& o) {
      const Op *left = o.left.get(), *right = o.right.get();
      float* result = o.result.get();
      multiply<Op>({keys, queries, qk_width_}, {left, qk_width_}, {right, queries},
                   {result, queries});
      multiply<Op>({keys, queries, v_width_}, {left, v_width_}, {right, queries},
                   {result, queries});
      exponentials(keys * queries, o);
      multiply<Op>({keys, v_width_, queries}, {left, queries}, {right, v_width_},
                   {result, v_width_}, /*add=*/true);
      multiply<Op>({keys, qk_width_, queries}, {left, queries}, {right, qk_width_},
                   {result, qk_width_}, /*add=*/true);
      multiply<Op>({qk_width_, queries, keys}, {left, keys}, {right, queries}, {result, queries},
                   /*add=*/true);
    });
  }

 private:
  // Zeros: no result overflows, however often it is added to.
  struct Operands {
    explicit Operands(int64_t size) : left(size), right(size), result(size), weights(size) {
      std::fill_n(left.get(), size, Op(0));
      std::fill_n(right.get(), size, Op(0));
      std::fill_n(result.get(), size, 0.0f);
    }
    Buffer<Op> left, right;
    Buffer<float> result;
    Buffer<Op> weights;
  };

  static void exponentials(int64_t count, const Operands& o) {
    for (int64_t i = 0; i < count; i += 2 * kLanes) {
      const Vec one = Vec::loadu(o.result.get(i)), two = Vec::loadu(o.result.get(i + kLanes));
      store_weights<Op>(fast_exp<Op>(one), fast_exp<Op>(two), o.weights.get(i));
    }
  }

  template <typename Work>
  double measure(int64_t pairs, double seconds, const Work& work) const {
    using clock = std::chrono::steady_clock;
    const auto since = [](clock::time_point start) {
      return std::chrono::duration<double>(clock::now() - start).count();
    };
    const int64_t size = kTileKeys * std::max({qk_width_, v_width_, kTileQueries, kPieceQueries});
    const int64_t workers = at::get_num_threads();
    std::vector<double> taken(workers);
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        const Operands operands(size);
        work(operands);
        int64_t rounds = 0;
        const auto start = clock::now();
        for (; since(start) < seconds; rounds += kRounds) {
          for (int64_t i = 0; i < kRounds; ++i) work(operands);
        }
        taken[worker] = since(start) / double(rounds * pairs);
      }
      release<Op>();
    });
    double sum = 0;
    for (const double of_worker : taken) sum += of_worker;
    return sum / double(workers);
  }

  int64_t qk_width_, v_width_;
};

}  // namespace colonnade
