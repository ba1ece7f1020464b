// The shares that the backward's work is cut into, and their gradients of keys in slots.
//
// One thread computes the rows of a share one after the other and adds up the share's own gradients
// of the slots. The shares, whose number depends on the sizes alone, are then added up in order. So
// no bit depends on the number of threads.
#pragma once

#include "operands.h"

namespace colonnade {

// About how many shares there are over all heads, and at most how many for one head.
constexpr int64_t kShares = 16;
constexpr int64_t kMostShares = 8;
// What a query costs besides its keys, counted in keys.
constexpr int64_t kQueryCost = 16;

// Rows of the table, and a range that holds all slots that they touch.
struct Share {
  int64_t row_begin, row_end;
  int64_t slot_begin, slot_end;
};

inline Share make_share(const Problem& problem, int64_t row_begin, int64_t row_end) {
  Share share{row_begin, row_end, problem.num_slots, 0};
  const auto touch = [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    share.slot_begin = std::min(share.slot_begin, begin);
    share.slot_end = std::max(share.slot_end, end);
  };
  for (int64_t index = row_begin; index < row_end; ++index) {
    const Row& row = problem.rows[index];
    touch(row.slot_begin, row.slot_end);
    for (int64_t kv_head = 0; kv_head < problem.kv_heads; ++kv_head) {
      const auto [begin, end] = problem.own_slots(row, kv_head);
      touch(begin, end);
    }
  }
  share.slot_begin = std::min(share.slot_begin, share.slot_end);
  return share;
}

// The rows, cut into shares with about equally many pairs of query and key.
inline std::vector<Share> cut_into_shares(const Problem& problem) {
  const auto cost = [](const Row& row) {
    return double(row.num_queries()) * double(row.num_slots() + row.num_own() / 2 + kQueryCost);
  };
  double total = 0;
  for (const Row& row : problem.rows) total += cost(row);
  const int64_t heads = std::max<int64_t>(problem.num_heads(), 1);
  const int64_t wanted = std::clamp<int64_t>((kShares + heads - 1) / heads, 1, kMostShares);
  std::vector<Share> shares;
  double done = 0;
  int64_t begin = 0;
  const int64_t num_rows = std::ssize(problem.rows);
  for (int64_t row = 0; row < num_rows; ++row) {
    done += cost(problem.rows[row]);
    const double enough = total * double(shares.size() + 1) / double(wanted);
    if (row + 1 == num_rows || done >= enough) {
      shares.push_back(make_share(problem, begin, row + 1));
      begin = row + 1;
    }
  }
  return shares;
}

// Gradients in float32 for each head, share and slot: qk_width numbers of its key, v_width of its
// value.
class SlotGrads {
 public:
  SlotGrads(const Problem& problem, int64_t qk_width, int64_t v_width)
      : problem_(problem), qk_width_(qk_width), v_width_(v_width),
        shares_(cut_into_shares(problem)),
        sums_(problem.num_heads() * num_shares() * problem.num_slots * width()) {}

  int64_t num_shares() const { return std::ssize(shares_); }
  std::pair<int64_t, int64_t> rows(int64_t share) const {
    return {shares_[share].row_begin, shares_[share].row_end};
  }
  int64_t width() const { return qk_width_ + v_width_; }

  float* key(const Head& head, int64_t share, int64_t slot) const {
    const int64_t sums = head.index * num_shares() + share;
    return sums_.get(sums * problem_.num_slots * width() + slot * qk_width_);
  }
  float* value(const Head& head, int64_t share, int64_t slot) const {
    return key(head, share, problem_.num_slots) + slot * v_width_;
  }

  void clear(const Head& head, int64_t share) const {
    const int64_t begin = shares_[share].slot_begin, end = shares_[share].slot_end;
    std::fill(key(head, share, begin), key(head, share, end), 0.0f);
    std::fill(value(head, share, begin), value(head, share, end), 0.0f);
  }

  // Write the gradients of the keys in slots begin … end - 1, over all shares in their order.
  // `sum` has room for width() numbers.
  template <typename T>
  void store(const Head& head, int64_t begin, int64_t end, const View<T>& grad_key,
             const View<T>& grad_value, float* sum) const {
    const auto position = [&](int64_t slot) { return problem_.slot_position(head.kv_head, slot); };
    for (int64_t first = begin; first < end; ++first) {
      const int64_t key_position = position(first);
      // A key that fills several slots is done with the first of them.
      if (first > 0 && position(first - 1) == key_position) continue;
      std::fill_n(sum, width(), 0.0f);
      for (int64_t slot = first; slot < problem_.num_slots && position(slot) == key_position;
           ++slot) {
        for (int64_t share = 0; share < num_shares(); ++share) {
          if (slot < shares_[share].slot_begin || slot >= shares_[share].slot_end) continue;
          add_row(key(head, share, slot), qk_width_, sum);
          add_row(value(head, share, slot), v_width_, sum + qk_width_);
        }
      }
      store_row(sum, problem_.qk_dim, problem_.scale, grad_key.at(head, key_position));
      store_row(sum + qk_width_, problem_.v_dim, 1.0f, grad_value.at(head, key_position));
    }
  }

 private:
  const Problem& problem_;
  int64_t qk_width_, v_width_;
  std::vector<Share> shares_;
  Buffer<float> sums_;
};

}  // namespace colonnade
