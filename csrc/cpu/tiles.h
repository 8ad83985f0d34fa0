// Chunks in scratch memory: tensors read into rows padded to whole vectors, and the small things done to them there.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/scan.h"
#include "cpu/simd.h"

namespace s0::S0_ISA {

// Vectors of another type with as many lanes as those of T, at any address.
template <class T, class Other>
struct LooseOf {
  typedef Other type __attribute__((vector_size(kLanes<T> * sizeof(Other)), may_alias, aligned(sizeof(Other))));
};

// bfloat16 is kept as its bits.
template <class T, class From>
S0_INLINE Vec<T> widen(const From* p) {
  const auto x = *reinterpret_cast<const typename LooseOf<T, From>::type*>(p);
  if constexpr (sizeof(From) == 2 && static_cast<From>(0.5f) == From(0)) {
    typedef uint32_t Bits __attribute__((vector_size(kLanes<float> * 4)));
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    if constexpr (sizeof(T) == 4) return __builtin_bit_cast(Vec<T>, __builtin_convertvector(x, Bits) << 16);
    return Vec<T>{};
  } else {
    return __builtin_convertvector(x, Vec<T>);
  }
}

template <class T, class From>
S0_INLINE T widen_one(From x) {
  if constexpr (sizeof(From) == 2 && static_cast<From>(0.5f) == From(0))
    return static_cast<T>(__builtin_bit_cast(float, static_cast<uint32_t>(x) << 16));
  else
    return static_cast<T>(x);
}

template <class To, class T>
S0_INLINE To narrow_one(T x) {
  if constexpr (sizeof(To) == 2 && static_cast<To>(0.5f) == To(0)) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, static_cast<float>(x));
    return x != x ? To(0x7fc0) : static_cast<To>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  } else {
    return static_cast<To>(x);
  }
}

template <class T, class From>
S0_INLINE void read_as(T* to, int ld, const void* data, int64_t at, int64_t token, int64_t element, int rows,
                       int columns) {
  const From* from = static_cast<const From*>(data) + at;
  for (int i = 0; i < rows; ++i, to += ld, from += token) {
    int j = 0;
    if constexpr (sizeof(T) == 4 || sizeof(From) == 8)
      if (element == 1)
        for (; j + kLanes<T> <= columns; j += kLanes<T>) store(to + j, widen<T>(from + j));
    for (; j < columns; ++j) to[j] = widen_one<T>(from[j * element]);
    for (; j < padded<T>(columns); ++j) to[j] = 0;
  }
}

// Rows of one head from element `at` on, filled up with zeros to whole vectors.
template <class T>
void read(T* to, int ld, const Rows& x, int64_t at, int rows, int columns) {
  if (columns == 0) return;  // there may be no memory
  switch (x.kind) {
    case Kind::kFloat: return read_as<T, float>(to, ld, x.data, at, x.token, x.element, rows, columns);
    case Kind::kDouble: return read_as<T, double>(to, ld, x.data, at, x.token, x.element, rows, columns);
    case Kind::kHalf: return read_as<T, _Float16>(to, ld, x.data, at, x.token, x.element, rows, columns);
    case Kind::kBFloat16: return read_as<T, uint16_t>(to, ld, x.data, at, x.token, x.element, rows, columns);
  }
}

template <class T, class To>
S0_INLINE void write_as(void* data, int64_t at, int64_t token, const T* from, int ld, int rows, int columns) {
  To* to = static_cast<To*>(data) + at;
  for (int i = 0; i < rows; ++i, from += ld, to += token) {
    int j = 0;
    if constexpr (sizeof(T) == sizeof(To))
      for (; j + kLanes<T> <= columns; j += kLanes<T>)
        store_loose(to + j, load(from + j));
#pragma GCC ivdep
    for (; j < columns; ++j) to[j] = narrow_one<To>(from[j]);
  }
}

// The reverse, to contiguous rows `token` elements apart.
template <class T>
void write(void* data, Kind kind, int64_t at, int64_t token, const T* from, int ld, int rows, int columns) {
  if (columns == 0) return;
  switch (kind) {
    case Kind::kFloat: return write_as<T, float>(data, at, token, from, ld, rows, columns);
    case Kind::kDouble: return write_as<T, double>(data, at, token, from, ld, rows, columns);
    case Kind::kHalf: return write_as<T, _Float16>(data, at, token, from, ld, rows, columns);
    case Kind::kBFloat16: return write_as<T, uint16_t>(data, at, token, from, ld, rows, columns);
  }
}

