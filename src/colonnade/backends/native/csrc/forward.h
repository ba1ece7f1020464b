// The forward: tiles of scores, and one online softmax over all keys of a query.
//
// Keys come in tiles. Query i starts from a peak m = -∞, a total ℓ = 0 and a row of sums a = 0. A
// tile with scores s_j = scale · q_i · k_j, for the keys j that the query sees, turns these into
//
//     m' = max(m, max_j s_j)        p_j = e^(s_j - m')
//     ℓ' = e^(m - m') ℓ + Σ_j p_j
//     a' = e^(m - m') a + Σ_j p_j v_j
//
// After the last tile the output is a / ℓ and the log-sum-exp m + log ℓ. In softmax.h m may lag
// behind the largest score, which changes neither.
//
// The keys of a row of the table, and when its queries read them:
//
//     slots                                           own keys
//     | granule | granule | … | granule | left over | key | key | … | key |
//     '---------- whole granules -------'----------- fresh keys ----------'
//       read second, by every query;      read first: query i sees the
//       packed once for a head, and       first visible(i) of them;
//       shared by its rows                packed for each piece
//
// A tile has up to kTileKeys keys of one kind. A granule that is not full ends in zeros, so that
// nothing of another document or block is multiplied by a weight of 0.
#pragma once

#include "softmax.h"

namespace colonnade {

// Queries and keys of a tile of scores.
constexpr int64_t kTileQueries = 32;
constexpr int64_t kTileKeys = 512;
// Queries of a piece, counted over all heads of a group. They share packed keys, and their state
// has to fit into a cache.
constexpr int64_t kGroupQueries = 1024;

template <typename T, typename Op>
class Forward {
 public:
  Forward(const Problem& problem, const Inputs& inputs, const Results& results)
      : problem_(problem), query_(inputs.query), key_(inputs.key), value_(inputs.value),
        out_(results.out), lse_(results.lse.mutable_data_ptr<float>()),
        qk_width_(padded<Op>(problem.qk_dim)), v_width_(padded<Op>(problem.v_dim)),
        piece_queries_(
            std::clamp<int64_t>(kGroupQueries / problem.group / kTileQueries * kTileQueries,
                                kTileQueries, kPieceQueries)),
        granules_(problem.num_heads() * problem.num_granules(), qk_width_, v_width_) {
    for (int64_t index = 0; index < std::ssize(problem.rows); ++index) {
      const Row& row = problem.rows[index];
      for (int64_t q = row.q_begin; q < row.q_end; q += piece_queries_) {
        pieces_.push_back({index, q, std::min(q + piece_queries_, row.q_end)});
      }
    }
    // Those with most keys come first, so that the threads end together.
    std::reverse(pieces_.begin(), pieces_.end());
  }

  void run() {
    const auto make = [&] { return Scratch(*this); };
    const int64_t heads = problem_.num_heads(), granules = problem_.num_granules();
    run_tasks(heads * granules, make, [&](int64_t index, Scratch& scratch) {
      const Head head = problem_.head(index / granules);
      const int64_t slot = problem_.granule_slots[index % granules];
      pack(head, kGranule, [&](int64_t i) {
        return problem_.slot_position(head.kv_head, slot + i);
      }, granules_[index], scratch);
    });
    const int64_t pieces = std::ssize(pieces_);
    // Heads that lie side by side share pages of memory, so they take turns.
    const int64_t in_turn = query_.head_stride < query_.length_stride ? problem_.kv_heads : 1;
    run_tasks(heads * pieces, make, [&](int64_t index, Scratch& scratch) {
      const int64_t head = index / (in_turn * pieces) * in_turn + index % in_turn;
      attend(problem_.head(head), pieces_[index / in_turn % pieces], scratch);
    }, release<Op>);
  }

 private:
  // A granule as right-hand operands: keys [qk_width / pair][64][pair] to be multiplied by queries,
  // values [64 / pair][v_width][pair] to be multiplied by weights.
  struct Granule {
    Op* keys;
    Op* values;
  };

  // Granules one after the other. The values of several are one operand.
  class Granules {
   public:
    Granules(int64_t count, int64_t qk_width, int64_t v_width)
        : qk_width_(qk_width), v_width_(v_width), keys_(count * kGranule * qk_width),
          values_(count * kGranule * v_width) {}

