// One token of the gated delta rule, and of a mixer around it, in a block for each (row, value head, tile of V):
//
//   q, k, v = silu(convolution)     where there is a window, which moves on by one
//   g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b)     where A_log is given
//   S' = exp(g) S;  S = S' + beta k (v - S'^T k)^T;  o = scale S^T q
//   o / rms(o) * norm * silu(z)     where they are given
//
// A warp owns columns of S: lanes across them, and `down` lanes for the rows, each of which keeps kRows. Sums over K
// then stay in registers and shuffles, S is read and written once, and only what goes in and out is shared.
#pragma once

#include "cuda/block.h"

namespace s0::S0_ISA {

struct DeltaShared {
  float q[kLargest], k[kLargest], v[kLargest], o[kLargest];
  float scale;  // of o: that of the call, and what normalises q
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
  return {expf(-rate * softplus(decay + read(d.dt_bias, 0, head, 0))), sigmoid(weight)};
}

// The channels of the convolution are q, k and v side by side.
S0_CALL int64_t key_channel(const Delta& d, int group, int i) {
  return i < d.K ? static_cast<int64_t>(group) * d.K + i
                 : static_cast<int64_t>(d.groups + group) * d.K + i - d.K;
}

S0_CALL float sum_of_squares(float x, float y) { return x + y * y; }

template <bool kFast, class Block>
S0_CALL void delta_block(Block& block, DeltaShared& shared, const Delta& d, int64_t index) {
  using Four = Wide<Block>;
  constexpr int kLanes = Block::kLanes, kWide = Block::kWide, kRows = Block::kRows;
  const int K = d.K, V = d.V, head = static_cast<int>(index / d.tiles % d.heads), group = head / (d.heads / d.groups);
  const int64_t row = index / d.tiles / d.heads;
  const int begin = static_cast<int>(index % d.tiles) * d.tile, end = begin + d.tile < V ? begin + d.tile : V;
  const Place place = place_of(d, row);
  const bool alone = d.tickets == nullptr;  // then q and k are nobody else's

  block.each([&](int t) {
    for (int i = t; i < 2 * K + end - begin; i += block.threads()) {
      if (i < 2 * K) {
        const float x = input(d, i < K ? d.q : d.k, row, group, i < K ? i : i - K, key_channel(d, group, i), place, alone);
        (i < K ? shared.q[i] : shared.k[i - K]) = x;
      } else {
        const int j = begin + i - 2 * K;
        const int64_t channel = 2 * static_cast<int64_t>(d.groups) * K + static_cast<int64_t>(head) * V + j;
        shared.v[j] = input(d, d.v, row, head, j, channel, place, true);
      }
    }
  });
  block.sync();
  if (!alone)
    block.each([&](int t) {
      if (t == 0) shared.last = Block::arrive(d.tickets + row * d.groups + group, d.members);
    });

  // every warp for itself: the factors that normalise q and k
  typename Block::template Local<float> q_factor, k_factor;
  block.each([&](int t) {
    q_factor[t] = k_factor[t] = 0.0f;
    for (int i = t % kLanes; i < K; i += kLanes) {
      q_factor[t] = sum_of_squares(q_factor[t], shared.q[i]);
      k_factor[t] = sum_of_squares(k_factor[t], shared.k[i]);
    }
  });
  block.add_lanes(q_factor, 1, kLanes);
  block.add_lanes(k_factor, 1, kLanes);
  typename Block::template Local<DeltaGates> gate;
  block.each([&](int t) {
    if (t == 0) shared.scale = d.normalise ? d.scale / sqrtf(q_factor[t] + 1e-6f) : d.scale;
    k_factor[t] = d.normalise ? 1.0f / sqrtf(k_factor[t] + 1e-6f) : 1.0f;
    gate[t] = gates(d, row, head);
    gate[t].beta *= k_factor[t];
    k_factor[t] *= gate[t].decay;
  });

  const int down = kLanes == 1 ? 1 : d.down, across = kLanes / down;
  const int rows = kLanes == 1 ? K : kRows;
  const int64_t step = down * d.state.first;
  float* const states = d.state.data + place.row * d.state.row + head * d.state.head;
  typename Block::template Local<Four[kRows]> kept;
  typename Block::template Local<Four> sums;
  for (int first = begin; first < end; first += d.warps * across * kWide) {
    const auto column = [=](int t) { return first + (t / kLanes * across + t % kLanes % across) * kWide; };
    block.each([&, column](int t) {
      const int j = column(t), above = t % kLanes / across;
      const int mine = place.stored && j < end ? (K - above + down - 1) / down : 0;  // rows
      sums[t] = Four{};
      const float* from = states + above * d.state.first + j * d.state.second;
      S0_UNROLL
      for (int r = 0; r < rows; ++r, from += step) {
        kept[t][r] = r < mine ? load<kFast, Block>(from, d.state.second, end - j) : Four{};
      }
      S0_UNROLL
      for (int r = 0; r < rows; ++r) {
        const float k = r < mine ? shared.k[above + r * down] : 0.0f;
        S0_UNROLL
        for (int c = 0; c < kWide; ++c) sums[t].v[c] += k * kept[t][r].v[c];
      }
    });
    block.add_lanes(sums, across, kLanes);
    block.each([&, column](int t) {
      const int j = column(t), above = t % kLanes / across;
      const int mine = (K - above + down - 1) / down;
      const bool there = place.stored && j < end;
      Four written, out{};
      S0_UNROLL
      for (int c = 0; c < kWide; ++c) {
        const float v = j + c < end ? shared.v[j + c] : 0.0f;
        written.v[c] = gate[t].beta * (v - k_factor[t] * sums[t].v[c]);
      }
      float* to = states + above * d.state.first + j * d.state.second;
      S0_UNROLL
      for (int r = 0; r < rows; ++r, to += step) {
        const float k = r < mine ? shared.k[above + r * down] : 0.0f, q = r < mine ? shared.q[above + r * down] : 0.0f;
        S0_UNROLL
        for (int c = 0; c < kWide; ++c) {
          kept[t][r].v[c] = gate[t].decay * kept[t][r].v[c] + k * written.v[c];
          out.v[c] += q * kept[t][r].v[c];
        }
        if (there && r < mine) store<kFast, Block>(to, d.state.second, end - j, kept[t][r]);
      }
      sums[t] = out;
    });
    block.add_lanes(sums, across, kLanes);
    block.each([&, column](int t) {
      const int j = column(t);
      if (t % kLanes / across != 0) return;
      S0_UNROLL
      for (int c = 0; c < kWide; ++c)
        if (j + c < end) shared.o[j + c] = sums[t].v[c];
    });
  }
  block.sync();

  block.each([&](int t) {
    k_factor[t] = 0.0f;
    for (int j = t % kLanes; d.norm.data != nullptr && j < V; j += kLanes)
      k_factor[t] = sum_of_squares(k_factor[t], shared.scale * shared.o[j]);
  });
  block.add_lanes(k_factor, 1, kLanes);
  block.each([&](int t) {
    const float factor = 1.0f / sqrtf(k_factor[t] / V + d.eps);
    for (int j = begin + t; j < end; j += block.threads()) {
      float o = place.bad ? not_a_number() : shared.scale * shared.o[j];
      if (d.norm.data != nullptr) o *= factor * read(d.norm, 0, 0, j);
      if (d.z.data != nullptr) o *= silu(read(d.z, row, head, j));
      write(d.output, d.kind, (row * d.heads + head) * V + j, o);
    }
  });
  // all blocks of the group have read its windows
  if (!alone && shared.last && d.convolution.window != nullptr)
    block.each([&](int t) {
      for (int i = t; i < 2 * K; i += block.threads())
        input(d, i < K ? d.q : d.k, row, group, i < K ? i : i - K, key_channel(d, group, i), place, true);
    });
  block.finish();
}

}  // namespace s0::S0_ISA