// Lanes of a and b that change places in one stage: those that differ in bit S. The masks have to be constants.
template <class T, int S, int... L>
S0_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, L...>) {
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Index Mask __attribute__((vector_size(S0_VECTOR_BYTES)));
  constexpr int lanes = sizeof...(L);
  const Vec<T> low = __builtin_shuffle(a, b, Mask{((L & S) != 0 ? lanes + L - S : L)...});
  b = __builtin_shuffle(a, b, Mask{((L & S) != 0 ? lanes + L : L + S)...});
  a = low;
}

template <class T, int S = 1>
S0_INLINE void exchange_all(Vec<T>* x) {
  constexpr int lanes = kLanes<T>;
  if constexpr (S < lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      if ((i & S) == 0) exchange<T, S>(x[i], x[i + S], std::make_integer_sequence<int, lanes>());
    exchange_all<T, 2 * S>(x);
  }
}

// A square of vectors turned over its diagonal, bit by bit of row and lane.
template <class T>
S0_INLINE void transpose_square(T* to, int64_t ld_to, const T* from, int64_t ld) {
  constexpr int lanes = kLanes<T>;
  Vec<T> x[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) x[i] = load_loose(from + i * ld);
  exchange_all<T>(x);
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) store_loose(to + i * ld_to, x[i]);
}

// to[j][i] = from[i][j], at any address.
template <class T>
void transpose(T* to, int64_t ld_to, const T* from, int64_t ld, int rows, int columns) {
  constexpr int lanes = kLanes<T>;
  const int whole_rows = rows / lanes * lanes, whole_columns = columns / lanes * lanes;
  for (int j = 0; j < whole_columns; j += lanes)
    for (int i = 0; i < whole_rows; i += lanes) transpose_square(to + j * ld_to + i, ld_to, from + i * ld + j, ld);
  for (int i = 0; i < rows; ++i)
    for (int j = i < whole_rows ? whole_columns : 0; j < columns; ++j) to[j * ld_to + i] = from[i * ld + j];
}

// The same from memory that no cache holds: row after row of `from`, while the next ones are on their way.
template <class T>
void transpose_far(T* to, int64_t ld_to, const T* from, int64_t ld, int rows, int columns) {
  constexpr int lanes = kLanes<T>, line = 64 / sizeof(T);
  for (int i = 0; i < rows; i += lanes) {
    for (int next = i + lanes; next < rows && next < i + 2 * lanes; ++next)
      for (int j = 0; j < columns; j += line) __builtin_prefetch(from + next * ld + j);
    transpose(to + i, ld_to, from + i * ld, ld, rows - i < lanes ? rows - i : lanes, columns);
  }
}

// `transpose`, the rows of `to` filled up with zeros to whole vectors.
template <class T>
void transpose_padded(T* to, int64_t ld_to, const T* from, int64_t ld, int rows, int columns) {
  transpose(to, ld_to, from, ld, rows, columns);
  for (int j = 0; j < columns && rows < padded<T>(rows); ++j)
    for (int i = rows; i < padded<T>(rows); ++i) to[j * ld_to + i] = 0;
}

template <class T>
S0_INLINE T sum(Vec<T> x) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += x[i];
  return total;
}

template <class T>
S0_INLINE T dot(const T* a, const T* b, int n) {
  Vec<T> first{}, second{};
  int j = 0;
  for (; j + 2 * kLanes<T> <= n; j += 2 * kLanes<T>) {
    first += load(a + j) * load(b + j);
    second += load(a + j + kLanes<T>) * load(b + j + kLanes<T>);
  }
  if (j < n) first += load(a + j) * load(b + j);
  return sum<T>(first + second);
}

// y = y * factor, over padded rows
template <class T>
S0_INLINE void scale_row(T* y, T factor, int n) {
  for (int j = 0; j < n; j += kLanes<T>) store(y + j, load(y + j) * factor);
}

// y += factor * x
template <class T>
S0_INLINE void add_row(T* y, const T* x, T factor, int n) {
  for (int j = 0; j < n; j += kLanes<T>) store(y + j, load(y + j) + factor * load(x + j));
}

// n padded to whole vectors
template <class T>
S0_INLINE void fill(T* p, T value, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store(p + i, value - Vec<T>{});
}

template <class T>
T exponential(T x);
template <>
S0_INLINE float exponential(float x) {
  return __builtin_expf(x);
}
template <>
S0_INLINE double exponential(double x) {
  return __builtin_exp(x);
}

// x * rsqrt(sum(x^2) + 1e-6) in place; the factor.
template <class T>
S0_INLINE T normalise(T* x, int n) {
  const T factor = 1 / __builtin_sqrt(dot(x, x, n) + T(1e-6));
  scale_row(x, factor, n);
  return factor;
}

// A bump pointer over scratch memory; with no memory it only counts.
template <class T>
struct Arena {
  char* base;
  int64_t used = 0;

  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

}  // namespace s0::S0_ISA
