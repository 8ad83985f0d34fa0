// Forward and backward of both scans, chunk by chunk with the state in cache.
//
// Inside a chunk of n tokens, with e_i = exp(decay_i), G_i = e_1 .. e_i, D_ij = e_{j+1} .. e_i and E_i = e_{i+1} .. e_n:
//   L     = strict_lower(diag(beta) (K K^T * D)),  P = lower(scale Q K^T * D)
//   (I + L) U = diag(beta) (V - diag(G) K S)        what each token writes; of SSD U = diag(dt) V
//   O     = scale diag(G) Q S + P U,  S' = G_n S + K^T diag(E) U
// and backwards, from dO and dS':
//   (I + L)^T R = P^T dO + diag(E) K dS';  of SSD the right side itself
//   dS    = G_n dS' + (scale diag(G) Q)^T dO - (diag(G beta) K)^T R;  of SSD without the last term
// Decays are products of exp(decay), never quotients, so a decay of zero is a clean reset.
#pragma once

#include "cpu/tiles.h"

namespace s0::S0_ISA {

// Which sequence, group of heads and block of them a unit of work is.
struct Unit {
  int64_t sequence, group, first, count, part, parts, batch, start, length;

  Unit(const Scan& s, int64_t unit) {
    const int64_t of_group = s.heads / s.groups;
    parts = (of_group + s.block - 1) / s.block;
    part = unit % parts;
    group = unit / parts % s.groups;
    sequence = unit / parts / s.groups;
    first = group * of_group + part * s.block;
    count = of_group - part * s.block < s.block ? of_group - part * s.block : s.block;
    batch = s.boundaries == nullptr ? sequence : 0;
    start = s.boundaries == nullptr ? 0 : s.boundaries[sequence];
    length = s.boundaries == nullptr ? s.tokens : s.boundaries[sequence + 1] - start;
  }

  int64_t at(const Rows& x, int64_t token, int64_t head) const {
    return batch * x.batch + (start + token) * x.token + head * x.head;
  }
  // of contiguous [B, T, ...]
  int64_t row(const Scan& s, int64_t token) const { return batch * s.tokens + start + token; }
};

template <class T>
class Engine {
 public:
  Engine(const Scan& s, void* memory)
      : s_(s),
        C_(static_cast<int>(s.chunk)),
        K_(static_cast<int>(s.key)),
        V_(static_cast<int>(s.value)),
        Cp_(padded<T>(C_)),
        Kp_(padded<T>(K_)),
        Vp_(padded<T>(V_)),
        arena_{static_cast<char*>(memory)} {
    qk_ = arena_.take(2 * C_ * Kp_);
    k_transposed_ = arena_.take(K_ * Cp_);
    queries_keys_ = arena_.take(C_ * Cp_);
    keys_keys_ = arena_.take(s.delta ? C_ * Cp_ : 0);
    norms_ = arena_.take(2 * C_);
    e_ = arena_.take(C_);
    from_start_ = arena_.take(C_);
    to_end_ = arena_.take(C_);
    weight_ = arena_.take(C_);
    factors_ = arena_.take(2 * C_);
    row_ = arena_.take(Cp_);
    attention_ = arena_.take(C_ * Cp_);
    similarity_ = arena_.take(s.delta ? C_ * Cp_ : 0);
    system_ = arena_.take(s.delta ? C_ * Cp_ : 0);
    writes_ = arena_.take(C_ * Vp_);
    output_ = arena_.take(C_ * Vp_);
  }

  int64_t plan_forward() {
    states_ = arena_.take(s_.block * K_ * Vp_);
    return arena_.used;
  }

