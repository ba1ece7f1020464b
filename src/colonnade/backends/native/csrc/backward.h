// The backward: scores computed again and transposed, keys down and queries across. So the
// log-sum-exp lies along a vector, and no product needs another transposition:
//
//     Sᵀ = K Qᵀ    dPᵀ = V dOᵀ    dV += Pᵀ dO    dK += dSᵀ Q    dQᵀ += Kᵀ dSᵀ
//
// P and dS of a key are in softmax.h. Keys come as in forward.h: first the fresh keys of a piece,
// whose gradients go to the row's own keys or to slots, then whole granules, whose gradients go to
// slots. slot_grads.h has how those are added up.
#pragma once

#include "slot_grads.h"
#include "softmax.h"

namespace colonnade {

// Queries of a granule are computed in steps of this: two vectors, or a row of paired operands.
constexpr int64_t kQueryStep = 2 * kStep;

template <typename T, typename Op>
class Backward {
 public:
  Backward(const Problem& problem, const Inputs& inputs, const Results& results,
           const Results& grad_results, const Inputs& grad_inputs)
      : problem_(problem), query_(inputs.query), key_(inputs.key), value_(inputs.value),
        out_(results.out), grad_out_(grad_results.out), grad_query_(grad_inputs.query),
        grad_key_(grad_inputs.key), grad_value_(grad_inputs.value),
        lse_(results.lse.const_data_ptr<float>()),
        grad_lse_(grad_results.lse.const_data_ptr<float>()), qk_width_(padded<Op>(problem.qk_dim)),
        v_width_(padded<Op>(problem.v_dim)),
        granules_(problem.num_heads() * problem.num_granules(), qk_width_, v_width_),
        slot_grads_(problem, qk_width_, v_width_) {
    for (const Row& row : problem.rows) most_own_ = std::max(most_own_, row.num_own());
  }

  void run() {
    const int64_t heads = problem_.num_heads(), granules = problem_.num_granules();
    const auto nothing = [] { return 0; };
    run_tasks(heads * granules, nothing, [&](int64_t index, int) {
      const Head head = problem_.head(index / granules);
      const int64_t slot = problem_.granule_slots[index % granules];
      pack(head, kGranule, [&](int64_t i) {
        return problem_.slot_position(head.kv_head, slot + i);
      }, granules_[index]);
    });
    const int64_t shares = slot_grads_.num_shares();
    const auto make = [&] { return Scratch(*this); };
    run_tasks(heads * shares, make, [&](int64_t index, Scratch& scratch) {
      // A query of the last share reads most keys, but all shares have about as many pairs.
      run_share(problem_.head(index / shares), shares - 1 - index % shares, scratch);
    }, release<Op>);
    const int64_t ranges = round_up(problem_.num_slots, kGranule) / kGranule;
    const auto make_sum = [&] { return Buffer<float>(slot_grads_.width()); };
    run_tasks(heads * ranges, make_sum, [&](int64_t index, const Buffer<float>& sum) {
      const int64_t begin = index % ranges * kGranule;
      const int64_t end = std::min(begin + kGranule, problem_.num_slots);
      slot_grads_.store(problem_.head(index / ranges), begin, end, grad_key_, grad_value_,
                        sum.get());
    });
  }

 private:
  // A granule as left-hand operands: keys [64][qk_width] and values [64][v_width] row by row, and
  // the keys once more in columns [qk_width][64].
  struct Granule {
    Op* keys;
    Op* values;
    Op* key_columns;
  };

  class Granules {
   public:
    Granules(int64_t count, int64_t qk_width, int64_t v_width)
        : qk_width_(qk_width), v_width_(v_width), memory_(count * size()) {}

    Granule operator[](int64_t index) const {
      Op* keys = memory_.get(index * size());
      Op* values = keys + kGranule * qk_width_;
      return {.keys = keys, .values = values, .key_columns = values + kGranule * v_width_};
    }

   private:
    int64_t size() const { return kGranule * (2 * qk_width_ + v_width_); }

