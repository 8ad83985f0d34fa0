"""What kernels share: where sequences and their chunks lie, tiles, decays and triangular inverses of a chunk."""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from s0kernels.backends import shared
from s0kernels.backends.triton.common.launch import cdiv, power_of_two
from s0kernels.backends.triton.common.targets import dot_precision
from s0kernels.calls import Start

# Sequences


class Chunks(NamedTuple):
    """How the tokens of a call are cut into chunks.

    A chunk's index says where it lies in all memory of chunks. A dense batch has cdiv(T, BT) chunks for each row, and
    chunk c of packed sequence n has index bos // BT + n + c. No two share one, some indices have no chunk, and their
    number is bounded without reading `cu_seqlens` on the host.
    """

    like: Tensor  # an input in the dtype of the operands of matrix products
    start: Start
    B: int
    T: int
    sequences: int
    size: int
    count: int  # of indices
    constants: dict  # of kernels: BT, BQ and PRECISION

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.like.dtype, device=self.like.device)


def cut(like: Tensor, start: Start, chunk_size: int) -> Chunks:
    """[B, T, ...] tokens into chunks of `chunk_size` or less; 0 is as long as they may be."""
    B, T = like.shape[:2]
    sequences = start.sequences(B)
    if sequences == 0 and T * B > 0:
        raise ValueError(f"cu_seqlens must start at 0 and end at T = {T}, got no sequences")
    BT, count = size_and_count(like, start, chunk_size)
    precision = dot_precision(like.element_size(), like.device)
    constants = {"BT": BT, "BQ": min(1024, power_of_two(sequences)), "PRECISION": precision}
    return Chunks(like, start, B, T, sequences, BT, count, constants)


def size_and_count(like: Tensor, start: Start, chunk_size: int) -> tuple[int, int]:
    """Of chunks: tokens in one, and indices. Sizes may be symbols."""
    B, T = like.shape[:2]
    longest = 64 if like.element_size() == 2 else 32
    BT = min(longest, power_of_two(chunk_size or longest))
    return BT, B * cdiv(T, BT) if start.cu_seqlens is None else T // BT + start.sequences(B)


@triton.jit
def _boundaries_are_wrong(cu_seqlens, NSEQ, T, BQ: tl.constexpr):
    decreases = 0
    for i in range(0, NSEQ, BQ):
        o_q = i + tl.arange(0, BQ)
        m_q = o_q < NSEQ
        b_bos = tl.load(cu_seqlens + o_q, mask=m_q, other=0)
        b_eos = tl.load(cu_seqlens + o_q + 1, mask=m_q, other=0)
        decreases += tl.sum((b_eos < b_bos).to(tl.int32))
    return (decreases > 0) | (tl.load(cu_seqlens) != 0) | (tl.load(cu_seqlens + NSEQ) != T)


