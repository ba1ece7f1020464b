// Operands of matrix products: copied once into the layout and the type that the products want.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <type_traits>

#include "problem.h"

namespace colonnade {

namespace blas = at::native::cpublas;
using at::BFloat16;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();
static_assert(kStep % kLanes == 0);

// Operands of type Op lie in groups of 32 bits: rows 2i and 2i+1 of a right-hand bfloat16 operand
// are interleaved, [rows/2][columns][2].
template <typename Op>
constexpr int64_t kPair = sizeof(float) / sizeof(Op);

template <typename Op>
int64_t padded(int64_t width) {
  return round_up(width, kStep * kPair<Op>);
}

// Uninitialised memory, aligned to a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : memory_(c10::GetCPUAllocator()->allocate(std::max<int64_t>(size, 1) * sizeof(T))) {}
  T* get() const { return static_cast<T*>(memory_.get()); }

 private:
  at::DataPtr memory_;
};

// C (+)= A B: A is [m, k] row by row, B [k, n] as `pack_pairs` or `pack_transposed` leave it.
template <typename Op>
void multiply(int64_t m, int64_t n, int64_t k, const Op* a, int64_t lda, const Op* b, int64_t ldb,
              float* c, int64_t ldc, bool add) {
  blas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/kPair<Op> == 2);
}

template <typename Op>
void release() {
  blas::brgemm_release(/*is_vnni=*/kPair<Op> == 2);
}

// A row of any input type as operands, zeros behind it.
template <typename T, typename Op>
void copy_row(const T* from, int64_t width, int64_t padded_width, Op* to, float factor = 1.0f) {
  if constexpr (std::is_same_v<T, Op>) {
    if (factor == 1.0f) {
      std::memcpy(to, from, width * sizeof(Op));
      std::fill(to + width, to + padded_width, Op(0));
      return;
    }
  }
  for (int64_t i = 0; i < width; ++i) to[i] = static_cast<Op>(static_cast<float>(from[i]) * factor);
  std::fill(to + width, to + padded_width, Op(0));
}

// Numbers of a cache line.
template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);
// Rows that are fetched before they are copied.
constexpr int64_t kAhead = 8;

template <typename T>
void fetch_row(const T* row, int64_t width) {
  for (int64_t i = 0; i < width; i += kLine<T>) __builtin_prefetch(row + i);
}

// The rows at row(0) … row(count - 1) as operands [count][padded_width], with rows of zeros up to a
// multiple of kStep. Where heads lie side by side, or rows are gathered, the processor does not
// foresee which memory comes next.
template <typename Op, typename Row>
void copy_rows(int64_t count, const Row& row, int64_t width, int64_t padded_width, Op* to,
               float factor = 1.0f) {
  for (int64_t i = 0; i < std::min(kAhead, count); ++i) fetch_row(row(i), width);
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) fetch_row(row(i + kAhead), width);
    copy_row(row(i), width, padded_width, to + i * padded_width, factor);
  }
  std::fill(to + count * padded_width, to + round_up(count, kStep) * padded_width, Op(0));
}

// [count, width] rows as a right-hand operand whose rows are the columns: [width/pair][ld][pair].
// count and the padded width are multiples of kStep.
template <typename Op>
void pack_transposed(const Op* rows, int64_t count, int64_t width, Op* to, int64_t ld) {
  const auto* words = reinterpret_cast<const float*>(rows);
  auto* out = reinterpret_cast<float*>(to);
  const int64_t across = width / kPair<Op>;
  for (int64_t i = 0; i < count; i += kStep) {
    for (int64_t j = 0; j < across; j += kStep) {
      at::vec::transpose_mxn<float, kStep, kStep>(words + i * across + j, across, out + j * ld + i,
                                                  ld);
    }
  }
}

// [count, width] rows as a right-hand operand: [count/pair][width][pair]; ld is the rows' distance.
template <typename Op>
void pack_pairs(const Op* rows, int64_t count, int64_t width, int64_t ld, Op* to, int64_t to_ld) {
  if constexpr (kPair<Op> == 1) {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(to + i * to_ld, rows + i * ld, width * sizeof(Op));
    }
  } else {
    for (int64_t i = 0; i < count; i += 2) {
      const auto* even = reinterpret_cast<const uint16_t*>(rows + i * ld);
      const auto* odd = reinterpret_cast<const uint16_t*>(rows + (i + 1) * ld);
      auto* out = reinterpret_cast<uint32_t*>(to + i * to_ld);
      for (int64_t j = 0; j < width; ++j) {
        out[j] = static_cast<uint32_t>(even[j]) | (static_cast<uint32_t>(odd[j]) << 16);
      }
    }
  }
}

