"""Tables of tiles, and which entry a device gets."""

from typing import NamedTuple

import torch

from s0kernels.backends.triton.common.targets import target_of


class Tiles(NamedTuple):
    """Size of a kernel's tile (of what, the table says), warps and pipeline stages. Where there is another choice for a
    chip with less shared memory, `base` and `per_column` tell what this one takes: at most base + per_column * width
    bytes, width being that of the states (K, or N), a power of two. Compiling ahead of time holds them to it.
    `registers`, on chips by NVIDIA: the most that a thread may have, so that more programs share a multiprocessor; 0 is
    no limit."""

    tile: int
    warps: int
    stages: int
    base: int = 0
    per_column: int = 0
    registers: int = 0

    def options(self) -> dict[str, int]:
        """How a kernel is to be compiled."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options | {"maxnreg": self.registers} if self.registers else options


class ScanTiles(NamedTuple):
    """How an inter-chunk scan runs: its tiles as constants of the kernel, and its programs, one for each tile of each
    head's state in each sequence."""

    tiles: Tiles
    blocks: dict
    programs: int


#: By compute capability, and 0 for chips by AMD: tiles in the order in which they are preferred.
Table = dict[int, tuple[Tiles, ...]]
#: bytes of shared memory that the system takes for each program beside its own
_RESERVED = 1024


def choose_tiles(table: Table, device: torch.device, width: int = 0, sharing: bool = False) -> Tiles:
    """Of the entry of the highest capability that the device has, the first that its shared memory has room for (twice,
    where two programs are to share a multiprocessor); the last where none has."""
    target = target_of(device)
    capability = target.capability
    choices = table[max([least for least in table if least <= capability])]
    if len(choices) == 1:
        return choices[0]
    room = (target.shared - _RESERVED) // 2 if sharing else target.shared
    return next((x for x in choices if x.base + x.per_column * width <= room), choices[-1])
