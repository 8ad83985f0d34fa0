// The common part of forward and backward of both scans, which go chunk by chunk with the state in cache.
//
// Inside a chunk of n tokens, with e_i = exp(decay_i), G_i = e_1 .. e_i, D_ij = e_{j+1} .. e_i and E_i = e_{i+1} .. e_n:
//   L     = strict_lower(diag(beta) (K K^T * D)),  P = lower(scale Q K^T * D)
//   (I + L) U = diag(beta) (V - diag(G) K S)        the value that each token writes; for SSD U = diag(dt) V
//   O     = scale diag(G) Q S + P U,  S' = G_n S + K^T diag(E) U
// and backwards, from dO and dS':
//   (I + L)^T R = P^T dO + diag(E) K dS';  for SSD R is the right side
//   dS    = G_n dS' + (scale diag(G) Q)^T dO - (diag(G beta) K)^T R;  for SSD without the last term
// Decays are products of exp(decay), never quotients, so a decay of zero is a clean reset.
#pragma once

#include <cstring>

#include "cpu/tiles.h"

namespace s0::S0_ISA {

// The sequence, the group of heads and the block of heads of a unit of work.
struct Unit {
  int64_t sequence, group, first, count, part, parts, batch, start, length;

  Unit(const Scan& s, int64_t unit) {
    const int64_t of_group = s.heads / s.groups;
    parts = (of_group + s.head_block - 1) / s.head_block;
    part = unit % parts;
    group = unit / parts % s.groups;
    sequence = unit / parts / s.groups;
    first = group * of_group + part * s.head_block;
    count = of_group - part * s.head_block < s.head_block ? of_group - part * s.head_block : s.head_block;
    batch = s.boundaries == nullptr ? sequence : 0;
    start = s.boundaries == nullptr ? 0 : s.boundaries[sequence];
    length = s.boundaries == nullptr ? s.tokens : s.boundaries[sequence + 1] - start;
  }

  int64_t at(const Rows& x, int64_t token, int64_t head) const {
    return batch * x.batch + (start + token) * x.token + head * x.head;
  }
  // in contiguous [B, T, ...]
  int64_t row(const Scan& s, int64_t token) const { return batch * s.tokens + start + token; }
};

// A name ends in p if the size is padded to whole vectors, and in l if it is the distance between rows in memory.
template <class T>
class Engine {
 protected:
  Engine(const Scan& s, void* memory)
      : s_(s),
        C_(static_cast<int>(s.chunk)),
        K_(static_cast<int>(s.key)),
        V_(static_cast<int>(s.value)),
        Cp_(padded<T>(C_)),
        Kp_(padded<T>(K_)),
        Vp_(padded<T>(V_)),
        Cl_(row_stride<T>(C_)),
        Kl_(row_stride<T>(K_)),
        Vl_(row_stride<T>(V_)),
        arena_{static_cast<char*>(memory)} {
    qk_ = arena_.take(2 * C_ * Kl_);
    k_transposed_ = arena_.take(K_ * Cl_);
    queries_keys_ = arena_.take(C_ * Cl_);
    keys_keys_ = arena_.take(s.delta ? C_ * Cl_ : 0);
    norms_ = arena_.take(2 * C_);
    e_ = arena_.take(C_);
    from_start_ = arena_.take(C_);
    to_end_ = arena_.take(Cp_);
    weight_ = arena_.take(C_);
    factors_ = arena_.take(2 * C_);
    row_ = arena_.take(Cp_);
    attention_ = arena_.take(C_ * Cl_);
    similarity_ = arena_.take(s.delta ? C_ * Cl_ : 0);
    system_ = arena_.take(s.delta ? C_ * Cl_ : 0);
    writes_ = arena_.take(C_ * Vl_);
    output_ = arena_.take(C_ * Vl_);
  }

  int tokens(const Unit& u, int64_t t) const { return static_cast<int>(u.length - t < C_ ? u.length - t : C_); }
  T* q_row(int i) { return qk_ + i * Kl_; }
  T* k_row(int i, int n) { return qk_ + (n + i) * Kl_; }

