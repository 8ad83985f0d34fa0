"""What every stage of the gated delta rule is told of a call."""

from typing import NamedTuple

import torch
from torch import Tensor

from s0kernels.backends.triton.common.chunks import Chunks, cut
from s0kernels.backends.triton.common.launch import cdiv, power_of_two
from s0kernels.backends.triton.common.targets import target_of
from s0kernels.backends.triton.common.tiles import ScanTiles, Table, Tiles, choose_tiles
from s0kernels.calls import DeltaInputs, DeltaOptions, Start

#: By stage and bytes of the dtype: the tile (of V, where there is one), warps, pipeline stages. Those of 90
#: were the best of a sweep. What each takes of a chip: `python -m s0kernels aot`.
TILES: dict[tuple[str, int], Table] = {
    ("prepare", 2): {
        0: (Tiles(0, 4, 1),),
        80: (Tiles(0, 8, 1),),
        90: (Tiles(0, 4, 1, registers=128),),
        120: (Tiles(0, 8, 1),),
    },
    ("scan", 2): {
        0: (Tiles(32, 4, 1),),
        80: (Tiles(64, 8, 2, 40960, 384), Tiles(32, 8, 1)),
        90: (Tiles(64, 4, 2),),
        100: (Tiles(64, 8, 2, 40960, 750), Tiles(32, 8, 2)),
        120: (Tiles(64, 8, 2, 40960, 384), Tiles(32, 8, 1)),
    },
    ("descriptor scan", 2): {0: (Tiles(64, 4, 3, 75264, 896), Tiles(64, 4, 2))},
    ("descriptor scan bwd", 2): {0: (Tiles(64, 4, 3, 83968, 896), Tiles(64, 4, 2))},
    ("output", 2): {0: (Tiles(64, 4, 2),), 90: (Tiles(128, 4, 2),), 100: (Tiles(64, 4, 2),)},
    ("intra", 2): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 2),), 90: (Tiles(64, 4, 3),), 100: (Tiles(32, 4, 1),)},
    ("inputs", 2): {
        0: (Tiles(32, 4, 1),),
        80: (Tiles(32, 8, 2),),
        90: (Tiles(32, 4, 3, 8192, 1000), Tiles(32, 8, 2)),
        100: (Tiles(32, 8, 1),),
    },
    ("step", 2): {0: (Tiles(32, 4, 1),)},
    ("prepare", 4): {0: (Tiles(0, 4, 1),), 80: (Tiles(0, 8, 1),)},
    ("scan", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("output", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("intra", 4): {0: (Tiles(16, 4, 1),), 80: (Tiles(16, 8, 1),)},
    ("inputs", 4): {0: (Tiles(16, 4, 1),), 80: (Tiles(16, 8, 1),)},
    ("step", 4): {0: (Tiles(32, 4, 1),)},
}


def _tiles(stage: str, q: Tensor, BK: int, sharing: bool = False) -> Tiles:
    return choose_tiles(TILES[stage, q.element_size()], q.device, BK, sharing)


def chunk_size(q: Tensor, options: DeltaOptions) -> int:
    """The most tokens of a chunk; 0 is the longest that kernels take. Keys of more than 128 entries get 32 tokens on
    every NVIDIA GPU but Hopper. On sm_80 longer chunks spill kilobytes, and on sm_86, sm_89 and sm_120 they do not fit
    into shared memory. For sm_100, Triton 3.6 to 3.8 silently make nothing of kernels in which products of 64 rows have
    256 columns."""
    capability = target_of(q.device).capability
    short = q.shape[-1] > 128 and capability >= 80 and not 90 <= capability < 100
    return min(options.chunk_size or 32, 32) if short else options.chunk_size


class Call(NamedTuple):
    inputs: DeltaInputs
    options: DeltaOptions
    chunks: Chunks
    H: int
    HV: int
    K: int
    V: int
    constants: dict  # of all kernels over chunks: H, HV, K, BK, and those of chunks
    scan_tiles: ScanTiles

    @classmethod
    def of(cls, inputs: DeltaInputs, V: int, start: Start, options: DeltaOptions) -> "Call":
        (_, _, H, K), HV = inputs.q.shape, inputs.g.shape[2]
        chunks = cut(inputs.q, start, chunk_size(inputs.q, options))
        BK = power_of_two(K)
        constants = {"H": H, "HV": HV, "K": K, "BK": BK, **chunks.constants}
        tiles = _tiles("scan", inputs.q, BK)
        BV = min(tiles.tile, power_of_two(V))
        scan_tiles = ScanTiles(tiles, {"BV": BV}, chunks.sequences * HV * cdiv(V, BV))
        return cls(inputs, options, chunks, H, HV, K, V, constants, scan_tiles)

    def tiles(self, stage: str, sharing: bool = False) -> Tiles:
        return _tiles(stage, self.inputs.q, self.constants["BK"], sharing)

    def tokens(self) -> Tensor:
        """[B, T, HV, V] in the dtype of q."""
        return self.chunks.empty(self.chunks.B, self.chunks.T, self.HV, self.V)

    def chunk_states(self) -> Tensor:
        """S^T of every chunk."""
        return self.chunks.empty(self.chunks.count, self.HV, self.V, self.K)

    def final_states(self, wanted: bool = True) -> Tensor:
        """A state for each sequence, or for none."""
        sequences = self.chunks.sequences if wanted else 0
        return self.chunks.empty(sequences, self.HV, self.K, self.V, dtype=torch.float32)

    def intra(self) -> Tensor:
        """A matrix between the tokens of every chunk."""
        return self.chunks.empty(self.chunks.count, self.HV, self.chunks.size, self.chunks.size)
