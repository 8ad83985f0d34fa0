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


def cut(like: Tensor, start: Start, chunk_size: int, longest: int | None = None) -> Chunks:
    """[B, T, ...] tokens into chunks of `chunk_size` or less; 0 is as long as they may be, which is `longest`."""
    B, T = like.shape[:2]
    sequences = start.sequences(B)
    if sequences == 0 and T * B > 0:
        raise ValueError(f"cu_seqlens must start at 0 and end at T = {T}, got no sequences")
    BT, count = size_and_count(like, start, chunk_size, longest)
    precision = dot_precision(like.element_size(), like.device)
    BQ = 16 if start.cu_seqlens is None else min(1024, power_of_two(sequences))  # for packed sequences alone
    constants = {"BT": BT, "BQ": BQ, "PRECISION": precision}
    return Chunks(like, start, B, T, sequences, BT, count, constants)


def size_and_count(like: Tensor, start: Start, chunk_size: int, longest: int | None = None) -> tuple[int, int]:
    """Return the tokens of a chunk and the number of chunk indices. Sizes may be symbols."""
    B, T = like.shape[:2]
    longest = longest or (64 if like.element_size() == 2 else 32)
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
LOG2_E = tl.constexpr(1.4426950408889634)
NO_MORE = tl.constexpr(-1e5)  # a log decay of which nothing is left, as of all below


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
def running_sums(b_g):
    """Of log decays, in units of log 2 and in two parts, of which the second is what rounding the first took away. So
    the difference of two of them is as exact as the sum of the log decays between, whatever came before: a strong decay
    costs later tokens no precision, and -inf is a clean reset."""
    b_g = tl.where(b_g < NO_MORE, NO_MORE, b_g).to(tl.float64)
    b_sum = tl.cumsum(b_g * LOG2_E, axis=0)
    b_high = b_sum.to(tl.float32)
    return b_high, (b_sum - b_high.to(tl.float64)).to(tl.float32)


@triton.jit
def decay_matrix(b_g, BT: tl.constexpr):
    """[BT, BT]: exp(g_{j+1} + .. + g_i) at (i, j), zero above the diagonal."""
    o_t = tl.arange(0, BT)
    b_high, b_low = running_sums(b_g)
    b_sum = (b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])
    return tl.exp2(tl.where(o_t[:, None] >= o_t[None, :], b_sum, float("-inf")))


@triton.jit
def decay_matrix_grad(b_sums, BT: tl.constexpr):
    """[BT]: gradient of the log decays, from that of the sums [BT, BT]: over all i, j with j < l <= i."""
    o_t = tl.arange(0, BT)
    b_below = tl.cumsum(b_sums, axis=0, reverse=True)
    return tl.sum(tl.where(o_t[:, None] > o_t[None, :], b_below, 0.0), axis=1)


@triton.jit
def right_below(o_row, o_col, s):
    """Where (row, column) is in a block of 2^s x 2^s that lies right below a block on the diagonal, and left of one."""
    return ((o_row >> (s + 1)) == (o_col >> (s + 1))) & ((o_row >> s) > (o_col >> s))


@triton.jit
def rest(b_x, dtype: tl.constexpr):
    """What rounding to `dtype` takes away."""
    return (b_x - b_x.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def half_product(b_x, b_y, FINE: tl.constexpr):
    """x y of fp32 in fp32, with operands in fp16; `FINE`: in two parts of it."""
    b_sum = tl.dot(b_x.to(tl.float16), b_y.to(tl.float16))
    if FINE:
        b_sum = tl.dot(rest(b_x, tl.float16), b_y.to(tl.float16), b_sum)
        b_sum = tl.dot(b_x.to(tl.float16), rest(b_y, tl.float16), b_sum)
    return b_sum


@triton.jit
def fine_product(b_x, b_y):
    """x y in fp32 with operands in two parts of fp16, and in fp64."""
    if b_x.dtype == tl.float64:
        return tl.dot(b_x, b_y, input_precision="ieee", out_dtype=tl.float64)
    else:
        return half_product(b_x, b_y, True)


@triton.jit
def invert_unit_lower(b_a, BT: tl.constexpr, FINE: tl.constexpr):
    """(I + a)^-1 for [BT, BT] in fp32 or fp64, of which what is below the diagonal is read; in IEEE products, or in
    those of `fine_product`.

    By halves: with X the inverses of the blocks on the diagonal and B the blocks of a right below these, the inverses
    of the blocks that are twice as large are X - X B X.
    """
    o_i, o_j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    b_x = tl.where(o_i == o_j, tl.full([BT, BT], 1.0, b_a.dtype), 0.0)
    s = 0
    while (1 << s) < BT:  # unrolled, the products would take all registers
        b_b = tl.where(right_below(o_i, o_j, s), b_a, 0.0)
        if FINE:
            b_x -= fine_product(fine_product(b_x, b_b), b_x)
        else:
            b_x -= tl.dot(tl.dot(b_x, b_b, input_precision="ieee"), b_x, input_precision="ieee")
        s += 1
    return b_x


@triton.jit
def diagonal_blocks(b_x, BT: tl.constexpr):
    """[BT / 16, 16, 16] of a [BT, BT]: of its columns the half with the diagonal, and again, which moves nothing."""
    o_t = tl.arange(0, BT)[:, None]
    if BT == 64:
        b_left, b_right = tl.split(tl.permute(tl.reshape(b_x, [BT, 2, 32]), (0, 2, 1)))
        b_x = tl.where(o_t < 32, b_left, b_right)
    if BT >= 32:
        b_left, b_right = tl.split(tl.permute(tl.reshape(b_x, [BT, 2, 16]), (0, 2, 1)))
        b_x = tl.where((o_t >> 4) % 2 == 0, b_left, b_right)
    return tl.reshape(b_x, [BT // 16, 16, 16])


@triton.jit
def invert_blocks(b_n, FINE: tl.constexpr):
    """(I - n)^-1 of [N, 16, 16], of which what is below the diagonal is read. By halves as in `invert_unit_lower`, in
    operands of fp16; `FINE`: in two parts of it."""
    o_i, o_j = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    b_x = tl.where(right_below(o_i, o_j, 0), b_n, tl.where(o_i == o_j, 1.0, 0.0))
    for s in tl.static_range(1, 4):
        b_b = tl.where(right_below(o_i, o_j, s), b_n, 0.0)
        b_x += half_product(b_x, half_product(b_b, b_x, FINE), FINE)
    return b_x


@triton.jit
def merge_blocks(b_blocks, b_n, never, BT: tl.constexpr, FINE: tl.constexpr):
    """(I - n)^-1 of [BT, BT], of which what is below the diagonal is read, from those of its blocks of 16. `never` is
    false, which the compiler does not know: so what it makes of the blocks is laid out as n is, and stays there."""
    o_i, o_j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    b_x = tl.broadcast_to(b_blocks[:, :, None, :], [BT // 16, 16, BT // 16, 16])
    b_x = tl.where((o_i >> 4) == (o_j >> 4), tl.reshape(b_x, [BT, BT]), tl.where(never, b_n, 0.0))
    if BT >= 32:
        for s in tl.static_range(4, 6 if BT == 64 else 5):
            b_b = tl.where(right_below(o_i, o_j, s), half_product(b_x, b_n, FINE), 0.0)
            b_x += half_product(b_b, b_x, FINE)
    return b_x
