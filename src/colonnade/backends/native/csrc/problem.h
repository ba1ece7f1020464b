// One call: the tensors' sizes, the plan's table, and how the work is cut.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <vector>

namespace colonnade {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Sizes are rounded up to this: a multiple of every vector, and of a row of an AMX tile. It also
// keeps the number of different products small, each of which the library compiles once.
constexpr int64_t kStep = 16;
// Keys that are packed together.
constexpr int64_t kGranule = 64;
// Queries of one head that are computed together at most; longer rows are cut.
constexpr int64_t kQueries = 128;

inline int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// A line of the plan's table; see plan.py.
struct Row {
  int64_t q_begin, q_end, own_begin, own_end, lead, slot_begin, slot_end;

  int64_t num_own() const { return own_end - own_begin; }
  int64_t num_slots() const { return slot_end - slot_begin; }
};

// A [batch, heads, length, width] tensor whose width is contiguous.
template <typename T>
struct View {
  T* data;
  int64_t batch_stride, head_stride, length_stride;

  explicit View(const at::Tensor& tensor)
      : data(const_cast<T*>(tensor.const_data_ptr<T>())), batch_stride(tensor.stride(0)),
        head_stride(tensor.stride(1)), length_stride(tensor.stride(2)) {}

  T* row(int64_t batch, int64_t head, int64_t position) const {
    return data + batch * batch_stride + head * head_stride + position * length_stride;
  }
};

// Some queries of a row, and which of its keys they see. The keys that are no whole granule of
// slots come first, the **fresh** keys: the slots left over, then the own keys. Query i of the
// piece sees the first visible(i) of them, and every whole granule.
struct Piece {
  int64_t row;
  int64_t first_query;  // counted from the row's first
  int64_t num_queries;
  int64_t left_over;  // slots among the fresh keys
  int64_t num_own;
  int64_t ahead;  // own keys that the first query sees, less one, before clamping

  int64_t visible(int64_t query) const {
    return left_over + std::clamp<int64_t>(query + 1 + ahead, 0, num_own);
  }
  // The first query that sees fresh key `key`.
  int64_t first_to_see(int64_t key) const {
    return key < left_over ? 0 : std::max<int64_t>(key - left_over - ahead, 0);
  }
};

struct Problem {
  int64_t batch, q_heads, kv_heads, group, q_len, kv_len, qk_dim, v_dim, slots;
  const int64_t* gather;
  std::vector<Row> rows;
  std::vector<int64_t> shift;
  bool own_from_slots;
  float scale;
  // Whole granules of slots, by the slot that each begins with; and for each row its first one.
  std::vector<int64_t> granules;
  std::vector<int64_t> first_granule;

  Problem(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
          const at::Tensor& gather_, const at::Tensor& table, const at::Tensor& shift_,
          bool own_from_slots_, double scale_)
      : batch(query.size(0)), q_heads(query.size(1)), kv_heads(key.size(1)),
        group(q_heads / kv_heads), q_len(query.size(2)), kv_len(key.size(2)), qk_dim(query.size(3)),
        v_dim(value.size(3)), slots(gather_.size(1)), gather(gather_.const_data_ptr<int64_t>()),
        own_from_slots(own_from_slots_), scale(static_cast<float>(scale_)) {
    const auto* lines = table.const_data_ptr<int64_t>();
    for (int64_t line = 0; line < table.size(0); ++line, lines += 7) {
      rows.push_back({lines[0], lines[1], lines[2], lines[3], lines[4], lines[5], lines[6]});
    }
    shift.assign(shift_.const_data_ptr<int64_t>(), shift_.const_data_ptr<int64_t>() + kv_heads);
    find_granules();
  }

  int64_t key_position(int64_t head, int64_t slot) const { return gather[head * slots + slot]; }

  // Where own key `index` of a row lies among the keys.
  int64_t own_position(const Row& row, int64_t head, int64_t index) const {
    const int64_t own = row.own_begin + index;
    return own_from_slots ? key_position(head, own) : own;
  }

  int64_t whole_granules(const Row& row) const { return row.num_slots() / kGranule; }

  int64_t fresh_position(const Row& row, int64_t head, const Piece& piece, int64_t key) const {
    if (key < piece.left_over) {
      return key_position(head, row.slot_end - piece.left_over + key);
    }
    return own_position(row, head, key - piece.left_over);
  }

  Piece piece(int64_t row, int64_t head, int64_t first_query, int64_t num_queries) const {
    const Row& of = rows[row];
    return {row,          first_query,
            num_queries,  of.num_slots() % kGranule,
            of.num_own(), first_query + of.lead - shift[head]};
  }

 private:
  // Rows that begin at one slot share granules; the one that reads most says how many there are.
  void find_granules() {
    std::map<int64_t, int64_t> most;
    for (const Row& row : rows) {
      auto& count = most[row.slot_begin];
      count = std::max(count, whole_granules(row));
    }
    std::map<int64_t, int64_t> first;
    for (const auto& [begin, count] : most) {
      first[begin] = static_cast<int64_t>(granules.size());
      for (int64_t index = 0; index < count; ++index) {
        granules.push_back(begin + index * kGranule);
      }
    }
    for (const Row& row : rows) first_granule.push_back(first[row.slot_begin]);
  }
};

// Run task(index, scratch) for every index below `count`, on as many threads as PyTorch has, each
// taking the next one as it gets free. `make` gives a thread its scratch, `leave` is called at its
// end.
template <typename Make, typename Task, typename Leave>
void share_out(int64_t count, const Make& make, const Task& task, const Leave& leave) {
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
