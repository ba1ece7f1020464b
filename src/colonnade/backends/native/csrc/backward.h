// The backward: scores computed anew and transposed, keys down and queries across. So the
// log-sum-exp lies along a vector, and no product needs another transposition:
//
//     Sᵀ = K Qᵀ    dPᵀ = V dOᵀ    dV += Pᵀ dO    dK += dSᵀ Q    dQᵀ += Kᵀ dSᵀ
//
// A part of a head's rows is computed one after the other and adds up its own gradients of the
// slots; the parts, whose number depends on the sizes alone, are added up in order. So no bit
// depends on the number of threads.
#pragma once

#include "operands.h"

namespace colonnade {

constexpr int64_t kUnits = 16;
constexpr int64_t kMostParts = 8;
// Queries of a granule are computed in steps of this: two vectors, or a row of paired operands.
constexpr int64_t kQueryStep = 2 * kStep;

template <typename T, typename Op>
class Backward {
 public:
  Backward(const Problem& problem, const at::Tensor& query, const at::Tensor& key,
           const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
           const at::Tensor& grad_out, const at::Tensor& grad_lse, const at::Tensor& grad_query,
           const at::Tensor& grad_key, const at::Tensor& grad_value)
      : problem_(problem), query_(query), key_(key), value_(value), out_(out), grad_out_(grad_out),
        grad_query_(grad_query), grad_key_(grad_key), grad_value_(grad_value),
        lse_(lse.const_data_ptr<float>()), grad_lse_(grad_lse.const_data_ptr<float>()),
        qk_width_(padded<Op>(problem.qk_dim)), v_width_(padded<Op>(problem.v_dim)),
        num_granules_(problem.granules.size()), heads_(problem.batch * problem.kv_heads),
        granules_(heads_ * num_granules_ * granule_size()) {
    for (const Row& row : problem.rows) longest_ = std::max(longest_, row.num_own());
    cut();
    slot_grads_ = Buffer<float>(heads_ * num_parts() * problem.slots * (qk_width_ + v_width_));
  }

  void run() {
    const auto make = [&] { return Scratch(*this); };
    share_out(heads_ * num_granules_, [] { return 0; }, [&](int64_t index, int) {
      const int64_t head = index / num_granules_ % problem_.kv_heads;
      const int64_t slot = problem_.granules[index % num_granules_];
      pack(index / num_granules_, kGranule, [&](int64_t i) {
        return problem_.key_position(head, slot + i);
      }, granules_.get() + index * granule_size());
    }, [] {});
    const int64_t parts = num_parts();
    share_out(heads_ * parts, make, [&](int64_t index, Scratch& scratch) {
      // The last part reads most keys a query, but all parts have the same number of pairs.
      run_part(index / parts, parts - 1 - index % parts, scratch);
    }, release<Op>);
    const int64_t cut = round_up(problem_.slots, kGranule) / kGranule;
    share_out(heads_ * cut, [&] { return Buffer<float>(qk_width_ + v_width_); },
              [&](int64_t index, Buffer<float>& sum) {
      const int64_t first = index % cut * kGranule;
      add_up(index / cut, first, std::min(first + kGranule, problem_.slots), sum.get());
    }, [] {});
  }

 private:
  // Rows of the table, and the slots that they touch.
  struct Part {
    int64_t row_begin, row_end, slot_begin, slot_end;
  };

  // One head's queries of a piece, in every layout that a product wants, and the granule at hand.
  struct Scratch {
    explicit Scratch(const Backward& b)
        : queries(kQueries * b.qk_width_), grads(kQueries * b.v_width_),
          queries_across(kQueries * b.qk_width_), grads_across(kQueries * b.v_width_),
          queries_paired(kPair<Op> == 2 ? kQueries * b.qk_width_ : 0),
          grads_paired(kPair<Op> == 2 ? kQueries * b.v_width_ : 0), granule(b.granule_size()),
          weights(kPair<Op> == 2 ? kGranule * kQueries : 0),
          score_grads(kPair<Op> == 2 ? kGranule * kQueries : 0),
          score_grads_paired(kPair<Op> == 2 ? kGranule * kQueries : 0), lse(kQueries),
          delta(kQueries), scores(kGranule * kQueries), weight_grads(kGranule * kQueries),
          query_grads(b.qk_width_ * kQueries), key_grads(kGranule * b.qk_width_),
          value_grads(kGranule * b.v_width_), own_key_grads(b.longest_ * b.qk_width_),
          own_value_grads(b.longest_ * b.v_width_) {}
    Buffer<Op> queries, grads, queries_across, grads_across, queries_paired, grads_paired, granule,
        weights, score_grads, score_grads_paired;
    Buffer<float> lse, delta, scores, weight_grads, query_grads, key_grads, value_grads,
        own_key_grads, own_value_grads;
  };

