// One call: its tensors and sizes, the plan's table, and how the work is cut and given to threads.
//
// These words mean the same in every file here:
//
//     head      a key head of one batch row (`Head`); kv_head and q_head count in a batch row
//     row       a row of the plan's table (`Row`); a matrix has rows too
//     piece     some queries of a row, at most kPieceQueries (`Piece`)
//     granule   kGranule keys of a head, packed together
//     fresh     a key that lies in no whole granule of slots (`FreshKeys`)
//     place     a position in the sequence, where a position alone is one in a tensor
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "dropout.h"

namespace colonnade {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Sizes are rounded up to a multiple of this, which is a multiple of every vector and of a row of
// an AMX tile. It also keeps the number of different products small: the library compiles each of
// them once.
constexpr int64_t kStep = 16;
// Keys that are packed together.
constexpr int64_t kGranule = 64;
// A row with more queries than this is cut, so that scratch does not grow with the stride.
constexpr int64_t kPieceQueries = 128;

inline int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// Tensors [batch, heads, length, width], or their gradients. The width is contiguous.
struct Inputs {
  at::Tensor query, key, value;
};

// Tensors [batch, q_heads, q_len, v_dim] and [batch, q_heads, q_len], or their gradients.
struct Results {
  at::Tensor out, lse;
};

// The plan as Python makes it, see plan/table.py. `gather` is [kv_heads, slots], the key position
// that fills each slot; `table` has a `Row` in each line; `shift` says for each key head how many
// queries of a block come before its first own key.
struct Plan {
  at::Tensor gather, table, shift;
  bool own_from_slots;  // own_begin … own_end count slots instead of keys
};

// Query q_begin + r of key head h reads in one softmax
//
//     own keys   own_begin … own_begin + clamp(r + 1 + lead - shift[h], 0, own_end - own_begin) - 1
//     slots      slot_begin … slot_end - 1
struct Row {
  int64_t q_begin, q_end, own_begin, own_end, lead, slot_begin, slot_end;

  int64_t num_queries() const { return q_end - q_begin; }
  int64_t num_own() const { return own_end - own_begin; }
  int64_t num_slots() const { return slot_end - slot_begin; }
  int64_t num_whole_granules() const { return num_slots() / kGranule; }
  int64_t num_left_over() const { return num_slots() % kGranule; }
};

struct Piece {
  int64_t row;  // its index
  int64_t q_begin, q_end;

  int64_t num_queries() const { return q_end - q_begin; }
};

struct Head {
  int64_t index;  // batch · kv_heads + kv_head
  int64_t batch, kv_head;

  static Head at(int64_t index, int64_t kv_heads) {
    return {.index = index, .batch = index / kv_heads, .kv_head = index % kv_heads};
  }
};

struct Problem {
  int64_t batch, q_heads, kv_heads, group, q_len, qk_dim, v_dim, num_slots;
  float scale;
  bool own_from_slots;
  const int64_t* gather;
  Dropout dropout;
  std::vector<int64_t> shift;
  std::vector<Row> rows;
  // The slot that each whole granule begins with, and for each row its first granule.
  std::vector<int64_t> granule_slots;
  std::vector<int64_t> first_granule;

  Problem(const Inputs& inputs, const Plan& plan, double scale_, const Dropout& dropout_)
      : batch(inputs.query.size(0)), q_heads(inputs.query.size(1)), kv_heads(inputs.key.size(1)),
        group(q_heads / kv_heads), q_len(inputs.query.size(2)), qk_dim(inputs.query.size(3)),
        v_dim(inputs.value.size(3)), num_slots(plan.gather.size(1)),
        scale(static_cast<float>(scale_)), own_from_slots(plan.own_from_slots),
        gather(plan.gather.const_data_ptr<int64_t>()), dropout(dropout_),
        shift(plan.shift.const_data_ptr<int64_t>(),
              plan.shift.const_data_ptr<int64_t>() + kv_heads) {
    const auto lines = plan.table.accessor<const int64_t, 2>();
    for (int64_t i = 0; i < lines.size(0); ++i) {
      const auto line = lines[i];
      rows.push_back({.q_begin = line[0],
                      .q_end = line[1],
                      .own_begin = line[2],
                      .own_end = line[3],
                      .lead = line[4],
                      .slot_begin = line[5],
                      .slot_end = line[6]});
    }
    find_granules();
  }

