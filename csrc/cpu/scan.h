// The arguments of the scans, in terms that both recurrences share, and the entry points of each instruction set.
//
// Mamba-2 SSD is the gated delta rule without the delta: q = C, k = B, v = dt x, and a state read as [N, P] through its
// strides. K and V below are N and P there.
#pragma once

#include <cstdint>

#include "kind.h"
#include "token/arguments.h"

namespace s0 {

// [B, T, heads, columns] with any strides, in elements.
struct Rows {
  const void* data;
  Kind kind;
  int64_t batch, token, head, element;
};

// [sequence, head, K, V] with any strides, in elements of the arithmetic's type. If the stride `sequence` is 0, all
// share one state.
struct States {
  void* data;
  int64_t sequence, head, key, value;
};

struct Scan {
  bool delta;  // the gated delta rule; otherwise SSD
  bool normalise;
  int64_t sequences, tokens, heads, groups, head_block;  // `head_block` heads of a group are computed at a time
  int64_t key, value, chunk;
  double scale;
  const int64_t* boundaries;  // [sequences + 1] if packed; otherwise a sequence is a row of `tokens`
  Rows q, k, v;
  // in the arithmetic's type, contiguous [B, T, heads]: log decay; beta, or dt; and [heads]: D of SSD, or null
  const void *decay, *weight, *skip;
  States initial;          // data null: zero
  const int64_t* indices;  // into a bank of `bank` states, or null
  int64_t bank;
};

struct Forward {
  void* output;  // [B, T, heads, V] contiguous
  Kind kind;
  States final;  // data null: not wanted
};

struct Backward {
  Rows doutput;    // data null: zero
  States dfinal;   // data null: zero
  States dinitial; // data null: not wanted
  // null: not wanted. Contiguous, in the arithmetic's type: [B, T, groups, parts, K] twice, [B, T, heads, V], and [B,
  // T, heads] twice
  void *dq, *dk, *dv, *ddecay, *dweight;
};

// One token for every row. The states are contiguous and updated in place.
struct Step {
  States state;
  void* output;  // [B, heads, V] contiguous
  Kind kind;
};

// The number of floats of a state that a mixer's step processes at a time: several vectors of any instruction set.
constexpr int kTokenVectorSize = 32;

int64_t units(const Scan& scan);

// Scratch memory of a thread, at least `bytes`, aligned to 64; filled with NaN if S0KERNELS_POISON is set.
void* scratch(int64_t bytes);

#define S0_ENTRIES                                                              \
  int64_t forward_bytes(const Scan&, bool fp64);                                \
  int64_t backward_bytes(const Scan&, const Backward&, bool fp64);              \
  void forward(const Scan&, const Forward&, bool fp64, int64_t unit, void*);    \
  void backward(const Scan&, const Backward&, bool fp64, int64_t unit, void*);  \
  int64_t step_bytes(const Scan&, bool fp64);                                   \
  void step(const Scan&, const Step&, bool fp64, int64_t unit, void*);           \
  void delta_token(const Delta&, int64_t index, void*);                         \
  void ssd_token(const Ssd&, int64_t index, void*);

namespace avx512 { S0_ENTRIES }
namespace avx2 { S0_ENTRIES }
namespace portable { S0_ENTRIES }

}  // namespace s0