  int64_t plan_backward(const Backward& b, int64_t longest) {
    others_ = b.dq != nullptr;
    dstates_ = arena_.take(s_.block * K_ * Vp_);
    pair_ = arena_.take(2 * C_ * Vp_);
    if (!others_) return arena_.used;
    const int64_t chunks = (longest + C_ - 1) / C_;
    history_ = arena_.take(chunks * s_.block * K_ * Vp_);
    deltas_ = arena_.take(chunks * s_.block * C_ * Vp_);
    errors_ = arena_.take(s_.delta ? chunks * s_.block * C_ * Vp_ : 0);
    transposed_ = arena_.take(V_ * Kp_);
    delta_transposed_ = arena_.take(V_ * Cp_);
    decay_ = arena_.take(C_ * Cp_);
    dattention_ = arena_.take(C_ * Cp_);
    dsimilarity_ = arena_.take(C_ * Cp_);
    through_ = arena_.take(2 * C_ * Kp_);
    dq_ = arena_.take(C_ * Kp_);
    dk_ = arena_.take(C_ * Kp_);
    columns_ = arena_.take(Cp_);
    starts_ = arena_.take(C_);
    ends_ = arena_.take(C_);
    ddecay_ = arena_.take(C_);
    dweight_ = arena_.take(C_);
    return arena_.used;
  }

  void forward(const Forward& f, int64_t index) {
    const Unit u(s_, index);
    for (int64_t r = 0; r < u.count; ++r) read_state(state(r), s_.initial, u, u.first + r, true);
    for (int64_t t = 0; t < u.length; t += C_) {
      const int n = tokens(u, t);
      load_keys(u, t, n, true);
      for (int64_t r = 0; r < u.count; ++r) {
        const int64_t head = u.first + r;
        load_gates(u, t, n, head);
        pairs(n, true);
        read(writes_, Vp_, s_.v, u.at(s_.v, t, head), n, V_);
        const T scale = static_cast<T>(s_.scale);
        for (int i = 0; i < n; ++i) factors_[i] = scale * from_start_[i];
        multiply(Shape::kFull, n, Vp_, K_, {qk_, Kp_, 1}, state(r), Vp_, set(output_, Vp_, {factors_, 1}));
        if (s_.delta) {
          for (int i = 0; i < n; ++i) factors_[i] = -weight_[i] * from_start_[i];
          multiply(Shape::kFull, n, Vp_, K_, {k_row(0, n), Kp_, 1}, state(r), Vp_,
                   add(writes_, Vp_, {factors_, 1}, {weight_, 1}));
          solve(n, writes_);
        } else {
          const T skip = s_.skip == nullptr ? T(0) : static_cast<const T*>(s_.skip)[head];
          for (int i = 0; i < n; ++i) {
            if (skip != 0) add_row(output_ + i * Vp_, writes_ + i * Vp_, skip, Vp_);
            scale_row(writes_ + i * Vp_, weight_[i], Vp_);
          }
        }
        multiply(Shape::kLower, n, Vp_, n, {attention_, Cp_, 1}, writes_, Vp_, add(output_, Vp_));
        write(f.output, f.kind, (u.row(s_, t) * s_.heads + head) * V_, s_.heads * V_, output_, Vp_, n, V_);
        advance(n, state(r), state(r));
      }
    }
    if (f.final.data == nullptr) return;
    for (int64_t r = 0; r < u.count; ++r) write_state(state(r), f.final, u, u.first + r);
  }

  void backward(const Backward& b, int64_t index) {
    const Unit u(s_, index);
    for (int64_t r = 0; r < u.count; ++r) read_state(dstates_ + r * K_ * Vp_, b.dfinal, u, u.first + r, false);
    residual_ = s_.delta || others_ || b.dv != nullptr;
    if (others_) remember(u);
    const int64_t last = u.length == 0 ? -C_ : (u.length - 1) / C_ * C_;
    for (int64_t t = last; t >= 0; t -= C_) {
      const int n = tokens(u, t);
      load_keys(u, t, n, true);
      if (others_) {
        clear(dq_, n * Kp_);
        clear(dk_, n * Kp_);
      }
      for (int64_t r = 0; r < u.count; ++r) head_backward(b, u, t, n, r);
      if (others_) write_keys(b, u, t, n);
    }
    if (b.dinitial.data == nullptr) return;
    for (int64_t r = 0; r < u.count; ++r) write_state(dstates_ + r * K_ * Vp_, b.dinitial, u, u.first + r);
  }

 private:
  T* state(int64_t r) { return states_ + r * K_ * Vp_; }
  int tokens(const Unit& u, int64_t t) const { return static_cast<int>(u.length - t < C_ ? u.length - t : C_); }
  T* q_row(int i) { return qk_ + i * Kp_; }
  T* k_row(int i, int n) { return qk_ + (n + i) * Kp_; }

