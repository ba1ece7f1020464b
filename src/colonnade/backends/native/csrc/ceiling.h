// What the products of the kernel's own tiles and the exponentials take, and nothing else.
#pragma once

#include <chrono>

#include "backward.h"
#include "forward.h"

namespace colonnade {

// Seconds for one pair of query and key, on one of `workers` threads that all work at once.
template <typename Op>
class Ceiling {
 public:
  Ceiling(int64_t qk_dim, int64_t v_dim)
      : qk_width_(padded<Op>(qk_dim)), v_width_(padded<Op>(v_dim)) {}

  double forward(double seconds) const {
    return measure(kTileQueries * kTileKeys, seconds, [&](const Operands& o) {
      for (int64_t j = 0; j < kTileKeys; j += kGranule) {
        multiply(kTileQueries, kGranule, qk_width_, o.left.get(), qk_width_, o.right.get(),
                 kGranule, o.result.get() + j, kTileKeys, false);
      }
      exponentials(kTileQueries * kTileKeys, o);
      multiply(kTileQueries, v_width_, kTileKeys, o.left.get(), kTileKeys, o.right.get(), v_width_,
               o.result.get(), v_width_, true);
    });
  }

  double backward(double seconds) const {
    return measure(kGranule * kQueries, seconds, [&](const Operands& o) {
      const Op *a = o.left.get(), *b = o.right.get();
      float* c = o.result.get();
      multiply(kGranule, kQueries, qk_width_, a, qk_width_, b, kQueries, c, kQueries, false);
      multiply(kGranule, kQueries, v_width_, a, v_width_, b, kQueries, c, kQueries, false);
      exponentials(kGranule * kQueries, o);
      multiply(kGranule, v_width_, kQueries, a, kQueries, b, v_width_, c, v_width_, true);
      multiply(kGranule, qk_width_, kQueries, a, kQueries, b, qk_width_, c, qk_width_, true);
      multiply(qk_width_, kQueries, kGranule, a, kGranule, b, kQueries, c, kQueries, true);
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
      store_weights<Op>(fast_exp<Op>(Vec::loadu(o.result.get() + i)),
                        fast_exp<Op>(Vec::loadu(o.result.get() + i + kLanes)), o.weights.get() + i);
    }
  }

  template <typename Work>
  double measure(int64_t pairs, double seconds, const Work& work) const {
    using clock = std::chrono::steady_clock;
    const auto since = [](clock::time_point start) {
      return std::chrono::duration<double>(clock::now() - start).count();
    };
    const int64_t size = kTileKeys * std::max({qk_width_, v_width_, kTileQueries, kQueries});
    const int64_t workers = at::get_num_threads();
    std::vector<double> taken(workers);
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        const Operands operands(size);
        work(operands);
        int64_t rounds = 0;
        const auto start = clock::now();
        for (; since(start) < seconds; rounds += 16) {
          for (int64_t i = 0; i < 16; ++i) work(operands);
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
