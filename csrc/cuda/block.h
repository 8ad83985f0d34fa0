// A block of a GPU's threads.
#pragma once

#include "token/block.h"

namespace s0::S0_ISA {

struct GpuBlock {
  static constexpr int kLanes = 32;      // threads of a warp
  static constexpr int kVectorSize = 4;  // adjacent floats of a state that a thread loads at a time: 16 bytes
  static constexpr int kRows = 16;       // rows of the delta rule's state that a thread keeps in registers

  template <class T>
  struct Local {
    T value;
    S0_CALL T& operator[](int) { return value; }
  };

  S0_CALL int threads() const { return static_cast<int>(blockDim.x); }

  template <class Each>
  S0_CALL void each(const Each& f) {
    f(static_cast<int>(threadIdx.x));
  }

  S0_CALL void sync() { __syncthreads(); }
  S0_CALL void finish() {}

  // Sums over the lanes whose indices differ in the bits from `from` up to, but not including, `to`. All of them get
  // the sum.
  template <class T>
  S0_CALL void add_lanes(Local<T>& x, int from, int to) {
    for (int bit = from; bit < to; bit *= 2) {
      S0_UNROLL
      for (int c = 0; c < static_cast<int>(sizeof(T) / sizeof(float)); ++c) {
        float* value = reinterpret_cast<float*>(&x.value) + c;
        *value += __shfl_xor_sync(0xffffffffu, *value, bit);
      }
    }
  }

  // Whether this is the last of `members` blocks to arrive. If so, all earlier reads and writes of the others are done.
  S0_CALL static bool arrive(unsigned* counter, int members) {
    __threadfence();
    const bool last = atomicInc(counter, static_cast<unsigned>(members - 1)) == static_cast<unsigned>(members - 1);
    __threadfence();
    return last;
  }

  // Reads a value that another block wrote, bypassing the first-level cache, which may hold an old value.
  template <class T>
  S0_CALL static T fresh(const T* p) {
    return __ldcg(p);
  }

  S0_CALL static StateVector<GpuBlock> load(const float* p) {
    const float4 x = *reinterpret_cast<const float4*>(p);
    return {{x.x, x.y, x.z, x.w}};
  }

  S0_CALL static void store(float* p, const StateVector<GpuBlock>& x) {
    __stwb(reinterpret_cast<float4*>(p), make_float4(x.v[0], x.v[1], x.v[2], x.v[3]));  // else it would be split
  }
};

}  // namespace s0::S0_ISA