    int64_t qk_width_, v_width_;
    Buffer<Op> memory_;
  };

  // Where a granule's gradients go: one row a key.
  struct KeyGrads {
    float* key;
    float* value;
    bool add;  // to what is there, instead of overwriting it
  };

  static constexpr int64_t kTileSize = kGranule * kPieceQueries;
  static constexpr bool kPaired = kPair<Op> == 2;

  // What a thread works on. For the queries of one piece and head there are Q and dO row by row,
  // transposed ("across") and in pairs of rows; log-sum-exp and delta; and dQᵀ. For a granule and
  // these queries there are the products, dP, P and dS, keys down. Then there are the gradients of
  // a granule's keys, and of a row's own keys.
  struct Scratch {
    explicit Scratch(const Backward& b)
        : queries(kPieceQueries * b.qk_width_), grads(kPieceQueries * b.v_width_),
          queries_across(kPieceQueries * b.qk_width_), grads_across(kPieceQueries * b.v_width_),
          queries_paired(kPaired ? kPieceQueries * b.qk_width_ : 0),
          grads_paired(kPaired ? kPieceQueries * b.v_width_ : 0), weights(kPaired ? kTileSize : 0),
          score_grads(kPaired ? kTileSize : 0), score_grads_paired(kPaired ? kTileSize : 0),
          lse(kPieceQueries), delta(kPieceQueries), query_grads(b.qk_width_ * kPieceQueries),
          products(kTileSize), weight_grads(kTileSize), key_grads(kGranule * b.qk_width_),
          value_grads(kGranule * b.v_width_), own_key_grads(b.most_own_ * b.qk_width_),
          own_value_grads(b.most_own_ * b.v_width_), fresh(1, b.qk_width_, b.v_width_) {}

    Buffer<Op> queries, grads, queries_across, grads_across, queries_paired, grads_paired;
    Buffer<Op> weights, score_grads, score_grads_paired;
    Buffer<float> lse, delta, query_grads;
    Buffer<float> products, weight_grads;
    Buffer<float> key_grads, value_grads, own_key_grads, own_value_grads;
    Granules fresh;
    FactorsOfQueries<kPieceQueries> factors;
  };

  // Pack up to kGranule keys and values of a head, at the positions that `position` gives.
  template <typename Position>
  void pack(const Head& head, int64_t count, const Position& position,
            const Granule& granule) const {
    const int64_t rounded = round_up(count, kStep);
    copy_rows(count, [&](int64_t i) { return key_.at(head, position(i)); }, problem_.qk_dim,
              qk_width_, granule.keys);
    copy_rows(count, [&](int64_t i) { return value_.at(head, position(i)); }, problem_.v_dim,
              v_width_, granule.values);
    if constexpr (!kPaired) {
      pack_transposed(granule.keys, rounded, qk_width_, granule.key_columns, kGranule);
    } else {
      alignas(64) Op paired[kGranule * 2 * kStep];
      for (int64_t i = 0; i < qk_width_; i += 2 * kStep) {
        transpose_columns(granule.keys + i, rounded, paired);
        unpair(paired, 2 * kStep, kGranule, granule.key_columns + i * kGranule);
      }
    }
  }

  // Transpose 2 · kStep columns of `count` rows of keys, two numbers at a time.
  void transpose_columns(const Op* keys, int64_t count, Op* to) const {
    const auto* words = reinterpret_cast<const float*>(keys);
    const int64_t stride = qk_width_ / 2;
    for (int64_t i = 0; i < count; i += kStep) {
      at::vec::transpose_mxn<float, kStep, kStep>(words + i * stride, stride,
                                                  reinterpret_cast<float*>(to) + i, kGranule);
    }
  }

