// Vectors of one instruction set, and the register-tiled matrix product that all kernels use.
// Included once per instruction set, by a file that defines S0_ISA (a namespace), S0_VECTOR_BYTES and S0_TILE_VECTORS;
// setup.py turns the instructions on for that file. These files must not share any code, or the linker could give an
// old machine the code of a new one. So use no static variables, and only builtin functions of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>

#include "compiler.h"

namespace s0::S0_ISA {

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(S0_VECTOR_BYTES), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr int kLanes = S0_VECTOR_BYTES / sizeof(T);

// A tile of the product: 6 rows of 4 vectors fill 24 of the 32 registers of AVX-512; 6 of 2 fill 12 of 16.
constexpr int kRows = 6;
constexpr int kVectors = S0_TILE_VECTORS;

template <class T>
S0_CALL Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}

template <class T>
S0_CALL void store(T* p, Vec<T> x) {
  *reinterpret_cast<Vec<T>*>(p) = x;
}

// A vector type for loads and stores at any address.
template <class T>
struct LooseVecOf {
  typedef T type __attribute__((vector_size(S0_VECTOR_BYTES), may_alias, aligned(sizeof(T))));
};

template <class T>
S0_CALL Vec<T> load_loose(const T* p) {
  return *reinterpret_cast<const typename LooseVecOf<T>::type*>(p);
}

template <class T>
S0_CALL void store_loose(T* p, Vec<T> x) {
  *reinterpret_cast<typename LooseVecOf<T>::type*>(p) = x;
}

