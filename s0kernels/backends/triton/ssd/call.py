"""What every stage of Mamba-2 SSD is told of a call."""

from typing import NamedTuple

import torch
from torch import Tensor

from s0kernels.backends.triton.common.chunks import Chunks, cut
from s0kernels.backends.triton.common.launch import cdiv, power_of_two
from s0kernels.backends.triton.common.tiles import ScanTiles, Table, Tiles, choose_tiles
from s0kernels.calls import SSDInputs, SSDOptions, Start

#: By stage and bytes of the dtype: the tile (of P, or of what a loop sums over), warps, pipeline stages. What each
#: takes of a chip: `python -m s0kernels aot`.
TILES: dict[tuple[str, int], Table] = {
    ("prepare", 2): {0: (Tiles(64, 4, 2),), 80: (Tiles(64, 8, 2),)},
    ("scan", 2): {
        0: (Tiles(32, 4, 1),),
        80: (Tiles(64, 8, 2, 16640, 384), Tiles(32, 8, 2)),
        90: (Tiles(64, 8, 2),),
        120: (Tiles(64, 8, 2, 16640, 384), Tiles(32, 8, 2)),
    },
    ("states", 2): {0: (Tiles(64, 4, 2),)},
    ("output", 2): {0: (Tiles(64, 4, 2),)},
    ("heads", 2): {0: (Tiles(32, 4, 1),), 80: (Tiles(64, 8, 2),)},
    ("groups", 2): {0: (Tiles(64, 4, 2),), 80: (Tiles(64, 8, 2),)},
    ("step", 2): {0: (Tiles(16, 4, 1),)},
    ("prepare", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("scan", 4): {0: (Tiles(16, 4, 1),), 80: (Tiles(16, 8, 1),)},
    ("states", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("output", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("heads", 4): {0: (Tiles(16, 4, 1),), 80: (Tiles(16, 8, 1),)},
    ("groups", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("step", 4): {0: (Tiles(16, 4, 1),)},
}


class Call(NamedTuple):
    inputs: SSDInputs
    options: SSDOptions
    chunks: Chunks
    H: int
    G: int
    P: int
    N: int
    sizes: dict  # these four, which are constants of most kernels

    @classmethod
    def of(cls, inputs: SSDInputs, P: int, start: Start, options: SSDOptions) -> "Call":
        C, H = inputs.C, inputs.dt.shape[2]
        sizes = {"H": H, "G": C.shape[2], "P": P, "N": C.shape[3]}
        return cls(inputs, options, cut(C, start, options.chunk_size), **sizes, sizes=sizes)

    def tiles(self, stage: str) -> Tiles:
        C = self.inputs.C
        return choose_tiles(TILES[stage, C.element_size()], C.device, power_of_two(self.N))

    def scan_tiles(self, whole: bool) -> ScanTiles:
        """Of N and P, or of P alone, with the whole of N in a program."""
        tiles, BN = self.tiles("scan" if whole else "states"), power_of_two(self.N)
        BP, BN = min(tiles.tile, power_of_two(self.P)), BN if whole else min(tiles.tile, BN)
        of_head = cdiv(self.P, BP) * max(1, cdiv(self.N, BN))
        return ScanTiles(tiles, {"BP": BP, "BN": BN}, self.chunks.sequences * self.H * of_head)

    def tokens(self) -> Tensor:
        """[B, T, H, P] in the dtype of C."""
        return self.chunks.empty(self.chunks.B, self.chunks.T, self.H, self.P)

    def chunk_states(self) -> Tensor:
        return self.chunks.empty(self.chunks.count, self.H, self.P, self.N)

    def final_states(self, wanted: bool = True) -> Tensor:
        """A state for each sequence, or for none."""
        return self.chunks.empty(self.chunks.sequences if wanted else 0, self.H, self.P, self.N, dtype=torch.float32)

    def intra(self, heads: int) -> Tensor:
        """A matrix between the tokens of every chunk."""
        return self.chunks.empty(self.chunks.count, heads, self.chunks.size, self.chunks.size)
