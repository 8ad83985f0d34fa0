// The interface of a block of threads, on a GPU and on the host, and the arithmetic of single values.
// A kernel consists of phases. A phase is `block.each(f)`, which calls f(thread) in every thread. `block.sync()` stands
// between a phase that writes shared memory and a phase that reads it in another thread. A `Local` is a value that a
// thread keeps between phases. `finish` completes the phases that refer to local variables of a function. See
// cuda/block.h and cpu/block.h.
#pragma once

#include <math.h>

#include <cstdint>

#include "numbers.h"
#include "token/arguments.h"

namespace s0::S0_ISA {

template <class Block>
struct alignas(16) StateVector {
  float v[Block::kVectorSize];
};

S0_CALL float read(const void* data, Kind kind, int64_t at) {
  if (kind == Kind::kBFloat16) return to_float(static_cast<const BFloat16*>(data)[at]);
  if (kind == Kind::kHalf) return to_float(static_cast<const Half*>(data)[at]);
  return static_cast<const float*>(data)[at];
}

S0_CALL float read(const Values& x, int64_t row, int64_t head, int64_t column) {
  return read(x.data, x.kind, row * x.row + head * x.head + column * x.column);
}

S0_CALL void write(void* data, Kind kind, int64_t at, float x) {
  if (kind == Kind::kBFloat16) {
    assign(static_cast<BFloat16*>(data)[at], x);
  } else if (kind == Kind::kHalf) {
    assign(static_cast<Half*>(data)[at], x);
  } else {
    static_cast<float*>(data)[at] = x;
  }
}

template <class Block>
S0_CALL float read_fresh(const void* data, Kind kind, int64_t at) {
  if (kind == Kind::kBFloat16) return to_float(BFloat16{Block::fresh(static_cast<const uint16_t*>(data) + at)});
  if (kind == Kind::kHalf) return to_float(Half{Block::fresh(static_cast<const uint16_t*>(data) + at)});
  return Block::fresh(static_cast<const float*>(data) + at);
}

S0_CALL float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
S0_CALL float silu(float x) { return x / (1.0f + expf(-x)); }
S0_CALL float softplus(float x) { return (x > 0.0f ? x : 0.0f) + log1pf(expf(x > 0.0f ? -x : x)); }
S0_CALL float not_a_number() { return __builtin_bit_cast(float, 0x7fc00000u); }

// The place of a row's window and state. `stored` is false if the row starts from zero and stores nothing; `bad` says
// that the index is out of range.
struct Place {
  int64_t row;
  bool stored, bad;
};

S0_CALL Place place_of(const Token& t, int64_t row) {
  if (t.indices == nullptr) return {row, true, false};
  const int64_t index =
      t.int64_indices ? static_cast<const int64_t*>(t.indices)[row] : static_cast<const int32_t*>(t.indices)[row];
  const bool inside = index >= 0 && index < t.state.rows;
  return {inside ? index : 0, inside, !inside && index != -1};
}

// The part of a call that one block computes: a row, a head, and the columns (V) or rows (P) of the head from `begin`
// to `end`.
struct Part {
  int64_t row;
  int head, group, begin, end;
  Place place;
  float* states;
  bool alone;  // whether no other block reads the inputs of the group
};

// `size` is V or P.
S0_CALL Part part_of(const Token& t, int64_t index, int size) {
  Part p;
  p.row = index / t.tiles / t.heads;
  p.head = static_cast<int>(index / t.tiles % t.heads);
  p.group = p.head / (t.heads / t.groups);
  p.begin = static_cast<int>(index % t.tiles) * t.tile;
  p.end = p.begin + t.tile < size ? p.begin + t.tile : size;
  p.place = place_of(t, p.row);
  p.states = t.state.data + p.place.row * t.state.row + p.head * t.state.head;
  p.alone = t.arrivals == nullptr;
  return p;
}

// silu of the convolution at a channel whose newest input is `now`. `move` shifts the window and appends `now`.
S0_CALL float convolve(const Convolution& c, const Place& place, int64_t channel, float now, bool move) {
  const int64_t at = place.row * c.row + channel * c.channel;
  float before[kMaxWindow], sum = c.bias.data == nullptr ? 0.0f : read(c.bias, 0, channel, 0);
  S0_UNROLL
  for (int j = 1; j < kMaxWindow; ++j)
    before[j] = place.stored && j < c.width ? read(c.window, c.kind, at + j * c.column) : 0.0f;
  S0_UNROLL
  for (int j = 1; j < kMaxWindow; ++j)
    if (j < c.width) sum += read(c.weight, 0, channel, j - 1) * before[j];
  sum += read(c.weight, 0, channel, c.width - 1) * now;
  if (move && place.stored) {
    S0_UNROLL
    for (int j = 1; j < kMaxWindow; ++j)
      if (j < c.width) write(c.window, c.kind, at + (j - 1) * c.column, before[j]);
    write(c.window, c.kind, at + (c.width - 1) * c.column, now);
  }
  return silu(sum);
}

// An input of the recurrence: the given value, or the result of the convolution if there is a window.
S0_CALL float input(const Token& t, const Values& x, int64_t row, int head, int i, int64_t channel, const Place& place,
                    bool move) {
  const float now = read(x, row, head, i);
  return t.convolution.window == nullptr ? now : convolve(t.convolution, place, channel, now, move);
}

// `kVectorSize` adjacent numbers of a state, of which the first `count` exist.
template <bool kFast, class Block>
S0_CALL StateVector<Block> load(const float* p, int64_t step, int count) {
  if constexpr (kFast) {
    return Block::load(p);
  } else {
    StateVector<Block> x;
    S0_UNROLL
    for (int c = 0; c < Block::kVectorSize; ++c) x.v[c] = c < count ? p[c * step] : 0.0f;
    return x;
  }
}

template <bool kFast, class Block>
S0_CALL void store(float* p, int64_t step, int count, const StateVector<Block>& x) {
  if constexpr (kFast) {
    Block::store(p, x);
  } else {
    S0_UNROLL
    for (int c = 0; c < Block::kVectorSize; ++c)
      if (c < count) p[c * step] = x.v[c];
  }
}

}  // namespace s0::S0_ISA