@triton.jit
def _boundary(cu_seqlens, i_q, NSEQ, T, wrong):
    """Where sequence `i_q` begins. Wrong boundaries are replaced by even ones, which lie inside the tensors and cover
    every token once, so that NaN reaches all of them."""
    even = (i_q.to(tl.int64) * T // NSEQ).to(tl.int32)
    return tl.where(wrong, even, tl.load(cu_seqlens + i_q).to(tl.int32))


@triton.jit
def sequence(cu_seqlens, i_q, NSEQ, T, BT: tl.constexpr, BQ: tl.constexpr):
    """(row of the batch, first token, number of tokens, index of its first chunk, whether the boundaries are wrong) of
    a sequence."""
    if cu_seqlens is None:
        return i_q, 0, T, i_q * tl.cdiv(T, BT), False
    else:
        wrong = _boundaries_are_wrong(cu_seqlens, NSEQ, T, BQ)
        bos = _boundary(cu_seqlens, i_q, NSEQ, T, wrong)
        eos = _boundary(cu_seqlens, i_q + 1, NSEQ, T, wrong)
        return 0, bos, eos - bos, bos // BT + i_q, wrong


@triton.jit
def locate_chunk(cu_seqlens, i_c, NSEQ, T, BT: tl.constexpr, BQ: tl.constexpr):
    """(row of the batch, first token, number of tokens from there to the end of the sequence) of a chunk; the number is
    not positive for an index that has no chunk."""
    if cu_seqlens is None:
        chunks = tl.cdiv(T, BT)
        i_t = i_c % chunks * BT
        return i_c // chunks, i_t, T - i_t
    else:
        wrong = _boundaries_are_wrong(cu_seqlens, NSEQ, T, BQ)
        before = 0
        for i in range(0, NSEQ, BQ):
            o_q = i + tl.arange(0, BQ)
            even = (o_q.to(tl.int64) * T // NSEQ).to(tl.int32)
            b_bos = tl.where(wrong, even, tl.load(cu_seqlens + o_q, mask=o_q < NSEQ, other=0).to(tl.int32))
            before += tl.sum(((o_q < NSEQ) & (b_bos // BT + o_q <= i_c)).to(tl.int32))
        i_q = before - 1
        bos = _boundary(cu_seqlens, i_q, NSEQ, T, wrong)
        eos = _boundary(cu_seqlens, i_q + 1, NSEQ, T, wrong)
        i_t = bos + (i_c - bos // BT - i_q) * BT
        return 0, i_t, eos - i_t


# Chunks

AMPLIFIES = tl.constexpr(shared.AMPLIFIES)


@triton.jit
def load_tile(base, o_row, o_col, stride_row, stride_col, rows, cols):
    """[rows, cols] of a matrix, zero outside. `base` has a 64-bit offset to its corner in it."""
    mask = (o_row < rows)[:, None] & (o_col < cols)[None, :]
    return tl.load(base + o_row[:, None] * stride_row + o_col[None, :] * stride_col, mask=mask, other=0.0)


@triton.jit
def load_tokens(base, o_t, stride, rows):
    """[BT] in fp32, zero beyond `rows`."""
    return tl.load(base + o_t * stride, mask=o_t < rows, other=0.0).to(tl.float32)


@triton.jit
def product(
    x,
    y,
    sxr,
    sxc,
    syr,
    syc,
    rows,
    inner,
    cols,
    BR: tl.constexpr,
    BI: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BR, BC] in fp32: x [rows, inner] times y [inner, cols], `BI` of the inner ones at a time; zero outside."""
    o_r, o_i, o_c = tl.arange(0, BR), tl.arange(0, BI), tl.arange(0, BC)
    b_sum = tl.zeros([BR, BC], tl.float32)
    for i in range(0, inner, BI):
        b_x = load_tile(x + i * sxc, o_r, o_i, sxr, sxc, rows, inner - i)
        b_y = load_tile(y + i * syr, o_i, o_c, syr, syc, inner - i, cols)
        b_sum = tl.dot(b_x, b_y, b_sum, input_precision=PRECISION)
    return b_sum


@triton.jit
def decay_matrix(b_g, BT: tl.constexpr):
    """[BT, BT]: exp(g_{j+1} + .. + g_i) at (i, j), zero above the diagonal. The sums are accumulated, not taken as
    differences of running sums: a strong decay costs later tokens no precision, and -inf is a clean reset."""
    o_t = tl.arange(0, BT)
    b_sum = tl.cumsum(tl.where(o_t[:, None] > o_t[None, :], b_g[:, None], 0.0), axis=0)
    return tl.where(o_t[:, None] >= o_t[None, :], tl.exp(b_sum), 0.0)


@triton.jit
def decay_matrix_grad(b_sums, BT: tl.constexpr):
    """[BT]: gradient of the log decays, from that of the sums [BT, BT]: over all i, j with j < l <= i."""
    o_t = tl.arange(0, BT)
    b_below = tl.cumsum(b_sums, axis=0, reverse=True)
    return tl.sum(tl.where(o_t[:, None] > o_t[None, :], b_below, 0.0), axis=1)


@triton.jit
def invert_unit_lower(b_a, BT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 for a strictly lower triangular [BT, BT] in fp32 or fp64, BT 16, 32 or 64.

    The 16 x 16 blocks on the diagonal, D, by substitution, all at once. With N = D^-1 (the blocks below them), which
    vanishes to the fourth power, the whole is (I - N) (I + N^2) D^-1.
    """
    BS: tl.constexpr = 16
    NB: tl.constexpr = BT // BS
    o_n, o_s, o_t = tl.arange(0, NB), tl.arange(0, BS), tl.arange(0, BT)
    on_diagonal = o_n[:, None, None, None] == o_n[None, None, :, None]
    b_blocks = tl.sum(tl.where(on_diagonal, tl.reshape(b_a, [NB, BS, NB, BS]), 0.0), axis=2)
    b_x = tl.where((o_s[:, None] == o_s[None, :])[None], tl.full([NB, BS, BS], 1.0, b_a.dtype), 0.0)
    for i in range(1, BS):
        here = (o_s == i)[None, :, None]
        b_row = tl.sum(tl.where(here, b_blocks, 0.0), axis=1)
        b_new = (o_s == i)[None, :] - tl.sum(b_row[:, :, None] * b_x, axis=1)
        b_x = tl.where(here, b_new[:, None, :], b_x)
    b_x = tl.where(on_diagonal, b_x[:, :, None, :], 0.0)
    b_inv = tl.reshape(b_x, [BT, BT])
    if NB > 1:
        b_below = tl.where(o_t[:, None] // BS > o_t[None, :] // BS, b_a, 0.0)
        b_n = tl.dot(b_inv, b_below, input_precision=PRECISION, out_dtype=b_a.dtype)
        if NB > 2:
            b_square = tl.dot(b_n, b_n, input_precision=PRECISION, out_dtype=b_a.dtype)
            b_inv += tl.dot(b_square, b_inv, input_precision=PRECISION, out_dtype=b_a.dtype)
        b_inv -= tl.dot(b_n, b_inv, input_precision=PRECISION, out_dtype=b_a.dtype)
    return b_inv