    Granule operator[](int64_t index) const {
      return {.keys = keys_.get(index * kGranule * qk_width_),
              .values = values_.get(index * kGranule * v_width_)};
    }

   private:
    int64_t qk_width_, v_width_;
    Buffer<Op> keys_, values_;
  };

  // What a thread works on: a tile, and the state of the queries of one piece.
  struct Scratch {
    explicit Scratch(const Forward& f)
        : rows(kGranule * std::max(f.qk_width_, f.v_width_)),
          fresh(kTileKeys / kGranule, f.qk_width_, f.v_width_),
          queries(f.num_states() * f.qk_width_), scores(kTileQueries * kTileKeys),
          weights(kPair<Op> == 2 ? kTileQueries * kTileKeys : 0),
          accumulated(f.num_states() * f.v_width_), softmax(f.num_states()),
          started(f.num_states() / kTileQueries),
          factors(f.problem_.dropout.drops ? kTileKeys : 0) {}

    Buffer<Op> rows;  // keys or values of a granule before they are packed
    Granules fresh;
    Buffer<Op> queries;
    Buffer<float> scores;
    Buffer<Op> weights;
    Buffer<float> accumulated;
    Buffer<Softmax> softmax;
    Buffer<bool> started;   // whether a tile's queries have accumulated anything
    FactorsOfKeys factors;  // of the keys of a tile
  };

  // Room for the queries of a piece in every head of a group: query i of head g has number
  // g · piece_queries_ + i.
  int64_t num_states() const { return problem_.group * piece_queries_; }

  // Pack up to kGranule keys and values of a head, at the positions that `position` gives.
  template <typename Position>
  void pack(const Head& head, int64_t count, const Position& position, const Granule& granule,
            const Scratch& scratch) const {
    const int64_t rounded = round_up(count, kStep);
    Op* rows = scratch.rows.get();
    copy_rows(count, [&](int64_t i) { return key_.at(head, position(i)); }, problem_.qk_dim,
              qk_width_, rows);
    pack_transposed(rows, rounded, qk_width_, granule.keys, kGranule);
    copy_rows(count, [&](int64_t i) { return value_.at(head, position(i)); }, problem_.v_dim,
              v_width_, rows);
    pack_pairs<Op>(rounded, v_width_, {rows, v_width_}, {granule.values, v_width_});
  }

  void attend(const Head& head, const Piece& piece, Scratch& scratch) const {
    const Row& row = problem_.rows[piece.row];
    load_queries(head, piece, scratch);
    const FreshKeys fresh(problem_, piece, head);
    for (int64_t first = 0; first < fresh.count; first += kTileKeys) {
      const int64_t count = std::min(kTileKeys, fresh.count - first);
      for (int64_t done = 0; done < count; done += kGranule) {
        pack(head, std::min(kGranule, count - done), [&](int64_t i) {
          return fresh.position(first + done + i);
        }, scratch.fresh[done / kGranule], scratch);
      }
      set_dropped_keys(head, count, [&](int64_t i) { return fresh.position(first + i); }, scratch);
      tile(head, piece, scratch.fresh[0], [&](int64_t query) {
        return std::clamp<int64_t>(fresh.visible(query) - first, 0, count);
      }, scratch);
    }
    const int64_t whole = row.num_whole_granules();
    const int64_t granules =
        head.index * problem_.num_granules() + problem_.first_granule[piece.row];
    for (int64_t first = 0; first < whole; first += kTileKeys / kGranule) {
      const int64_t count = std::min(kTileKeys / kGranule, whole - first) * kGranule;
      set_dropped_keys(head, count, [&](int64_t i) {
        return problem_.slot_position(head.kv_head, row.slot_begin + first * kGranule + i);
      }, scratch);
      tile(head, piece, granules_[granules + first], [&](int64_t) { return count; }, scratch);
    }
    store_results(head, piece, scratch);
  }

  // Prepare the factors of a tile's keys, at the positions that `position` gives.
  template <typename Position>
  void set_dropped_keys(const Head& head, int64_t count, const Position& position,
                        Scratch& scratch) const {
    if (!problem_.dropout.drops) return;
    scratch.factors.set_keys(
        count, [&](int64_t i) { return problem_.dropout.place_of_key(head.kv_head, position(i)); });
  }