  // Loads the state that the index picks from a bank: -1 gives zero, any other index outside the bank gives NaN.
  void read_state(T* to, const States& from, const Unit& u, int64_t head, bool initial) {
    int64_t which = u.sequence;
    if (initial && s_.indices != nullptr) which = s_.indices[u.sequence];
    const bool absent = from.data == nullptr || which == -1;
    const bool broken = !absent && initial && s_.indices != nullptr && (which < -1 || which >= s_.bank);
    if (absent || broken || Vp_ != V_) fill(to, broken ? static_cast<T>(__builtin_nan("")) : T(0), K_ * Vl_);
    if (absent || broken) return;
    const T* p = static_cast<const T*>(from.data) + which * from.sequence + head * from.head;
    if (from.key == 1)
      transpose_far(to, Vl_, p, from.value, V_, K_);
    else
      copy_state(to, Vl_, 1, p, from.key, from.value);
  }

  void write_state(const T* from, const States& to, const Unit& u, int64_t head) {
    T* p = static_cast<T*>(to.data) + u.sequence * to.sequence + head * to.head;
    if (to.key == 1)
      transpose(p, to.value, from, Vl_, K_, V_);
    else
      copy_state(p, to.key, to.value, from, Vl_, 1);
  }

  void copy_state(T* to, int64_t to_key, int64_t to_value, const T* from, int64_t key, int64_t value) {
    for (int i = 0; i < K_; ++i, to += to_key, from += key) {
      if (to_value == 1 && value == 1)
        std::memcpy(to, from, V_ * sizeof(T));
      else
        for (int j = 0; j < V_; ++j) to[j * to_value] = from[j * value];
    }
  }

  // Puts queries above keys in qk_, transposes the keys, and computes the products that all heads of the group share.
  void load_keys(const Unit& u, int64_t t, int n, bool with_queries) {
    if (with_queries) read(qk_, Kl_, s_.q, u.at(s_.q, t, u.group), n, K_);
    if (!keys_matter_) return;
    read(k_row(0, n), Kl_, s_.k, u.at(s_.k, t, u.group), n, K_);
    if (s_.normalise)
      for (int i = with_queries ? 0 : n; i < 2 * n; ++i) norms_[i] = normalise(qk_ + i * Kl_, Kp_);
    if (with_queries || s_.delta) transpose_padded(k_transposed_, Cl_, k_row(0, n), Kl_, n, K_);
    if (with_queries) lower_product(queries_keys_, n, K_, qk_, Kl_, k_transposed_);
    if (s_.delta) lower_product(keys_keys_, n, K_, k_row(0, n), Kl_, k_transposed_);
  }

  // A B^T for n tokens, in vectors from the left up to the diagonal, with zeros beyond it.
  void lower_product(T* to, int n, int depth, const T* a, int lda, const T* b_transposed) {
    multiply(Shape::kLowerProduct, n, Cp_, depth, {a, lda, 1}, b_transposed, Cl_, set(to, Cl_));
    for (int i = 0; i < n; ++i)
      for (int j = i + 1; j < padded<T>(i + 1); ++j) to[i * Cl_ + j] = 0;
  }

  void load_gates(const Unit& u, int64_t t, int n, int64_t head) {
    const T* decay = static_cast<const T*>(s_.decay) + u.row(s_, t) * s_.heads + head;
    const T* weight = static_cast<const T*>(s_.weight) + u.row(s_, t) * s_.heads + head;
    double product = 1;  // in double: all tokens share its rounding error
    for (int i = 0; i < n; ++i) {
      e_[i] = exponential(decay[i * s_.heads]);
      weight_[i] = weight[i * s_.heads];
      from_start_[i] = static_cast<T>(product *= e_[i]);
    }
    product = 1;
    for (int i = n - 1; i >= 0; --i) {
      to_end_[i] = static_cast<T>(product);
      product *= e_[i];
    }
    for (int i = n; i < Cp_; ++i) to_end_[i] = 0;
  }