  void run_share(const Head& head, int64_t share, Scratch& scratch) const {
    slot_grads_.clear(head, share);
    const auto [row_begin, row_end] = slot_grads_.rows(share);
    for (int64_t index = row_begin; index < row_end; ++index) {
      const Row& row = problem_.rows[index];
      std::fill_n(scratch.own_key_grads.get(), row.num_own() * qk_width_, 0.0f);
      std::fill_n(scratch.own_value_grads.get(), row.num_own() * v_width_, 0.0f);
      for (int64_t q = row.q_begin; q < row.q_end; q += kPieceQueries) {
        const Piece piece{index, q, std::min(q + kPieceQueries, row.q_end)};
        for (int64_t g = 0; g < problem_.group; ++g) {
          differentiate(head, problem_.q_head(head, g), share, piece, scratch);
        }
      }
      pass_on(head, share, row, scratch);
    }
  }

  void differentiate(const Head& head, int64_t q_head, int64_t share, const Piece& piece,
                     Scratch& scratch) const {
    const Row& row = problem_.rows[piece.row];
    const int64_t queries = round_up(piece.num_queries(), kQueryStep);
    load_queries(head.batch, q_head, piece, queries, scratch);
    if (problem_.dropout.drops) {
      const Counter first = problem_.dropout.counter_of(head.batch, q_head, piece.q_begin);
      scratch.factors.set_queries(piece.num_queries(), [&](int64_t i) {
        return problem_.dropout.place_of_query(piece.q_begin + i);
      }, first.head, first.row);
    }
    const FreshKeys fresh(problem_, piece, head);
    for (int64_t first = 0; first < fresh.count; first += kGranule) {
      const int64_t count = std::min(kGranule, fresh.count - first);
      const Granule granule = scratch.fresh[0];
      pack(head, count, [&](int64_t i) { return fresh.position(first + i); }, granule);
      const KeyGrads grads{scratch.key_grads.get(), scratch.value_grads.get(), /*add=*/false};
      multiply_granule(granule, count, queries, [&](int64_t i) {
        return std::min(fresh.first_to_see(first + i), queries);
      }, [&](int64_t i) {
        return problem_.dropout.place_of_key(head.kv_head, fresh.position(first + i));
      }, grads, scratch);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t own = first + i - fresh.left_over, slot = row.slot_end + own;
        add_row(grads.key + i * qk_width_, qk_width_,
                own < 0 ? slot_grads_.key(head, share, slot)
                        : scratch.own_key_grads.get(own * qk_width_));
        add_row(grads.value + i * v_width_, v_width_,
                own < 0 ? slot_grads_.value(head, share, slot)
                        : scratch.own_value_grads.get(own * v_width_));
      }
    }
    const int64_t first_granule =
        head.index * problem_.num_granules() + problem_.first_granule[piece.row];
    for (int64_t i = 0; i < row.num_whole_granules(); ++i) {
      const int64_t slot = row.slot_begin + i * kGranule;
      const KeyGrads grads{slot_grads_.key(head, share, slot), slot_grads_.value(head, share, slot),
                           /*add=*/true};
      multiply_granule(granules_[first_granule + i], kGranule, queries,
                       [](int64_t) { return int64_t{0}; }, [&](int64_t j) {
        return problem_.dropout.place_of_key(head.kv_head,
                                             problem_.slot_position(head.kv_head, slot + j));
      }, grads, scratch);
    }
    store_query_grads(head.batch, q_head, piece, scratch);
  }

