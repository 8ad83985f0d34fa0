// The backward of both scans. The formulas are in engine.h.
// The part of dq and dk that flows through states is computed transposed, [K, tokens]: then the states are the left
// matrices and need no transposition. The part within a chunk is summed over the heads before it is multiplied by the
// keys, which the heads share.
#pragma once

#include "cpu/engine.h"

namespace s0::S0_ISA {

inline int64_t longest(const Scan& s) {
  if (s.boundaries == nullptr) return s.tokens;
  int64_t most = 0;
  for (int64_t i = 0; i < s.sequences; ++i)
    most = s.boundaries[i + 1] - s.boundaries[i] > most ? s.boundaries[i + 1] - s.boundaries[i] : most;
  return most;
}

template <class T>
class BackwardEngine : Engine<T> {
  using Base = Engine<T>;
  using Base::s_, Base::C_, Base::K_, Base::V_, Base::Cp_, Base::Kp_, Base::Vp_, Base::Cl_, Base::Kl_, Base::Vl_;
  using Base::arena_, Base::keys_matter_, Base::qk_, Base::k_transposed_, Base::norms_, Base::from_start_;
  using Base::to_end_, Base::weight_, Base::factors_, Base::attention_, Base::similarity_, Base::system_;
  using Base::writes_, Base::output_, Base::decay_;

 public:
  BackwardEngine(const Scan& s, const Backward& b, void* memory)
      : Base(s, memory), b_(b), inputs_wanted_(b.ddecay != nullptr) {  // if K = 0 the other gradients have no memory
    keys_matter_ = s.delta || inputs_wanted_ || b.dv != nullptr;
    dstates_ = arena_.take(s.head_block * K_ * Vl_);
    dout_dwrites_ = arena_.take(2 * C_ * Vl_);
    if (!inputs_wanted_) return;
    const int64_t chunks = (longest(s) + C_ - 1) / C_ * s.head_block;
    chunk_states_ = arena_.take(chunks * K_ * Vl_);
    chunk_writes_ = arena_.take((s.delta ? chunks : 1) * C_ * Vl_);
    residuals_ = arena_.take(s.delta ? chunks * C_ * Vl_ : 0);
    q_transposed_ = arena_.take(K_ * Cl_);
    rows_transposed_ = arena_.take(V_ * Cl_);
    writes_transposed_ = arena_.take(V_ * Cl_);
    decay_ = arena_.take(C_ * Cl_);
    dqueries_keys_ = arena_.take(C_ * Cl_);
    dkeys_keys_ = arena_.take(s.delta ? C_ * Cl_ : 0);
    dattention_ = arena_.take(C_ * Cl_);
    dsimilarity_ = arena_.take(s.delta ? C_ * Cl_ : 0);
    through_ = arena_.take(K_ * Cl_);
    dq_transposed_ = arena_.take(K_ * Cl_);
    dk_transposed_ = arena_.take(K_ * Cl_);
    dqk_ = arena_.take(C_ * Kl_);
    columns_ = arena_.take(Cp_);
    starts_ = arena_.take(Cp_);
    ends_ = arena_.take(Cp_);
    ddecay_ = arena_.take(C_);
    dweight_ = arena_.take(C_);
  }

  int64_t bytes() const { return arena_.used; }

  void run(int64_t index) {
    const Unit u(s_, index);
    for (int64_t r = 0; r < u.count; ++r) this->read_state(dstate(r), b_.dfinal, u, u.first + r, false);
    if (inputs_wanted_) recompute(u);
    const int64_t last = u.length == 0 ? -C_ : (u.length - 1) / C_ * C_;
    for (int64_t t = last; t >= 0; t -= C_) {
      const int n = this->tokens(u, t);
      this->load_keys(u, t, n, true);
      if (inputs_wanted_) begin_keys(n);
      for (int64_t r = 0; r < u.count; ++r) chunk(u, t, n, r);
      if (inputs_wanted_) write_keys(u, t, n);
    }
    if (b_.dinitial.data == nullptr) return;
    for (int64_t r = 0; r < u.count; ++r) this->write_state(dstate(r), b_.dinitial, u, u.first + r);
  }

 private:
  static constexpr Kind kKind = sizeof(T) == 8 ? Kind::kDouble : Kind::kFloat;

  T* dstate(int64_t r) { return dstates_ + r * K_ * Vl_; }
  int64_t chunk_index(int64_t t, int64_t r) const { return t / C_ * s_.head_block + r; }

