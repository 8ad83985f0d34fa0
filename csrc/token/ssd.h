// One token of Mamba-2 SSD, or of a mixer with it. There is one block for each (row, head, tile of P):
//
//   x, B, C = silu(convolution)     if there is a window, which is shifted by one
//   dt = clamp(softplus(dt + dt_bias)), A = -exp(A_log)     each if requested
//   S = exp(dt A) S + dt x B^T;  y = S C + D x
//   y * silu(z), or with the norm, over all heads of a group: norm(y) * silu(z), or norm(y * silu(z))
//
// 8 lanes share a row of S, with 32 numbers each, so a warp processes 4 rows at once. The norm, and the shift of the
// windows of B and C, must wait for all blocks of the group: the last block does both.
#pragma once

#include "token/block.h"

namespace s0::S0_ISA {

struct SsdShared {
  float x[kMaxHeadSize], B[kMaxHeadSize], C[kMaxHeadSize], sums[kMaxWarps];
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
  dt = dt < s.low ? s.low : dt > s.high ? s.high : dt;  // NaN is kept
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

// Gates and normalises in place the outputs of the group, which all of its blocks have written.
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

template <class Block>
constexpr int kAcross = Block::kLanes == 1 ? 1 : 8;  // lanes of a row

// Advances row p of S in the lanes that share it. Returns the part of S C of the lane with index `lane`.
template <bool kFast, class Block>
S0_CALL float advance(const SsdShared& shared, const Ssd& s, const Part& part, const SsdGates& gate, int p,
                      int lane) {
  using Vector = StateVector<Block>;
  constexpr int kVectorSize = Block::kVectorSize, kParts = kMaxHeadSize / (kAcross<Block> * kVectorSize);
  const bool there = part.place.stored && p < part.end;
  const float written = p < part.end ? gate.dt * shared.x[p] : 0.0f;
  const int64_t step = kAcross<Block> * kVectorSize * s.state.second;
  float* at = part.states + p * s.state.first + lane * kVectorSize * s.state.second;
  Vector kept[kParts], sums{};
  S0_UNROLL
  for (int i = 0; i < kParts; ++i, at += step) {
    const int n = (i * kAcross<Block> + lane) * kVectorSize;
    kept[i] = there && n < s.N ? load<kFast, Block>(at, s.state.second, s.N - n) : Vector{};
  }
  at -= kParts * step;
  S0_UNROLL
  for (int i = 0; i < kParts; ++i, at += step) {
    const int n = (i * kAcross<Block> + lane) * kVectorSize;
    if (n >= s.N) continue;
    S0_UNROLL
    for (int c = 0; c < kVectorSize; ++c) {
      const bool inside = kFast || n + c < s.N;
      kept[i].v[c] = gate.decay * kept[i].v[c] + (inside ? written * shared.B[n + c] : 0.0f);
      sums.v[c] += inside ? kept[i].v[c] * shared.C[n + c] : 0.0f;
    }
    if (there) store<kFast, Block>(at, s.state.second, s.N - n, kept[i]);
  }
  float sum = 0.0f;
  S0_UNROLL
  for (int c = 0; c < kVectorSize; ++c) sum += sums.v[c];
  return sum;
}

template <bool kFast, class Block>
S0_CALL void ssd_block(Block& block, SsdShared& shared, const Ssd& s, int64_t index) {
  constexpr int kLanesOfRow = kAcross<Block>;
  const Part part = part_of(s, index, s.P);
  const int64_t first_channel = static_cast<int64_t>(part.head) * s.P;
  block.each([&](int t) {
    for (int i = t; i < 2 * s.N + part.end - part.begin; i += block.threads()) {
      if (i < 2 * s.N) {
        (i < s.N ? shared.B[i] : shared.C[i - s.N]) = group_input(s, part.row, part.group, i, part.place, part.alone);
      } else {
        const int p = part.begin + i - 2 * s.N;
        shared.x[p] = input(s, s.x, part.row, part.head, p, first_channel + p, part.place, true);
      }
    }
  });
  block.sync();

  typename Block::template Local<SsdGates> gate;
  typename Block::template Local<float> sums;
  block.each([&](int t) { gate[t] = gates(s, part.row, part.head); });
  for (int first = part.begin; first < part.end; first += s.warps * (Block::kLanes / kLanesOfRow)) {
    block.each([&, first](int t) {
      sums[t] = advance<kFast, Block>(shared, s, part, gate[t], first + t / kLanesOfRow, t % kLanesOfRow);
    });
    block.add_lanes(sums, 1, kLanesOfRow);
    block.each([&, first](int t) {
      const int p = first + t / kLanesOfRow;
      if (t % kLanesOfRow != 0 || p >= part.end) return;
      float y = part.place.bad ? not_a_number() : sums[t];
      if (s.D.data != nullptr) y += read(s.D, 0, part.head, 0) * shared.x[p];
      if (s.z.data != nullptr && s.norm.data == nullptr) y *= silu(read(s.z, part.row, part.head, p));
      write(s.output, s.kind, (part.row * s.heads + part.head) * s.P + p, y);
    });
  }
  if (!part.alone) {
    block.sync();
    block.each([&](int t) {
      if (t == 0) shared.last = Block::arrive(s.arrivals + part.row * s.groups + part.group, s.members);
    });
  }
  block.sync();
  if (!part.alone && !shared.last) return;
  if (s.norm.data != nullptr) finish_group(block, shared, s, part.row, part.group);
  if (!part.alone && s.convolution.window != nullptr)
    block.each([&](int t) {
      for (int i = t; i < 2 * s.N; i += block.threads()) group_input(s, part.row, part.group, i, part.place, true);
    });
  block.finish();
}

}  // namespace s0::S0_ISA
