"""What a device offers, and what is chosen by that alone."""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

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
        return _capability(self.name)


@functools.cache
def _capability(name: str) -> int:
    return int(name.removeprefix("sm_")) if name.startswith("sm_") else 0


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


def dot_precision(size: int, device: torch.device) -> str:
    """How the factors of a matrix product in fp32 are rounded, with inputs of `size` bytes: not at all for fp32. For
    inputs of two bytes only the inverses of the delta rule have such factors, and tf32 is finer than what their result
    is stored in. Chips by AMD have fp32 in their matrix cores, and not all of them tf32."""
    return "tf32" if size == 2 and target_of(device).capability > 0 else "ieee"
