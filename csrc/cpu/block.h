// A block on the host: one thread.
#pragma once

#include "cpu/scan.h"
#include "token/block.h"

namespace s0::S0_ISA {

// The common part of blocks on the host.
template <class Block>
struct HostBlock {
  static bool arrive(unsigned* counter, int members) {
    const bool last = __atomic_add_fetch(counter, 1, __ATOMIC_ACQ_REL) == static_cast<unsigned>(members);
    if (last) __atomic_store_n(counter, 0, __ATOMIC_RELAXED);
    return last;
  }

  template <class T>
  static T fresh(const T* p) {
    return *p;
  }

  S0_CALL static StateVector<Block> load(const float* p) {
    StateVector<Block> x;
    for (int c = 0; c < Block::kVectorSize; ++c) x.v[c] = p[c];
    return x;
  }

  S0_CALL static void store(float* p, const StateVector<Block>& x) {
    for (int c = 0; c < Block::kVectorSize; ++c) p[c] = x.v[c];
  }
};

// It processes many columns of a state at a time, and all rows.
struct OneThreadBlock : HostBlock<OneThreadBlock> {
  static constexpr int kLanes = 1, kVectorSize = kTokenVectorSize, kRows = kMaxHeadSize;

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
