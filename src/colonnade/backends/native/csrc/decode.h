// A decoder's step: one query of each head over keys that lie as a cache keeps them.
//
// Memory sets the pace. So nothing is packed: keys and values are read once, where they are, for
// all queries of a group.
#pragma once

#include "forward.h"

namespace colonnade {

// Keys of one head that one thread takes, whatever the number of threads is.
constexpr int64_t kRunKeys = 256;
// Keys whose weights are computed together: they are still in the first cache when their values,
// and the next query of the group, come to be read.
constexpr int64_t kFewKeys = 64;
// So few numbers are read sooner than a second thread has woken up.
constexpr int64_t kAlone = 1 << 15;

// Two vectors of a row, of which `count` numbers are left; zeros behind them.
template <typename T>
std::tuple<Vec, Vec> load_two(const T* from, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    if (count >= 2 * kLanes) return {Vec::loadu(from), Vec::loadu(from + kLanes)};
    if (count <= kLanes) return {Vec::loadu(from, count), Vec(0.0f)};
    return {Vec::loadu(from), Vec::loadu(from + kLanes, count - kLanes)};
  } else {
    using Half = at::vec::Vectorized<T>;
    return at::vec::convert_to_float<T>(count >= 2 * kLanes ? Half::loadu(from)
                                                            : Half::loadu(from, count));
  }
}

template <typename T>
class Decode {
 public:
  // `reads` is [batch, kv_heads, length], row by row, or null: everything is read.
  Decode(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const bool* reads,
         float scale, const at::Tensor& out, const at::Tensor& lse)
      : batch_(key.size(0)), kv_heads_(key.size(1)), group_(query.size(1) / kv_heads_),
        length_(key.size(2)), qk_dim_(query.size(3)), v_dim_(value.size(3)),
        qk_width_(round_up(qk_dim_, 2 * kLanes)), v_width_(round_up(v_dim_, 2 * kLanes)),
        runs_((length_ + kRunKeys - 1) / kRunKeys), key_(key), value_(value), out_(out),
        lse_(lse.data_ptr<float>()), reads_(reads),
        queries_(batch_ * kv_heads_ * group_ * qk_width_),
        peaks_(batch_ * kv_heads_ * runs_ * group_), totals_(batch_ * kv_heads_ * runs_ * group_),
        sums_(batch_ * kv_heads_ * runs_ * group_ * v_width_) {
    const View<T> rows(query);
    for (int64_t head = 0; head < batch_ * kv_heads_ * group_; ++head) {
      copy_row(rows.row(head / query.size(1), head % query.size(1), 0), qk_dim_, qk_width_,
               queries_.get() + head * qk_width_, scale);
    }
  }

  void run() {
    const int64_t count = batch_ * kv_heads_ * runs_;
    const auto make = [&] { return Buffer<float>(group_ * kFewKeys); };
    const auto task = [&](int64_t index, Buffer<float>& scores) { attend(index, scores.get()); };
    if (batch_ * kv_heads_ * length_ * (qk_dim_ + v_dim_) <= kAlone) {
      auto scores = make();
      for (int64_t index = 0; index < count; ++index) task(index, scores);
    } else {
      share_out(count, make, task, [] {});
    }
    for (int64_t head = 0; head < batch_ * kv_heads_; ++head) merge(head);
  }

 private:
  // Some keys of one head, which are dealt with together.
  struct Few {
    const T* key;
    const T* value;
    const bool* reads;
    int64_t count;

    bool skips(int64_t i) const { return reads != nullptr && !reads[i]; }
  };

  // A run's weights, relative to its own peak, and what they add up to.
  void attend(int64_t index, float* scores) {
    const int64_t head = index / runs_, begin = index % runs_ * kRunKeys;
    const int64_t end = std::min(begin + kRunKeys, length_);
    const float* queries = queries_.get() + head * group_ * qk_width_;
    float* peaks = peaks_.get() + index * group_;
    float* totals = totals_.get() + index * group_;
    float* sums = sums_.get() + index * group_ * v_width_;
    std::fill_n(peaks, group_, -kInfinity);
    std::fill_n(totals, group_, 0.0f);
    std::fill_n(sums, group_ * v_width_, 0.0f);
    for (int64_t first = begin; first < end; first += kFewKeys) {
      const Few keys{key_.row(head / kv_heads_, head % kv_heads_, first),
                     value_.row(head / kv_heads_, head % kv_heads_, first),
                     reads_ == nullptr ? nullptr : reads_ + head * length_ + first,
                     std::min(kFewKeys, end - first)};
      by_few_queries([&]<int64_t N>(int64_t g) {
        score<N>(queries + g * qk_width_, keys, scores + g * kFewKeys);
      });
      for (int64_t g = 0; g < group_; ++g) {
        float* of_query = scores + g * kFewKeys;
        weigh_row<float>(of_query, of_query, keys.count, keys.count, 1.0f, peaks[g], totals[g],
                         sums + g * v_width_, v_width_);
      }
      by_few_queries([&]<int64_t N>(int64_t g) {
        add_values<N>(scores + g * kFewKeys, keys, sums + g * v_width_);
      });
    }
  }

