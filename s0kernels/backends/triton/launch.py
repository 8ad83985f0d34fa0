"""One place that every launch goes through, so that launches can be counted and compiled ahead of time."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Target(NamedTuple):
    """What decides about sizes and schedules: compute capability (80, 90, 100) and multiprocessors."""

    capability: int
    processors: int


class Tiles(NamedTuple):
    """Size of a kernel's tile (of what, the table says), warps and pipeline stages."""

    tile: int
    warps: int
    stages: int


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


@functools.cache
def _properties(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


def target_of(device: torch.device) -> Target:
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return Target(90, 132)  # the interpreter
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


def choose_tiles(table: dict[int, Tiles], device: torch.device) -> Tiles:
    """The entry of the highest capability that the device has."""
    capability = target_of(device).capability
    return table[max(least for least in table if least <= capability)]


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
    global _recorded, _assumed
    before = _recorded, _assumed
    _recorded, _assumed = [], target
    try:
        yield _recorded
    finally:
        _recorded, _assumed = before


def strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()


def power_of_two(size: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(size))
