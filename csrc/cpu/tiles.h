// Chunks in scratch memory: tensors read into rows padded to whole vectors, and the small things done to them there.
#pragma once

#include "cpu/scan.h"
#include "cpu/simd.h"

namespace s0::S0_ISA {

S0_INLINE float from_bfloat16(uint16_t bits) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}

S0_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T, class From>
S0_INLINE void read_as(T* to, int ld, const void* data, int64_t at, int64_t token, int64_t element, int rows,
                       int columns) {
  const From* from = static_cast<const From*>(data) + at;
  for (int i = 0; i < rows; ++i, to += ld, from += token) {
    if (element == 1) {
      for (int j = 0; j < columns; ++j) to[j] = static_cast<T>(from[j]);
    } else {
      for (int j = 0; j < columns; ++j) to[j] = static_cast<T>(from[j * element]);
    }
    for (int j = columns; j < ld; ++j) to[j] = 0;
  }
}

template <class T>
S0_INLINE void read_bfloat16(T* to, int ld, const void* data, int64_t at, int64_t token, int64_t element, int rows,
                             int columns) {
  const uint16_t* from = static_cast<const uint16_t*>(data) + at;
  for (int i = 0; i < rows; ++i, to += ld, from += token) {
    if (element == 1) {
      for (int j = 0; j < columns; ++j) to[j] = from_bfloat16(from[j]);
    } else {
      for (int j = 0; j < columns; ++j) to[j] = from_bfloat16(from[j * element]);
    }
    for (int j = columns; j < ld; ++j) to[j] = 0;
  }
}

// Rows of one head from element `at` on, zeros behind the columns.
template <class T>
void read(T* to, int ld, const Rows& x, int64_t at, int rows, int columns) {
  switch (x.kind) {
    case Kind::kFloat: return read_as<T, float>(to, ld, x.data, at, x.token, x.element, rows, columns);
    case Kind::kDouble: return read_as<T, double>(to, ld, x.data, at, x.token, x.element, rows, columns);
    case Kind::kHalf: return read_as<T, _Float16>(to, ld, x.data, at, x.token, x.element, rows, columns);
    case Kind::kBFloat16: return read_bfloat16<T>(to, ld, x.data, at, x.token, x.element, rows, columns);
  }
}

// The reverse, to contiguous rows `token` elements apart.
template <class T>
void write(void* data, Kind kind, int64_t at, int64_t token, const T* from, int ld, int rows, int columns) {
  for (int i = 0; i < rows; ++i, from += ld, at += token) {
    switch (kind) {
      case Kind::kFloat:
        for (int j = 0; j < columns; ++j) static_cast<float*>(data)[at + j] = static_cast<float>(from[j]);
        break;
      case Kind::kDouble:
        for (int j = 0; j < columns; ++j) static_cast<double*>(data)[at + j] = from[j];
        break;
      case Kind::kHalf:
        for (int j = 0; j < columns; ++j) static_cast<_Float16*>(data)[at + j] = static_cast<_Float16>(from[j]);
        break;
      case Kind::kBFloat16:
        for (int j = 0; j < columns; ++j)
          static_cast<uint16_t*>(data)[at + j] = to_bfloat16(static_cast<float>(from[j]));
        break;
    }
  }
}

// to[j][i] = from[i][j]; `to` has rows of ld_to, zeros behind the rows of `from`.
template <class T>
void transpose(T* to, int ld_to, const T* from, int ld, int rows, int columns) {
  constexpr int tile = 16;
  for (int i = 0; i < rows; i += tile) {
    const int end = rows - i < tile ? rows : i + tile;
    for (int j = 0; j < columns; ++j)
      for (int r = i; r < end; ++r) to[static_cast<int64_t>(j) * ld_to + r] = from[static_cast<int64_t>(r) * ld + j];
  }
  for (int j = 0; j < columns && rows < ld_to; ++j)
    for (int r = rows; r < ld_to; ++r) to[static_cast<int64_t>(j) * ld_to + r] = 0;
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