  static void clear(T* p, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = 0;
  }

  // Of a bank the one that the index names: -1 is zero, any other outside the bank not a number.
  void read_state(T* to, const States& from, const Unit& u, int64_t head, bool initial) {
    int64_t which = u.sequence;
    if (initial && s_.indices != nullptr) which = s_.indices[u.sequence];
    const bool absent = from.data == nullptr || which == -1;
    const bool broken = !absent && initial && s_.indices != nullptr && (which < -1 || which >= s_.bank);
    if (absent || broken) {
      const T value = broken ? static_cast<T>(__builtin_nan("")) : T(0);
      for (int64_t i = 0; i < K_ * Vp_; ++i) to[i] = value;
      return;
    }
    const T* p = static_cast<const T*>(from.data) + which * from.sequence + head * from.head;
    if (from.value == 1) {
      for (int i = 0; i < K_; ++i, to += Vp_) {
        for (int j = 0; j < V_; ++j) to[j] = p[i * from.key + j];
        for (int j = V_; j < Vp_; ++j) to[j] = 0;
      }
      return;
    }
    constexpr int tile = 16;
    for (int i = 0; i < K_; i += tile)
      for (int j = 0; j < Vp_; ++j)
        for (int r = i; r < (K_ < i + tile ? K_ : i + tile); ++r)
          to[r * Vp_ + j] = j < V_ ? p[r * from.key + j * from.value] : T(0);
  }

  void write_state(const T* from, const States& to, const Unit& u, int64_t head) {
    T* p = static_cast<T*>(to.data) + u.sequence * to.sequence + head * to.head;
    constexpr int tile = 16;
    if (to.value == 1) {
      for (int i = 0; i < K_; ++i)
        for (int j = 0; j < V_; ++j) p[i * to.key + j] = from[i * Vp_ + j];
      return;
    }
    for (int i = 0; i < K_; i += tile)
      for (int j = 0; j < V_; ++j)
        for (int r = i; r < (K_ < i + tile ? K_ : i + tile); ++r) p[r * to.key + j * to.value] = from[r * Vp_ + j];
  }

  // Queries over keys in qk_, the keys transposed, and the products that all heads of the group share.
  void load_keys(const Unit& u, int64_t t, int n, bool with_queries) {
    if (with_queries) read(qk_, Kp_, s_.q, u.at(s_.q, t, u.group), n, K_);
    if (!residual_) return;
    read(k_row(0, n), Kp_, s_.k, u.at(s_.k, t, u.group), n, K_);
    if (s_.normalise) {
      for (int i = with_queries ? 0 : n; i < 2 * n; ++i) {
        T* x = qk_ + i * Kp_;
        norms_[i] = normalise(x, Kp_);
      }
    }
    if (with_queries || s_.delta) transpose(k_transposed_, Cp_, k_row(0, n), Kp_, n, K_);
    if (with_queries)
      multiply(Shape::kLowerProduct, n, Cp_, K_, {qk_, Kp_, 1}, k_transposed_, Cp_, set(queries_keys_, Cp_));
    if (s_.delta)
      multiply(Shape::kLowerProduct, n, Cp_, K_, {k_row(0, n), Kp_, 1}, k_transposed_, Cp_, set(keys_keys_, Cp_));
  }

  void load_gates(const Unit& u, int64_t t, int n, int64_t head) {
    const T* decay = static_cast<const T*>(s_.decay) + u.row(s_, t) * s_.heads + head;
    const T* weight = static_cast<const T*>(s_.weight) + u.row(s_, t) * s_.heads + head;
    T product = 1;
    for (int i = 0; i < n; ++i) {
      e_[i] = exponential(decay[i * s_.heads]);
      weight_[i] = weight[i * s_.heads];
      from_start_[i] = product *= e_[i];
    }
    product = 1;
    for (int i = n - 1; i >= 0; --i) {
      to_end_[i] = product;
      product *= e_[i];
    }
  }

