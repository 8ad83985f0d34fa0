"""One place that every launch goes through, so that launches can be counted and compiled ahead of time."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from s0kernels.backends.triton.common.targets import Target, assuming
from s0kernels.backends.triton.common.tiles import Tiles


class Launch(NamedTuple):
    """A launch that was recorded instead of run."""

    kernel: triton.runtime.JITFunction
    programs: int
    arguments: tuple
    constants: dict
    tiles: Tiles


#: the variable of the environment that forces one
SCHEDULE = "S0KERNELS_TRITON_SCHEDULE"
#: Arguments of kernels that change from call to call: nothing is compiled anew where they are 1 or multiples of 16.
VARYING = ["T", "NSEQ", "S", "chunks", "programs", "products"]
#: Set while launches are recorded.
_recorded: list[Launch] | None = None


def kernel(function: Callable) -> triton.runtime.JITFunction:
    return triton.jit(do_not_specialize=VARYING)(function)


def forced_schedule() -> str | None:
    """The schedule of forwards that the environment asks for: fused, split, or None for the better one."""
    forced = os.environ.get(SCHEDULE)
    if forced not in (None, "fused", "split"):
        raise ValueError(f"{SCHEDULE} must be fused or split, got {forced!r}")
    return forced


def launch(function, programs: int, *arguments, tiles: Tiles, **constants) -> None:
    """Run `programs` instances of the kernel `function`; none is no launch."""
    if programs == 0:
        return
    if _recorded is not None:
        _recorded.append(Launch(function, programs, arguments, constants, tiles))
        return
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        function[(programs,)](*arguments, **constants, **tiles.options())


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


def strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()


def cdiv(size: int, tile: int) -> int:
    """Tiles that cover a size; Triton's own function is for kernels as well, and slower."""
    return -(-size // tile)


def power_of_two(size: int, least: int = 16) -> int:
    """Triton's own function takes a microsecond, and a call asks for ten of these."""
    return max(least, 1 << (size - 1).bit_length())


def empty_grads(inputs: NamedTuple, names: frozenset[str]) -> dict[str, Tensor]:
    """Memory for the gradients of those inputs, contiguous."""
    wanted = {name: x for name, x in inputs._asdict().items() if name in names}
    return {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in wanted.items()}
