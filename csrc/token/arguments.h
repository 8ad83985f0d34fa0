// What the kernels of one token are told: plain data, which goes to a GPU by value and to the same code on the host.
#pragma once

#include <cstdint>

#include "kind.h"

namespace s0 {

constexpr int kMaxHeadSize = 256;   // K, V, P and N
constexpr int kMaxWindow = 8;       // width of the convolution
constexpr int kMaxWarps = 8;        // of a block
constexpr int kSharedBytes = 8192;  // at least what a block shares

// [rows, heads, columns] of any strides, in elements. What has fewer dimensions leaves strides 0; data null: not given.
struct Values {
  const void* data;
  Kind kind;
  int64_t row, head, column;
};

// States [rows, heads, first, second] of any strides: K x V of the delta rule, P x N of SSD.
struct Pool {
  float* data;
  int64_t rows, row, head, first, second;
};

// The convolution in front of a mixer's recurrence; window null: there is none.
struct Convolution {
  void* window;  // [rows, channels, width]: the last inputs, the newest last; moved on by one
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
  const void* indices;  // [rows] of the pool, int64 where `int64_indices`, else int32; null: each row its own
  bool int64_indices;
  // Arrival counters [rows, groups], zero before and after: they count the blocks of a group, so that the last one does
  // what has to wait for all of them. Null where nothing waits; see `counters`.
  unsigned* arrivals;
  Values z, norm;  // the gate, and the weight of the RMS norm
  float eps;
  void* output;  // [rows, heads, V or P], contiguous
  Kind kind;
  // a head's columns (V) or rows (P) are cut into `tiles` of `tile`, a block for each, of `warps` warps
  int tiles, tile, warps;
  int members;  // blocks of a group
  bool fast;    // the states can be read 16 bytes at a time
};

// q and k of a group, v of a head. With A_log, decay and weight are a and b of the mixer, otherwise log decay and beta.
struct Delta : Token {
  int K, V;
  int down;  // lanes of a warp that share a column of S
  Values q, k, v, decay, weight, A_log, dt_bias;
  bool normalise;
  bool allow_neg_eigval;  // beta is twice the sigmoid of b
  float scale;
};

// x of a head, B and C of a group.
struct Ssd : Token {
  int P, N;
  Values x, B, C, dt, A, D, dt_bias;
  bool logarithm;  // A is given as A_log
  bool softplus;
  float low, high;
  bool gate_first;  // through the norm, rather than on its result
};

inline int64_t blocks(const Token& t) { return t.rows * t.heads * t.tiles; }

// Arrival counters that a call needs: none where every group is one block's, or where no window waits to move on.
inline int64_t counters(const Token& t) {
  return t.members > 1 && t.convolution.window != nullptr ? t.rows * t.groups : 0;
}

// Whether states with `columns` can be read in vectors of `size` floats, 16 bytes at a time.
inline bool aligned(const Pool& s, int columns, int size) {
  return s.second == 1 && columns % size == 0 && s.first % 4 == 0 && s.head % 4 == 0 && s.row % 4 == 0 &&
         reinterpret_cast<uintptr_t>(s.data) % 16 == 0;
}

}  // namespace s0