  // P, and of the delta rule K K^T * D and L; zeros above the diagonal. `decay_` keeps D where the backward wants it.
  void pairs(int n, bool with_attention) {
    const T scale = static_cast<T>(s_.scale);
    for (int j = 0; j < Cp_; ++j) row_[j] = 0;
    for (int i = 0; i < n; ++i) {
      const int end = padded<T>(i + 1);
      scale_row(row_, e_[i], end);
      row_[i] = 1;
      for (int j = 0; j < end; j += kLanes<T>) {
        const Vec<T> d = load(row_ + j);
        if (with_attention) store(attention_ + i * Cp_ + j, scale * d * load(queries_keys_ + i * Cp_ + j));
        if (others_) store(decay_ + i * Cp_ + j, d);
        if (s_.delta) {
          const Vec<T> similarity = d * load(keys_keys_ + i * Cp_ + j);
          store(similarity_ + i * Cp_ + j, similarity);
          store(system_ + i * Cp_ + j, weight_[i] * similarity);
        }
      }
      for (int j = end; j < Cp_; ++j) {
        if (with_attention) attention_[i * Cp_ + j] = 0;
        if (others_) decay_[i * Cp_ + j] = 0;
        if (s_.delta) similarity_[i * Cp_ + j] = system_[i * Cp_ + j] = 0;
      }
      if (s_.delta) similarity_[i * Cp_ + i] = system_[i * Cp_ + i] = 0;
    }
  }

  // (I + L) X = X in place, by blocks of rows: those above by a product, those inside one after the other.
  void solve(int n, T* x) {
    for (int i = 0; i < n; i += kRows) {
      const int rows = n - i < kRows ? n - i : kRows;
      if (i > 0)
        multiply(Shape::kFull, rows, Vp_, i, {system_ + i * Cp_, Cp_, 1}, x, Vp_,
                 add(x + i * Vp_, Vp_, {&kMinusOne<T>, 0}));
      for (int r = 1; r < rows; ++r)
        for (int c = 0; c < r; ++c) add_row(x + (i + r) * Vp_, x + (i + c) * Vp_, -system_[(i + r) * Cp_ + i + c], Vp_);
    }
  }

  // (I + L)^T X = X in place, from the last block to the first.
  void solve_transposed(int n, T* x) {
    for (int i = (n - 1) / kRows * kRows; i >= 0; i -= kRows) {
      const int rows = n - i < kRows ? n - i : kRows, below = i + rows;
      if (below < n)
        multiply(Shape::kFull, rows, Vp_, n - below, {system_ + below * Cp_ + i, 1, Cp_}, x + below * Vp_, Vp_,
                 add(x + i * Vp_, Vp_, {&kMinusOne<T>, 0}));
      for (int r = rows - 2; r >= 0; --r)
        for (int c = r + 1; c < rows; ++c)
          add_row(x + (i + r) * Vp_, x + (i + c) * Vp_, -system_[(i + c) * Cp_ + i + r], Vp_);
    }
  }

  // S to S'; scales the writes.
  void advance(int n, const T* from, T* to) {
    for (int i = 0; i < n; ++i) scale_row(writes_ + i * Vp_, to_end_[i], Vp_);
    multiply(Shape::kFull, K_, Vp_, n, {k_row(0, n), 1, Kp_}, writes_, Vp_,
             Target<T>{to, Vp_, {&kOne<T>, 0}, {from_start_ + n - 1, 0}, from});
  }

  // The states at the start of every chunk, what is written in it, and of the delta rule V - diag(G) K S.
  void remember(const Unit& u) {
    for (int64_t r = 0; r < u.count; ++r) read_state(history_ + r * K_ * Vp_, s_.initial, u, u.first + r, true);
    for (int64_t t = 0; t < u.length; t += C_) {
      const int n = tokens(u, t);
      load_keys(u, t, n, false);
      for (int64_t r = 0; r < u.count; ++r) {
        const int64_t slot = t / C_ * s_.block + r;
        T* before = history_ + slot * K_ * Vp_;
        load_gates(u, t, n, u.first + r);
        T* values = s_.delta ? errors_ + slot * C_ * Vp_ : writes_;
        read(values, Vp_, s_.v, u.at(s_.v, t, u.first + r), n, V_);
        if (s_.delta) {
          pairs(n, false);
          for (int i = 0; i < n; ++i) factors_[i] = -from_start_[i];
          multiply(Shape::kFull, n, Vp_, K_, {k_row(0, n), Kp_, 1}, before, Vp_, add(values, Vp_, {factors_, 1}));
        }
        for (int i = 0; i < n; ++i)
          for (int j = 0; j < Vp_; j += kLanes<T>)
            store(writes_ + i * Vp_ + j, weight_[i] * load(values + i * Vp_ + j));
        if (s_.delta) solve(n, writes_);
        T* deltas = deltas_ + slot * C_ * Vp_;
        for (int i = 0; i < n * Vp_; i += kLanes<T>) store(deltas + i, load(writes_ + i));
        if (t + n < u.length) advance(n, before, before + s_.block * K_ * Vp_);
      }
    }
  }