  void load_queries(const Head& head, const Piece& piece, Scratch& scratch) const {
    // The sign of the scale goes into the queries, so that the largest product is the largest
    // score; in float32 all of it does.
    const float sign = float((problem_.scale > 0) - (problem_.scale < 0));
    const float factor = kPair<Op> == 1 ? problem_.scale : sign;
    for (int64_t g = 0; g < problem_.group; ++g) {
      const int64_t q_head = problem_.q_head(head, g);
      copy_rows(piece.num_queries(), [&](int64_t i) {
        return query_.at(head.batch, q_head, piece.q_begin + i);
      }, problem_.qk_dim, qk_width_, scratch.queries.get(g * piece_queries_ * qk_width_), factor);
    }
    std::fill_n(scratch.softmax.get(), num_states(), Softmax{});
    std::fill_n(scratch.started.get(), num_states() / kTileQueries, false);
  }

  // A tile of the keys of granule `first` and of those behind it, for all queries of a piece. Query
  // i sees the first visible(i) of them.
  template <typename Visible>
  void tile(const Head& head, const Piece& piece, const Granule& first, const Visible& visible,
            Scratch& scratch) const {
    const float factor = kPair<Op> == 1 ? 1.0f : std::abs(problem_.scale);
    const Dropout& dropout = problem_.dropout;
    float* scores = scratch.scores.get();
    Op* weights = paired_or(scratch.weights, scratch.scores);
    for (int64_t g = 0; g < problem_.group; ++g) {
      for (int64_t q = 0; q < piece.num_queries(); q += kTileQueries) {
        const int64_t queries = std::min(kTileQueries, piece.num_queries() - q);
        const int64_t rounded = round_up(queries, kStep);
        const int64_t width = round_up(visible(q + queries - 1), kStep);
        if (width == 0) continue;
        const int64_t state = g * piece_queries_ + q;
        for (int64_t j = 0; j < width; j += kGranule) {
          multiply<Op>({rounded, std::min(kGranule, width - j), qk_width_},
                       {scratch.queries.get(state * qk_width_), qk_width_},
                       {first.keys + j * qk_width_, kGranule}, {scores + j, kTileKeys});
        }
        float* accumulated = scratch.accumulated.get(state * v_width_);
        bool& started = scratch.started[state / kTileQueries];
        for (int64_t i = 0; i < queries; ++i) {
          const float* kept = nullptr;
          if (dropout.drops) {
            const int64_t position = piece.q_begin + q + i;
            kept = scratch.factors.of_query(
                dropout.seed, dropout.kept,
                dropout.counter_of(head.batch, problem_.q_head(head, g), position), visible(q + i));
          }
          weigh_keys<Op>(
              scores + i * kTileKeys, factor, visible(q + i), width, scratch.softmax[state + i],
              started ? std::span(accumulated + i * v_width_, v_width_) : std::span<float>(), kept,
              weights + i * kTileKeys);
        }
        multiply<Op>({rounded, v_width_, width}, {weights, kTileKeys}, {first.values, v_width_},
                     {accumulated, v_width_}, /*add=*/started);
        started = true;
      }
    }
  }

  void store_results(const Head& head, const Piece& piece, const Scratch& scratch) const {
    for (int64_t g = 0; g < problem_.group; ++g) {
      const int64_t q_head = problem_.q_head(head, g);
      for (int64_t i = 0; i < piece.num_queries(); ++i) {
        const int64_t state = g * piece_queries_ + i, position = piece.q_begin + i;
        lse_[problem_.lse_index(head.batch, q_head, position)] =
            finish_softmax(scratch.softmax[state], scratch.accumulated.get(state * v_width_),
                           problem_.v_dim, out_.at(head.batch, q_head, position));
      }
    }
  }

  const Problem& problem_;
  View<const T> query_, key_, value_;
  View<T> out_;
  float* lse_;
  int64_t qk_width_, v_width_, piece_queries_;
  Granules granules_;
  std::vector<Piece> pieces_;
};

}  // namespace colonnade
