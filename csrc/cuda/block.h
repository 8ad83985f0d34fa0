// What a block of threads is, on a GPU and on the host, and the arithmetic of single values.
//
// A kernel is written as phases, `block.each(f)`, which call f(thread) in every thread, and `block.sync()` between a
// phase that writes shared memory and one that reads it in another thread. What a thread keeps from one phase to the
// next is a `Local`. `finish` ends what refers to a function's variables. The host runs the same text: see host.h.
#pragma once

#include <math.h>

#include <cstdint>

#include "cuda/arguments.h"
#include "numbers.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define S0_UNROLL _Pragma("unroll")
#else
#define S0_UNROLL
#endif

namespace s0::S0_ISA {

template <class Block>
struct alignas(16) Wide {
  float v[Block::kWide];
};

#if defined(__CUDACC__)
using Half = __half;
S0_CALL float to_float(Half x) { return static_cast<float>(x); }
S0_CALL void assign(Half& to, float x) { to = static_cast<Half>(x); }

struct GpuBlock {
  static constexpr int kLanes = 32;  // threads of a warp
  static constexpr int kWide = 4;    // neighbouring floats that a thread takes of a state: 16 bytes
  static constexpr int kRows = 16;   // rows of the delta rule's state that a thread keeps in registers

  template <class T>
  struct Local {
    T value;
    S0_CALL T& operator[](int) { return value; }
  };

  S0_CALL int threads() const { return static_cast<int>(blockDim.x); }

  template <class Each>
  S0_CALL void each(const Each& f) {
    f(static_cast<int>(threadIdx.x));
  }

  S0_CALL void sync() { __syncthreads(); }
  S0_CALL void finish() {}

  // The sum over the lanes whose numbers differ in the bits from `from` up to below `to`, for all of them.
  template <class T>
  S0_CALL void add_lanes(Local<T>& x, int from, int to) {
    for (int bit = from; bit < to; bit *= 2) {
      S0_UNROLL
      for (int c = 0; c < static_cast<int>(sizeof(T) / sizeof(float)); ++c) {
        float* value = reinterpret_cast<float*>(&x.value) + c;
        *value += __shfl_xor_sync(0xffffffffu, *value, bit);
      }
    }
  }

  // Whether this is the last of `members` to come; all that the others wrote and read before is then behind it.
  S0_CALL static bool arrive(unsigned* ticket, int members) {
    __threadfence();
    const bool last = atomicInc(ticket, static_cast<unsigned>(members - 1)) == static_cast<unsigned>(members - 1);
    __threadfence();
    return last;
  }

  // What another block wrote, which the first-level cache may not know.
  template <class T>
  S0_CALL static T fresh(const T* p) {
    return __ldcg(p);
  }

  S0_CALL static Wide<GpuBlock> load(const float* p) {
    const float4 x = *reinterpret_cast<const float4*>(p);
    return {{x.x, x.y, x.z, x.w}};
  }

  S0_CALL static void store(float* p, const Wide<GpuBlock>& x) {
    __stwb(reinterpret_cast<float4*>(p), make_float4(x.v[0], x.v[1], x.v[2], x.v[3]));  // or the compiler splits it
  }
};
#endif

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
  if (kind == Kind::kHalf) return to_float(Block::fresh(static_cast<const Half*>(data) + at));
  return Block::fresh(static_cast<const float*>(data) + at);
}

S0_CALL float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
S0_CALL float silu(float x) { return x / (1.0f + expf(-x)); }
S0_CALL float softplus(float x) { return (x > 0.0f ? x : 0.0f) + log1pf(expf(x > 0.0f ? -x : x)); }
S0_CALL float not_a_number() { return __builtin_bit_cast(float, 0x7fc00000u); }

// Where a row's window and state lie: `stored` unless it starts from zero and leaves nothing; `bad` is out of range.
struct Place {
  int64_t row;
  bool stored, bad;
};

S0_CALL Place place_of(const Token& t, int64_t row) {
  if (t.indices == nullptr) return {row, true, false};
  const int64_t index =
      t.wide ? static_cast<const int64_t*>(t.indices)[row] : static_cast<const int32_t*>(t.indices)[row];
  const bool inside = index >= 0 && index < t.state.rows;
  return {inside ? index : 0, inside, !inside && index != -1};
}

// silu of the convolution at a channel whose newest input is `now`; `move` puts that into the window.
S0_CALL float convolve(const Convolution& c, const Place& place, int64_t channel, float now, bool move) {
  const int64_t at = place.row * c.row + channel * c.channel;
  float before[kWidest], sum = c.bias.data == nullptr ? 0.0f : read(c.bias, 0, channel, 0);
  S0_UNROLL
  for (int j = 1; j < kWidest; ++j)
    before[j] = place.stored && j < c.width ? read(c.window, c.kind, at + j * c.column) : 0.0f;
  S0_UNROLL
  for (int j = 1; j < kWidest; ++j)
    if (j < c.width) sum += read(c.weight, 0, channel, j - 1) * before[j];
  sum += read(c.weight, 0, channel, c.width - 1) * now;
  if (move && place.stored) {
    S0_UNROLL
    for (int j = 1; j < kWidest; ++j)
      if (j < c.width) write(c.window, c.kind, at + (j - 1) * c.column, before[j]);
    write(c.window, c.kind, at + (c.width - 1) * c.column, now);
  }
  return silu(sum);
}

// An input of the recurrence: as it is given, or convolved where there is a window.
S0_CALL float input(const Token& t, const Values& x, int64_t row, int head, int i, int64_t channel, const Place& place,
                    bool move) {
  const float now = read(x, row, head, i);
  return t.convolution.window == nullptr ? now : convolve(t.convolution, place, channel, now, move);
}

// `kWide` neighbours of a state, of which the first `count` exist.
template <bool kFast, class Block>
S0_CALL Wide<Block> load(const float* p, int64_t step, int count) {
  if constexpr (kFast) {
    return Block::load(p);
  } else {
    Wide<Block> x;
    S0_UNROLL
    for (int c = 0; c < Block::kWide; ++c) x.v[c] = c < count ? p[c * step] : 0.0f;
    return x;
  }
}

template <bool kFast, class Block>
S0_CALL void store(float* p, int64_t step, int count, const Wide<Block>& x) {
  if constexpr (kFast) {
    Block::store(p, x);
  } else {
    S0_UNROLL
    for (int c = 0; c < Block::kWide; ++c)
      if (c < count) p[c * step] = x.v[c];
  }
}

}  // namespace s0::S0_ISA