  // Copy the queries of a piece and what belongs to them, with rows of zeros up to `queries`.
  void load_queries(int64_t batch, int64_t q_head, const Piece& piece, int64_t queries,
                    Scratch& scratch) const {
    copy_rows(piece.num_queries(), [&](int64_t i) {
      return query_.at(batch, q_head, piece.q_begin + i);
    }, problem_.qk_dim, qk_width_, scratch.queries.get());
    copy_rows(piece.num_queries(), [&](int64_t i) {
      return grad_out_.at(batch, q_head, piece.q_begin + i);
    }, problem_.v_dim, v_width_, scratch.grads.get());
    for (int64_t i = 0; i < piece.num_queries(); ++i) {
      const int64_t position = piece.q_begin + i;
      if (i + kAhead < piece.num_queries()) {
        fetch_row(out_.at(batch, q_head, position + kAhead), problem_.v_dim);
      }
      set_statistics(batch, q_head, position, scratch.lse[i], scratch.delta[i],
                     scratch.grads.get(i * v_width_));
    }
    for (int64_t i = piece.num_queries(); i < queries; ++i) {
      scratch.lse[i] = kInfinity;
      scratch.delta[i] = 0;
      std::fill_n(scratch.queries.get(i * qk_width_), qk_width_, Op(0));
      std::fill_n(scratch.grads.get(i * v_width_), v_width_, Op(0));
    }
    pack_transposed(scratch.queries.get(), queries, qk_width_, scratch.queries_across.get(),
                    kPieceQueries);
    pack_transposed(scratch.grads.get(), queries, v_width_, scratch.grads_across.get(),
                    kPieceQueries);
    if constexpr (kPaired) {
      pack_pairs<Op>(queries, qk_width_, {scratch.queries.get(), qk_width_},
                     {scratch.queries_paired.get(), qk_width_});
      pack_pairs<Op>(queries, v_width_, {scratch.grads.get(), v_width_},
                     {scratch.grads_paired.get(), v_width_});
    }
    std::fill_n(scratch.query_grads.get(), qk_width_ * kPieceQueries, 0.0f);
  }

  // Set a query's log-sum-exp, and delta = Σ_j P_ij dP_ij = dO_i · O_i, less what flows back
  // through the log-sum-exp. `grads` is the query's copy of dO_i.
  void set_statistics(int64_t batch, int64_t q_head, int64_t position, float& lse, float& delta,
                      Op* grads) const {
    const int64_t index = problem_.lse_index(batch, q_head, position);
    const T* grad_out = grad_out_.at(batch, q_head, position);
    delta = dot(grad_out, out_.at(batch, q_head, position), problem_.v_dim) - grad_lse_[index];
    lse = lse_[index];
    if (lse == -kInfinity) {
      // It reads nothing: weights e^-∞ and gradients of 0, whatever gradient comes in.
      lse = kInfinity;
      delta = 0;
      std::fill_n(grads, v_width_, Op(0));
    } else if (!std::isfinite(lse)) {
      std::fill_n(grads, v_width_, static_cast<Op>(kNaN));
    }
  }

  // The five products of the first `count` keys of a granule and the queries of a piece. Queries
  // from first_to_see(i) on see key i, which is at place(i); it does not fall as i grows.
  template <typename FirstToSee, typename Place>
  void multiply_granule(const Granule& granule, int64_t count, int64_t queries,
                        const FirstToSee& first_to_see, const Place& place, const KeyGrads& grads,
                        Scratch& scratch) const {
    const int64_t keys = round_up(count, kStep);
    const int64_t begin = first_to_see(0) / kQueryStep * kQueryStep, across = queries - begin;
    float* products = scratch.products.get();
    float* weight_grads = scratch.weight_grads.get();
    multiply<Op>({keys, across, qk_width_}, {granule.keys, qk_width_},
                 {scratch.queries_across.get(begin * kPair<Op>), kPieceQueries},
                 {products + begin, kPieceQueries});
    multiply<Op>({keys, across, v_width_}, {granule.values, v_width_},
                 {scratch.grads_across.get(begin * kPair<Op>), kPieceQueries},
                 {weight_grads + begin, kPieceQueries});
    Op* weights = paired_or(scratch.weights, scratch.products);
    Op* score_grads = paired_or(scratch.score_grads, scratch.weight_grads);
    Op* score_grads_paired = paired_or(scratch.score_grads_paired, scratch.weight_grads);
    const Op* right_queries = paired_or(scratch.queries_paired, scratch.queries);
    const Op* right_grads = paired_or(scratch.grads_paired, scratch.grads);
    const QueryStatistics statistics{scratch.lse.get(), scratch.delta.get(), problem_.scale};
    for (int64_t i = 0; i < keys; ++i) {
      const int64_t at = i * kPieceQueries, seen_from = i < count ? first_to_see(i) : queries;
      const float* kept = nullptr;
      if (problem_.dropout.drops && i < count) {
        kept = scratch.factors.of_key(problem_.dropout.seed, problem_.dropout.kept, place(i), begin,
                                      queries);
      }
      differentiate_softmax<Op>(products + at, weight_grads + at, begin, seen_from, queries,
                                statistics, kept, weights + at, score_grads + at);
    }
    if constexpr (kPaired) {
      pack_pairs<Op>(keys, across, {score_grads + begin, kPieceQueries},
                     {score_grads_paired + begin * kPair<Op>, kPieceQueries});
    }
    multiply<Op>({keys, v_width_, across}, {weights + begin, kPieceQueries},
                 {right_grads + begin * v_width_, v_width_}, {grads.value, v_width_}, grads.add);
    multiply<Op>({keys, qk_width_, across}, {score_grads + begin, kPieceQueries},
                 {right_queries + begin * qk_width_, qk_width_}, {grads.key, qk_width_}, grads.add);
    multiply<Op>({qk_width_, across, keys}, {granule.key_columns, kGranule},
                 {score_grads_paired + begin * kPair<Op>, kPieceQueries},
                 {scratch.query_grads.get(begin), kPieceQueries}, /*add=*/true);
  }