// What `pack_transposed` left, as a left-hand operand: [width][ld], row by row.
template <typename Op>
void unpair(const Op* packed, int64_t width, int64_t ld, Op* to) {
  if constexpr (kPair<Op> == 1) {
    std::memcpy(to, packed, width * ld * sizeof(Op));
  } else {
    for (int64_t i = 0; i < width; i += 2) {
      const auto* words = reinterpret_cast<const uint32_t*>(packed + i * ld);
      auto* even = reinterpret_cast<uint16_t*>(to + i * ld);
      auto* odd = even + ld;
      for (int64_t j = 0; j < ld; ++j) {
        even[j] = static_cast<uint16_t>(words[j]);
        odd[j] = static_cast<uint16_t>(words[j] >> 16);
      }
    }
  }
}

// factor · row, rounded to the output's type.
template <typename T>
void store_row(const float* from, int64_t width, float factor, T* to) {
  const Vec by(factor);
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; i + kLanes <= width; i += kLanes) (Vec::loadu(from + i) * by).store(to + i);
  } else {
    for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
      at::vec::convert_from_float<T>(Vec::loadu(from + i) * by, Vec::loadu(from + i + kLanes) * by)
          .store(to + i);
    }
  }
  for (; i < width; ++i) to[i] = static_cast<T>(from[i] * factor);
}

// The sum of products of two rows, in float32.
template <typename T>
float dot(const T* a, const T* b, int64_t width) {
  Vec sum(0.0f);
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; i + kLanes <= width; i += kLanes) {
      sum = at::vec::fmadd(Vec::loadu(a + i), Vec::loadu(b + i), sum);
    }
  } else {
    using Half = at::vec::Vectorized<T>;
    for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
      const auto [a0, a1] = at::vec::convert_to_float<T>(Half::loadu(a + i));
      const auto [b0, b1] = at::vec::convert_to_float<T>(Half::loadu(b + i));
      sum = at::vec::fmadd(a0, b0, at::vec::fmadd(a1, b1, sum));
    }
  }
  float total =
      at::vec::vec_reduce_all<float>([](const Vec& x, const Vec& y) { return x + y; }, sum);
  for (; i < width; ++i) total += static_cast<float>(a[i]) * static_cast<float>(b[i]);
  return total;
}

inline void add_row(const float* from, int64_t width, float* to) {
  for (int64_t i = 0; i < width; i += kLanes)
    (Vec::loadu(to + i) + Vec::loadu(from + i)).store(to + i);
}

// e^x. Of NaN it may give anything: callers know of NaN by the largest score or the log-sum-exp.
template <typename Op>
Vec fast_exp(const Vec& x) {
  if constexpr (kPair<Op> == 2) {
    return x.fexp_u20();  // good to the digits of bfloat16
  } else {
    return x.exp_u20();
  }
}

// Two vectors of weights in the operands' type.
template <typename Op>
void store_weights(const Vec& first, const Vec& second, Op* to) {
  if constexpr (kPair<Op> == 1) {
    first.store(to);
    second.store(to + kLanes);
  } else {
    at::vec::convert_from_float<Op>(first, second).store(to);
  }
}

// Whether products of paired bfloat16 operands are right on this processor. Small integers, exact.
inline bool paired_products_work() {
  constexpr int64_t n = 32;
  Buffer<BFloat16> rows(n * n), packed(n * n);
  Buffer<float> result(n * n);
  for (int64_t i = 0; i < n * n; ++i) rows.get()[i] = static_cast<BFloat16>(float(i % 7) - 3);
  pack_pairs(rows.get(), n, n, n, packed.get(), n);
  try {
    multiply(n, n, n, rows.get(), n, packed.get(), n, result.get(), n, false);
    release<BFloat16>();
  } catch (const c10::Error&) {
    return false;
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < n; ++k)
        sum += float(rows.get()[i * n + k]) * float(rows.get()[k * n + j]);
      if (result.get()[i * n + j] != sum) return false;
    }
  }
  return true;
}

}  // namespace colonnade