  // dO stands in the first n rows of pair_, R in the n after them.
  void head_backward(const Backward& b, const Unit& u, int64_t t, int n, int64_t r) {
    const int64_t head = u.first + r;
    T *dstate = dstates_ + r * K_ * Vp_, *dout = pair_, *residual = pair_ + n * Vp_;
    load_gates(u, t, n, head);
    if (residual_) pairs(n, true);
    if (b.doutput.data == nullptr)
      clear(dout, n * Vp_);
    else
      read(dout, Vp_, b.doutput, u.at(b.doutput, t, head), n, V_);
    if (residual_) {
      multiply(Shape::kUpper, n, Vp_, n, {attention_, 1, Cp_}, dout, Vp_, set(residual, Vp_));
      multiply(Shape::kFull, n, Vp_, K_, {k_row(0, n), Kp_, 1}, dstate, Vp_, add(residual, Vp_, {to_end_, 1}));
      if (s_.delta) solve_transposed(n, residual);
    }
    const T scale = static_cast<T>(s_.scale);
    for (int i = 0; i < n; ++i) {
      factors_[i] = scale * from_start_[i];
      factors_[n + i] = -from_start_[i] * weight_[i];
    }
    if (b.dv != nullptr) write_values(b, u, t, n, head, dout, residual);
    if (others_) inputs_backward(b, u, t, n, r, dout, residual, dstate);
    const int rows = s_.delta ? 2 * n : n;
    for (int i = 0; i < rows; ++i) scale_row(pair_ + i * Vp_, factors_[i], Vp_);
    multiply(Shape::kFull, K_, Vp_, rows, {qk_, 1, Kp_}, pair_, Vp_,
             add(dstate, Vp_, {&kOne<T>, 0}, {from_start_ + n - 1, 0}));
  }

  void write_values(const Backward& b, const Unit& u, int64_t t, int n, int64_t head, const T* dout, const T* residual) {
    const T skip = s_.skip == nullptr ? T(0) : static_cast<const T*>(s_.skip)[head];
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < Vp_; j += kLanes<T>) {
        Vec<T> x = weight_[i] * load(residual + i * Vp_ + j);
        if (skip != 0) x += skip * load(dout + i * Vp_ + j);
        store(output_ + i * Vp_ + j, x);
      }
    const Kind kind = sizeof(T) == 8 ? Kind::kDouble : Kind::kFloat;
    write(b.dv, kind, (u.row(s_, t) * s_.heads + head) * V_, s_.heads * V_, output_, Vp_, n, V_);
  }

