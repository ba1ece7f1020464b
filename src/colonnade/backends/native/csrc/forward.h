// The forward: tiles of scores, one online softmax over a row's fresh keys and its granules of
// slots.
#pragma once

#include "operands.h"

namespace colonnade {

// Queries and keys of a tile of scores.
constexpr int64_t kTileQueries = 32;
constexpr int64_t kTileKeys = 512;
// A row's weights are relative to a peak that may lag behind the largest score by this much: e^8
// is far from overflow, and the accumulated row is seldom scaled anew.
constexpr float kSlack = 8.0f;

// Weights of one query over `width` scores, of which it sees the first `live`; peak and total are
// those of the scores before, `accumulated` what they have added up to.
template <typename Op>
void weigh_row(float* scores, Op* weights, int64_t live, int64_t width, float factor, float& peak,
               float& total, float* accumulated, int64_t accumulated_width) {
  const Vec nothing(0.0f), low(-kInfinity);
  float top = -kInfinity;
  int64_t j = 0;
  if (live > 0) {
    Vec one = low, two = low;
    for (; j + 2 * kLanes <= live; j += 2 * kLanes) {
      one = at::vec::maximum(one, Vec::loadu(scores + j));
      two = at::vec::maximum(two, Vec::loadu(scores + j + kLanes));
    }
    for (; j < live; j += kLanes) {
      const Vec last = Vec::loadu(scores + j);
      one = at::vec::maximum(one, live - j < kLanes ? Vec::set(low, last, live - j) : last);
    }
    top = factor * at::vec::vec_reduce_all<float>([](const Vec& x, const Vec& y) {
      return at::vec::maximum(x, y);
    }, at::vec::maximum(one, two));
  }
  // Written so that NaN passes.
  if (!(top <= peak + kSlack)) {
    const float shrink = std::exp(peak - top);
    total *= shrink;
    if (accumulated != nullptr) store_row(accumulated, accumulated_width, shrink, accumulated);
    peak = top;
  }
  if (peak == -kInfinity) live = 0;
  const Vec by(factor), from(-peak);
  Vec sum_one = nothing, sum_two = nothing;
  for (j = 0; j + 2 * kLanes <= live; j += 2 * kLanes) {
    const Vec one = fast_exp<Op>(at::vec::fmadd(Vec::loadu(scores + j), by, from));
    const Vec two = fast_exp<Op>(at::vec::fmadd(Vec::loadu(scores + j + kLanes), by, from));
    sum_one = sum_one + one;
    sum_two = sum_two + two;
    store_weights<Op>(one, two, weights + j);
  }
  for (; j < width; j += 2 * kLanes) {
    Vec one = nothing, two = nothing;
    if (j < live) {
      one = fast_exp<Op>(at::vec::fmadd(Vec::loadu(scores + j), by, from));
      if (live - j < kLanes) one = Vec::set(nothing, one, live - j);
    }
    if (j + kLanes < live) {
      two = fast_exp<Op>(at::vec::fmadd(Vec::loadu(scores + j + kLanes), by, from));
      two = Vec::set(nothing, two, live - j - kLanes);
    }
    sum_one = sum_one + one;
    sum_two = sum_two + two;
    store_weights<Op>(one, two, weights + j);
  }
  total += at::vec::vec_reduce_all<float>([](const Vec& x, const Vec& y) { return x + y; },
                                          sum_one + sum_two);
}

template <typename T, typename Op>
class Forward {
 public:
  Forward(const Problem& problem, const at::Tensor& query, const at::Tensor& key,
          const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse)
      : problem_(problem), query_(query), key_(key), value_(value), out_(out),
        lse_(lse.mutable_data_ptr<float>()), qk_width_(padded<Op>(problem.qk_dim)),
        v_width_(padded<Op>(problem.v_dim)), num_granules_(problem.granules.size()),
        packed_keys_(problem.batch * problem.kv_heads * num_granules_ * kGranule * qk_width_),
        packed_values_(problem.batch * problem.kv_heads * num_granules_ * kGranule * v_width_) {
    // Query tiles of one head and of its group share packed keys; their state has to fit a cache.
    queries_ = std::clamp<int64_t>(1024 / problem.group / kTileQueries * kTileQueries, kTileQueries,
                                   kQueries);
    for (int64_t row = 0; row < static_cast<int64_t>(problem.rows.size()); ++row) {
      const int64_t length = problem.rows[row].q_end - problem.rows[row].q_begin;
      for (int64_t first = 0; first < length; first += queries_) {
        pieces_.push_back({row, first, std::min(queries_, length - first), 0, 0, 0});
      }
    }
    // Long ones first, so that the threads end together.
    std::reverse(pieces_.begin(), pieces_.end());
  }

