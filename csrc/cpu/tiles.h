// Chunks in scratch memory: tensors are read into rows padded to whole vectors; and small operations on these rows.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/scan.h"
#include "cpu/simd.h"
#include "numbers.h"

namespace s0::S0_ISA {

// A vector of integers as wide as a vector of floats, and a vector of 16-bit numbers for its lanes, at any address.
typedef uint32_t Bits __attribute__((vector_size(S0_VECTOR_BYTES)));
typedef uint16_t Shorts __attribute__((vector_size(S0_VECTOR_BYTES / 2), may_alias, aligned(2)));

// Loads a vector from any address, and stores it.
S0_CALL Vec<float> widen(const float* p) { return load_loose(p); }
S0_CALL Vec<double> widen(const double* p) { return load_loose(p); }

S0_CALL Vec<float> widen(const BFloat16* p) {
  return widen_bfloat16<Vec<float>>(__builtin_convertvector(*reinterpret_cast<const Shorts*>(p), Bits));
}

// Masked, because g++ 12 would otherwise warn of an uninitialised value in its own header.
S0_CALL Vec<float> widen(const Half* p) {
  const Shorts x = *reinterpret_cast<const Shorts*>(p);
#if defined(__F16C__) && S0_VECTOR_BYTES == 64
  return __builtin_bit_cast(Vec<float>, _mm512_maskz_cvtph_ps(-1, __builtin_bit_cast(__m256i, x)));
#elif defined(__F16C__) && S0_VECTOR_BYTES == 32
  return __builtin_bit_cast(Vec<float>, _mm256_cvtph_ps(__builtin_bit_cast(__m128i, x)));
#else
  return widen_half<Vec<float>>(__builtin_convertvector(x, Bits));
#endif
}

S0_CALL void narrow(float* p, Vec<float> x) { store_loose(p, x); }
S0_CALL void narrow(double* p, Vec<double> x) { store_loose(p, x); }

S0_CALL void narrow(BFloat16* p, Vec<float> x) {
  *reinterpret_cast<Shorts*>(p) = __builtin_convertvector(narrow_bfloat16<Bits>(x), Shorts);
}

S0_CALL void narrow(Half* p, Vec<float> x) {
#if defined(__F16C__) && S0_VECTOR_BYTES == 64
  const __m256i found = _mm512_maskz_cvtps_ph(-1, __builtin_bit_cast(__m512, x), _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__) && S0_VECTOR_BYTES == 32
  const __m128i found = _mm256_cvtps_ph(__builtin_bit_cast(__m256, x), _MM_FROUND_TO_NEAREST_INT);
#else
  const Shorts found = __builtin_convertvector(narrow_half<Bits>(x), Shorts);
#endif
  *reinterpret_cast<Shorts*>(p) = __builtin_bit_cast(Shorts, found);
}

template <class T, class From>
S0_CALL void read_as(T* to, int ld, const void* data, int64_t at, int64_t token, int64_t element, int rows,
                       int columns) {
  const From* from = static_cast<const From*>(data) + at;
  for (int i = 0; i < rows; ++i, to += ld, from += token) {
    int j = 0;
    if (element == 1)
      for (; j + kLanes<T> <= columns; j += kLanes<T>) store(to + j, widen(from + j));
    for (; j < columns; ++j) to[j] = to_float(from[j * element]);
    for (; j < padded<T>(columns); ++j) to[j] = 0;
  }
}

// Reads rows of one head from element `at` on, and pads them with zeros to whole vectors.
template <class T>
void read(T* to, int ld, const Rows& x, int64_t at, int rows, int columns) {
  if (columns == 0) return;  // there may be no memory
  if constexpr (sizeof(T) == 8)
    read_as<T, double>(to, ld, x.data, at, x.token, x.element, rows, columns);
  else if (x.kind == Kind::kHalf)
    read_as<T, Half>(to, ld, x.data, at, x.token, x.element, rows, columns);
  else if (x.kind == Kind::kBFloat16)
    read_as<T, BFloat16>(to, ld, x.data, at, x.token, x.element, rows, columns);
  else
    read_as<T, float>(to, ld, x.data, at, x.token, x.element, rows, columns);
}

template <class T, class To>
S0_CALL void write_as(void* data, int64_t at, int64_t token, const T* from, int ld, int rows, int columns) {
  To* to = static_cast<To*>(data) + at;
  for (int i = 0; i < rows; ++i, from += ld, to += token) {
    int j = 0;
    for (; j + kLanes<T> <= columns; j += kLanes<T>) narrow(to + j, load(from + j));
    for (; j < columns; ++j) assign(to[j], from[j]);
  }
}

// The inverse: writes contiguous rows that are `token` elements apart.
template <class T>
void write(void* data, Kind kind, int64_t at, int64_t token, const T* from, int ld, int rows, int columns) {
  if (columns == 0) return;
  if constexpr (sizeof(T) == 8)
    write_as<T, double>(data, at, token, from, ld, rows, columns);
  else if (kind == Kind::kHalf)
    write_as<T, Half>(data, at, token, from, ld, rows, columns);
  else if (kind == Kind::kBFloat16)
    write_as<T, BFloat16>(data, at, token, from, ld, rows, columns);
  else
    write_as<T, float>(data, at, token, from, ld, rows, columns);
}

// Swaps the lanes of a and b whose index differs in bit S, for one stage. The masks must be constants.
template <class T, int S, int... L>
S0_CALL void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, L...>) {
  constexpr int lanes = sizeof...(L);
#if __has_builtin(__builtin_shufflevector)
  const Vec<T> low = __builtin_shufflevector(a, b, ((L & S) != 0 ? lanes + L - S : L)...);
  b = __builtin_shufflevector(a, b, ((L & S) != 0 ? lanes + L : L + S)...);
#else  // g++ 11
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Index Mask __attribute__((vector_size(S0_VECTOR_BYTES)));
  const Vec<T> low = __builtin_shuffle(a, b, Mask{((L & S) != 0 ? lanes + L - S : L)...});
  b = __builtin_shuffle(a, b, Mask{((L & S) != 0 ? lanes + L : L + S)...});
#endif
  a = low;
}

