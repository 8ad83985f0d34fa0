// One token of Mamba-2 SSD, and of a mixer around it, in a block for each (row, head, tile of P):
//
//   x, B, C = silu(convolution)     where there is a window, which moves on by one
//   dt = clamp(softplus(dt + dt_bias)), A = -exp(A_log)     each where asked for
//   S = exp(dt A) S + dt x B^T;  y = S C + D x
//   y * silu(z), or with the norm over all heads of a group: norm(y) * silu(z), or norm(y * silu(z))
//
// 8 lanes share a row of S, 32 numbers each, so a warp has 4 rows at once. The norm, and moving the windows of B and C,
// have to wait for all blocks of the group: the last of them does both.
#pragma once

#include "cuda/block.h"

namespace s0::S0_ISA {

struct SsdShared {
  float x[kLargest], B[kLargest], C[kLargest], sums[kMostWarps];
  bool last;
};

static_assert(sizeof(SsdShared) <= kSharedBytes);

struct SsdGates {
  float decay, dt;
};

S0_CALL SsdGates gates(const Ssd& s, int64_t row, int head) {
  float dt = read(s.dt, row, head, 0), A = read(s.A, 0, head, 0);
  if (s.dt_bias.data != nullptr) dt += read(s.dt_bias, 0, head, 0);
  if (s.softplus) dt = softplus(dt);
  dt = dt < s.low ? s.low : dt > s.high ? s.high : dt;  // NaN stays
  if (s.logarithm) A = -expf(A);
  return {expf(dt * A), dt};
}

// The channels of the convolution are x, B and C side by side.
S0_CALL int64_t group_channel(const Ssd& s, int group, int i) {
  const int64_t before = static_cast<int64_t>(s.heads) * s.P;
  return i < s.N ? before + static_cast<int64_t>(group) * s.N + i
                 : before + static_cast<int64_t>(s.groups + group) * s.N + i - s.N;
}

S0_CALL float group_input(const Ssd& s, int64_t row, int group, int i, const Place& place, bool move) {
  return input(s, i < s.N ? s.B : s.C, row, group, i < s.N ? i : i - s.N, group_channel(s, group, i), place, move);
}

// The group's outputs, written by all of its blocks, gated and normalised in place.
template <class Block>
S0_CALL void finish_group(Block& block, SsdShared& shared, const Ssd& s, int64_t row, int group) {
  const int64_t first = static_cast<int64_t>(group) * (s.heads / s.groups) * s.P;
  const int size = s.heads / s.groups * s.P;
  const auto gate = [&s, row](int64_t i) {
    return silu(read(s.z, row, static_cast<int>(i / s.P), static_cast<int>(i % s.P)));
  };
  const auto value = [&s, row, gate](int64_t i) {
    const float y = read_fresh<Block>(s.output, s.kind, row * s.heads * s.P + i);
    return s.z.data != nullptr && s.gate_first ? y * gate(i) : y;
  };
  typename Block::template Local<float> total;
  block.each([&, first, size, value](int t) {
    total[t] = 0.0f;
    for (int i = t; i < size; i += block.threads()) {
      const float y = value(first + i);
      total[t] += y * y;
    }
  });
  block.add_lanes(total, 1, Block::kLanes);
  block.each([&](int t) {
    if (t % Block::kLanes == 0) shared.sums[t / Block::kLanes] = total[t];
  });
  block.sync();
  block.each([&](int t) {
    float sum = 0.0f;
    for (int w = 0; w < block.threads() / Block::kLanes; ++w) sum += shared.sums[w];
    const float factor = 1.0f / sqrtf(sum / size + s.eps);
    for (int i = t; i < size; i += block.threads()) {
      float y = value(first + i) * factor * read(s.norm, 0, 0, first + i);
      if (s.z.data != nullptr && !s.gate_first) y *= gate(first + i);
      write(s.output, s.kind, row * s.heads * s.P + first + i, y);
    }
  });
  block.finish();
}

template <bool kFast, class Block>
S0_CALL void ssd_block(Block& block, SsdShared& shared, const Ssd& s, int64_t index) {
  using Four = Wide<Block>;
  constexpr int kLanes = Block::kLanes, kWide = Block::kWide, kAcross = kLanes == 1 ? 1 : 8;
  constexpr int kParts = kLargest / (kAcross * kWide);
  const int P = s.P, N = s.N, head = static_cast<int>(index / s.tiles % s.heads), group = head / (s.heads / s.groups);
  const int64_t row = index / s.tiles / s.heads;
  const int begin = static_cast<int>(index % s.tiles) * s.tile, end = begin + s.tile < P ? begin + s.tile : P;
  const Place place = place_of(s, row);
  const bool alone = s.tickets == nullptr;

  block.each([&](int t) {
    for (int i = t; i < 2 * N + end - begin; i += block.threads()) {
      if (i < 2 * N) {
        (i < N ? shared.B[i] : shared.C[i - N]) = group_input(s, row, group, i, place, alone);
      } else {
        const int p = begin + i - 2 * N;
        shared.x[p] = input(s, s.x, row, head, p, static_cast<int64_t>(head) * P + p, place, true);
      }
    }
  });
  block.sync();

  float* const states = s.state.data + place.row * s.state.row + head * s.state.head;
  typename Block::template Local<SsdGates> gate;
  typename Block::template Local<float> sums;
  block.each([&](int t) { gate[t] = gates(s, row, head); });
  for (int first = begin; first < end; first += s.warps * (kLanes / kAcross)) {
    const auto row_of = [=](int t) { return first + t / kAcross; };
    block.each([&, row_of](int t) {
      const int p = row_of(t), x = t % kAcross;
      const bool there = place.stored && p < end;
      const float written = p < end ? gate[t].dt * shared.x[p] : 0.0f;
      Four kept[kParts];
      S0_UNROLL
      for (int part = 0; part < kParts; ++part) {
        const int n = (part * kAcross + x) * kWide;
        const float* from = states + p * s.state.first + n * s.state.second;
        kept[part] = there && n < N ? load<kFast, Block>(from, s.state.second, N - n) : Four{};
      }
      Four sum{};
      S0_UNROLL
      for (int part = 0; part < kParts; ++part) {
        const int n = (part * kAcross + x) * kWide;
        if (n >= N) continue;
        S0_UNROLL
        for (int c = 0; c < kWide; ++c) {
          const bool inside = kFast || n + c < N;
          kept[part].v[c] = gate[t].decay * kept[part].v[c] + (inside ? written * shared.B[n + c] : 0.0f);
          sum.v[c] += inside ? kept[part].v[c] * shared.C[n + c] : 0.0f;
        }
        if (there)
          store<kFast, Block>(states + p * s.state.first + n * s.state.second, s.state.second, N - n, kept[part]);
      }
      sums[t] = 0.0f;
      S0_UNROLL
      for (int c = 0; c < kWide; ++c) sums[t] += sum.v[c];
    });
    block.add_lanes(sums, 1, kAcross);
    block.each([&, row_of](int t) {
      const int p = row_of(t);
      if (t % kAcross != 0 || p >= end) return;
      float y = place.bad ? not_a_number() : sums[t];
      if (s.D.data != nullptr) y += read(s.D, 0, head, 0) * shared.x[p];
      if (s.z.data != nullptr && s.norm.data == nullptr) y *= silu(read(s.z, row, head, p));
      write(s.output, s.kind, (row * s.heads + head) * P + p, y);
    });
  }
  if (!alone) {
    block.sync();
    block.each([&](int t) {
      if (t == 0) shared.last = Block::arrive(s.tickets + row * s.groups + group, s.members);
    });
  }
  block.sync();
  if (!alone && !shared.last) return;
  if (s.norm.data != nullptr) finish_group(block, shared, s, row, group);
  if (!alone && s.convolution.window != nullptr)
    block.each([&](int t) {
      for (int i = t; i < 2 * N; i += block.threads()) group_input(s, row, group, i, place, true);
    });
  block.finish();
}

}  // namespace s0::S0_ISA
