// How a call is cut into blocks.
#pragma once

#include "cuda/arguments.h"

namespace s0 {

inline int64_t blocks(const Token& t) { return t.rows * t.heads * t.tiles; }

inline bool aligned(const Pool& s, int columns, int wide = 4) {
  return s.second == 1 && columns % wide == 0 && s.first % 4 == 0 && s.head % 4 == 0 && s.row % 4 == 0 &&
         reinterpret_cast<uintptr_t>(s.data) % 16 == 0;
}

// Tiles of at least `least`, fewer the more blocks there are anyway. 256 blocks are two for each multiprocessor.
inline void cut(Token& t, int size, int least) {
  t.tile = (size + least - 1) / least * least;
  t.tiles = 1;
  while (t.tile > least && t.rows * t.heads * t.tiles < 256) {
    t.tile = (t.tile / 2 + least - 1) / least * least;
    t.tiles = (size + t.tile - 1) / t.tile;
  }
}

// The norm is over all of V, so a mixer's heads are not cut.
inline void plan(Delta& d) {
  d.down = d.K <= 64 ? 4 : d.K <= 128 ? 8 : 16;
  const int columns = 4 * 32 / d.down;  // that a warp takes at once
  d.fast = aligned(d.state, d.V);
  if (d.norm.data == nullptr) {
    cut(d, d.V, 32);
  } else {
    d.tile = d.V;
    d.tiles = 1;
  }
  d.warps = (d.tile + columns - 1) / columns;
  d.warps = d.warps < 2 ? 2 : d.warps > kMostWarps ? kMostWarps : d.warps;
  d.members = d.heads / d.groups * d.tiles;
}

inline void plan(Ssd& s) {
  s.fast = aligned(s.state, s.N);
  cut(s, s.P, 16);
  s.warps = (s.tile + 3) / 4;
  s.warps = s.warps > kMostWarps ? kMostWarps : s.warps;
  s.members = s.heads / s.groups * s.tiles;
}

// Each head to one thread of the host; its `members` are its group's heads.
template <class Call>
void plan_whole(Call& c, int size, int columns) {
  c.fast = aligned(c.state, columns, 32);
  c.tile = size;
  c.tiles = c.warps = 1;
  c.members = c.heads / c.groups;
}

}  // namespace s0