  int64_t num_parts() const { return static_cast<int64_t>(parts_.size()); }
  // Keys and values row by row, then keys in columns, twice: paired to be unpaired.
  int64_t granule_size() const { return kGranule * (2 * qk_width_ + v_width_); }

  // Cut the rows into parts of about equally many pairs.
  void cut() {
    const auto& rows = problem_.rows;
    const auto cost = [](const Row& row) {
      return double(row.q_end - row.q_begin) * double(row.num_slots() + row.num_own() / 2 + 16);
    };
    double total = 0;
    for (const Row& row : rows) total += cost(row);
    const int64_t wanted =
        std::clamp<int64_t>((kUnits + heads_ - 1) / std::max<int64_t>(heads_, 1), 1, kMostParts);
    double done = 0;
    int64_t begin = 0;
    for (int64_t row = 0; row < static_cast<int64_t>(rows.size()); ++row) {
      done += cost(rows[row]);
      const bool last = row + 1 == static_cast<int64_t>(rows.size());
      if (last || done >= total * double(num_parts() + 1) / double(wanted)) {
        parts_.push_back(touched(begin, row + 1));
        begin = row + 1;
      }
    }
  }

  Part touched(int64_t row_begin, int64_t row_end) const {
    Part part{row_begin, row_end, problem_.slots, 0};
    for (int64_t index = row_begin; index < row_end; ++index) {
      const Row& row = problem_.rows[index];
      const auto touch = [&](int64_t begin, int64_t end) {
        if (begin == end) return;
        part.slot_begin = std::min(part.slot_begin, begin);
        part.slot_end = std::max(part.slot_end, end);
      };
      touch(row.slot_begin, row.slot_end);
      for (int64_t head = 0; head < problem_.kv_heads; ++head) {
        const auto [begin, end] = own_slots(row, head);
        touch(begin, end);
      }
    }
    part.slot_begin = std::min(part.slot_begin, part.slot_end);
    return part;
  }

  // The slots that hold own keys of a row. Slots lie in the order of their keys.
  std::pair<int64_t, int64_t> own_slots(const Row& row, int64_t head) const {
    if (problem_.own_from_slots) return {row.own_begin, row.own_end};
    const int64_t* begin = problem_.gather + head * problem_.slots;
    const int64_t* end = begin + problem_.slots;
    return {std::lower_bound(begin, end, row.own_begin) - begin,
            std::lower_bound(begin, end, row.own_end) - begin};
  }

  float* slot_key_grads(int64_t batch_head, int64_t part, int64_t slot) const {
    const int64_t at = (batch_head * num_parts() + part) * problem_.slots;
    return slot_grads_.get() + at * (qk_width_ + v_width_) + slot * qk_width_;
  }
  float* slot_value_grads(int64_t batch_head, int64_t part, int64_t slot) const {
    return slot_key_grads(batch_head, part, problem_.slots) + slot * v_width_;
  }

  // Keys [64][width] and values [64][width] row by row, keys in columns [width][64].
  template <typename Position>
  void pack(int64_t batch_head, int64_t count, const Position& position, Op* to) const {
    const int64_t batch = batch_head / problem_.kv_heads, head = batch_head % problem_.kv_heads;
    const int64_t rounded = round_up(count, kStep);
    Op* values = to + kGranule * qk_width_;
    Op* columns = values + kGranule * v_width_;
    copy_rows(count, [&](int64_t i) { return key_.row(batch, head, position(i)); }, problem_.qk_dim,
              qk_width_, to);
    copy_rows(count, [&](int64_t i) { return value_.row(batch, head, position(i)); },
              problem_.v_dim, v_width_, values);
    if constexpr (kPair<Op> == 1) {
      pack_transposed(to, rounded, qk_width_, columns, kGranule);
    } else {
      alignas(64) Op paired[kGranule * 2 * kStep];
      for (int64_t i = 0; i < qk_width_; i += 2 * kStep) {
        transpose_some(to + i, rounded, qk_width_, paired);
        unpair(paired, 2 * kStep, kGranule, columns + i * kGranule);
      }
    }
  }

  // 32 columns of [count, width] rows, in pairs.
  static void transpose_some(const Op* rows, int64_t count, int64_t width, Op* to) {
    const auto* words = reinterpret_cast<const float*>(rows);
    for (int64_t i = 0; i < count; i += kStep) {
      at::vec::transpose_mxn<float, kStep, kStep>(words + i * (width / 2), width / 2,
                                                  reinterpret_cast<float*>(to) + i, kGranule);
    }
  }

