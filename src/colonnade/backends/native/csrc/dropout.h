// Dropout on the weights. Which are dropped is a function of a seed and of where a weight is, for
// all backends alike: backends/dropout.py has the definition.
//
// Philox gives four words at once, those of four keys that follow one another: a **quad**.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace colonnade {

constexpr int64_t kPhiloxRounds = 7;
constexpr int64_t kQuad = 4;
// No vector has more words.
constexpr int64_t kVector = 16;

inline int64_t round_to_vectors(int64_t count) { return (count + kVector - 1) / kVector * kVector; }

// What Philox turns into four words, in this order; 32 bits each.
struct Counter {
  uint32_t quad, query, head, row;
};

// Turn a counter into its words. There is no loop in here: it would keep those around it from being
// turned into vectors.
inline void philox(uint64_t seed, Counter& words) {
  const auto low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  const auto turn = [&](uint32_t number) {
    const uint64_t first = uint64_t{0xD2511F53} * words.quad;
    const uint64_t second = uint64_t{0xCD9E8D57} * words.head;
    words.quad = static_cast<uint32_t>(second >> 32) ^ words.query ^ (low + number * 0x9E3779B9);
    words.head = static_cast<uint32_t>(first >> 32) ^ words.row ^ (high + number * 0xBB67AE85);
    words.query = static_cast<uint32_t>(second);
    words.row = static_cast<uint32_t>(first);
  };
  [&]<uint32_t... kNumbers>(std::integer_sequence<uint32_t, kNumbers...>) {
    (turn(kNumbers), ...);
  }(std::make_integer_sequence<uint32_t, kPhiloxRounds>());
}

// Words from `threshold` on are kept, with a factor. `threshold` is at most 2³²; there nothing is
// kept, and the factor is 0.
struct Kept {
  uint32_t threshold;
  float factor;

  Kept(int64_t threshold_, double factor_)
      : threshold(static_cast<uint32_t>(threshold_ >> 32 ? 0 : threshold_)),
        factor(threshold_ >> 32 ? 0.0f : static_cast<float>(factor_)) {}

  float factor_of(uint32_t word) const { return word >= threshold ? factor : 0.0f; }
};

// The dropout of a call, and the places of its queries and keys: where they are in the sequence
// that they belong to, see plan/places.py.
class Dropout {
 public:
  bool drops = false;
  uint64_t seed = 0;
  Kept kept{0, 1.0};

  // `tensors` are the seed, documents [q_len] and places [q_len] of queries, and places [kv_heads
  // or 1, kv_len] of keys; there are none if nothing is dropped. `first` are the numbers of the
  // first batch row and query head, and the place of the first key.
  Dropout(at::TensorList tensors, int64_t threshold, double factor, at::IntArrayRef first)
      : drops(!tensors.empty()) {
    if (!drops) return;
    TORCH_CHECK(tensors.size() == 4 && first.size() == 3, "dropout takes 4 tensors and 3 numbers");
    for (const at::Tensor& tensor : tensors) tensors_.push_back(tensor.contiguous());
    seed = static_cast<uint64_t>(*numbers(0));
    kept = Kept(threshold, factor);
    documents_ = numbers(1);
    queries_ = numbers(2);
    keys_ = numbers(3);
    key_stride_ = tensors_[3].size(0) == 1 ? 0 : tensors_[3].size(1);
    first_row_ = first[0];
    first_head_ = first[1];
    first_place_ = first[2];
  }

  int64_t place_of_key(int64_t kv_head, int64_t position) const {
    return first_place_ + keys_[kv_head * key_stride_ + position];
  }
  int64_t place_of_query(int64_t position) const { return first_place_ + queries_[position]; }
  // A query as Philox counts it, without a key.
  Counter counter_of(int64_t batch_row, int64_t q_head, int64_t position) const {
    return {.quad = 0,
            .query = static_cast<uint32_t>(place_of_query(position)),
            .head = static_cast<uint32_t>(first_head_ + q_head),
            .row = static_cast<uint32_t>(first_row_ + batch_row + documents_[position])};
  }

 private:
  const int64_t* numbers(int64_t index) const { return tensors_[index].const_data_ptr<int64_t>(); }

  std::vector<at::Tensor> tensors_;
  const int64_t* documents_ = nullptr;
  const int64_t* queries_ = nullptr;
  const int64_t* keys_ = nullptr;
  int64_t key_stride_ = 0, first_row_ = 0, first_head_ = 0, first_place_ = 0;
};