  void store_query_grads(int64_t batch, int64_t q_head, const Piece& piece,
                         Scratch& scratch) const {
    alignas(64) float square[kStep * kStep];
    for (int64_t first = 0; first < piece.num_queries(); first += kStep) {
      const int64_t queries = std::min(kStep, piece.num_queries() - first);
      for (int64_t j = 0; j < problem_.qk_dim; j += kStep) {
        at::vec::transpose_mxn<float, kStep, kStep>(
            scratch.query_grads.get(j * kPieceQueries + first), kPieceQueries, square, kStep);
        const int64_t width = std::min(kStep, problem_.qk_dim - j);
        for (int64_t i = 0; i < queries; ++i) {
          store_row(square + i * kStep, width, problem_.scale,
                    grad_query_.at(batch, q_head, piece.q_begin + first + i) + j);
        }
      }
    }
  }

  // Pass the gradients of a row's own keys on: of those that fill a slot to the share's sums, so
  // that each gradient is rounded once, and of all to the result, where `SlotGrads::store`
  // overwrites the ones in slots.
  void pass_on(const Head& head, int64_t share, const Row& row, Scratch& scratch) const {
    const auto [begin, end] = problem_.own_slots(row, head.kv_head);
    const auto position = [&](int64_t slot) { return problem_.slot_position(head.kv_head, slot); };
    for (int64_t slot = begin; slot < end; ++slot) {
      // A key that fills several slots is added to the first of them.
      if (!problem_.own_from_slots && slot > begin && position(slot) == position(slot - 1)) {
        continue;
      }
      const int64_t own = problem_.own_from_slots ? slot - begin : position(slot) - row.own_begin;
      add_row(scratch.own_key_grads.get(own * qk_width_), qk_width_,
              slot_grads_.key(head, share, slot));
      add_row(scratch.own_value_grads.get(own * v_width_), v_width_,
              slot_grads_.value(head, share, slot));
    }
    if (problem_.own_from_slots) return;
    for (int64_t own = 0; own < row.num_own(); ++own) {
      store_row(scratch.own_key_grads.get(own * qk_width_), problem_.qk_dim, problem_.scale,
                grad_key_.at(head, row.own_begin + own));
      store_row(scratch.own_value_grads.get(own * v_width_), problem_.v_dim, 1.0f,
                grad_value_.at(head, row.own_begin + own));
    }
  }

  const Problem& problem_;
  View<const T> query_, key_, value_, out_, grad_out_;
  View<T> grad_query_, grad_key_, grad_value_;
  const float* lse_;
  const float* grad_lse_;
  int64_t qk_width_, v_width_, most_own_ = 0;
  Granules granules_;
  SlotGrads slot_grads_;
};

}  // namespace colonnade