  void run_part(int64_t batch_head, int64_t part_index, Scratch& scratch) {
    const Part& part = parts_[part_index];
    const int64_t batch = batch_head / problem_.kv_heads, head = batch_head % problem_.kv_heads;
    const auto clear = [](float* begin, float* end) { std::fill(begin, end, 0.0f); };
    clear(slot_key_grads(batch_head, part_index, part.slot_begin),
          slot_key_grads(batch_head, part_index, part.slot_end));
    clear(slot_value_grads(batch_head, part_index, part.slot_begin),
          slot_value_grads(batch_head, part_index, part.slot_end));
    for (int64_t index = part.row_begin; index < part.row_end; ++index) {
      const Row& row = problem_.rows[index];
      clear(scratch.own_key_grads.get(), scratch.own_key_grads.get() + row.num_own() * qk_width_);
      clear(scratch.own_value_grads.get(),
            scratch.own_value_grads.get() + row.num_own() * v_width_);
      const int64_t length = row.q_end - row.q_begin;
      for (int64_t first = 0; first < length; first += kQueries) {
        const Piece piece = problem_.piece(index, head, first, std::min(kQueries, length - first));
        for (int64_t g = 0; g < problem_.group; ++g) {
          differentiate(batch, head, head * problem_.group + g, part_index, piece, scratch);
        }
      }
      hand_over(batch, head, part_index, row, scratch);
    }
  }

  void differentiate(int64_t batch, int64_t head, int64_t q_head, int64_t part, const Piece& piece,
                     Scratch& scratch) {
    const Row& row = problem_.rows[piece.row];
    const int64_t batch_head = batch * problem_.kv_heads + head;
    const int64_t queries = round_up(piece.num_queries, kQueryStep);
    begin(batch, q_head, row, piece, queries, scratch);
    const int64_t fresh = piece.visible(piece.num_queries - 1);
    for (int64_t first = 0; first < fresh; first += kGranule) {
      const int64_t count = std::min(kGranule, fresh - first);
      pack(batch_head, count, [&](int64_t i) {
        return problem_.fresh_position(row, head, piece, first + i);
      }, scratch.granule.get());
      granule(piece, queries, first, count, scratch.granule.get(), scratch.key_grads.get(),
              scratch.value_grads.get(), false, scratch);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t own = first + i - piece.left_over, slot = row.slot_end + own;
        add_row(scratch.key_grads.get() + i * qk_width_, qk_width_,
                own < 0 ? slot_key_grads(batch_head, part, slot)
                        : scratch.own_key_grads.get() + own * qk_width_);
        add_row(scratch.value_grads.get() + i * v_width_, v_width_,
                own < 0 ? slot_value_grads(batch_head, part, slot)
                        : scratch.own_value_grads.get() + own * v_width_);
      }
    }
    const int64_t first_granule = batch_head * num_granules_ + problem_.first_granule[piece.row];
    for (int64_t i = 0; i < problem_.whole_granules(row); ++i) {
      const int64_t slot = row.slot_begin + i * kGranule;
      granule(piece, queries, kAllVisible, kGranule,
              granules_.get() + (first_granule + i) * granule_size(),
              slot_key_grads(batch_head, part, slot), slot_value_grads(batch_head, part, slot),
              true, scratch);
    }
    finish(batch, q_head, row, piece, scratch);
  }

  static constexpr int64_t kAllVisible = -1;

