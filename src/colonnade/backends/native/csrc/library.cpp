// The kernels behind the operations of backend "native", and native_ceiling for benchmarks. Python
// states their schemas.
#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <torch/library.h>

#include "backward.h"
#include "ceiling.h"
#include "decode.h"
#include "forward.h"

namespace colonnade {
namespace {

at::Tensor rows_contiguous(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.numel() == 0 ? tensor : tensor.contiguous();
}

Inputs rows_contiguous(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "tensors must be 4-D");
  TORCH_CHECK(query.scalar_type() == key.scalar_type() && key.scalar_type() == value.scalar_type(),
              "query, key and value must have one type");
  const bool fit = query.size(0) == key.size(0) && query.size(3) == key.size(3) &&
      key.sizes().slice(0, 3) == value.sizes().slice(0, 3) && key.size(1) > 0 &&
      query.size(1) % key.size(1) == 0;
  TORCH_CHECK(fit, "query, key and value must fit together, got ", query.sizes(), ", ", key.sizes(),
              " and ", value.sizes());
  return {.query = rows_contiguous(query),
          .key = rows_contiguous(key),
          .value = rows_contiguous(value)};
}

Results empty_results(const Inputs& inputs) {
  const at::Tensor& query = inputs.query;
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2);
  return {.out = at::empty({batch, heads, length, inputs.value.size(3)}, query.options()),
          .lse = at::empty({batch, heads, length}, query.options().dtype(at::kFloat))};
}

