// A block of a GPU, run thread by thread on the host, to test the kernels without a GPU.
// Phases wait for the next `sync`. Then each warp in turn runs all of them. If the kernel lacks a `sync`, a phase that
// reads a value of another warp finds the old value (NaN in tests).
#pragma once

#include <functional>
#include <vector>

#include "cpu/block.h"

namespace s0::S0_ISA {

class EmulatedBlock : public HostBlock<EmulatedBlock> {
 public:
  static constexpr int kLanes = 32, kVectorSize = 4, kRows = 16, kMost = kLanes * kMaxWarps;

  template <class T>
  struct Local {
    T values[kMost];
    T& operator[](int t) { return values[t]; }
  };

  EmulatedBlock(int warps, bool backwards) : warps_(warps), backwards_(backwards) {}

  int threads() const { return warps_ * kLanes; }

  template <class Each>
  void each(Each f) {
    phases_.push_back([f](int first) {
      for (int t = first; t < first + kLanes; ++t) f(t);
    });
  }

  void sync() {
    for (int i = 0; i < warps_; ++i)
      for (const auto& phase : phases_) phase((backwards_ ? warps_ - 1 - i : i) * kLanes);
    phases_.clear();
  }

  void finish() { sync(); }

  template <class T>
  void add_lanes(Local<T>& x, int from, int to) {
    phases_.push_back([&x, from, to](int first) {
      constexpr int kFloats = sizeof(T) / sizeof(float);
      float* values = reinterpret_cast<float*>(x.values + first);
      for (int bit = from; bit < to; bit *= 2) {
        float before[kLanes * kFloats];
        for (int i = 0; i < kLanes * kFloats; ++i) before[i] = values[i];
        for (int i = 0; i < kLanes * kFloats; ++i)
          values[i] += before[(i / kFloats ^ bit) * kFloats + i % kFloats];
      }
    });
  }

 private:
  int warps_;
  bool backwards_;
  std::vector<std::function<void(int)>> phases_;
};

}  // namespace s0::S0_ISA