// The words of some quads for one query; its own quad is ignored. Functions of plain pointers,
// which no other memory aliases, are what compilers turn into vectors.
inline void words_of_quads(uint64_t seed, const Counter query, const uint32_t* __restrict quads,
                           int64_t count, uint32_t* __restrict words) {
  for (int64_t i = 0; i < count; ++i) {
    Counter counter{quads[i], query.query, query.head, query.row};
    philox(seed, counter);
    words[kQuad * i] = counter.quad;
    words[kQuad * i + 1] = counter.query;
    words[kQuad * i + 2] = counter.head;
    words[kQuad * i + 3] = counter.row;
  }
}

// The factors of the four keys of a quad for some queries; the counter's query is ignored.
inline void factors_of_quad(uint64_t seed, const Kept kept, const Counter quad,
                            const uint32_t* __restrict queries, int64_t count,
                            float* __restrict first, float* __restrict second,
                            float* __restrict third, float* __restrict fourth) {
  for (int64_t i = 0; i < count; ++i) {
    Counter counter{quad.quad, queries[i], quad.head, quad.row};
    philox(seed, counter);
    first[i] = kept.factor_of(counter.quad);
    second[i] = kept.factor_of(counter.query);
    third[i] = kept.factor_of(counter.head);
    fourth[i] = kept.factor_of(counter.row);
  }
}

// The factors of one query after the other, for keys that stay the same.
class FactorsOfKeys {
 public:
  // Room for `most` keys, and behind them for a vector of finite numbers.
  explicit FactorsOfKeys(int64_t most = 0)
      : quads_(most + kVector), index_(most), words_(kQuad * (most + 2 * kVector)),
        factors_(most + kVector) {}

  // Take the keys at position(0) … position(count - 1).
  template <typename Position>
  void set_keys(int64_t count, const Position& position) {
    int64_t quads = 0;
    in_order_ = true;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t key = position(i);
      const auto quad = static_cast<uint32_t>(key / kQuad);
      if (quads == 0 || quads_[quads - 1] != quad) quads_[quads++] = quad;
      index_[i] = static_cast<int32_t>((quads - 1) * kQuad + key % kQuad);
      in_order_ &= index_[i] == index_[0] + i;
    }
  }

  // The factors of the first `count` keys for a query; the counter's quad is ignored.
  const float* of_query(uint64_t seed, const Kept kept, const Counter query, int64_t count) {
    if (count == 0) return factors_.data();
    // Rounded up, so that nothing is left over from vectors.
    const int64_t quads = round_to_vectors(index_[count - 1] / kQuad + 1);
    words_of_quads(seed, query, quads_.data(), quads, words_.data());
    const uint32_t* __restrict words = words_.data();
    float* __restrict factors = factors_.data();
    if (in_order_) {
      const uint32_t* from = words + index_[0];
      const int64_t rounded = round_to_vectors(count);
      for (int64_t i = 0; i < rounded; ++i) factors[i] = kept.factor_of(from[i]);
    } else {
      const int32_t* index = index_.data();
      for (int64_t i = 0; i < count; ++i) factors[i] = kept.factor_of(words[index[i]]);
    }
    return factors;
  }

 private:
  std::vector<uint32_t> quads_;
  std::vector<int32_t> index_;  // of a key's word
  std::vector<uint32_t> words_;
  std::vector<float> factors_;
  bool in_order_ = true;  // whether words lie as keys do
};

// The factors of one key after the other, for queries of one head that stay the same.
template <int64_t kMost>
class FactorsOfQueries {
 public:
  // Take the queries at position(0) … position(count - 1).
  template <typename Position>
  void set_queries(int64_t count, const Position& position, uint32_t head, uint32_t row) {
    for (int64_t i = 0; i < count; ++i) queries_[i] = static_cast<uint32_t>(position(i));
    head_ = head;
    row_ = row;
    quad_ = -1;
  }

  // The factors of the queries begin … end - 1 for a key, at begin … end - 1. Ask with one range
  // for all keys of a quad.
  const float* of_key(uint64_t seed, const Kept kept, int64_t key, int64_t begin, int64_t end) {
    if (key / kQuad != quad_ || begin != begin_) {
      quad_ = key / kQuad;
      begin_ = begin;
      const Counter quad{static_cast<uint32_t>(quad_), 0, head_, row_};
      factors_of_quad(seed, kept, quad, queries_.data() + begin, end - begin,
                      factors_[0].data() + begin, factors_[1].data() + begin,
                      factors_[2].data() + begin, factors_[3].data() + begin);
    }
    return factors_[key % kQuad].data();
  }

 private:
  std::array<uint32_t, kMost> queries_{};
  std::array<std::array<float, kMost>, kQuad> factors_{};
  uint32_t head_ = 0, row_ = 0;
  int64_t quad_ = -1, begin_ = 0;
};

}  // namespace colonnade