template <class T, int S = 1>
S0_CALL void exchange_all(Vec<T>* x) {
  constexpr int lanes = kLanes<T>;
  if constexpr (S < lanes) {
    S0_UNROLL_WHOLE
    for (int i = 0; i < lanes; ++i)
      if ((i & S) == 0) exchange<T, S>(x[i], x[i + S], std::make_integer_sequence<int, lanes>());
    exchange_all<T, 2 * S>(x);
  }
}

// Transposes a square of vectors, bit by bit of row and lane.
template <class T>
S0_CALL void transpose_square(T* to, int64_t ld_to, const T* from, int64_t ld) {
  constexpr int lanes = kLanes<T>;
  Vec<T> x[lanes];
  S0_UNROLL_WHOLE
  for (int i = 0; i < lanes; ++i) x[i] = load_loose(from + i * ld);
  exchange_all<T>(x);
  S0_UNROLL_WHOLE
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

// The same for memory that is not in the cache: it reads `from` row by row and prefetches the next rows.
template <class T>
void transpose_far(T* to, int64_t ld_to, const T* from, int64_t ld, int rows, int columns) {
  constexpr int lanes = kLanes<T>, line = 64 / sizeof(T);
  for (int i = 0; i < rows; i += lanes) {
    for (int next = i + lanes; next < rows && next < i + 2 * lanes; ++next)
      for (int j = 0; j < columns; j += line) __builtin_prefetch(from + next * ld + j);
    transpose(to + i, ld_to, from + i * ld, ld, rows - i < lanes ? rows - i : lanes, columns);
  }
}

// Like `transpose`, with the rows of `to` padded with zeros to whole vectors.
template <class T>
void transpose_padded(T* to, int64_t ld_to, const T* from, int64_t ld, int rows, int columns) {
  transpose(to, ld_to, from, ld, rows, columns);
  for (int j = 0; j < columns && rows < padded<T>(rows); ++j)
    for (int i = rows; i < padded<T>(rows); ++i) to[j * ld_to + i] = 0;
}

template <class T>
S0_CALL T sum(Vec<T> x) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += x[i];
  return total;
}

template <class T>
S0_CALL T dot(const T* a, const T* b, int n) {
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
S0_CALL void scale_row(T* y, T factor, int n) {
  for (int j = 0; j < n; j += kLanes<T>) store(y + j, load(y + j) * factor);
}

// y += factor * x
template <class T>
S0_CALL void add_row(T* y, const T* x, T factor, int n) {
  for (int j = 0; j < n; j += kLanes<T>) store(y + j, load(y + j) + factor * load(x + j));
}

// n padded to whole vectors
template <class T>
S0_CALL void fill(T* p, T value, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store(p + i, value - Vec<T>{});
}

template <class T>
T exponential(T x);
template <>
S0_CALL float exponential(float x) {
  return __builtin_expf(x);
}
template <>
S0_CALL double exponential(double x) {
  return __builtin_exp(x);
}

// Multiplies x by rsqrt(sum(x^2) + 1e-6) in place, and returns the factor.
template <class T>
S0_CALL T normalise(T* x, int n) {
  const T factor = 1 / __builtin_sqrt(dot(x, x, n) + T(1e-6));
  scale_row(x, factor, n);
  return factor;
}

// A bump pointer over scratch memory. Without memory it only counts bytes.
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
