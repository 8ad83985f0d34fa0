// One token of the gated delta rule, or of a mixer with it. There is one block for each (row, value head, tile of V):
//
//   q, k, v = silu(convolution)     if there is a window, which is shifted by one
//   g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b), or twice that     if A_log is given
//   S' = exp(g) S;  S = S' + beta k (v - S'^T k)^T;  o = scale S^T q
//   o / rms(o) * norm * silu(z)     if they are given
//
// A warp owns columns of S. `down` lanes share a column, and each of them keeps kRows rows in registers. So sums over K
// need only registers and shuffles, S is read and written once, and only inputs and outputs go through shared memory.
#pragma once

#include "token/block.h"

namespace s0::S0_ISA {

struct DeltaShared {
  float q[kMaxHeadSize], k[kMaxHeadSize], v[kMaxHeadSize], o[kMaxHeadSize];
  float scale;  // factor of o: the scale of the call times the factor that normalises q
  bool last;
};

static_assert(sizeof(DeltaShared) <= kSharedBytes);

struct DeltaGates {
  float decay, beta;
};

S0_CALL DeltaGates gates(const Delta& d, int64_t row, int head) {
  const float decay = read(d.decay, row, head, 0), weight = read(d.weight, row, head, 0);
  if (d.A_log.data == nullptr) return {expf(decay), weight};
  const float rate = expf(read(d.A_log, 0, head, 0));
  const float beta = d.allow_neg_eigval ? 2.0f * sigmoid(weight) : sigmoid(weight);
  return {expf(-rate * softplus(decay + read(d.dt_bias, 0, head, 0))), beta};
}

// The channels of the convolution are q, k and v side by side.
S0_CALL int64_t key_channel(const Delta& d, int group, int i) {
  return i < d.K ? static_cast<int64_t>(group) * d.K + i
                 : static_cast<int64_t>(d.groups + group) * d.K + i - d.K;
}

struct DeltaPart : Part {
  int down, across, rows;  // lanes of a warp along the rows of S, and along its columns; maximum number of rows per lane
  int64_t step;            // distance between consecutive rows of a lane in S
};

template <class Block>
S0_CALL DeltaPart part_of(const Delta& d, int64_t index) {
  DeltaPart p{part_of(d, index, d.V)};
  p.down = Block::kLanes == 1 ? 1 : d.down;
  p.across = Block::kLanes / p.down;
  p.rows = Block::kLanes == 1 ? d.K : Block::kRows;
  p.step = p.down * d.state.first;
  return p;
}

S0_CALL float key_input(const Delta& d, const DeltaPart& p, int i, bool move) {
  const int64_t channel = key_channel(d, p.group, i);
  return input(d, i < d.K ? d.q : d.k, p.row, p.group, i < d.K ? i : i - d.K, channel, p.place, move);
}

template <class Block>
S0_CALL void take_inputs(Block& block, DeltaShared& shared, const Delta& d, const DeltaPart& p) {
  block.each([&](int t) {
    for (int i = t; i < 2 * d.K + p.end - p.begin; i += block.threads()) {
      if (i < 2 * d.K) {
        (i < d.K ? shared.q[i] : shared.k[i - d.K]) = key_input(d, p, i, p.alone);
      } else {
        const int j = p.begin + i - 2 * d.K;
        const int64_t channel = 2 * static_cast<int64_t>(d.groups) * d.K + static_cast<int64_t>(p.head) * d.V + j;
        shared.v[j] = input(d, d.v, p.row, p.head, j, channel, p.place, true);
      }
    }
  });
  block.sync();
  if (!p.alone)
    block.each([&](int t) {
      if (t == 0) shared.last = Block::arrive(d.arrivals + p.row * d.groups + p.group, d.members);
    });
}

// The part of S and of its sums that a thread keeps, and the factors that all threads of a block share.
template <class Block>
struct DeltaKept {
  typename Block::template Local<StateVector<Block>[Block::kRows]> rows;
  typename Block::template Local<StateVector<Block>> sums;
  typename Block::template Local<DeltaGates> gate;  // beta times the factor that normalises k
  typename Block::template Local<float> factor;    // exp(g) times the factor that normalises k
};

// Computes S and o in those columns from `first` on that the warps process at once.
template <bool kFast, class Block>
S0_CALL void advance(Block& block, DeltaShared& shared, const Delta& d, const DeltaPart& p, DeltaKept<Block>& kept,
                     int first) {
  using Vector = StateVector<Block>;
  constexpr int kLanes = Block::kLanes, kVectorSize = Block::kVectorSize;
  const auto column = [first, &p](int t) {
    return first + (t / kLanes * p.across + t % kLanes % p.across) * kVectorSize;
  };
  const auto above = [&p](int t) { return t % kLanes / p.across; };
  block.each([&, column, above](int t) {
    const int j = column(t), top = above(t);
    const int mine = p.place.stored && j < p.end ? (d.K - top + p.down - 1) / p.down : 0;  // rows
    const float* from = p.states + top * d.state.first + j * d.state.second;
    kept.sums[t] = Vector{};
    S0_UNROLL
    for (int r = 0; r < p.rows; ++r, from += p.step)
      kept.rows[t][r] = r < mine ? load<kFast, Block>(from, d.state.second, p.end - j) : Vector{};
    S0_UNROLL
    for (int r = 0; r < p.rows; ++r) {
      const float k = r < mine ? shared.k[top + r * p.down] : 0.0f;
      S0_UNROLL
      for (int c = 0; c < kVectorSize; ++c) kept.sums[t].v[c] += k * kept.rows[t][r].v[c];
    }
  });
  block.add_lanes(kept.sums, p.across, kLanes);
  block.each([&, column, above](int t) {
    const int j = column(t), top = above(t), mine = (d.K - top + p.down - 1) / p.down;
    const bool there = p.place.stored && j < p.end;
    float* to = p.states + top * d.state.first + j * d.state.second;
    Vector written, out{};
    S0_UNROLL
    for (int c = 0; c < kVectorSize; ++c) {
      const float v = j + c < p.end ? shared.v[j + c] : 0.0f;
      written.v[c] = kept.gate[t].beta * (v - kept.factor[t] * kept.sums[t].v[c]);
    }
    S0_UNROLL
    for (int r = 0; r < p.rows; ++r, to += p.step) {
      const float k = r < mine ? shared.k[top + r * p.down] : 0.0f, q = r < mine ? shared.q[top + r * p.down] : 0.0f;
      S0_UNROLL
      for (int c = 0; c < kVectorSize; ++c) {
        kept.rows[t][r].v[c] = kept.gate[t].decay * kept.rows[t][r].v[c] + k * written.v[c];
        out.v[c] += q * kept.rows[t][r].v[c];
      }
      if (there && r < mine) store<kFast, Block>(to, d.state.second, p.end - j, kept.rows[t][r]);
    }
    kept.sums[t] = out;
  });
  block.add_lanes(kept.sums, p.across, kLanes);
  block.each([&, column, above](int t) {
    S0_UNROLL
    for (int c = 0; c < kVectorSize; ++c)
      if (above(t) == 0 && column(t) + c < p.end) shared.o[column(t) + c] = kept.sums[t].v[c];
  });
}

template <bool kFast, class Block>
S0_CALL void delta_block(Block& block, DeltaShared& shared, const Delta& d, int64_t index) {
  constexpr int kLanes = Block::kLanes;
  const DeltaPart p = part_of<Block>(d, index);
  take_inputs(block, shared, d, p);

  // every warp computes the factors that normalise q and k, and later o
  typename Block::template Local<float> squares;
  DeltaKept<Block> kept;
  block.each([&](int t) {
    squares[t] = kept.factor[t] = 0.0f;
    for (int i = t % kLanes; i < d.K; i += kLanes) {
      squares[t] += shared.q[i] * shared.q[i];
      kept.factor[t] += shared.k[i] * shared.k[i];
    }
  });
  block.add_lanes(squares, 1, kLanes);
  block.add_lanes(kept.factor, 1, kLanes);
  block.each([&](int t) {
    if (t == 0) shared.scale = d.normalise ? d.scale / sqrtf(squares[t] + 1e-6f) : d.scale;
    const float k_factor = d.normalise ? 1.0f / sqrtf(kept.factor[t] + 1e-6f) : 1.0f;
    kept.gate[t] = gates(d, p.row, p.head);
    kept.gate[t].beta *= k_factor;
    kept.factor[t] = kept.gate[t].decay * k_factor;
  });
  for (int first = p.begin; first < p.end; first += d.warps * p.across * Block::kVectorSize)
    advance<kFast>(block, shared, d, p, kept, first);
  block.sync();

  block.each([&](int t) {
    squares[t] = 0.0f;
    for (int j = t % kLanes; d.norm.data != nullptr && j < d.V; j += kLanes) {
      const float o = shared.scale * shared.o[j];
      squares[t] += o * o;
    }
  });
  block.add_lanes(squares, 1, kLanes);
  block.each([&](int t) {
    const float factor = 1.0f / sqrtf(squares[t] / d.V + d.eps);
    for (int j = p.begin + t; j < p.end; j += block.threads()) {
      float o = p.place.bad ? not_a_number() : shared.scale * shared.o[j];
      if (d.norm.data != nullptr) o *= factor * read(d.norm, 0, 0, j);
      if (d.z.data != nullptr) o *= silu(read(d.z, p.row, p.head, j));
      write(d.output, d.kind, (p.row * d.heads + p.head) * d.V + j, o);
    }
  });
  // by now all blocks of the group have read its windows
  if (!p.alone && shared.last && d.convolution.window != nullptr)
    block.each([&](int t) {
      for (int i = t; i < 2 * d.K; i += block.threads()) key_input(d, p, i, true);
    });
  block.finish();
}

}  // namespace s0::S0_ISA