  void run() {
    const int64_t heads = problem_.batch * problem_.kv_heads;
    const auto make = [&] { return Scratch(*this); };
    share_out(heads * num_granules_, make, [&](int64_t index, Scratch& scratch) {
      pack_granule(index / num_granules_, index % num_granules_, scratch);
    }, [] {});
    const int64_t pieces = pieces_.size();
    // Heads that lie side by side share pages of memory: they take turns.
    const int64_t in_turn = query_.head_stride < query_.length_stride ? problem_.kv_heads : 1;
    share_out(heads * pieces, make, [&](int64_t index, Scratch& scratch) {
      const int64_t batch_head = index / (in_turn * pieces) * in_turn + index % in_turn;
      attend(batch_head, pieces_[index / in_turn % pieces], scratch);
    }, release<Op>);
  }

 private:
  struct Scratch {
    explicit Scratch(const Forward& f)
        : rows(kGranule * std::max(f.qk_width_, f.v_width_)), keys(kTileKeys * f.qk_width_),
          values(kTileKeys * f.v_width_), queries(f.stacked() * f.qk_width_),
          scores(kTileQueries * kTileKeys), weights(kPair<Op> == 2 ? kTileQueries * kTileKeys : 0),
          accumulated(f.stacked() * f.v_width_), peak(f.stacked()), total(f.stacked()),
          started(f.problem_.group * f.queries_ / kTileQueries) {}
    Buffer<Op> rows, keys, values, queries;
    Buffer<float> scores;
    Buffer<Op> weights;
    Buffer<float> accumulated, peak, total;
    Buffer<bool> started;
  };

  int64_t stacked() const { return problem_.group * queries_; }

  // Up to kGranule keys and values, at the positions that `position` gives, zeros behind them.
  template <typename Position>
  void pack(int64_t batch, int64_t head, int64_t count, const Position& position, Op* rows,
            Op* keys, Op* values) const {
    const int64_t rounded = round_up(count, kStep);
    copy_rows(count, [&](int64_t i) { return key_.row(batch, head, position(i)); }, problem_.qk_dim,
              qk_width_, rows);
    pack_transposed(rows, rounded, qk_width_, keys, kGranule);
    copy_rows(count, [&](int64_t i) { return value_.row(batch, head, position(i)); },
              problem_.v_dim, v_width_, rows);
    pack_pairs(rows, rounded, v_width_, v_width_, values, v_width_);
  }

  void pack_granule(int64_t batch_head, int64_t granule, Scratch& scratch) {
    const int64_t batch = batch_head / problem_.kv_heads, head = batch_head % problem_.kv_heads;
    const int64_t at = (batch_head * num_granules_ + granule) * kGranule;
    pack(batch, head, kGranule,
         [&](int64_t i) { return problem_.key_position(head, problem_.granules[granule] + i); },
         scratch.rows.get(), packed_keys_.get() + at * qk_width_,
         packed_values_.get() + at * v_width_);
  }

  void attend(int64_t batch_head, const Piece& where, Scratch& scratch) {
    const int64_t batch = batch_head / problem_.kv_heads, head = batch_head % problem_.kv_heads;
    const Row& row = problem_.rows[where.row];
    const Piece piece = problem_.piece(where.row, head, where.first_query, where.num_queries);
    begin(batch, head, row, piece, scratch);

    const int64_t fresh = piece.visible(piece.num_queries - 1);
    for (int64_t first = 0; first < fresh; first += kTileKeys) {
      const int64_t count = std::min(kTileKeys, fresh - first);
      for (int64_t done = 0; done < count; done += kGranule) {
        pack(batch, head, std::min(kGranule, count - done),
             [&](int64_t i) { return problem_.fresh_position(row, head, piece, first + done + i); },
             scratch.rows.get(), scratch.keys.get() + done * qk_width_,
             scratch.values.get() + done * v_width_);
      }
      tile(piece, scratch.keys.get(), scratch.values.get(), count, first, scratch);
    }
    const int64_t whole = problem_.whole_granules(row);
    for (int64_t first = 0; first < whole; first += kTileKeys / kGranule) {
      const int64_t count = std::min(kTileKeys / kGranule, whole - first) * kGranule;
      const int64_t at =
          (batch_head * num_granules_ + problem_.first_granule[piece.row] + first) * kGranule;
      tile(piece, packed_keys_.get() + at * qk_width_, packed_values_.get() + at * v_width_, count,
           kAllVisible, scratch);
    }
    finish(batch, head, row, piece, scratch);
  }

