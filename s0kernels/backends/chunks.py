"""Tokens cut into chunks, the same way for dense and packed batches.

Every sequence is padded at its end to whole chunks. Chunks are ordered by their number within the sequence, and within
that by sequence, longest first: the scan's step `c` then works on one contiguous slice of chunks and on the first
states, whatever the lengths.
"""

import itertools

import torch
from torch import Tensor

from s0kernels.backends.shared import gather_states, read_boundaries
from s0kernels.calls import Start, state_dtype


class Chunks:
    """The layout of one call. `size` is the chunk length C, `count` the number of chunks NC, `sequences` is NSEQ."""

    def __init__(self, tokens: Tensor, cu_seqlens: Tensor | None, size: int):
        """`tokens` is any [B, T, ...] input in the dtype that decides the arithmetic, `size` the longest chunk."""
        self.batch, self.length = tokens.shape[:2]
        self.dtype = state_dtype(tokens.dtype)
        #: an empty tensor to take dtype and device of states from
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
        #: per step of the scan: the slice of chunks it works on; it uses as many states, from the first on
        self.steps = [slice(a, b) for a, b in itertools.pairwise(starts)]
        self.count = starts[-1]

    def _slots(self, ends: list[int], order: list[int], alive: list[int]) -> Tensor:
        """Where token t of the packed row lies in [NC * C]; step c of the scan works on `alive[c]` chunks."""
        first_chunks = torch.tensor(list(itertools.accumulate(alive, initial=0)), dtype=torch.int64, device="cpu")
        slots = torch.empty(self.length, dtype=torch.int64, device="cpu")
        for place, i in enumerate(order):
            t = torch.arange(ends[i + 1] - ends[i], device="cpu")
            slots[ends[i] : ends[i + 1]] = (first_chunks[t // self.size] + place) * self.size + t % self.size
        return slots.to(self.like.device)

    def split(self, x: Tensor, dtype: torch.dtype, heads: int | None = None) -> Tensor:
        """[B, T, H, ...] to [NC, H, C, ...] in `dtype`, zeros at pads; each head repeated to make `heads` of them."""
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
        """[NC, H, C, ...] back to [B, T, H, ...]; groups of heads summed to make `heads` of them."""
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
        """What `gather_states` gives, in the order of the scan and in memory of their own: of zeros and of rows of a
        bank there is no second copy."""
        states = gather_states(start.state, start.indices, (self.sequences, *shape), self.like)
        fresh = start.state is None or start.indices is not None
        return states if fresh and self.order is None else self.sort(states)

    def sort(self, states: Tensor) -> Tensor:
        """States [NSEQ, ...] in the order of the scan, in memory of their own."""
        return (
            states.clone(memory_format=torch.contiguous_format)
            if self.order is None
            else states.index_select(0, self.order)
        )

    def unsort(self, states: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return states if self.order is None else torch.empty_like(states).index_copy_(0, self.order, states)


def decay_matrix(log_decay: Tensor) -> Tensor:
    """[..., C] to [..., C, C]: exp(sum of log_decay over j < l <= i) at (i, j), zero above the diagonal.

    The sums are accumulated rather than taken as differences of running sums, so a strong decay early in the chunk
    costs the later tokens no precision, and a log decay of -inf is a clean reset.
    """
    size = log_decay.shape[-1]
    sums = log_decay.unsqueeze(-1).expand(*log_decay.shape, size).tril(-1).cumsum(-2)
    above = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).triu(1)
    return sums.masked_fill_(above, -torch.inf).exp_()


def decay_matrix_grad(weights: Tensor) -> Tensor:
    """d(log_decay) [..., C] from dL/d(sum) [..., C, C] on and below the diagonal: sums over j < l <= i."""
    below = weights.flip(-2).cumsum(-2).flip(-2).tril(-1)
    return below.sum(-1)


def reverse_cumsum(x: Tensor) -> Tensor:
    return x.flip(-1).cumsum(-1).flip(-1)


def unit_lower_inverse(system: Tensor) -> Tensor:
    """(I + system)^-1 of a strictly lower triangular [..., C, C]. An entry (r, c) that is not finite reaches (i, j)
    with i >= r and j <= c alone."""
    inverse = _solve(system)
    if _is_finite(inverse):
        return inverse
    return _solve(_or_zero(system)) + reverse_cumsum((system * 0.0).cumsum(-2))


def _solve(system: Tensor) -> Tensor:
    eye = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
    return torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)


def lower_product(triangle: Tensor, rows: Tensor) -> Tensor:
    """`triangle @ rows` of a lower triangular matrix. What is not finite in a row reaches that row and those below it
    alone, which a product with zeros does not see to."""
    product = triangle @ rows
    if _is_finite(product):
        return product
    return triangle @ _or_zero(rows) + (rows * 0.0).cumsum(-2)


def upper_product(triangle: Tensor, rows: Tensor) -> Tensor:
    """The same of an upper triangular matrix, and the rows above."""
    product = triangle @ rows
    if _is_finite(product):
        return product
    return triangle @ _or_zero(rows) + (rows * 0.0).flip(-2).cumsum(-2).flip(-2)


def _is_finite(x: Tensor) -> bool:
    """Known at once on a CPU; elsewhere it would have to be waited for, and False is always right."""
    return x.device.type == "cpu" and bool(x.sum().isfinite())


def _or_zero(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)
