// Operands of matrix products, copied into the layout and the type that the products want, and
// arithmetic on rows of numbers.
//
// T is the type of the tensors, Op that of the operands: equal, or bfloat16 and float where paired
// products of bfloat16 do not work on this processor.
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

// Numbers of type Op in 32 bits. A right-hand operand lies in groups of that many rows: those of a
// bfloat16 operand are interleaved two by two, [rows/2][columns][2].
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
  T* get(int64_t index = 0) const { return static_cast<T*>(memory_.get()) + index; }
  T& operator[](int64_t index) const { return *get(index); }

 private:
  at::DataPtr memory_;
};

// The buffer of bfloat16 operands where there are any. For float there are no pairs and nothing is
// converted, so that the plain buffer will do.
template <typename Op, typename From>
Op* paired_or(const Buffer<Op>& paired, const Buffer<From>& plain) {
  if constexpr (kPair<Op> == 2) {
    return paired.get();
  } else {
    return plain.get();
  }
}

// A [batch, heads, length, width] tensor whose width is contiguous; T is const where it is read.
template <typename T>
struct View {
  T* data;
  int64_t batch_stride, head_stride, length_stride;

  explicit View(const at::Tensor& tensor)
      : data(data_of(tensor)), batch_stride(tensor.stride(0)), head_stride(tensor.stride(1)),
        length_stride(tensor.stride(2)) {}

  T* at(int64_t batch, int64_t q_or_kv_head, int64_t position) const {
    return data + batch * batch_stride + q_or_kv_head * head_stride + position * length_stride;
  }
  T* at(const Head& head, int64_t position) const { return at(head.batch, head.kv_head, position); }

 private:
  static T* data_of(const at::Tensor& tensor) {
    if constexpr (std::is_const_v<T>) {
      return tensor.const_data_ptr<std::remove_const_t<T>>();
    } else {
      return tensor.mutable_data_ptr<T>();
    }
  }
};

// A matrix in memory; `stride` numbers lie between the beginnings of two rows.
template <typename T>
struct Matrix {
  T* data;
  int64_t stride;
};

struct Sizes {
  int64_t rows, columns, depth;
};

// result (+)= left · right, with left [rows, depth] and right [depth, columns]; right lies as
// `pack_pairs` or `pack_transposed` leave it.
template <typename Op>
void multiply(Sizes sizes, Matrix<const Op> left, Matrix<const Op> right, Matrix<float> result,
              bool add = false) {
  blas::brgemm(sizes.rows, sizes.columns, sizes.depth, left.stride, right.stride, result.stride,
               add, left.data, right.data, result.data, /*is_vnni=*/kPair<Op> == 2);
}

// To be called at the end by a thread that has multiplied.
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

// Numbers in a cache line.
template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);
// Rows are fetched this many rows before they are copied.
constexpr int64_t kAhead = 8;

template <typename T>
void fetch_row(const T* row, int64_t width) {
  for (int64_t i = 0; i < width; i += kLine<T>) __builtin_prefetch(row + i);
}

// The rows at row(0) … row(count - 1) as operands [count][padded_width], with rows of zeros up to a
// multiple of kStep. Rows are fetched ahead: where heads lie side by side, or rows are gathered,
// the processor does not foresee which memory comes next.
template <typename Op, typename RowAt>
void copy_rows(int64_t count, const RowAt& row, int64_t width, int64_t padded_width, Op* to,
               float factor = 1.0f) {
  for (int64_t i = 0; i < std::min(kAhead, count); ++i) fetch_row(row(i), width);
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) fetch_row(row(i + kAhead), width);
    copy_row(row(i), width, padded_width, to + i * padded_width, factor);
  }
  std::fill(to + count * padded_width, to + round_up(count, kStep) * padded_width, Op(0));
}