  // Computes the states at the start of every chunk; for the delta rule also the writes U and the residual V - diag(G)
  // K S.
  void recompute(const Unit& u) {
    for (int64_t r = 0; r < u.count; ++r)
      this->read_state(chunk_states_ + r * K_ * Vl_, s_.initial, u, u.first + r, true);
    for (int64_t t = 0; s_.delta ? t < u.length : t + C_ < u.length; t += C_) {
      const int n = this->tokens(u, t);
      this->load_keys(u, t, n, false);
      for (int64_t r = 0; r < u.count; ++r) {
        T* before = chunk_states_ + chunk_index(t, r) * K_ * Vl_;
        this->load_gates(u, t, n, u.first + r);
        T* values = s_.delta ? residuals_ + chunk_index(t, r) * C_ * Vl_ : writes_;
        read(values, Vl_, s_.v, u.at(s_.v, t, u.first + r), n, V_);
        if (s_.delta) {
          this->intra_chunk(n, false);
          for (int i = 0; i < n; ++i) factors_[i] = -from_start_[i];
          multiply(Shape::kFull, n, Vp_, K_, {this->k_row(0, n), Kl_, 1}, before, Vl_, add(values, Vl_, {factors_, 1}));
        }
        weigh(writes_, values, n);
        if (s_.delta) {
          this->solve(n, writes_);
          T* writes = chunk_writes_ + chunk_index(t, r) * C_ * Vl_;
          for (int i = 0; i < n * Vl_; i += kLanes<T>) store(writes + i, load(writes_ + i));
        }
        if (t + n < u.length) this->advance(n, before, before + s_.head_block * K_ * Vl_);
      }
    }
  }

  void weigh(T* to, const T* values, int n) {
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < Vp_; j += kLanes<T>) store(to + i * Vl_ + j, weight_[i] * load(values + i * Vl_ + j));
  }

  void begin_keys(int n) {
    transpose_padded(q_transposed_, Cl_, qk_, Kl_, n, K_);
    fill(dq_transposed_, T(0), K_ * Cl_);
    fill(dk_transposed_, T(0), K_ * Cl_);
    fill(dqueries_keys_, T(0), C_ * Cl_);
    if (s_.delta) fill(dkeys_keys_, T(0), C_ * Cl_);
  }

  // The first n rows of dout_dwrites_ hold dO. The next n rows hold R, the gradient of the right side of the system for
  // U.
  void chunk(const Unit& u, int64_t t, int n, int64_t r) {
    const int64_t head = u.first + r;
    T *dout = dout_dwrites_, *dwrites = dout_dwrites_ + n * Vl_;
    this->load_gates(u, t, n, head);
    if (keys_matter_) this->intra_chunk(n, true);
    if (b_.doutput.data == nullptr)
      fill(dout, T(0), n * Vl_);
    else
      read(dout, Vl_, b_.doutput, u.at(b_.doutput, t, head), n, V_);
    if (keys_matter_) {
      multiply(Shape::kUpper, n, Vp_, n, {attention_, 1, Cl_}, dout, Vl_, set(dwrites, Vl_));
      multiply(Shape::kFull, n, Vp_, K_, {this->k_row(0, n), Kl_, 1}, dstate(r), Vl_,
               add(dwrites, Vl_, {to_end_, 1}));
      if (s_.delta) this->solve_transposed(n, dwrites);
    }
    if (b_.dv != nullptr) write_values(u, t, n, head);
    if (inputs_wanted_) intra_chunk_backward(u, t, n, r);
    const T scale = static_cast<T>(s_.scale);
    for (int i = 0; i < n; ++i) {
      scale_row(dout + i * Vl_, scale * from_start_[i], Vp_);
      if (s_.delta) scale_row(dwrites + i * Vl_, -from_start_[i] * weight_[i], Vp_);
    }
    if (inputs_wanted_) states_backward(u, t, n, r);
    multiply(Shape::kFull, K_, Vp_, s_.delta ? 2 * n : n, {qk_, 1, Kl_}, dout_dwrites_, Vl_,
             add(dstate(r), Vl_, {&kOne<T>, 0}, {from_start_ + n - 1, 0}));
  }

