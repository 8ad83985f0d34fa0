"""Initial states: how kernels are told where they lie, and how their gradients come back to the shape they had."""

import triton
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.launch import cdiv, kernel, launch
from s0kernels.backends.triton.common.tiles import Tiles


def state_strides(state: Tensor | None) -> tuple[int, ...]:
    """(from one sequence's state to the next, heads, rows, columns); 0 first where all share one."""
    if state is None:
        return (0, 0, 0, 0)
    return state.stride() if state.dim() == 4 else (0, *state.stride())


def bank_size(state: Tensor | None) -> int:
    return state.shape[0] if state is not None and state.dim() == 4 else 1


@triton.jit
def state_row(indices, i_q, S):
    """(row, whether the state is zero, whether there is none): without indices the row of a sequence is its number."""
    if indices is None:
        return i_q.to(tl.int64), False, False
    else:
        row = tl.load(indices + i_q).to(tl.int64)
        inside = (row >= 0) & (row < S)
        return tl.where(inside, row, 0), row == -1, (row < -1) | (row >= S)


@kernel
def state_grad_kernel(
    dh,  # [NSEQ, D] in fp32, the gradient of every sequence's initial state
    indices,  # None, or the row of each sequence
    dh0,  # [rows, D]
    NSEQ,
    D,
    tiles,
    BD: tl.constexpr,
):
    """Sums over the sequences that share a state, in their order. A program per (tile of D, row)."""
    i_d, i_row = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    o_d = i_d.to(tl.int64) * BD + tl.arange(0, BD)
    b_sum = tl.zeros([BD], tl.float32)
    for i_q in range(NSEQ):
        mine = True
        if indices is not None:
            mine = tl.load(indices + i_q) == i_row
        b_sum += tl.load(dh + tl.cast(i_q, tl.int64) * D + o_d, mask=(o_d < D) & mine, other=0.0)
    tl.store(dh0 + i_row.to(tl.int64) * D + o_d, b_sum, mask=o_d < D)


def reduce_state_grad(dh: Tensor, shape: tuple[int, ...], indices: Tensor | None) -> Tensor:
    """[NSEQ, ...] to the shape the state was given in."""
    if indices is None and dh.shape[0] == (shape[0] if len(shape) == dh.dim() else 1):
        return dh.view(shape)
    dh0 = dh.new_empty(shape)
    rows = shape[0] if indices is not None else 1
    if rows and dh0.numel():
        size, block = dh0.numel() // rows, Tiles(1024, 4, 2)
        tiles = cdiv(size, block.tile)
        launch(state_grad_kernel, tiles * rows, dh, indices, dh0, dh.shape[0], size, tiles, BD=block.tile, tiles=block)
    return dh0