  void begin(int64_t batch, int64_t q_head, const Row& row, const Piece& piece, int64_t queries,
             Scratch& scratch) {
    float* delta = scratch.delta.get();
    float* lse = scratch.lse.get();
    const int64_t first = row.q_begin + piece.first_query;
    copy_rows(piece.num_queries, [&](int64_t i) { return query_.row(batch, q_head, first + i); },
              problem_.qk_dim, qk_width_, scratch.queries.get());
    copy_rows(piece.num_queries, [&](int64_t i) { return grad_out_.row(batch, q_head, first + i); },
              problem_.v_dim, v_width_, scratch.grads.get());
    for (int64_t i = 0; i < piece.num_queries; ++i) {
      const int64_t position = first + i;
      const int64_t at = (batch * problem_.q_heads + q_head) * problem_.q_len + position;
      const T* grad = grad_out_.row(batch, q_head, position);
      Op* grads = scratch.grads.get() + i * v_width_;
      if (i + kAhead < piece.num_queries) {
        fetch_row(out_.row(batch, q_head, position + kAhead), problem_.v_dim);
      }
      // delta = sum_j P_ij dP_ij = dO_i · O_i, less what flows back through the log-sum-exp.
      delta[i] = dot(grad, out_.row(batch, q_head, position), problem_.v_dim) - grad_lse_[at];
      lse[i] = lse_[at];
      if (lse[i] == -kInfinity) {
        // It reads nothing: weights e^-inf, gradients 0, whatever comes from above.
        lse[i] = kInfinity;
        delta[i] = 0;
        std::fill_n(grads, v_width_, Op(0));
      } else if (!std::isfinite(lse[i])) {
        std::fill_n(grads, v_width_, static_cast<Op>(kNaN));
      }
    }
    for (int64_t i = piece.num_queries; i < queries; ++i) {
      lse[i] = kInfinity;
      delta[i] = 0;
      std::fill_n(scratch.queries.get() + i * qk_width_, qk_width_, Op(0));
      std::fill_n(scratch.grads.get() + i * v_width_, v_width_, Op(0));
    }
    pack_transposed(scratch.queries.get(), queries, qk_width_, scratch.queries_across.get(),
                    kQueries);
    pack_transposed(scratch.grads.get(), queries, v_width_, scratch.grads_across.get(), kQueries);
    if constexpr (kPair<Op> == 2) {
      pack_pairs(scratch.queries.get(), queries, qk_width_, qk_width_, scratch.queries_paired.get(),
                 qk_width_);
      pack_pairs(scratch.grads.get(), queries, v_width_, v_width_, scratch.grads_paired.get(),
                 v_width_);
    }
    std::fill_n(scratch.query_grads.get(), qk_width_ * kQueries, 0.0f);
  }

  // The five products of a granule of keys and the queries of a piece.
  void granule(const Piece& piece, int64_t queries, int64_t first_fresh, int64_t count,
               const Op* packed, float* key_grads, float* value_grads, bool add, Scratch& scratch) {
    const Op* keys = packed;
    const Op* values = keys + kGranule * qk_width_;
    const Op* columns = values + kGranule * v_width_;
    const int64_t rows = round_up(count, kStep);
    const int64_t begin =
        first_fresh == kAllVisible ? 0 : piece.first_to_see(first_fresh) / kQueryStep * kQueryStep;
    const int64_t across = queries - begin;
    float* scores = scratch.scores.get();
    float* weight_grads = scratch.weight_grads.get();
    multiply(rows, across, qk_width_, keys, qk_width_,
             scratch.queries_across.get() + begin * kPair<Op>, kQueries, scores + begin, kQueries,
             false);
    multiply(rows, across, v_width_, values, v_width_,
             scratch.grads_across.get() + begin * kPair<Op>, kQueries, weight_grads + begin,
             kQueries, false);
    Op *weights, *score_grads, *score_grads_paired;
    const Op *of_queries, *of_grads;
    if constexpr (kPair<Op> == 1) {
      weights = scores;
      score_grads = score_grads_paired = weight_grads;
      of_queries = scratch.queries.get();
      of_grads = scratch.grads.get();
    } else {
      weights = scratch.weights.get();
      score_grads = scratch.score_grads.get();
      score_grads_paired = scratch.score_grads_paired.get();
      of_queries = scratch.queries_paired.get();
      of_grads = scratch.grads_paired.get();
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t seen_from = i >= count ? queries
          : first_fresh == kAllVisible     ? 0
                                           : std::min(piece.first_to_see(first_fresh + i), queries);
      differentiate_row(scores + i * kQueries, weight_grads + i * kQueries, weights + i * kQueries,
                        score_grads + i * kQueries, begin, seen_from, queries, scratch);
    }
    if constexpr (kPair<Op> == 2) {
      pack_pairs(score_grads + begin, rows, across, kQueries, score_grads_paired + begin * 2,
                 kQueries);
    }
    multiply(rows, v_width_, across, weights + begin, kQueries, of_grads + begin * v_width_,
             v_width_, value_grads, v_width_, add);
    multiply(rows, qk_width_, across, score_grads + begin, kQueries, of_queries + begin * qk_width_,
             qk_width_, key_grads, qk_width_, add);
    multiply(qk_width_, across, rows, columns, kGranule, score_grads_paired + begin * kPair<Op>,
             kQueries, scratch.query_grads.get() + begin, kQueries, true);
  }

