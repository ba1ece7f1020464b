// A decoder's step: one query of each head over keys that lie as a cache keeps them.
//
// Memory sets the pace. So nothing is packed: keys and values are read once, where they are, for
// all queries of a group. The keys of a head are split every kSplitKeys keys, whatever the number
// of threads is. Each split has a softmax of its own, with a peak m_s, total ℓ_s and sums a_s as in
// forward.h; they are merged in order:
//
//     m = max_s m_s      ℓ = Σ_s e^(m_s - m) ℓ_s      a = Σ_s e^(m_s - m) a_s
#pragma once

#include <optional>

#include "softmax.h"

namespace colonnade {

// Keys of one head that a thread takes at a time.
constexpr int64_t kSplitKeys = 256;
// Keys whose weights are computed together: they are still in the first cache when their values are
// read, and when the next query of the group reads them.
constexpr int64_t kNearKeys = 64;
// One thread reads this many numbers before a second one would have woken up.
constexpr int64_t kOneThread = 1 << 15;

// Two vectors of a row, of which `count` numbers are left; zeros behind them.
template <typename T>
std::tuple<Vec, Vec> load_two(const T* from, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    if (count >= 2 * kLanes) return {Vec::loadu(from), Vec::loadu(from + kLanes)};
    if (count <= kLanes) return {Vec::loadu(from, count), Vec(0.0f)};
    return {Vec::loadu(from), Vec::loadu(from + kLanes, count - kLanes)};
  } else {
    using Half = at::vec::Vectorized<T>;
    const Half both = count >= 2 * kLanes ? Half::loadu(from) : Half::loadu(from, count);
    return at::vec::convert_to_float<T>(both);
  }
}

template <typename T>
class Decode {
 public:
  // `reads` is [batch, kv_heads, length] and contiguous; without it everything is read.
  Decode(const Inputs& inputs, const std::optional<at::Tensor>& reads, float scale,
         const Results& results)
      : kv_heads_(inputs.key.size(1)), heads_(inputs.key.size(0) * kv_heads_),
        group_(inputs.query.size(1) / kv_heads_), length_(inputs.key.size(2)),
        qk_dim_(inputs.query.size(3)), v_dim_(inputs.value.size(3)),
        qk_width_(round_up(qk_dim_, 2 * kLanes)), v_width_(round_up(v_dim_, 2 * kLanes)),
        splits_(round_up(length_, kSplitKeys) / kSplitKeys), key_(inputs.key), value_(inputs.value),
        out_(results.out), lse_(results.lse.mutable_data_ptr<float>()),
        reads_(reads.has_value() ? reads->const_data_ptr<bool>() : nullptr),
        queries_(heads_ * group_ * qk_width_), softmax_(heads_ * splits_ * group_),
        sums_(heads_ * splits_ * group_ * v_width_) {
    const View<const T> query(inputs.query);
    for (int64_t index = 0; index < heads_; ++index) {
      const Head head = Head::at(index, kv_heads_);
      for (int64_t g = 0; g < group_; ++g) {
        copy_row(query.at(head.batch, head.kv_head * group_ + g, 0), qk_dim_, qk_width_,
                 queries_.get((index * group_ + g) * qk_width_), scale);
      }
    }
  }

  void run() {
    const int64_t count = heads_ * splits_;
    const auto make = [&] { return Buffer<float>(group_ * kNearKeys); };
    const auto task = [&](int64_t index, const Buffer<float>& scores) {
      attend(Head::at(index / splits_, kv_heads_), index % splits_, scores.get());
    };
    if (heads_ * length_ * (qk_dim_ + v_dim_) <= kOneThread) {
      const auto scores = make();
      for (int64_t index = 0; index < count; ++index) task(index, scores);
    } else {
      run_tasks(count, make, task);
    }
    for (int64_t index = 0; index < heads_; ++index) merge(Head::at(index, kv_heads_));
  }

 private:
  // At most kNearKeys keys of one head.
  struct Keys {
    const T* key;
    const T* value;
    const bool* reads;
    int64_t count;

