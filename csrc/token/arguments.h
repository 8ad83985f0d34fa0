// The arguments of the one-token kernels: plain data, which is passed by value to a GPU, and to the same code on the
// host.
#pragma once

#include <cstdint>

#include "kind.h"

namespace s0 {

constexpr int kMaxHeadSize = 256;   // K, V, P and N
constexpr int kMaxWindow = 8;       // width of the convolution
constexpr int kMaxWarps = 8;        // maximum per block
constexpr int kSharedBytes = 8192;  // maximum shared memory of a block

// [rows, heads, columns] with any strides, in elements. A missing dimension has stride 0. data null: not given.
struct Values {
  const void* data;
  Kind kind;
  int64_t row, head, column;
};

// States [rows, heads, first, second] with any strides: K x V for the delta rule, P x N for SSD.
struct Pool {
  float* data;
  int64_t rows, row, head, first, second;
};

// The convolution before a mixer's recurrence. window null: there is none.
struct Convolution {
  void* window;  // [rows, channels, width]: the last inputs, the newest last; the kernel shifts them by one
  Kind kind;
  int64_t row, channel, column;
  int width;
  Values weight, bias;  // [channels, width], [channels]: `head` is the stride of channels
};

struct Token {
  int64_t rows;
  int heads, groups;
  Convolution convolution;
  Pool state;
  const void* indices;  // [rows]: rows of the pool, int64 if `int64_indices`, else int32; null: each row uses its own state
  bool int64_indices;
  // Arrival counters [rows, groups], zero before and after a kernel. They count the finished blocks of a group: the
  // last block does the work that needs all blocks to be done. Null if no work waits; see `counters`.
  unsigned* arrivals;
  Values z, norm;  // the gate, and the weight of the RMS norm
  float eps;
  void* output;  // [rows, heads, V or P], contiguous
  Kind kind;
  // a head's columns (V) or rows (P) are cut into `tiles` tiles of size `tile`, each with one block of `warps` warps
  int tiles, tile, warps;
  int members;  // blocks of a group
  bool fast;    // the states can be read 16 bytes at a time
};

// q and k are those of a group, v is that of a head. With A_log, decay and weight are the mixer's a and b; otherwise
// the log decay and beta.
struct Delta : Token {
  int K, V;
  int down;  // lanes of a warp that share a column of S
  Values q, k, v, decay, weight, A_log, dt_bias;
  bool normalise;
  bool allow_neg_eigval;  // beta is twice the sigmoid of b
  float scale;
};

// x is that of a head, B and C are those of a group.
struct Ssd : Token {
  int P, N;
  Values x, B, C, dt, A, D, dt_bias;
  bool logarithm;  // A is given as A_log
  bool softplus;
  float low, high;
  bool gate_first;  // the gate is applied before the norm, not after it
};

inline int64_t blocks(const Token& t) { return t.rows * t.heads * t.tiles; }

// The number of arrival counters that a call needs: none if every group has a single block, or if no window must be
// shifted.
inline int64_t counters(const Token& t) {
  return t.members > 1 && t.convolution.window != nullptr ? t.rows * t.groups : 0;
}

// Whether states with `columns` columns can be read in vectors of `size` floats, 16 bytes at a time.
inline bool aligned(const Pool& s, int columns, int size) {
  return s.second == 1 && columns % size == 0 && s.first % 4 == 0 && s.head % 4 == 0 && s.row % 4 == 0 &&
         reinterpret_cast<uintptr_t>(s.data) % 16 == 0;
}

}  // namespace s0
