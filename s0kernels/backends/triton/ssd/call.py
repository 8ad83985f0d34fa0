"""What every stage of Mamba-2 SSD is told of a call."""

from typing import NamedTuple

import torch
from torch import Tensor

from s0kernels.backends.triton.common.chunks import Chunks, cut
from s0kernels.backends.triton.common.launch import cdiv, power_of_two
from s0kernels.backends.triton.common.targets import target_of
from s0kernels.backends.triton.common.tiles import ScanTiles, Table, Tiles, choose_tiles
from s0kernels.calls import SSDInputs, SSDOptions, Start

#: By stage and bytes of the dtype: the tile (of N in `prepare`, `states` and `groups`, of P in `output` and
#: `heads`), warps, pipeline stages. What each takes of a chip: `python -m s0kernels aot`.
TILES: dict[tuple[str, int], Table] = {
    ("prepare", 2): {0: (Tiles(64, 4, 2),), 90: (Tiles(64, 4, 3),)},
    ("states", 2): {
        0: (Tiles(64, 4, 2),),
        80: (Tiles(128, 4, 3),),
        90: (Tiles(256, 8, 3),),
        100: (Tiles(128, 8, 3),),
        120: (Tiles(128, 4, 2),),
    },
    ("output", 2): {0: (Tiles(64, 4, 2),), 80: (Tiles(128, 4, 2),), 90: (Tiles(128, 4, 3),), 120: (Tiles(128, 4, 2),)},
    ("heads", 2): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 4, 2),), 90: (Tiles(64, 8, 3),), 120: (Tiles(32, 4, 2),)},
    ("groups", 2): {0: (Tiles(64, 4, 2),), 80: (Tiles(128, 4, 2),), 90: (Tiles(128, 8, 3),), 120: (Tiles(128, 4, 2),)},
    ("step", 2): {0: (Tiles(16, 4, 1),)},
    ("prepare", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("states", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("output", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("heads", 4): {0: (Tiles(16, 4, 1),), 80: (Tiles(16, 8, 1),)},
    ("groups", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("step", 4): {0: (Tiles(16, 4, 1),)},
}
#: bytes of shared memory that kernels for chunks of 128 tokens ask of a chip
ROOM = 160_000


def longest_chunk(like: Tensor) -> int:
    """Of chunks of 128 tokens, states take half of the memory that they take of chunks of 64, and states are most of
    what the kernels move; there is nothing to gain where there are no more than 64 tokens."""
    if like.element_size() > 2:
        return 32
    target = target_of(like.device)
    return 128 if target.capability >= 90 and target.shared >= ROOM and like.shape[1] > 64 else 64


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
        return cls(inputs, options, cut(C, start, options.chunk_size, longest_chunk(C)), **sizes, sizes=sizes)

    def tiles(self, stage: str) -> Tiles:
        C = self.inputs.C
        return choose_tiles(TILES[stage, C.element_size()], C.device, power_of_two(self.N))

    def scan_tiles(self, directions: int = 1) -> ScanTiles:
        """Of P and N, for scans that run side by side. Wide tiles of N read the least, narrow ones leave the fewest
        multiprocessors idle."""
        tiles, enough = self.tiles("states"), target_of(self.inputs.C.device).processors * 2 // 3
        BP, BN = min(64, tiles.tile, power_of_two(self.P)), min(tiles.tile, power_of_two(self.N))
        of_state = self.chunks.sequences * self.H * cdiv(self.P, BP)
        while BN > 64 and directions * of_state * cdiv(self.N, BN) < enough:
            BN //= 2
        return ScanTiles(tiles, {"BP": BP, "BN": BN}, of_state * max(1, cdiv(self.N, BN)))

    def tokens(self) -> Tensor:
        """[B, T, H, P] in the dtype of C."""
        return self.chunks.empty(self.chunks.B, self.chunks.T, self.H, self.P)

    def chunk_states(self) -> Tensor:
        return self.chunks.empty(self.chunks.count, self.H, self.P, self.N)

    def final_states(self, wanted: bool = True) -> Tensor:
        """A state for each sequence, or for none."""
        return self.chunks.empty(self.chunks.sequences if wanted else 0, self.H, self.P, self.N, dtype=torch.float32)

    def intra(self, heads: int, dtype: torch.dtype | None = None) -> Tensor:
        """A matrix between the tokens of every chunk."""
        return self.chunks.empty(self.chunks.count, heads, self.chunks.size, self.chunks.size, dtype=dtype)
