"""Functions shared by backends and references: packed sequences, states by index, dt, and amplified rounding."""

import itertools

import torch
from torch import Tensor

from s0kernels.calls import SSDInputs, SSDOptions, state_dtype

#: If the sum of squares of a row of the delta rule's inverse W exceeds this, the chunk is computed in higher precision.
#: The root of that sum is about the factor by which W amplifies rounding errors. With normalised keys and beta up to 1
#: the sum stays below 6. With beta up to 2 it is about 4 if keys are independent, and 4 times the chunk length if they
#: are nearly equal.
AMPLIFIES = 8.0


def read_boundaries(cu_seqlens: Tensor, length: int) -> list[int]:
    """Read `cu_seqlens` to the host (on a GPU this synchronises), and check that it starts at 0, never decreases and
    ends at T."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != length:
        raise ValueError(f"cu_seqlens must start at 0 and end at T = {length}, got {shorten(ends)}")
    if any(b < a for a, b in itertools.pairwise(ends)):
        raise ValueError(f"cu_seqlens must not decrease, got {shorten(ends)}")
    return ends


def shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 16 else f"[{', '.join(map(str, values[:16]))}, ... ({len(values)} values)]"


def process_dt(inputs: SSDInputs, options: SSDOptions) -> Tensor:
    """Return clamp(softplus(dt + dt_bias), dt_limit) in the dtype of states. softplus is logaddexp(x, 0), which neither
    overflows nor rounds to 0."""
    return _before_limits(inputs, options).clamp(*options.dt_limit)


def _before_limits(inputs: SSDInputs, options: SSDOptions) -> Tensor:
    dt = _raw_dt(inputs)
    return torch.logaddexp(dt, torch.zeros_like(dt)) if options.dt_softplus else dt


def _raw_dt(inputs: SSDInputs) -> Tensor:
    dt = inputs.dt.to(state_dtype(inputs.C.dtype))
    return dt if inputs.dt_bias is None else dt + inputs.dt_bias.to(dt.dtype)


def silu_slope(z: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


def dt_grad(ddt: Tensor, inputs: SSDInputs, options: SSDOptions) -> Tensor:
    """Propagate the gradient of the processed dt through clamp (bounds included) and softplus to dt + dt_bias."""
    before = _before_limits(inputs, options)
    ddt = torch.where((before >= options.dt_min) & (before <= options.dt_max), ddt, 0.0)
    return ddt * torch.sigmoid(_raw_dt(inputs)) if options.dt_softplus else ddt


def gather_states(initial_state: Tensor | None, state_indices: Tensor | None, shape: tuple, like: Tensor) -> Tensor:
    """Return the starting state of every sequence, [NSEQ, ...]: a view if possible, a copy for a bank, zeros for None.

    An index of -1 gives zeros. Any other index outside the bank gives NaN. So a bad index cannot give a plausible
    result, even on a GPU, where the host does not read it.
    """
    if initial_state is None:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    if initial_state.dim() == len(shape) - 1:
        return initial_state.expand(shape)
    if state_indices is None:
        return initial_state
    size = initial_state.shape[0]
    index = state_indices.long()
    trailing = (-1,) + (1,) * (len(shape) - 1)
    rows = initial_state.new_zeros(shape) if size == 0 else initial_state.index_select(0, index.clamp(0, size - 1))
    rows.masked_fill_((index == -1).view(trailing), 0.0)  # in place: no other tensor shares these rows
    return rows.masked_fill_(((index < -1) | (index >= size)).view(trailing), float("nan"))


def store_states(state: Tensor, state_indices: Tensor | None, new: Tensor) -> None:
    """Write the states [B, ...] of one step back in place: row by row, or to the addressed rows of a pool.

    Rows with index -1 (or outside the pool) store nothing. Selecting the other rows would need their number on the
    host. So these rows repeat the write of a stored row, or rewrite row 0 with itself.
    """
    if state_indices is None:
        state.copy_(new)
        return
    if state.shape[0] == 0 or new.shape[0] == 0:
        return
    index = state_indices.long()
    stored = (index >= 0) & (index < state.shape[0])
    first = stored.to(torch.int64).argmax(0, keepdim=True)  # [1]: the host would read an index without dimensions
    stand_in = torch.where(stored.any(), index.index_select(0, first), 0)
    value = torch.where(stored.any(), new.index_select(0, first), state[:1])
    shape = (-1,) + (1,) * (new.dim() - 1)
    state.index_copy_(0, torch.where(stored, index, stand_in), torch.where(stored.view(shape), new, value))


def reduce_state_grad(dstate: Tensor, initial_state_shape: tuple, state_indices: Tensor | None) -> Tensor:
    """Reduce gradients [NSEQ, ...] to the shape of the given state, by sums over sequences in a fixed order."""
    if len(initial_state_shape) == dstate.dim() - 1:
        return dstate.sum(0)
    if state_indices is None:
        return dstate
    out = dstate.new_zeros(initial_state_shape)
    size = initial_state_shape[0]
    if size == 0 or dstate.shape[0] == 0:
        return out
    index = state_indices.long()
    used = (index >= 0) & (index < size)
    dstate = torch.where(used.view((-1,) + (1,) * (dstate.dim() - 1)), dstate, 0.0)
    index = index.clamp(0, size - 1)
    # Both orders are fixed: index_add_ walks the rows in turn on a CPU, index_put_ sorts them on a GPU (where
    # index_add_ would use atomics; on a CPU it is index_put_ that is not ordered).
    if dstate.device.type == "cpu":
        return out.index_add_(0, index, dstate)
    return out.index_put_((index,), dstate, accumulate=True)


def as_gradient(grad: Tensor, of: Tensor | None) -> Tensor:
    """Return a gradient that is contiguous, as torch.compile assumes, and has the dtype of the input (None: keep the
    dtype)."""
    return grad.to(grad.dtype if of is None else of.dtype).contiguous()
