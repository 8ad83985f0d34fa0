"""One place that every launch goes through, so that launches can be counted and compiled ahead of time."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from s0kernels.hardware import CHIPS, target_name


class Target(NamedTuple):
    """What a device offers, as far as sizes, schedules and precision depend on it: what Triton compiles for (sm_90,
    gfx942), multiprocessors, the bytes of shared memory that one program can have, and the threads of a warp."""

    name: str
    processors: int
    shared: int
    warp: int

    @property
    def capability(self) -> int:
        """90 for sm_90; 0 on a chip by AMD."""
        return int(self.name.removeprefix("sm_")) if self.name.startswith("sm_") else 0


class Tiles(NamedTuple):
    """Size of a kernel's tile (of what, the table says), warps and pipeline stages. Where there is another choice for a
    chip with less shared memory, `base` and `per_column` tell what this one takes: at most base + per_column * width
    bytes, width being that of the states (K, or N), a power of two. Compiling ahead of time holds them to it."""

    tile: int
    warps: int
    stages: int
    base: int = 0
    per_column: int = 0


#: By compute capability, and 0 for chips by AMD: tiles in the order in which they are preferred.
Table = dict[int, tuple[Tiles, ...]]


class Launch(NamedTuple):
    """A launch that was recorded instead of run."""

    kernel: triton.runtime.JITFunction
    programs: int
    arguments: tuple
    constants: dict
    tiles: Tiles


#: Set while launches are recorded.
_recorded: list[Launch] | None = None
_assumed: Target | None = None


def known_target(name: str) -> Target:
    """Of a chip in `hardware.CHIPS`, which need not be here."""
    chip = CHIPS[name]
    return Target(chip.target, chip.processors, chip.shared, chip.warp)


@functools.cache
def _properties(index: int) -> Target:
    found = torch.cuda.get_device_properties(index)
    shared = 65536  # not every torch for ROCm tells; no chip by AMD has less
    for field in ("shared_memory_per_block", "shared_memory_per_block_optin"):
        shared = getattr(found, field, shared)
    return Target(target_name(found, torch.version.hip), found.multi_processor_count, shared, found.warp_size)


def target_of(device: torch.device) -> Target:
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return known_target("sm_90")  # the interpreter
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


def choose_tiles(table: Table, device: torch.device, width: int = 0) -> Tiles:
    """Of the entry of the highest capability that the device has, the first that its shared memory has room for; the
    last where none has."""
    target = target_of(device)
    choices = table[max(least for least in table if least <= target.capability)]
    return next((x for x in choices if x.base + x.per_column * width <= target.shared), choices[-1])


def dot_precision(size: int, device: torch.device) -> str:
    """How the factors of a matrix product in fp32 are rounded, with inputs of `size` bytes: not at all for fp32. For
    inputs of two bytes only the inverses of the delta rule have such factors, and tf32 is finer than what their result
    is stored in. Chips by AMD have fp32 in their matrix cores, and not all of them tf32."""
    return "tf32" if size == 2 and target_of(device).capability > 0 else "ieee"


def forced_schedule() -> str | None:
    """The schedule of forwards that the environment asks for: fused, split, or None for the better one."""
    forced = os.environ.get("S0KERNELS_TRITON_SCHEDULE")
    if forced not in (None, "fused", "split"):
        raise ValueError(f"S0KERNELS_TRITON_SCHEDULE must be fused or split, got {forced!r}")
    return forced


def launch(kernel, programs: int, *arguments, tiles: Tiles, **constants) -> None:
    """Run `programs` instances of a kernel; none is no launch."""
    if programs == 0:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, programs, arguments, constants, tiles))
        return
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **constants, num_warps=tiles.warps, num_stages=tiles.stages)


@contextlib.contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Launches, as they are chosen on `target`, go into a list instead."""
    global _recorded
    before = _recorded
    _recorded = []
    try:
        with assuming(target):
            yield _recorded
    finally:
        _recorded = before


@contextlib.contextmanager
def assuming(target: Target) -> Iterator[None]:
    """Everything is chosen as on `target`."""
    global _assumed
    before = _assumed
    _assumed = target
    try:
        yield
    finally:
        _assumed = before


def strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()


def power_of_two(size: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(size))