template <class T>
constexpr int padded(int n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// The distance between rows of n numbers: n padded to whole vectors, plus a cache line if the rows would all map to a
// few sets of the cache.
template <class T>
constexpr int row_stride(int n) {
  constexpr int line = 64 / sizeof(T);
  return padded<T>(n) % (4 * line) == 0 ? padded<T>(n) + line : padded<T>(n);
}

// A matrix in scratch memory, with rows padded to whole vectors. Swapping the two strides reads it transposed.
template <class T>
struct Left {
  const T* data;
  std::ptrdiff_t row, column;
};

// One factor for each row, or one factor for all rows.
template <class T>
struct Factors {
  const T* data;
  int step;
};

// Row i becomes to[i] * product + keep[i] * before. `before` is usually the old row. Without `keep` it is ignored.
template <class T>
struct Target {
  T* data;
  std::ptrdiff_t ld;
  Factors<T> to, keep;
  const T* before;
};

template <class T>
constexpr T kOne = 1;
template <class T>
constexpr T kMinusOne = -1;

template <class T>
S0_CALL Target<T> set(T* data, std::ptrdiff_t ld, Factors<T> to = {&kOne<T>, 0}) {
  return {data, ld, to, {nullptr, 0}, data};
}
template <class T>
S0_CALL Target<T> add(T* data, std::ptrdiff_t ld, Factors<T> to = {&kOne<T>, 0}, Factors<T> keep = {&kOne<T>, 0}) {
  return {data, ld, to, keep, data};
}

// The entries of the left matrix that are not zero: all; or, in a square matrix, those up to the diagonal or from it
// on. The other entries, and the numbers that they would be multiplied by, are not read, so that values that are not
// finite do not spread. kLowerProduct is for a product that is needed below its diagonal only: it computes the vectors
// from the left up to the diagonal.
enum class Shape { kFull, kLower, kUpper, kLowerProduct };

template <class T>
struct Product {
  Left<T> a;
  const T* b;
  std::ptrdiff_t ldb;
  Target<T> c;
};

// sums += term d of the product, for those of the M rows from `a` on that lie from `top` to `bottom`
template <class T, int M, int N>
S0_CALL void add_depth(Vec<T> (&sums)[M][N], const T* a, std::ptrdiff_t row, const T* b, int top, int bottom) {
  Vec<T> right[N];
  S0_UNROLL_WHOLE
  for (int n = 0; n < N; ++n) right[n] = load(b + n * kLanes<T>);
  S0_UNROLL_WHOLE
  for (int m = 0; m < M; ++m) {
    if (m < top || m > bottom) continue;
    const Vec<T> left = a[m * row] - Vec<T>{};
    S0_UNROLL_WHOLE
    for (int n = 0; n < N; ++n) sums[m][n] += left * right[n];
  }
}

// Computes M rows from i on and N vectors from column j on, as sums over `depth` terms.
template <class T, int M, int N, Shape S>
__attribute__((noinline)) void tile(const Product<T>& p, int i, int j, int depth) {
  const int first = S == Shape::kUpper ? i : 0;
  const T *a = p.a.data + i * p.a.row + first * p.a.column, *b = p.b + first * p.ldb + j;
  const std::ptrdiff_t row = p.a.row, column = p.a.column, ldb = p.ldb;
  Vec<T> sums[M][N];
  S0_UNROLL_WHOLE
  for (int m = 0; m < M; ++m)
    S0_UNROLL_WHOLE
    for (int n = 0; n < N; ++n) sums[m][n] = Vec<T>{};
  if constexpr (S == Shape::kUpper) {
    S0_UNROLL_WHOLE
    for (int d = 0; d < M; ++d, a += column, b += ldb) add_depth<T, M, N>(sums, a, row, b, 0, d);
  }
  const int rest = S == Shape::kUpper ? depth - i - M : S == Shape::kLower ? i : depth;
  for (int d = 0; d < rest; ++d, a += column, b += ldb) add_depth<T, M, N>(sums, a, row, b, 0, M - 1);
  if constexpr (S == Shape::kLower) {
    S0_UNROLL_WHOLE
    for (int d = 0; d < M; ++d, a += column, b += ldb) add_depth<T, M, N>(sums, a, row, b, d, M - 1);
  }
  const Target<T>& c = p.c;
  T* to = c.data + i * c.ld + j;
  const T *before = c.before + i * c.ld + j, *factor = c.to.data + i * c.to.step;
  const T* keep = c.keep.data == nullptr ? nullptr : c.keep.data + i * c.keep.step;
  S0_UNROLL_WHOLE
  for (int m = 0; m < M; ++m, to += c.ld, before += c.ld, factor += c.to.step) {
    if (keep == nullptr) {
      S0_UNROLL_WHOLE
      for (int n = 0; n < N; ++n) store(to + n * kLanes<T>, *factor * sums[m][n]);
    } else {
      S0_UNROLL_WHOLE
      for (int n = 0; n < N; ++n)
        store(to + n * kLanes<T>, *keep * load(before + n * kLanes<T>) + *factor * sums[m][n]);
      keep += c.keep.step;
    }
  }
}

template <class T, int N, Shape S>
void tile_of_rows(int rows, const Product<T>& p, int i, int j, int depth) {
  switch (rows) {
    case 6: return tile<T, 6, N, S>(p, i, j, depth);
    case 5: return tile<T, 5, N, S>(p, i, j, depth);
    case 4: return tile<T, 4, N, S>(p, i, j, depth);
    case 3: return tile<T, 3, N, S>(p, i, j, depth);
    case 2: return tile<T, 2, N, S>(p, i, j, depth);
    case 1: return tile<T, 1, N, S>(p, i, j, depth);
  }
}

template <class T, Shape S>
void multiply_shaped(bool below, int m, int n, int depth, const Product<T>& p) {
  constexpr int width = kVectors * kLanes<T>;
  for (int j = 0; j < n; j += width) {
    for (int i = below ? j / kRows * kRows : 0; i < m; i += kRows) {
      const int rows = m - i < kRows ? m - i : kRows;
      const int end = below && i + rows < n ? i + rows : n;
      if (end <= j) continue;
      switch (end - j >= width ? kVectors : (end - j + kLanes<T> - 1) / kLanes<T>) {
        case 4:
          if constexpr (kVectors >= 4) tile_of_rows<T, 4, S>(rows, p, i, j, depth);
          break;
        case 3:
          if constexpr (kVectors >= 3) tile_of_rows<T, 3, S>(rows, p, i, j, depth);
          break;
        case 2: tile_of_rows<T, 2, S>(rows, p, i, j, depth); break;
        case 1: tile_of_rows<T, 1, S>(rows, p, i, j, depth); break;
      }
    }
  }
}

// The product of a [m, depth] and b [depth, n], with n padded to whole vectors. If a is a triangle, depth is m.
template <class T>
void multiply(Shape shape, int m, int n, int depth, Left<T> a, const T* b, std::ptrdiff_t ldb, Target<T> c) {
  const Product<T> p{a, b, ldb, c};
  switch (shape) {
    case Shape::kLower: return multiply_shaped<T, Shape::kLower>(false, m, n, depth, p);
    case Shape::kUpper: return multiply_shaped<T, Shape::kUpper>(false, m, n, depth, p);
    default: return multiply_shaped<T, Shape::kFull>(shape == Shape::kLowerProduct, m, n, depth, p);
  }
}

}  // namespace s0::S0_ISA