    bool skips(int64_t i) const { return reads != nullptr && !reads[i]; }
  };

  // Index of a split's state for the first query of a group.
  int64_t state(const Head& head, int64_t split) const {
    return (head.index * splits_ + split) * group_;
  }

  void attend(const Head& head, int64_t split, float* scores) const {
    const float* queries = queries_.get(head.index * group_ * qk_width_);
    Softmax* softmax = softmax_.get(state(head, split));
    float* sums = sums_.get(state(head, split) * v_width_);
    std::fill_n(softmax, group_, Softmax{});
    std::fill_n(sums, group_ * v_width_, 0.0f);
    const int64_t begin = split * kSplitKeys, end = std::min(begin + kSplitKeys, length_);
    for (int64_t first = begin; first < end; first += kNearKeys) {
      const Keys keys{
          .key = key_.at(head, first),
          .value = value_.at(head, first),
          .reads = reads_ == nullptr ? nullptr : reads_ + head.index * length_ + first,
          .count = std::min(kNearKeys, end - first),
      };
      for_queries([&]<int64_t N>(int64_t g) {
        score<N>(queries + g * qk_width_, keys, scores + g * kNearKeys);
      });
      for (int64_t g = 0; g < group_; ++g) {
        float* of_query = scores + g * kNearKeys;
        weigh_keys<float>(of_query, 1.0f, keys.count, keys.count, softmax[g],
                          std::span(sums + g * v_width_, v_width_), /*kept=*/nullptr, of_query);
      }
      for_queries([&]<int64_t N>(int64_t g) {
        add_values<N>(scores + g * kNearKeys, keys, sums + g * v_width_);
      });
    }
  }

  // Queries of a group share what is read of a key: call task<N>(first) for N of them at a time.
  template <typename Task>
  void for_queries(const Task& task) const {
    int64_t g = 0;
    for (; g + 4 <= group_; g += 4) task.template operator()<4>(g);
    for (; g + 2 <= group_; g += 2) task.template operator()<2>(g);
    for (; g < group_; ++g) task.template operator()<1>(g);
  }

  template <int64_t N>
  void score(const float* queries, const Keys& keys, float* scores) const {
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
        scores[n * kNearKeys + i] = keys.skips(i) ? -kInfinity : sum_of(one[n] + two[n]);
      }
    }
  }

  template <int64_t N>
  void add_values(const float* weights, const Keys& keys, float* sums) const {
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
          const Vec weight(weights[n * kNearKeys + i]);
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

  void merge(const Head& head) const {
    Buffer<float> sum(v_width_);
    for (int64_t g = 0; g < group_; ++g) {
      Softmax merged;
      for (int64_t split = 0; split < splits_; ++split) {
        const float peak = softmax_[state(head, split) + g].peak;
        if (!(peak <= merged.peak)) merged.peak = peak;  // Written so that NaN passes.
      }
      std::fill_n(sum.get(), v_width_, 0.0f);
      for (int64_t split = 0; split < splits_; ++split) {
        const int64_t at = state(head, split) + g;
        if (softmax_[at].peak == -kInfinity) continue;
        const float factor = std::exp(softmax_[at].peak - merged.peak);
        merged.total += factor * softmax_[at].total;
        float* sums = sums_.get(at * v_width_);
        store_row(sums, v_width_, factor, sums);
        add_row(sums, v_width_, sum.get());
      }
      lse_[head.index * group_ + g] = finish_softmax(
          merged, sum.get(), v_dim_, out_.at(head.batch, head.kv_head * group_ + g, 0));
    }
  }

  int64_t kv_heads_, heads_, group_, length_, qk_dim_, v_dim_, qk_width_, v_width_, splits_;
  View<const T> key_, value_;
  View<T> out_;
  float* lse_;  // [batch, kv_heads, group]
  const bool* reads_;
  Buffer<float> queries_;
  Buffer<Softmax> softmax_;  // [batch, kv_heads, splits, group]
  Buffer<float> sums_;       // [batch, kv_heads, splits, group, v_width]
};

}  // namespace colonnade
