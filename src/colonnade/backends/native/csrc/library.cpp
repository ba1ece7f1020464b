// The operations colonnade::native_forward, native_backward and native_decode, and native_ceiling
// for benchmarks; Python states their schemas.
#include <ATen/ATen.h>
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
                                           bool own_from_slots, double scale) {
  const auto q = rows_contiguous(query), k = rows_contiguous(key), v = rows_contiguous(value);
  const Problem problem(q, k, v, gather, table, shift, own_from_slots, scale);
  auto out = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  auto lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  with_types(q.scalar_type(),
             [&]<typename T, typename Op>() { Forward<T, Op>(problem, q, k, v, out, lse).run(); });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_out, const at::Tensor& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& gather, const at::Tensor& table, const at::Tensor& shift, bool own_from_slots,
    double scale) {
  const auto q = rows_contiguous(query), k = rows_contiguous(key), v = rows_contiguous(value);
  const auto g = rows_contiguous(grad_out), g_lse = grad_lse.contiguous();
  const Problem problem(q, k, v, gather, table, shift, own_from_slots, scale);
  auto grad_query = at::empty(q.sizes(), q.options());
  // Keys that no row has for its own, and that no slot holds, have no gradient.
  auto grad_key = at::zeros(k.sizes(), k.options());
  auto grad_value = at::zeros(v.sizes(), v.options());
  with_types(q.scalar_type(), [&]<typename T, typename Op>() {
    Backward<T, Op>(problem, q, k, v, out, lse, g, g_lse, grad_query, grad_key, grad_value).run();
  });
  return {grad_query, grad_key, grad_value};
}

std::tuple<at::Tensor, at::Tensor> decode(const at::Tensor& query, const at::Tensor& key,
                                          const at::Tensor& value,
                                          const std::optional<at::Tensor>& reads, double scale) {
  const auto q = rows_contiguous(query), k = rows_contiguous(key), v = rows_contiguous(value);
  auto out = at::empty({q.size(0), q.size(1), 1, v.size(3)}, q.options());
  auto lse = at::empty({q.size(0), q.size(1), 1}, q.options().dtype(at::kFloat));
  const auto read = reads.has_value() ? reads->contiguous() : at::Tensor();
  const bool* marks = read.defined() ? read.const_data_ptr<bool>() : nullptr;
  const auto factor = static_cast<float>(scale);
  if (q.scalar_type() == at::kFloat) {
    Decode<float>(q, k, v, marks, factor, out, lse).run();
  } else {
    Decode<BFloat16>(q, k, v, marks, factor, out, lse).run();
  }
  return {out, lse};
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
  library.impl("native_forward", &colonnade::forward);
  library.impl("native_backward", &colonnade::backward);
  library.impl("native_decode", &colonnade::decode);
  library.impl("native_ceiling", &colonnade::ceiling);
}