  void write_values(const Unit& u, int64_t t, int n, int64_t head) {
    const T *dout = dout_dwrites_, *dwrites = dout_dwrites_ + n * Vl_;
    const T skip = s_.skip == nullptr ? T(0) : static_cast<const T*>(s_.skip)[head];
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < Vp_; j += kLanes<T>) {
        Vec<T> x = weight_[i] * load(dwrites + i * Vl_ + j);
        if (skip != 0) x += skip * load(dout + i * Vl_ + j);
        store(output_ + i * Vl_ + j, x);
      }
    write(b_.dv, kKind, (u.row(s_, t) * s_.heads + head) * V_, s_.heads * V_, output_, Vl_, n, V_);
  }

  // Adds to the gradients of Q K^T and K K^T, and starts those of decay and weight.
  void intra_chunk_backward(const Unit& u, int64_t t, int n, int64_t r) {
    const T *dout = dout_dwrites_, *dwrites = dout_dwrites_ + n * Vl_;
    T* writes = s_.delta ? chunk_writes_ + chunk_index(t, r) * C_ * Vl_ : chunk_writes_;
    T* values = s_.delta ? residuals_ + chunk_index(t, r) * C_ * Vl_ : output_;  // the factor of the weight
    if (!s_.delta) {
      read(values, Vl_, s_.v, u.at(s_.v, t, u.first + r), n, V_);
      weigh(writes, values, n);
    }
    for (int i = 0; i < n; ++i) dweight_[i] = dot(dwrites + i * Vl_, values + i * Vl_, Vp_);
    transpose_padded(writes_transposed_, Cl_, writes, Vl_, n, V_);
    this->lower_product(dattention_, n, V_, dout, Vl_, writes_transposed_);
    if (s_.delta) this->lower_product(dsimilarity_, n, V_, dwrites, Vl_, writes_transposed_);
    products_backward(n);
  }

  // Turns d(P) and d(L) of every pair of tokens into d(Q K^T) and d(K K^T), and adds the gradients of the decays in the
  // chunk.
  void products_backward(int n) {
    const T scale = static_cast<T>(s_.scale);
    fill(columns_, T(0), Cp_);
    for (int i = n - 1; i >= 0; --i) {
      const int end = padded<T>(i + 1), at = i * Cl_;
      T *datt = dattention_ + at, *dsim = dsimilarity_ + at;
      if (s_.delta) dsim[i] = 0;
      Vec<T> through_similarity{};
      for (int j = 0; j < end; j += kLanes<T>) {
        const Vec<T> d = load(decay_ + at + j), da = load(datt + j);
        Vec<T> moved = da * load(attention_ + at + j);
        store(dqueries_keys_ + at + j, load(dqueries_keys_ + at + j) + scale * d * da);
        if (s_.delta) {
          const Vec<T> ds = -load(dsim + j);
          moved += ds * load(system_ + at + j);
          through_similarity += ds * load(similarity_ + at + j);
          store(dkeys_keys_ + at + j, load(dkeys_keys_ + at + j) + weight_[i] * d * ds);
        }
        store(columns_ + j, load(columns_ + j) + moved);
      }
      if (s_.delta) dweight_[i] += sum<T>(through_similarity);
      double across = 0;  // pairs of a token at or after i with one before it
      for (int j = 0; j < i; ++j) across += columns_[j];
      ddecay_[i] = static_cast<T>(across);
    }
  }

  // Adds the gradients of q, k and the decays through the states at the chunk's start and end; writes d(decay) and
  // d(weight).
  void states_backward(const Unit& u, int64_t t, int n, int64_t r) {
    const T *before = chunk_states_ + chunk_index(t, r) * K_ * Vl_, *after = dstate(r);
    fill(starts_, T(0), Cp_);
    fill(ends_, T(0), Cp_);
    transpose_padded(rows_transposed_, Cl_, dout_dwrites_, Vl_, n, V_);
    through_state(before, rows_transposed_, dq_transposed_, q_transposed_, starts_);
    if (s_.delta) {
      transpose_padded(rows_transposed_, Cl_, dout_dwrites_ + n * Vl_, Vl_, n, V_);
      through_state(before, rows_transposed_, dk_transposed_, k_transposed_, starts_);
    }
    for (int i = 0; i < V_; ++i)
      for (int j = 0; j < Cp_; j += kLanes<T>) {
        T* x = writes_transposed_ + i * Cl_ + j;
        store(x, load(x) * load(to_end_ + j));
      }
    through_state(after, writes_transposed_, dk_transposed_, k_transposed_, ends_);

    T carried = 0;
    for (int i = 0; i < K_; ++i) carried += dot(before + i * Vl_, after + i * Vl_, Vp_);
    carried *= from_start_[n - 1];
    double later = 0, earlier = 0;  // sums over tokens from i on (through the start), and before i (through the end)
    for (int i = n - 1; i >= 0; --i) ddecay_[i] += static_cast<T>((later += starts_[i]) + carried);
    T* ddecay = static_cast<T*>(b_.ddecay) + u.row(s_, t) * s_.heads + u.first + r;
    T* dweight = static_cast<T*>(b_.dweight) + u.row(s_, t) * s_.heads + u.first + r;
    for (int i = 0; i < n; ++i) {
      ddecay[i * s_.heads] = ddecay_[i] + static_cast<T>(earlier);
      dweight[i * s_.heads] = dweight_[i];
      earlier += ends_[i];
    }
  }

  // to += X, where X = S rows^T; totals += sums over K of X * of, the gradient of each token's decay.
  void through_state(const T* state, const T* rows, T* to, const T* of, T* totals) {
    multiply(Shape::kFull, K_, Cp_, V_, {state, Vl_, 1}, rows, Cl_, set(through_, Cl_));
    for (int j = 0; j < Cp_; j += kLanes<T>) {
      Vec<T> sums[2]{};
      for (int i = 0; i < K_; ++i) {
        const Vec<T> x = load(through_ + i * Cl_ + j);
        store(to + i * Cl_ + j, load(to + i * Cl_ + j) + x);
        sums[i % 2] += x * load(of + i * Cl_ + j);
      }
      store(totals + j, load(totals + j) + (sums[0] + sums[1]));
    }
  }

  // Propagates dq and dk of the block of heads through the normalisation.
  void write_keys(const Unit& u, int64_t t, int n) {
    const Left<T> down{dqueries_keys_, Cl_, 1}, up{dqueries_keys_, 1, Cl_};
    transpose_padded(dqk_, Kl_, dq_transposed_, Cl_, K_, n);
    multiply(Shape::kLower, n, Kp_, n, down, this->k_row(0, n), Kl_, add(dqk_, Kl_));
    write_key(b_.dq, u, t, n, qk_, norms_);
    transpose_padded(dqk_, Kl_, dk_transposed_, Cl_, K_, n);
    multiply(Shape::kUpper, n, Kp_, n, up, qk_, Kl_, add(dqk_, Kl_));
    if (s_.delta) {
      multiply(Shape::kLower, n, Kp_, n, {dkeys_keys_, Cl_, 1}, this->k_row(0, n), Kl_, add(dqk_, Kl_));
      multiply(Shape::kUpper, n, Kp_, n, {dkeys_keys_, 1, Cl_}, this->k_row(0, n), Kl_, add(dqk_, Kl_));
    }
    write_key(b_.dk, u, t, n, this->k_row(0, n), norms_ + n);
  }

  void write_key(void* to, const Unit& u, int64_t t, int n, const T* x, const T* norms) {
    for (int i = 0; i < n && s_.normalise; ++i) {
      add_row(dqk_ + i * Kl_, x + i * Kl_, -dot(dqk_ + i * Kl_, x + i * Kl_, Kp_), Kp_);
      scale_row(dqk_ + i * Kl_, norms[i], Kp_);
    }
    const int64_t token = s_.groups * u.parts * K_;
    write(to, kKind, u.row(s_, t) * token + (u.group * u.parts + u.part) * K_, token, dqk_, Kl_, n, K_);
  }

  const Backward& b_;
  const bool inputs_wanted_;  // the gradients of q, k, decay and weight are wanted
  T *dstates_, *dout_dwrites_, *chunk_states_, *chunk_writes_, *residuals_;
  T *q_transposed_, *rows_transposed_, *writes_transposed_;
  T *dqueries_keys_, *dkeys_keys_, *dattention_, *dsimilarity_, *through_, *dq_transposed_, *dk_transposed_, *dqk_;
  T *columns_, *starts_, *ends_, *ddecay_, *dweight_;
};

int64_t backward_bytes(const Scan& s, const Backward& b, bool fp64) {
  return fp64 ? BackwardEngine<double>(s, b, nullptr).bytes() : BackwardEngine<float>(s, b, nullptr).bytes();
}

void backward(const Scan& s, const Backward& b, bool fp64, int64_t unit, void* memory) {
  fp64 ? BackwardEngine<double>(s, b, memory).run(unit) : BackwardEngine<float>(s, b, memory).run(unit);
}

}  // namespace s0::S0_ISA