  // P = e^(scale·s - lse) and dS = P (dP - delta) of one key, for the queries that see it.
  void differentiate_row(const float* scores, const float* weight_grads, Op* weights,
                         Op* score_grads, int64_t begin, int64_t seen_from, int64_t end,
                         const Scratch& scratch) const {
    const Vec nothing(0.0f), by(problem_.scale);
    int64_t i = begin;
    for (; i + 2 * kLanes <= seen_from; i += 2 * kLanes) {
      store_weights<Op>(nothing, nothing, weights + i);
      store_weights<Op>(nothing, nothing, score_grads + i);
    }
    for (; i < end; i += 2 * kLanes) {
      Vec weight[2], grad[2];
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t at = i + half * kLanes;
        weight[half] = fast_exp<Op>(
            at::vec::fmsub(Vec::loadu(scores + at), by, Vec::loadu(scratch.lse.get() + at)));
        grad[half] =
            weight[half] * (Vec::loadu(weight_grads + at) - Vec::loadu(scratch.delta.get() + at));
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

  void finish(int64_t batch, int64_t q_head, const Row& row, const Piece& piece, Scratch& scratch) {
    alignas(64) float block[kStep * kStep];
    for (int64_t first = 0; first < piece.num_queries; first += kStep) {
      for (int64_t j = 0; j < qk_width_; j += kStep) {
        at::vec::transpose_mxn<float, kStep, kStep>(
            scratch.query_grads.get() + j * kQueries + first, kQueries, block, kStep);
        const int64_t width = std::min(kStep, problem_.qk_dim - j);
        for (int64_t i = 0; i < std::min(kStep, piece.num_queries - first); ++i) {
          const int64_t position = row.q_begin + piece.first_query + first + i;
          if (width > 0) {
            store_row(block + i * kStep, width, problem_.scale,
                      grad_query_.row(batch, q_head, position) + j);
          }
        }
      }
    }
  }

  // A row's own gradients go to where they belong: slots among them to the part's sum.
  void hand_over(int64_t batch, int64_t head, int64_t part, const Row& row, Scratch& scratch) {
    const int64_t batch_head = batch * problem_.kv_heads + head;
    const auto [begin, end] = own_slots(row, head);
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t own = problem_.own_from_slots
          ? slot - begin
          : problem_.key_position(head, slot) - row.own_begin;
      // A key that several slots hold is added to the first one.
      if (!problem_.own_from_slots && slot > begin &&
          problem_.key_position(head, slot) == problem_.key_position(head, slot - 1)) {
        continue;
      }
      add_row(scratch.own_key_grads.get() + own * qk_width_, qk_width_,
              slot_key_grads(batch_head, part, slot));
      add_row(scratch.own_value_grads.get() + own * v_width_, v_width_,
              slot_value_grads(batch_head, part, slot));
    }
    if (problem_.own_from_slots) return;
    for (int64_t own = 0; own < row.num_own(); ++own) {
      store_row(scratch.own_key_grads.get() + own * qk_width_, problem_.qk_dim, problem_.scale,
                grad_key_.row(batch, head, row.own_begin + own));
      store_row(scratch.own_value_grads.get() + own * v_width_, problem_.v_dim, 1.0f,
                grad_value_.row(batch, head, row.own_begin + own));
    }
  }

  // The gradients of the keys in slots begin … end - 1, over all parts in order.
  void add_up(int64_t batch_head, int64_t begin, int64_t end, float* sum) {
    const int64_t batch = batch_head / problem_.kv_heads, head = batch_head % problem_.kv_heads;
    for (int64_t first = begin; first < end; ++first) {
      const int64_t position = problem_.key_position(head, first);
      // A key that several slots hold is done with the first of them.
      if (first > 0 && problem_.key_position(head, first - 1) == position) continue;
      std::fill_n(sum, qk_width_ + v_width_, 0.0f);
      for (int64_t slot = first;
           slot < problem_.slots && problem_.key_position(head, slot) == position; ++slot) {
        for (int64_t part = 0; part < num_parts(); ++part) {
          if (slot < parts_[part].slot_begin || slot >= parts_[part].slot_end) continue;
          add_row(slot_key_grads(batch_head, part, slot), qk_width_, sum);
          add_row(slot_value_grads(batch_head, part, slot), v_width_, sum + qk_width_);
        }
      }
      store_row(sum, problem_.qk_dim, problem_.scale, grad_key_.row(batch, head, position));
      store_row(sum + qk_width_, problem_.v_dim, 1.0f, grad_value_.row(batch, head, position));
    }
  }

  const Problem& problem_;
  View<T> query_, key_, value_, out_, grad_out_, grad_query_, grad_key_, grad_value_;
  const float* lse_;
  const float* grad_lse_;
  int64_t qk_width_, v_width_, num_granules_, heads_, longest_ = 0;
  Buffer<Op> granules_;
  std::vector<Part> parts_;
  Buffer<float> slot_grads_{0};
};

}  // namespace colonnade
