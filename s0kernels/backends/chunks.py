"""Cut tokens into chunks, in the same way for dense and packed batches.

Every sequence is padded at its end to whole chunks. Chunks are ordered by their index within the sequence, and then by
sequence, longest first. So step `c` of the scan works on one contiguous slice of chunks and on the first states,
whatever the lengths.
"""

import itertools

import torch
from torch import Tensor

from s0kernels.backends.shared import gather_states, read_boundaries
from s0kernels.calls import Start, state_dtype


class Chunks:
    """The chunks of one call. `size` is the chunk length C, `count` the number of chunks NC, `sequences` is NSEQ."""

    def __init__(self, tokens: Tensor, cu_seqlens: Tensor | None, size: int):
        """`tokens` is any [B, T, ...] input whose dtype decides the dtype of the arithmetic; `size` is the maximum
        chunk length."""
        self.batch, self.length = tokens.shape[:2]
        self.dtype = state_dtype(tokens.dtype)
        #: an empty tensor with the dtype and device of states
        self.like = tokens.new_empty(0, dtype=self.dtype)
        if cu_seqlens is None:
            self.order = self.slots = None
            self.sequences = self.batch
            self.size = max(1, min(size, self.length))
            alive = [self.batch] * -(-self.length // self.size)
        else:
            ends = read_boundaries(cu_seqlens, self.length)
            lengths = [stop - start for start, stop in itertools.pairwise(ends)]
            order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
            self.order = torch.tensor(order, dtype=torch.int64, device=tokens.device)
            self.sequences = len(lengths)
            self.size = max(1, min(size, max(lengths, default=0)))
            per_sequence = [-(-length // self.size) for length in lengths]
            alive = [sum(n > step for n in per_sequence) for step in range(max(per_sequence, default=0))]
            self.slots = self._slots(ends, order, alive)
        starts = list(itertools.accumulate(alive, initial=0))
        #: for each step of the scan: its slice of chunks. It uses the first states, as many as the slice has chunks
        self.steps = [slice(a, b) for a, b in itertools.pairwise(starts)]
        self.count = starts[-1]

    def _slots(self, ends: list[int], order: list[int], alive: list[int]) -> Tensor:
        """Return the index in [NC * C] of every token of the packed row. Step c of the scan works on `alive[c]`
        chunks."""
        first_chunks = torch.tensor(list(itertools.accumulate(alive, initial=0)), dtype=torch.int64, device="cpu")
        slots = torch.empty(self.length, dtype=torch.int64, device="cpu")
        for place, i in enumerate(order):
            t = torch.arange(ends[i + 1] - ends[i], device="cpu")
            slots[ends[i] : ends[i + 1]] = (first_chunks[t // self.size] + place) * self.size + t % self.size
        return slots.to(self.like.device)

    def split(self, x: Tensor, dtype: torch.dtype, heads: int | None = None) -> Tensor:
        """Cut [B, T, H, ...] into [NC, H, C, ...] in `dtype`, with zeros at pads. Heads are repeated to `heads`
        heads."""
        tail = x.shape[2:]
        if self.slots is None:
            full = len(self.steps) * self.size
            if full != self.length:
                x = torch.nn.functional.pad(x, (0, 0) * len(tail) + (0, full - self.length))
            x = x.reshape(self.batch, len(self.steps), self.size, *tail).transpose(0, 1)
            x = x.reshape(self.count, self.size, *tail)
        else:
            flat = x.new_zeros(self.count * self.size, *tail)
            x = flat.index_copy_(0, self.slots, x[0]).view(self.count, self.size, *tail)
        x = x.transpose(1, 2)
        if heads is not None and heads != tail[0]:
            x = x.repeat_interleave(heads // tail[0], dim=1)
        return x.to(dtype).contiguous()

    def join(self, x: Tensor, dtype: torch.dtype, heads: int | None = None) -> Tensor:
        """Join [NC, H, C, ...] to [B, T, H, ...]. Groups of heads are summed to `heads` heads."""
        if heads is not None and heads != x.shape[1]:
            x = x.unflatten(1, (heads, -1)).sum(2)
        x = x.transpose(1, 2)
        tail = x.shape[2:]
        if self.slots is None:
            full = len(self.steps) * self.size
            x = x.reshape(len(self.steps), self.batch, self.size, *tail).transpose(0, 1)
            x = x.reshape(self.batch, full, *tail)[:, : self.length]
        else:
            x = x.reshape(self.count * self.size, *tail).index_select(0, self.slots)[None]
        return x.to(dtype).contiguous()

    def starting_states(self, start: Start, shape: tuple[int, ...]) -> Tensor:
        """Return the states of `gather_states` in the order of the scan, in new memory. Zeros and rows of a bank are
        not copied twice."""
        states = gather_states(start.state, start.indices, (self.sequences, *shape), self.like)
        fresh = start.state is None or start.indices is not None
        return states if fresh and self.order is None else self.sort(states)

    def sort(self, states: Tensor) -> Tensor:
        """Return states [NSEQ, ...] in the order of the scan, in new memory."""
        return (
            states.clone(memory_format=torch.contiguous_format)
            if self.order is None
            else states.index_select(0, self.order)
        )

    def unsort(self, states: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return states if self.order is None else torch.empty_like(states).index_copy_(0, self.order, states)


def decay_matrix(log_decay: Tensor) -> Tensor:
    """Map [..., C] to [..., C, C]: exp(sum of log_decay over j < l <= i) at (i, j), zero above the diagonal.

    The sums are accumulated; they are not differences of running sums. So a strong decay early in the chunk does not
    reduce the precision of later tokens, and a log decay of -inf is a clean reset.
    """
    size = log_decay.shape[-1]
    sums = log_decay.unsqueeze(-1).expand(*log_decay.shape, size).tril(-1).cumsum(-2)
    above = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).triu(1)
    return sums.masked_fill_(above, -torch.inf).exp_()


def decay_matrix_grad(weights: Tensor) -> Tensor:
    """Return d(log_decay) [..., C] from dL/d(sum) [..., C, C] on and below the diagonal, as sums over j < l <= i."""
    below = weights.flip(-2).cumsum(-2).flip(-2).tril(-1)
    return below.sum(-1)


def reverse_cumsum(x: Tensor) -> Tensor:
    return x.flip(-1).cumsum(-1).flip(-1)


def unit_lower_inverse(system: Tensor) -> Tensor:
    """Return (I + system)^-1 for a strictly lower triangular system [..., C, C]. An entry (r, c) that is not finite
    affects only entries (i, j) with i >= r and j <= c."""
    inverse = _solve(system)
    if _is_finite(inverse):
        return inverse
    return _solve(_or_zero(system)) + reverse_cumsum((system * 0.0).cumsum(-2))


def _solve(system: Tensor) -> Tensor:
    eye = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
    return torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)


def lower_product(triangle: Tensor, rows: Tensor) -> Tensor:
    """Return `triangle @ rows` for a lower triangular matrix. A value that is not finite in a row affects only that row
    and the rows below. An ordinary product would multiply it by zeros, and spread NaN."""
    product = triangle @ rows
    if _is_finite(product):
        return product
    return triangle @ _or_zero(rows) + (rows * 0.0).cumsum(-2)


def upper_product(triangle: Tensor, rows: Tensor) -> Tensor:
    """Like `lower_product`, for an upper triangular matrix and the rows above."""
    product = triangle @ rows
    if _is_finite(product):
        return product
    return triangle @ _or_zero(rows) + (rows * 0.0).flip(-2).cumsum(-2).flip(-2)


def _is_finite(x: Tensor) -> bool:
    """Whether all values are finite. On other devices than a CPU the answer would need a synchronisation, so it is
    False, which is always safe."""
    return x.device.type == "cpu" and bool(x.sum().isfinite())


def _or_zero(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)