// [count, width] rows as the columns of a right-hand operand: [width/pair][stride][pair]. count and
// width/pair are multiples of kStep.
template <typename Op>
void pack_transposed(const Op* rows, int64_t count, int64_t width, Op* to, int64_t stride) {
  const auto* words = reinterpret_cast<const float*>(rows);
  auto* out = reinterpret_cast<float*>(to);
  const int64_t across = width / kPair<Op>;
  for (int64_t i = 0; i < count; i += kStep) {
    for (int64_t j = 0; j < across; j += kStep) {
      at::vec::transpose_mxn<float, kStep, kStep>(words + i * across + j, across,
                                                  out + j * stride + i, stride);
    }
  }
}

// [count, width] rows as a right-hand operand: [count/pair][width][pair].
template <typename Op>
void pack_pairs(int64_t count, int64_t width, Matrix<const Op> rows, Matrix<Op> to) {
  if constexpr (kPair<Op> == 1) {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(to.data + i * to.stride, rows.data + i * rows.stride, width * sizeof(Op));
    }
  } else {
    for (int64_t i = 0; i < count; i += 2) {
      const auto* even = reinterpret_cast<const uint16_t*>(rows.data + i * rows.stride);
      const auto* odd = even + rows.stride;
      auto* out = reinterpret_cast<uint32_t*>(to.data + i * to.stride);
      for (int64_t j = 0; j < width; ++j) {
        out[j] = static_cast<uint32_t>(even[j]) | (static_cast<uint32_t>(odd[j]) << 16);
      }
    }
  }
}

// What `pack_transposed` made, as a left-hand operand: [width][stride], row by row.
template <typename Op>
void unpair(const Op* packed, int64_t width, int64_t stride, Op* to) {
  if constexpr (kPair<Op> == 1) {
    std::memcpy(to, packed, width * stride * sizeof(Op));
  } else {
    for (int64_t i = 0; i < width; i += 2) {
      const auto* words = reinterpret_cast<const uint32_t*>(packed + i * stride);
      auto* even = reinterpret_cast<uint16_t*>(to + i * stride);
      auto* odd = even + stride;
      for (int64_t j = 0; j < stride; ++j) {
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
      const Vec one = Vec::loadu(from + i) * by, two = Vec::loadu(from + i + kLanes) * by;
      at::vec::convert_from_float<T>(one, two).store(to + i);
    }
  }
  for (; i < width; ++i) to[i] = static_cast<T>(from[i] * factor);
}

inline void add_row(const float* from, int64_t width, float* to) {
  for (int64_t i = 0; i < width; i += kLanes) {
    (Vec::loadu(to + i) + Vec::loadu(from + i)).store(to + i);
  }
}

inline float sum_of(const Vec& vector) {
  return at::vec::vec_reduce_all<float>([](const Vec& x, const Vec& y) { return x + y; }, vector);
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
  float total = sum_of(sum);
  for (; i < width; ++i) total += static_cast<float>(a[i]) * static_cast<float>(b[i]);
  return total;
}

// Whether products of paired bfloat16 operands are right on this processor, tried out with integers
// so small that every sum is exact.
inline bool paired_products_work() {
  constexpr int64_t n = 32, most = 3;
  Buffer<BFloat16> rows(n * n), packed(n * n);
  Buffer<float> result(n * n);
  for (int64_t i = 0; i < n * n; ++i) {
    rows[i] = static_cast<BFloat16>(static_cast<float>(i % (2 * most + 1) - most));
  }
  pack_pairs<BFloat16>(n, n, {rows.get(), n}, {packed.get(), n});
  try {
    multiply<BFloat16>({n, n, n}, {rows.get(), n}, {packed.get(), n}, {result.get(), n});
    release<BFloat16>();
  } catch (const c10::Error&) {
    return false;
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < n; ++k) sum += float(rows[i * n + k]) * float(rows[k * n + j]);
      if (result[i * n + j] != sum) return false;
    }
  }
  return true;
}

}  // namespace colonnade