// Call run<T, Op>() with the input's type and the type of the products' operands.
template <typename Run>
void with_types(at::ScalarType type, const Run& run) {
  static const bool paired = paired_products_work();
  if (type == at::kFloat) {
    run.template operator()<float, float>();
  } else if (paired) {
    run.template operator()<BFloat16, BFloat16>();
  } else {
    run.template operator()<BFloat16, float>();
  }
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query, const at::Tensor& key,
                                           const at::Tensor& value, const at::Tensor& gather,
                                           const at::Tensor& table, const at::Tensor& shift,
                                           bool own_from_slots, double scale,
                                           at::TensorList dropped, int64_t threshold, double factor,
                                           at::IntArrayRef first) {
  const Inputs inputs = rows_contiguous(query, key, value);
  const Problem problem(inputs, {gather, table, shift, own_from_slots}, scale,
                        Dropout(dropped, threshold, factor, first));
  const Results results = empty_results(inputs);
  with_types(query.scalar_type(),
             [&]<typename T, typename Op>() { Forward<T, Op>(problem, inputs, results).run(); });
  return {results.out, results.lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_out, const at::Tensor& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& gather, const at::Tensor& table, const at::Tensor& shift, bool own_from_slots,
    double scale, at::TensorList dropped, int64_t threshold, double factor, at::IntArrayRef first) {
  const Inputs inputs = rows_contiguous(query, key, value);
  const Results results{.out = out.contiguous(), .lse = lse.contiguous()};
  const Results grad_results{.out = rows_contiguous(grad_out), .lse = grad_lse.contiguous()};
  const Problem problem(inputs, {gather, table, shift, own_from_slots}, scale,
                        Dropout(dropped, threshold, factor, first));
  // Keys that no row has for its own, and that fill no slot, have a gradient of 0.
  const Inputs grads{.query = at::empty(query.sizes(), inputs.query.options()),
                     .key = at::zeros(key.sizes(), inputs.key.options()),
                     .value = at::zeros(value.sizes(), inputs.value.options())};
  with_types(query.scalar_type(), [&]<typename T, typename Op>() {
    Backward<T, Op>(problem, inputs, results, grad_results, grads).run();
  });
  return {grads.query, grads.key, grads.value};
}

std::tuple<at::Tensor, at::Tensor> decode(const at::Tensor& query, const at::Tensor& key,
                                          const at::Tensor& value,
                                          const std::optional<at::Tensor>& reads, double scale) {
  const Inputs inputs = rows_contiguous(query, key, value);
  const Results results = empty_results(inputs);
  const auto marks = reads.has_value() ? std::optional(reads->contiguous()) : std::nullopt;
  const auto factor = static_cast<float>(scale);
  if (query.scalar_type() == at::kFloat) {
    Decode<float>(inputs, marks, factor, results).run();
  } else {
    Decode<BFloat16>(inputs, marks, factor, results).run();
  }
  return {results.out, results.lse};
}

// The factors [batch, heads, tiles, queries, keys] of weights, given the numbers of their rows and
// heads and the places of their queries, all [batch, heads, tiles, queries], and the places of
// their keys [batch, heads, tiles, keys]; sizes may be 1 where they do not matter.
at::Tensor factors(const at::Tensor& row, const at::Tensor& head, const at::Tensor& query,
                   const at::Tensor& key, const at::Tensor& seed, int64_t threshold,
                   double factor) {
  auto sizes = at::infer_size(at::infer_size(row.sizes(), head.sizes()), query.sizes());
  auto of_keys = at::infer_size(at::IntArrayRef(sizes).slice(0, 3), key.sizes().slice(0, 3));
  std::copy(of_keys.begin(), of_keys.end(), sizes.begin());
  of_keys.push_back(key.size(3));
  const int64_t queries = sizes[3], keys = of_keys[3], sets = sizes[0] * sizes[1] * sizes[2];
  at::Tensor result = at::empty({sizes[0], sizes[1], sizes[2], queries, keys}, at::kFloat);
  const at::Tensor rows = row.expand(sizes), heads = head.expand(sizes);
  const at::Tensor places = query.expand(sizes), key_places = key.expand(of_keys);
  const auto row_at = rows.accessor<const int64_t, 4>(),
             head_at = heads.accessor<const int64_t, 4>();
  const auto query_at = places.accessor<const int64_t, 4>();
  const auto key_at = key_places.accessor<const int64_t, 4>();
  const auto from = static_cast<uint64_t>(seed.const_data_ptr<int64_t>()[0]);
  const Kept kept(threshold, factor);
  float* to = result.mutable_data_ptr<float>();
  // Some queries of one set of keys are a task.
  const int64_t parts = round_up(queries, kPieceQueries) / kPieceQueries;
  const auto make = [&] { return FactorsOfKeys(keys); };
  run_tasks(sets * parts, make, [&](int64_t index, FactorsOfKeys& scratch) {
    const int64_t set = index / parts, begin = index % parts * kPieceQueries;
    const int64_t b = set / (sizes[1] * sizes[2]), h = set / sizes[2] % sizes[1],
                  m = set % sizes[2];
    scratch.set_keys(keys, [&](int64_t i) { return key_at[b][h][m][i]; });
    for (int64_t i = begin; i < std::min(begin + kPieceQueries, queries); ++i) {
      const Counter counter{0, static_cast<uint32_t>(query_at[b][h][m][i]),
                            static_cast<uint32_t>(head_at[b][h][m][i]),
                            static_cast<uint32_t>(row_at[b][h][m][i])};
      std::copy_n(scratch.of_query(from, kept, counter, keys), keys,
                  to + (set * queries + i) * keys);
    }
  });
  return result;
}

// Seconds for a pair of query and key on one thread while all are busy: forward and backward.
std::tuple<double, double> ceiling(const at::Tensor& like, int64_t qk_dim, int64_t v_dim,
                                   double seconds) {
  std::tuple<double, double> result;
  with_types(like.scalar_type(), [&]<typename T, typename Op>() {
    const Ceiling<Op> ceiling(qk_dim, v_dim);
    result = {ceiling.forward(seconds), ceiling.backward(seconds)};
  });
  return result;
}

}  // namespace
}  // namespace colonnade

TORCH_LIBRARY_IMPL(colonnade, CPU, library) {
  library.impl("native_forward_kernel", &colonnade::forward);
  library.impl("native_backward_kernel", &colonnade::backward);
  library.impl("native_decode", &colonnade::decode);
  library.impl("native_dropout", &colonnade::factors);
  library.impl("native_ceiling", &colonnade::ceiling);
}