  // Computes P, and for the delta rule K K^T * D and L, with zeros above the diagonal. `decay_` keeps D if the backward
  // needs it.
  void intra_chunk(int n, bool with_attention) {
    const T scale = static_cast<T>(s_.scale);
    fill(row_, T(0), Cp_);
    for (int i = 0; i < n; ++i) {
      const int end = padded<T>(i + 1), at = i * Cl_;
      scale_row(row_, e_[i], end);
      row_[i] = 1;
      for (int j = 0; j < end; j += kLanes<T>) {
        const Vec<T> d = load(row_ + j);
        if (with_attention) store(attention_ + at + j, scale * d * load(queries_keys_ + at + j));
        if (decay_ != nullptr) store(decay_ + at + j, d);
        if (s_.delta) {
          const Vec<T> similarity = d * load(keys_keys_ + at + j);
          store(similarity_ + at + j, similarity);
          store(system_ + at + j, weight_[i] * similarity);
        }
      }
      if (with_attention) fill(attention_ + at + end, T(0), Cp_ - end);
      if (!s_.delta) continue;
      fill(similarity_ + at + end, T(0), Cp_ - end);
      fill(system_ + at + end, T(0), Cp_ - end);
      similarity_[at + i] = system_[at + i] = 0;
    }
  }

  // Solves (I + L) X = X in place, by blocks of rows: earlier blocks by a product, rows within a block one after the
  // other.
  void solve(int n, T* x) {
    for (int i = 0; i < n; i += kRows) {
      const int rows = n - i < kRows ? n - i : kRows;
      if (i > 0)
        multiply(Shape::kFull, rows, Vp_, i, {system_ + i * Cl_, Cl_, 1}, x, Vl_,
                 add(x + i * Vl_, Vl_, {&kMinusOne<T>, 0}));
      for (int r = 1; r < rows; ++r)
        for (int c = 0; c < r; ++c) add_row(x + (i + r) * Vl_, x + (i + c) * Vl_, -system_[(i + r) * Cl_ + i + c], Vp_);
    }
  }

  // Solves (I + L)^T X = X in place, from the last block to the first.
  void solve_transposed(int n, T* x) {
    for (int i = (n - 1) / kRows * kRows; i >= 0; i -= kRows) {
      const int rows = n - i < kRows ? n - i : kRows, below = i + rows;
      if (below < n)
        multiply(Shape::kFull, rows, Vp_, n - below, {system_ + below * Cl_ + i, 1, Cl_}, x + below * Vl_, Vl_,
                 add(x + i * Vl_, Vl_, {&kMinusOne<T>, 0}));
      for (int r = rows - 2; r >= 0; --r)
        for (int c = r + 1; c < rows; ++c)
          add_row(x + (i + r) * Vl_, x + (i + c) * Vl_, -system_[(i + c) * Cl_ + i + r], Vp_);
    }
  }

  // Advances S to S', and scales the writes in place.
  void advance(int n, const T* from, T* to) {
    for (int i = 0; i < n; ++i) scale_row(writes_ + i * Vl_, to_end_[i], Vp_);
    multiply(Shape::kFull, K_, Vp_, n, {k_row(0, n), 1, Kl_}, writes_, Vl_,
             Target<T>{to, Vl_, {&kOne<T>, 0}, {from_start_ + n - 1, 0}, from});
  }

  const Scan& s_;
  const int C_, K_, V_, Cp_, Kp_, Vp_, Cl_, Kl_, Vl_;
  Arena<T> arena_;
  bool keys_matter_ = true;  // false for the gradient of SSD's state, which needs neither keys nor P
  T *qk_, *k_transposed_, *queries_keys_, *keys_keys_, *norms_;
  T *e_, *from_start_, *to_end_, *weight_, *factors_, *row_;
  T *attention_, *similarity_, *system_, *writes_, *output_, *decay_ = nullptr;
};

}  // namespace s0::S0_ISA
