// The forward of both scans. The formulas are in engine.h.
#pragma once

#include "cpu/engine.h"

namespace s0::S0_ISA {

template <class T>
class ForwardEngine : Engine<T> {
  using Base = Engine<T>;
  using Base::s_, Base::C_, Base::K_, Base::V_, Base::Vp_, Base::Cl_, Base::Kl_, Base::Vl_, Base::arena_, Base::qk_;
  using Base::from_start_, Base::weight_, Base::factors_, Base::attention_, Base::writes_, Base::output_;

 public:
  ForwardEngine(const Scan& s, void* memory) : Base(s, memory) { states_ = arena_.take(s.head_block * K_ * Vl_); }

  int64_t bytes() const { return arena_.used; }

  void run(const Forward& f, int64_t index) {
    const Unit u(s_, index);
    for (int64_t r = 0; r < u.count; ++r) this->read_state(state(r), s_.initial, u, u.first + r, true);
    for (int64_t t = 0; t < u.length; t += C_) {
      const int n = this->tokens(u, t);
      this->load_keys(u, t, n, true);
      for (int64_t r = 0; r < u.count; ++r) chunk(f, u, t, n, u.first + r, state(r));
    }
    if (f.final.data == nullptr) return;
    for (int64_t r = 0; r < u.count; ++r) this->write_state(state(r), f.final, u, u.first + r);
  }

 private:
  T* state(int64_t r) { return states_ + r * K_ * Vl_; }

  void chunk(const Forward& f, const Unit& u, int64_t t, int n, int64_t head, T* state) {
    this->load_gates(u, t, n, head);
    this->intra_chunk(n, true);
    read(writes_, Vl_, s_.v, u.at(s_.v, t, head), n, V_);
    const T scale = static_cast<T>(s_.scale);
    for (int i = 0; i < n; ++i) factors_[i] = scale * from_start_[i];
    multiply(Shape::kFull, n, Vp_, K_, {qk_, Kl_, 1}, state, Vl_, set(output_, Vl_, {factors_, 1}));
    if (s_.delta) {
      for (int i = 0; i < n; ++i) factors_[i] = -weight_[i] * from_start_[i];
      multiply(Shape::kFull, n, Vp_, K_, {this->k_row(0, n), Kl_, 1}, state, Vl_,
               add(writes_, Vl_, {factors_, 1}, {weight_, 1}));
      this->solve(n, writes_);
    } else {
      const T skip = s_.skip == nullptr ? T(0) : static_cast<const T*>(s_.skip)[head];
      for (int i = 0; i < n; ++i) {
        if (skip != 0) add_row(output_ + i * Vl_, writes_ + i * Vl_, skip, Vp_);
        scale_row(writes_ + i * Vl_, weight_[i], Vp_);
      }
    }
    multiply(Shape::kLower, n, Vp_, n, {attention_, Cl_, 1}, writes_, Vl_, add(output_, Vl_));
    write(f.output, f.kind, (u.row(s_, t) * s_.heads + head) * V_, s_.heads * V_, output_, Vl_, n, V_);
    this->advance(n, state, state);
  }

  T* states_;
};

int64_t forward_bytes(const Scan& s, bool fp64) {
  return fp64 ? ForwardEngine<double>(s, nullptr).bytes() : ForwardEngine<float>(s, nullptr).bytes();
}

void forward(const Scan& s, const Forward& f, bool fp64, int64_t unit, void* memory) {
  fp64 ? ForwardEngine<double>(s, memory).run(f, unit) : ForwardEngine<float>(s, memory).run(f, unit);
}

}  // namespace s0::S0_ISA