  static constexpr int64_t kAllVisible = -1;

  void begin(int64_t batch, int64_t head, const Row& row, const Piece& piece, Scratch& scratch) {
    // The sign of the scale goes into the queries, so that the largest product is the largest
    // score; in float32 all of it does.
    const float factor =
        kPair<Op> == 1 ? problem_.scale : float((problem_.scale > 0) - (problem_.scale < 0));
    for (int64_t g = 0; g < problem_.group; ++g) {
      const int64_t q_head = head * problem_.group + g;
      copy_rows(piece.num_queries, [&](int64_t i) {
        return query_.row(batch, q_head, row.q_begin + piece.first_query + i);
      }, problem_.qk_dim, qk_width_, scratch.queries.get() + g * queries_ * qk_width_, factor);
    }
    std::fill_n(scratch.peak.get(), stacked(), -kInfinity);
    std::fill_n(scratch.total.get(), stacked(), 0.0f);
    std::fill_n(scratch.started.get(), stacked() / kTileQueries, false);
  }

  // One tile of keys for all queries of the piece. Fresh keys count from `first_fresh`.
  void tile(const Piece& piece, const Op* keys, const Op* values, int64_t count,
            int64_t first_fresh, Scratch& scratch) {
    const float factor = kPair<Op> == 1 ? 1.0f : std::abs(problem_.scale);
    float* scores = scratch.scores.get();
    const auto seen = [&](int64_t query) {
      return first_fresh == kAllVisible
          ? count
          : std::clamp<int64_t>(piece.visible(query) - first_fresh, 0, count);
    };
    for (int64_t g = 0; g < problem_.group; ++g) {
      for (int64_t q = 0; q < piece.num_queries; q += kTileQueries) {
        const int64_t queries = std::min(kTileQueries, piece.num_queries - q);
        const int64_t rows = round_up(queries, kStep);
        const int64_t width = round_up(seen(q + queries - 1), kStep);
        if (width == 0) continue;
        const int64_t at = g * queries_ + q;
        const Op* of_queries = scratch.queries.get() + at * qk_width_;
        for (int64_t j = 0; j < width; j += kGranule) {
          multiply(rows, std::min(kGranule, width - j), qk_width_, of_queries, qk_width_,
                   keys + j * qk_width_, kGranule, scores + j, kTileKeys, false);
        }
        Op* weights;
        if constexpr (kPair<Op> == 1) {
          weights = scores;
        } else {
          weights = scratch.weights.get();
        }
        float* accumulated = scratch.accumulated.get() + at * v_width_;
        bool& started = scratch.started.get()[at / kTileQueries];
        for (int64_t i = 0; i < queries; ++i) {
          weigh_row<Op>(scores + i * kTileKeys, weights + i * kTileKeys, seen(q + i), width, factor,
                        scratch.peak.get()[at + i], scratch.total.get()[at + i],
                        started ? accumulated + i * v_width_ : nullptr, v_width_);
        }
        multiply(rows, v_width_, width, weights, kTileKeys, values, v_width_, accumulated, v_width_,
                 started);
        started = true;
      }
    }
  }

  void finish(int64_t batch, int64_t head, const Row& row, const Piece& piece, Scratch& scratch) {
    for (int64_t g = 0; g < problem_.group; ++g) {
      for (int64_t i = 0; i < piece.num_queries; ++i) {
        const int64_t at = g * queries_ + i, q_head = head * problem_.group + g;
        const int64_t position = row.q_begin + piece.first_query + i;
        const float peak = scratch.peak.get()[at], total = scratch.total.get()[at];
        T* out = out_.row(batch, q_head, position);
        float& lse = lse_[(batch * problem_.q_heads + q_head) * problem_.q_len + position];
        if (peak == -kInfinity) {  // It reads nothing.
          std::fill_n(out, problem_.v_dim, T(0));
          lse = -kInfinity;
        } else if (!std::isfinite(peak)) {  // NaN or infinity among its scores.
          std::fill_n(out, problem_.v_dim, static_cast<T>(kNaN));
          lse = kNaN;
        } else {
          store_row(scratch.accumulated.get() + at * v_width_, problem_.v_dim, 1 / total, out);
          lse = peak + std::log(total);
        }
      }
    }
  }

  const Problem& problem_;
  View<T> query_, key_, value_, out_;
  float* lse_;
  int64_t qk_width_, v_width_, num_granules_, queries_;
  Buffer<Op> packed_keys_, packed_values_;
  std::vector<Piece> pieces_;
};

}  // namespace colonnade