  // Adds to dq_ and dk_, and writes d(decay) and d(beta) or d(dt).
  void inputs_backward(const Backward& b, const Unit& u, int64_t t, int n, int64_t r, const T* dout, const T* residual,
                       const T* dstate) {
    const int64_t slot = t / C_ * s_.block + r;
    const T *before = history_ + slot * K_ * Vp_, *deltas = deltas_ + slot * C_ * Vp_;

    // through the state at the chunk's start
    transpose(transposed_, Kp_, before, Vp_, K_, V_);
    multiply(Shape::kFull, s_.delta ? 2 * n : n, Kp_, V_, {dout, Vp_, 1}, transposed_, Kp_,
             set(through_, Kp_, {factors_, 1}));
    for (int i = 0; i < n; ++i) {
      starts_[i] = dot(through_ + i * Kp_, q_row(i), Kp_);
      add_row(dq_ + i * Kp_, through_ + i * Kp_, T(1), Kp_);
      if (!s_.delta) continue;
      starts_[i] += dot(through_ + (n + i) * Kp_, k_row(i, n), Kp_);
      add_row(dk_ + i * Kp_, through_ + (n + i) * Kp_, T(1), Kp_);
    }
    // through the state at its end
    transpose(transposed_, Kp_, dstate, Vp_, K_, V_);
    multiply(Shape::kFull, n, Kp_, V_, {deltas, Vp_, 1}, transposed_, Kp_, set(through_, Kp_, {to_end_, 1}));
    for (int i = 0; i < n; ++i) {
      ends_[i] = dot(through_ + i * Kp_, k_row(i, n), Kp_);
      add_row(dk_ + i * Kp_, through_ + i * Kp_, T(1), Kp_);
    }
    T carried = 0;
    for (int i = 0; i < K_; ++i) carried += dot(before + i * Vp_, dstate + i * Vp_, Vp_);
    carried *= from_start_[n - 1];

    // through the pairs of tokens
    transpose(delta_transposed_, Cp_, deltas, Vp_, n, V_);
    multiply(Shape::kLowerProduct, n, Cp_, V_, {dout, Vp_, 1}, delta_transposed_, Cp_, set(dattention_, Cp_));
    if (s_.delta)
      multiply(Shape::kLowerProduct, n, Cp_, V_, {residual, Vp_, 1}, delta_transposed_, Cp_, set(dsimilarity_, Cp_));
    weigh_pairs(n, b, u, t, r, deltas, residual, slot, carried);
    multiply(Shape::kLower, n, Kp_, n, {dattention_, Cp_, 1}, k_row(0, n), Kp_, add(dq_, Kp_));
    multiply(Shape::kUpper, n, Kp_, n, {dattention_, 1, Cp_}, qk_, Kp_, add(dk_, Kp_));
    if (!s_.delta) return;
    multiply(Shape::kLower, n, Kp_, n, {dsimilarity_, Cp_, 1}, k_row(0, n), Kp_, add(dk_, Kp_));
    multiply(Shape::kUpper, n, Kp_, n, {dsimilarity_, 1, Cp_}, k_row(0, n), Kp_, add(dk_, Kp_));
  }

  // d(P) and d(L) by pair to d(Q K^T) and d(K K^T); on the way the gradients of decay and weight.
  void weigh_pairs(int n, const Backward& b, const Unit& u, int64_t t, int64_t r, const T* deltas, const T* residual,
                   int64_t slot, T carried) {
    const T scale = static_cast<T>(s_.scale);
    for (int j = 0; j < Cp_; ++j) columns_[j] = 0;
    double later = 0;  // what passes through the start of this chunk at or after token i
    for (int i = n - 1; i >= 0; --i) {
      const int end = padded<T>(i + 1);
      T *datt = dattention_ + i * Cp_, *dsim = dsimilarity_ + i * Cp_;
      for (int j = i + 1; j < Cp_; ++j) datt[j] = 0;
      if (s_.delta)
        for (int j = i; j < Cp_; ++j) dsim[j] = 0;
      Vec<T> through_similarity{};
      for (int j = 0; j < end; j += kLanes<T>) {
        const Vec<T> d = load(decay_ + i * Cp_ + j);
        Vec<T> moved = load(datt + j) * load(attention_ + i * Cp_ + j);
        store(datt + j, scale * d * load(datt + j));
        if (s_.delta) {
          const Vec<T> ds = -load(dsim + j);
          moved += ds * load(system_ + i * Cp_ + j);
          through_similarity += ds * load(similarity_ + i * Cp_ + j);
          store(dsim + j, weight_[i] * d * ds);
        }
        store(columns_ + j, load(columns_ + j) + moved);
      }
      double across = 0;  // pairs of a token at or after i with one before it
      for (int j = 0; j < i; ++j) across += columns_[j];
      later += starts_[i];
      ddecay_[i] = static_cast<T>(across + later + carried);
      dweight_[i] = s_.delta ? sum<T>(through_similarity) +
                                   dot(residual + i * Vp_, errors_ + (slot * C_ + i) * Vp_, Vp_)
                             : T(0);
    }
    double earlier = 0;
    for (int i = 0; i < n; ++i) {
      ddecay_[i] += static_cast<T>(earlier);
      earlier += ends_[i];
    }
    T* ddecay = static_cast<T*>(b.ddecay) + u.row(s_, t) * s_.heads + u.first + r;
    T* dweight = static_cast<T*>(b.dweight) + u.row(s_, t) * s_.heads + u.first + r;
    if (!s_.delta) read(output_, Vp_, s_.v, u.at(s_.v, t, u.first + r), n, V_);
    for (int i = 0; i < n; ++i) {
      if (!s_.delta) dweight_[i] = dot(residual + i * Vp_, output_ + i * Vp_, Vp_);
      ddecay[i * s_.heads] = ddecay_[i];
      dweight[i * s_.heads] = dweight_[i];
    }
  }

