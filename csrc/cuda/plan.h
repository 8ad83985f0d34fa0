// Cuts a call into blocks of a GPU.
#pragma once

#include "token/arguments.h"

namespace s0 {

// Cuts a head into tiles of at least `least`: the more heads there are, the fewer tiles. The aim is 256 blocks, about
// two per multiprocessor.
inline void cut(Token& t, int size, int least) {
  t.tile = (size + least - 1) / least * least;
  t.tiles = 1;
  while (t.tile > least && t.rows * t.heads * t.tiles < 256) {
    t.tile = (t.tile / 2 + least - 1) / least * least;
    t.tiles = (size + t.tile - 1) / t.tile;
  }
}

// The heads of a mixer are not cut, because the norm is over all of V.
inline void plan(Delta& d) {
  d.down = d.K <= 64 ? 4 : d.K <= 128 ? 8 : 16;
  const int columns = 4 * 32 / d.down;  // columns that a warp processes at once
  d.fast = aligned(d.state, d.V, 4);
  if (d.norm.data == nullptr) {
    cut(d, d.V, 32);
  } else {
    d.tile = d.V;
    d.tiles = 1;
  }
  d.warps = (d.tile + columns - 1) / columns;
  d.warps = d.warps < 2 ? 2 : d.warps > kMaxWarps ? kMaxWarps : d.warps;
  d.members = d.heads / d.groups * d.tiles;
}

inline void plan(Ssd& s) {
  s.fast = aligned(s.state, s.N, 4);
  cut(s, s.P, 16);
  s.warps = (s.tile + 3) / 4;
  s.warps = s.warps > kMaxWarps ? kMaxWarps : s.warps;
  s.members = s.heads / s.groups * s.tiles;
}

}  // namespace s0
