"""Split a batch into sequences, and find the state that each one starts from; see `s0kernels.calls.Start`."""

import itertools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from s0kernels.backends.shared import gather_states, read_boundaries, shorten
from s0kernels.calls import Start, state_dtype


def starting_states(start: Start, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Check the values of `start`, and return the starting states [NSEQ, *shape]. `like` is an input [B, T, ...]."""
    if not torch.compiler.is_compiling():
        check_values(like.shape[1], start.cu_seqlens, start.indices, start.state)
    empty = like.new_empty(0, dtype=state_dtype(like.dtype))
    return gather_states(start.state, start.indices, (start.sequences(like.shape[0]), *shape), empty)


def scan_each(
    scan: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], states: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run a dense `scan(*inputs, states)` on a batch, or on one packed sequence after the other."""
    if cu_seqlens is None:
        return scan(*inputs, states)
    ends = read_boundaries(cu_seqlens, inputs[0].shape[1])
    if len(ends) == 1:
        return scan(*inputs, states.new_zeros(1, *states.shape[1:]))[0], states
    results = [
        scan(*(x[:, start:stop] for x in inputs), states[i : i + 1])
        for i, (start, stop) in enumerate(itertools.pairwise(ends))
    ]
    return torch.cat([output for output, _ in results], dim=1), torch.cat([final for _, final in results])


def _reads_values(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or os.environ.get("S0KERNELS_CHECK") == "1"


def check_values(
    length: int, cu_seqlens: Tensor | None, state_indices: Tensor | None, bank: Tensor | None, unique: bool = False
) -> None:
    """Raise ValueError if the values of the arguments are invalid. GPU tensors are read only if S0KERNELS_CHECK=1."""
    if cu_seqlens is not None and _reads_values(cu_seqlens):
        read_boundaries(cu_seqlens, length)
    if state_indices is not None and _reads_values(state_indices):
        assert bank is not None  # validation has checked that
        rows, size = state_indices.tolist(), bank.shape[0]
        if any(row < -1 or row >= size for row in rows):
            raise ValueError(
                f"state_indices must lie in [-1, {size - 1}] for a bank of {size} states, got {shorten(rows)}"
            )
        if unique:
            used = [row for row in rows if row >= 0]
            if len(set(used)) != len(used):
                raise ValueError(f"state_indices must not name a row twice in one step, got {shorten(rows)}")