  // dq and dk of the block of heads, through the normalisation.
  void write_keys(const Backward& b, const Unit& u, int64_t t, int n) {
    const Kind kind = sizeof(T) == 8 ? Kind::kDouble : Kind::kFloat;
    const int64_t token = s_.groups * u.parts * K_;
    const int64_t at = u.row(s_, t) * token + (u.group * u.parts + u.part) * K_;
    for (int i = 0; i < n && s_.normalise; ++i) {
      for (int which = 0; which < 2; ++which) {
        T *dx = (which == 0 ? dq_ : dk_) + i * Kp_, *x = qk_ + (which * n + i) * Kp_;
        add_row(dx, x, -dot(dx, x, Kp_), Kp_);
        scale_row(dx, norms_[which * n + i], Kp_);
      }
    }
    write(b.dq, kind, at, token, dq_, Kp_, n, K_);
    write(b.dk, kind, at, token, dk_, Kp_, n, K_);
  }

  const Scan& s_;
  const int C_, K_, V_, Cp_, Kp_, Vp_;
  Arena<T> arena_;
  bool others_ = false;   // the gradients of q, k, decay and weight are wanted
  bool residual_ = true;  // keys and pairs of tokens matter; not to the gradient of SSD's state
  T *qk_, *k_transposed_, *queries_keys_, *keys_keys_, *norms_;
  T *e_, *from_start_, *to_end_, *weight_, *factors_, *row_;
  T *attention_, *similarity_, *system_, *writes_, *output_, *states_;
  T *dstates_, *pair_, *history_, *deltas_, *errors_, *transposed_, *delta_transposed_, *decay_, *dattention_;
  T *dsimilarity_, *through_, *dq_, *dk_, *columns_, *starts_, *ends_, *ddecay_, *dweight_;
};

inline int64_t longest(const Scan& s) {
  if (s.boundaries == nullptr) return s.tokens;
  int64_t most = 0;
  for (int64_t i = 0; i < s.sequences; ++i)
    most = s.boundaries[i + 1] - s.boundaries[i] > most ? s.boundaries[i + 1] - s.boundaries[i] : most;
  return most;
}

template <class T>
int64_t forward_bytes_of(const Scan& s) {
  return Engine<T>(s, nullptr).plan_forward();
}
template <class T>
int64_t backward_bytes_of(const Scan& s, const Backward& b) {
  return Engine<T>(s, nullptr).plan_backward(b, longest(s));
}
template <class T>
void forward_of(const Scan& s, const Forward& f, int64_t unit, void* memory) {
  Engine<T> engine(s, memory);
  engine.plan_forward();
  engine.forward(f, unit);
}
template <class T>
void backward_of(const Scan& s, const Backward& b, int64_t unit, void* memory) {
  Engine<T> engine(s, memory);
  engine.plan_backward(b, longest(s));
  engine.backward(b, unit);
}

int64_t forward_bytes(const Scan& s, bool wide) { return wide ? forward_bytes_of<double>(s) : forward_bytes_of<float>(s); }
int64_t backward_bytes(const Scan& s, const Backward& b, bool wide) {
  return wide ? backward_bytes_of<double>(s, b) : backward_bytes_of<float>(s, b);
}
void forward(const Scan& s, const Forward& f, bool wide, int64_t unit, void* memory) {
  wide ? forward_of<double>(s, f, unit, memory) : forward_of<float>(s, f, unit, memory);
}
void backward(const Scan& s, const Backward& b, bool wide, int64_t unit, void* memory) {
  wide ? backward_of<double>(s, b, unit, memory) : backward_of<float>(s, b, unit, memory);
}

}  // namespace s0::S0_ISA
