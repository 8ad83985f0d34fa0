// One token for every row. The states are updated in place, in one pass that is limited by memory bandwidth.
#pragma once

#include "cpu/tiles.h"

namespace s0::S0_ISA {

// Calls each(offset, lanes as a vector) for n elements at any alignment. The last elements go through a copy.
template <class T, class Each>
S0_CALL void over(int n, Each&& each) {
  int j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>) each(j, kLanes<T>);
  if (j < n) each(j, n - j);
}

template <class T>
S0_CALL Vec<T> load_some(const T* p, int lanes) {
  if (lanes == kLanes<T>) return load_loose(p);
  Vec<T> x{};
  for (int i = 0; i < lanes; ++i) x[i] = p[i];
  return x;
}

template <class T>
S0_CALL void store_some(T* p, Vec<T> x, int lanes) {
  if (lanes == kLanes<T>) {
    store_loose(p, x);
    return;
  }
  for (int i = 0; i < lanes; ++i) p[i] = x[i];
}

template <class T>
class Stepper {
 public:
  Stepper(const Scan& s, void* memory) : s_(s), arena_{static_cast<char*>(memory)} {
    const int longest = padded<T>(static_cast<int>(s.key > s.value ? s.key : s.value));
    q_ = arena_.take(longest);
    k_ = arena_.take(longest);
    v_ = arena_.take(longest);
    output_ = arena_.take(longest);
  }

  int64_t bytes() const { return arena_.used; }

  void run(const Step& step, int64_t unit) {
    const int64_t row = unit / s_.heads, head = unit % s_.heads, group = head / (s_.heads / s_.groups);
    const int K = static_cast<int>(s_.key), V = static_cast<int>(s_.value);
    read(q_, padded<T>(K), s_.q, row * s_.q.batch + group * s_.q.head, 1, K);
    read(k_, padded<T>(K), s_.k, row * s_.k.batch + group * s_.k.head, 1, K);
    read(v_, padded<T>(V), s_.v, row * s_.v.batch + head * s_.v.head, 1, V);
    if (s_.normalise) {
      normalise(q_, padded<T>(K));
      normalise(k_, padded<T>(K));
    }
    const T decay = exponential(static_cast<const T*>(s_.decay)[unit]), weight = static_cast<const T*>(s_.weight)[unit];
    const int64_t which = s_.indices == nullptr ? row : s_.indices[row];
    if (which == -1 || step.state.data == nullptr) {  // zero, or of size zero
      const T factor = static_cast<T>(s_.scale) * weight * dot(q_, k_, padded<T>(K));
      for (int j = 0; j < V; ++j) output_[j] = factor * v_[j];
    } else {
      T* state = static_cast<T*>(step.state.data) + which * step.state.sequence + head * step.state.head;
      s_.delta ? delta(state, K, V, decay, weight) : ssd(state, K, V, decay, weight);
    }
    if (s_.skip != nullptr)
      for (int j = 0; j < V; ++j) output_[j] += static_cast<const T*>(s_.skip)[head] * v_[j];
    write(step.output, step.kind, unit * V, V, output_, padded<T>(V), 1, V);
  }

 private:
  // S [K, V]: S' = e S; S = S' + beta k (v - S'^T k)^T; o = scale S^T q
  void delta(T* state, int K, int V, T decay, T beta) {
    over<T>(V, [&](int j, int lanes) {
      Vec<T> seen[2]{};
      for (int i = 0; i < K; ++i) seen[i % 2] += k_[i] * load_some(state + i * V + j, lanes);
      const Vec<T> written = beta * (load(v_ + j) - decay * (seen[0] + seen[1]));
      Vec<T> sums[2]{};
      for (int i = 0; i < K; ++i) {
        const Vec<T> x = decay * load_some(state + i * V + j, lanes) + k_[i] * written;
        store_some(state + i * V + j, x, lanes);
        sums[i % 2] += q_[i] * x;
      }
      store(output_ + j, static_cast<T>(s_.scale) * (sums[0] + sums[1]));
    });
  }

  // S [V, K], that is [P, N]: S = e S + dt x B^T; y = S C
  void ssd(T* state, int K, int V, T decay, T dt) {
    for (int p = 0; p < V; ++p, state += K) {
      const T written = dt * v_[p];
      Vec<T> total{};
      over<T>(K, [&](int j, int lanes) {
        const Vec<T> x = decay * load_some(state + j, lanes) + written * load(k_ + j);
        store_some(state + j, x, lanes);
        total += load(q_ + j) * x;
      });
      output_[p] = sum<T>(total);
    }
  }

  const Scan& s_;
  Arena<T> arena_;
  T *q_, *k_, *v_, *output_;
};

int64_t step_bytes(const Scan& s, bool fp64) {
  return fp64 ? Stepper<double>(s, nullptr).bytes() : Stepper<float>(s, nullptr).bytes();
}

void step(const Scan& s, const Step& step, bool fp64, int64_t unit, void* memory) {
  fp64 ? Stepper<double>(s, memory).run(step, unit) : Stepper<float>(s, memory).run(step, unit);
}

}  // namespace s0::S0_ISA
