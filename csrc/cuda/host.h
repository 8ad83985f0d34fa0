// Blocks on the host: one fat thread for speed, or every thread of a GPU's block for tests.
#pragma once

#include "cuda/block.h"

namespace s0::S0_ISA {

template <class Block>
struct HostBlock {
  static bool arrive(unsigned* ticket, int members) {
    const bool last = __atomic_add_fetch(ticket, 1, __ATOMIC_ACQ_REL) == static_cast<unsigned>(members);
    if (last) __atomic_store_n(ticket, 0, __ATOMIC_RELAXED);
    return last;
  }

  template <class T>
  static T fresh(const T* p) {
    return *p;
  }

  S0_CALL static Wide<Block> load(const float* p) {
    Wide<Block> x;
    for (int c = 0; c < Block::kWide; ++c) x.v[c] = p[c];
    return x;
  }

  S0_CALL static void store(float* p, const Wide<Block>& x) {
    for (int c = 0; c < Block::kWide; ++c) p[c] = x.v[c];
  }
};

// A single thread that takes 32 columns of a state at a time, and all rows.
struct WholeBlock : HostBlock<WholeBlock> {
  static constexpr int kLanes = 1, kWide = 32, kRows = kLargest;

  template <class T>
  struct Local {
    T value;
    S0_CALL T& operator[](int) { return value; }
  };

  int threads() const { return 1; }
  template <class Each>
  S0_CALL void each(const Each& f) {
    f(0);
  }
  void sync() {}
  void finish() {}
  template <class T>
  void add_lanes(Local<T>&, int, int) {}
};

}  // namespace s0::S0_ISA