  int64_t num_heads() const { return batch * kv_heads; }
  int64_t num_granules() const { return static_cast<int64_t>(granule_slots.size()); }

  Head head(int64_t index) const { return Head::at(index, kv_heads); }
  // The query heads that read a head are q_head(head, 0) … q_head(head, group - 1).
  int64_t q_head(const Head& head, int64_t g) const { return head.kv_head * group + g; }

  // Where a query's log-sum-exp lies.
  int64_t lse_index(int64_t batch_row, int64_t q_head, int64_t position) const {
    return (batch_row * q_heads + q_head) * q_len + position;
  }

  int64_t slot_position(int64_t kv_head, int64_t slot) const {
    return gather[kv_head * num_slots + slot];
  }

  int64_t own_position(const Row& row, int64_t kv_head, int64_t index) const {
    const int64_t own = row.own_begin + index;
    return own_from_slots ? slot_position(kv_head, own) : own;
  }

  // The slots that hold own keys of a row. Slots lie in the order of their keys.
  std::pair<int64_t, int64_t> own_slots(const Row& row, int64_t kv_head) const {
    if (own_from_slots) return {row.own_begin, row.own_end};
    const int64_t* begin = gather + kv_head * num_slots;
    const int64_t* end = begin + num_slots;
    return {std::lower_bound(begin, end, row.own_begin) - begin,
            std::lower_bound(begin, end, row.own_end) - begin};
  }

 private:
  // Rows that begin at the same slot share granules; the one that reads most says how many there
  // are.
  void find_granules() {
    std::map<int64_t, int64_t> most;
    for (const Row& row : rows) {
      auto& count = most[row.slot_begin];
      count = std::max(count, row.num_whole_granules());
    }
    std::map<int64_t, int64_t> first;
    for (const auto& [begin, count] : most) {
      first[begin] = num_granules();
      for (int64_t i = 0; i < count; ++i) granule_slots.push_back(begin + i * kGranule);
    }
    for (const Row& row : rows) first_granule.push_back(first[row.slot_begin]);
  }
};

// The keys of a piece that lie in no whole granule: the slots left over, then the row's own keys.
// Query i of the piece sees the first visible(i) of them. forward.h has a sketch.
struct FreshKeys {
  FreshKeys(const Problem& problem_, const Piece& piece, const Head& head)
      : problem(problem_), row(problem_.rows[piece.row]), kv_head(head.kv_head),
        left_over(row.num_left_over()), num_own(row.num_own()),
        ahead(piece.q_begin - row.q_begin + row.lead - problem.shift[kv_head]),
        count(visible(piece.num_queries() - 1)) {}

  int64_t visible(int64_t query) const {
    return left_over + std::clamp<int64_t>(query + 1 + ahead, 0, num_own);
  }

  // The first query of the piece that sees a key.
  int64_t first_to_see(int64_t key) const {
    return key < left_over ? 0 : std::max<int64_t>(key - left_over - ahead, 0);
  }

  int64_t position(int64_t key) const {
    if (key < left_over) return problem.slot_position(kv_head, row.slot_end - left_over + key);
    return problem.own_position(row, kv_head, key - left_over);
  }

  const Problem& problem;
  const Row& row;
  int64_t kv_head;
  int64_t left_over;  // slots among the fresh keys
  int64_t num_own;
  int64_t ahead;  // own keys that the first query sees, less one, before clamping
  int64_t count;  // how many the last query sees, which is all that any query sees
};

// Run task(index, scratch) for every index below `count`, on as many threads as PyTorch has. A
// thread takes the next index when it is free. `make` gives it its scratch, and it ends with
// `leave`.
template <typename Make, typename Task, typename Leave = void (*)()>
void run_tasks(int64_t count, const Make& make, const Task& task, const Leave& leave = [] {}) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    int64_t index = next++;
    if (index >= count) return;
    auto scratch = make();
    for (; index < count; index = next++) task(index, scratch);
    leave();
  });
}

}  // namespace colonnade