  // Queries of a group share what is read of a key: call task<N>(first) for N of them at a time.
  template <typename Task>
  void by_few_queries(const Task& task) const {
    int64_t g = 0;
    for (; g + 4 <= group_; g += 4) task.template operator()<4>(g);
    for (; g + 2 <= group_; g += 2) task.template operator()<2>(g);
    for (; g < group_; ++g) task.template operator()<1>(g);
  }

  template <int64_t N>
  void score(const float* queries, const Few& keys, float* scores) const {
    for (int64_t i = 0; i < keys.count; ++i) {
      const T* key = keys.key + i * key_.length_stride;
      // The processor foresees one stream of reads, not that values come next.
      fetch_row(keys.value + i * value_.length_stride, v_dim_);
      Vec one[N], two[N];
      for (int64_t n = 0; n < N; ++n) one[n] = two[n] = Vec(0.0f);
      for (int64_t at = 0; at < qk_dim_; at += 2 * kLanes) {
        const auto [k_one, k_two] = load_two(key + at, qk_dim_ - at);
        for (int64_t n = 0; n < N; ++n) {
          const float* query = queries + n * qk_width_ + at;
          one[n] = at::vec::fmadd(Vec::loadu(query), k_one, one[n]);
          two[n] = at::vec::fmadd(Vec::loadu(query + kLanes), k_two, two[n]);
        }
      }
      for (int64_t n = 0; n < N; ++n) {
        scores[n * kFewKeys + i] = keys.skips(i)
            ? -kInfinity
            : at::vec::vec_reduce_all<float>([](const Vec& x, const Vec& y) { return x + y; },
                                             one[n] + two[n]);
      }
    }
  }

  template <int64_t N>
  void add_values(const float* weights, const Few& keys, float* sums) const {
    for (int64_t at = 0; at < v_dim_; at += 2 * kLanes) {
      Vec one[N], two[N];
      for (int64_t n = 0; n < N; ++n) {
        one[n] = Vec::loadu(sums + n * v_width_ + at);
        two[n] = Vec::loadu(sums + n * v_width_ + at + kLanes);
      }
      for (int64_t i = 0; i < keys.count; ++i) {
        if (keys.skips(i)) continue;  // 0 times a value that is not finite would be NaN.
        const auto [v_one, v_two] =
            load_two(keys.value + i * value_.length_stride + at, v_dim_ - at);
        for (int64_t n = 0; n < N; ++n) {
          const Vec weight(weights[n * kFewKeys + i]);
          one[n] = at::vec::fmadd(weight, v_one, one[n]);
          two[n] = at::vec::fmadd(weight, v_two, two[n]);
        }
      }
      for (int64_t n = 0; n < N; ++n) {
        one[n].store(sums + n * v_width_ + at);
        two[n].store(sums + n * v_width_ + at + kLanes);
      }
    }
  }

  // The runs of a key head, in their order.
  void merge(int64_t head) {
    Buffer<float> sum(v_width_);
    for (int64_t g = 0; g < group_; ++g) {
      float peak = -kInfinity, total = 0.0f;
      std::fill_n(sum.get(), v_width_, 0.0f);
      const auto at = [&](int64_t run) { return (head * runs_ + run) * group_ + g; };
      for (int64_t run = 0; run < runs_; ++run) {
        const float of_run = peaks_.get()[at(run)];
        if (!(of_run <= peak)) peak = of_run;  // Written so that NaN passes.
      }
      for (int64_t run = 0; run < runs_; ++run) {
        const float of_run = peaks_.get()[at(run)];
        if (of_run == -kInfinity) continue;
        const float factor = std::exp(of_run - peak);
        total += factor * totals_.get()[at(run)];
        store_row(sums_.get() + at(run) * v_width_, v_width_, factor,
                  sums_.get() + at(run) * v_width_);
        add_row(sums_.get() + at(run) * v_width_, v_width_, sum.get());
      }
      T* out = out_.row(head / kv_heads_, head % kv_heads_ * group_ + g, 0);
      float& lse = lse_[head * group_ + g];
      if (peak == -kInfinity) {  // It reads nothing.
        lse = -kInfinity;
        std::fill_n(out, v_dim_, T(0));
      } else if (!std::isfinite(peak)) {
        lse = kNaN;
        std::fill_n(out, v_dim_, static_cast<T>(kNaN));
      } else {
        lse = peak + std::log(total);
        store_row(sum.get(), v_dim_, 1 / total, out);
      }
    }
  }

  int64_t batch_, kv_heads_, group_, length_, qk_dim_, v_dim_, qk_width_, v_width_, runs_;
  View<T> key_, value_, out_;
  float* lse_;  // [batch, kv_heads, group]
  const bool* reads_;
  Buffer<float> queries_, peaks_, totals_, sums_;
};

}  // namespace colonnade
