"""What every chunk of Mamba-2 SSD needs before a scan: processed steps, decays, and C B^T for the heads of a group.

In the symbols of `forward`. Running sums of the log decays are accumulated in fp64 and kept in two numbers in fp32, so
that a difference of two of them is what a sum of the decays between would be: a strong decay costs later tokens no
precision, and a clean reset is one.
"""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.chunks import load_tokens, locate_chunk, product
from s0kernels.backends.triton.common.launch import cdiv, kernel, launch, strides
from s0kernels.backends.triton.ssd.call import Call

# The rows of `gates`, [chunks, H, ROWS, BT] in fp32.
DT = tl.constexpr(0)  # dt, processed; 0 at pads
START = tl.constexpr(1)  # G, whose last is G_C
END = tl.constexpr(2)  # E
WRITE = tl.constexpr(3)  # dt E
LOG = tl.constexpr(4)  # the logarithm of G to base 2
REST = tl.constexpr(5)  # what of it is left below the last digit of LOG
ROWS = tl.constexpr(6)

LOG2E = tl.constexpr(1.4426950408889634)
#: of a token, to base 2; nothing in fp32 outlives more
STRONGEST = tl.constexpr(-160.0)


@triton.jit
def softplus(b_x):
    """log(1 + exp(x)) as max(x, 0) + log1p(u), u = exp(-|x|), with log1p(u) = 2 artanh(s), s = u / (2 + u) <= 1/3, by
    its series: exact to fp32 however small u is, where a logarithm near 1 is not."""
    b_u = tl.exp(-tl.abs(b_x))
    b_s = b_u / (2.0 + b_u)
    b_square = b_s * b_s
    b_sum = 1.0 / 17
    for i in tl.static_range(8):
        b_sum = b_sum * b_square + 1.0 / (15 - 2 * i)
    return tl.maximum(b_x, 0.0) + 2 * b_s * b_sum


@triton.jit
def load_raw_dt(dt, stride, dt_bias, o_bias, rows, BT: tl.constexpr):
    """dt + dt_bias, [BT]."""
    b_dt = load_tokens(dt, tl.arange(0, BT), stride, rows)
    if dt_bias is not None:
        b_dt += tl.load(dt_bias + o_bias).to(tl.float32)
    return b_dt


@triton.jit
def clamp(b_x, low, high):
    """Between the limits; NaN stays."""
    b_x = tl.where(b_x < low, low, b_x)
    return tl.where(b_x > high, high, b_x)


@triton.jit
def at_token(x, stride, i_b, i_t, i_h):
    """Where the row of a head at a token begins. Not for None: in Triton 3.6 no function returns it."""
    return x + i_b * stride[0] + i_t * stride[1] + tl.cast(i_h, tl.int64) * stride[2]


@triton.jit
def decays(gates, o_i, o_j, BT: tl.constexpr):
    """exp(a_{j+1} + .. + a_i) at (i, j), zero where j > i; `gates` of a chunk and head."""
    p_log, p_rest = gates + LOG * BT, gates + REST * BT
    b_sum = tl.load(p_log + o_i)[:, None] - tl.load(p_log + o_j)[None, :]
    b_sum += tl.load(p_rest + o_i)[:, None] - tl.load(p_rest + o_j)[None, :]
    return tl.exp2(tl.where(o_i[:, None] >= o_j[None, :], b_sum, float("-inf")))


@triton.jit
def causal_blocks(o_i, o_j):
    """Which tokens' blocks of 16 x 16 are not above the diagonal: what is masked by blocks is loaded by vectors."""
    return o_i[:, None] // 16 >= o_j[None, :] // 16


@triton.jit
def load_causal(x, o_i, o_j, BT: tl.constexpr):
    """In fp32, of a matrix between the tokens of a chunk; zero in blocks above the diagonal, where nothing is read."""
    p_x = x + o_i[:, None] * BT + o_j[None, :]
    return tl.load(p_x, mask=causal_blocks(o_i, o_j), other=0.0).to(tl.float32)


@kernel
def ssd_prepare_fwd_kernel(
    dt,  # [B, T, H], any strides
    A,  # [H], any stride, as dt_bias
    B,  # None without cb, or [B, T, G, N], any strides, as C
    C,
    dt_bias,  # or None
    cu_seqlens,
    cb,  # None, or [chunks, G, BT, BT] in fp32: C B^T; blocks above the diagonal are not written
    gates,  # [chunks, H, ROWS, BT]
    low,
    high,
    T,
    NSEQ,
    products,  # programs of C B^T
    inner,  # N, where loops over it are not to be unrolled
    sdt,
    sB,
    sC,
    sA,
    sbias,
    H: tl.constexpr,
    G: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BI: tl.constexpr,
    BQ: tl.constexpr,
):
    """A program per (tile of C B^T, group, chunk), then one per (head, chunk) for its gates."""
    at = tl.program_id(0) - products
    if cb is not None and at < 0:
        store_product(tl.program_id(0), B, C, cu_seqlens, cb, T, NSEQ, inner, sB, sC, G, PRECISION, BT, BM, BI, BQ)
    else:
        i_b, i_t, rows = locate_chunk(cu_seqlens, at // H, NSEQ, T, BT, BQ)
        if rows > 0:
            p_dt = at_token(dt, sdt, tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), at % H)
            b_dt = load_raw_dt(p_dt, sdt[1], dt_bias, at % H * sbias, rows, BT)
            if SOFTPLUS:
                b_dt = softplus(b_dt)
            b_dt = tl.where(tl.arange(0, BT) < rows, clamp(b_dt, low, high), 0.0)
            store_gates(gates + at.to(tl.int64) * ROWS * BT, b_dt, tl.load(A + at % H * sA).to(tl.float32), BT)


@triton.jit
def store_product(
    pid,
    B,
    C,
    cu_seqlens,
    cb,
    T,
    NSEQ,
    inner,
    sB,
    sC,
    G: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BI: tl.constexpr,
    BQ: tl.constexpr,
):
    """C B^T of one (tile, group, chunk), zero beyond the sequence."""
    tiles: tl.constexpr = BT // BM
    i_j, i_i = pid % tiles * BM, pid // tiles % tiles * BM
    i_c, i_g = pid // (tiles * tiles * G), pid // (tiles * tiles) % G
    i_b, i_t, rows = locate_chunk(cu_seqlens, i_c, NSEQ, T, BT, BQ)
    if (i_j > i_i) | (rows <= 0):
        return
    i_b, i_t = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64)
    p_C, p_B = at_token(C, sC, i_b, i_t + i_i, i_g), at_token(B, sB, i_b, i_t + i_j, i_g)
    b_cb = product(p_C, p_B, sC[1], sC[3], sB[3], sB[1], rows - i_i, inner, rows - i_j, BM, BI, BM, PRECISION)
    o_i, o_j = i_i + tl.arange(0, BM), i_j + tl.arange(0, BM)
    p_cb = cb + (i_c.to(tl.int64) * G + i_g) * BT * BT
    tl.store(p_cb + o_i[:, None] * BT + o_j[None, :], b_cb.to(cb.dtype.element_ty))


@triton.jit
def store_gates(gates, b_dt, b_a, BT: tl.constexpr):
    """All rows of a chunk and head."""
    b_log = b_dt.to(tl.float64) * b_a * LOG2E
    b_log = tl.where(b_log < STRONGEST, STRONGEST, b_log)
    b_sum = tl.cumsum(b_log, axis=0)
    b_start = b_sum.to(tl.float32)
    b_end = tl.exp2((tl.sum(b_log, axis=0) - b_sum).to(tl.float32))
    p_gates = gates + tl.arange(0, BT)
    tl.store(p_gates + DT * BT, b_dt)
    tl.store(p_gates + START * BT, tl.exp2(b_start))
    tl.store(p_gates + END * BT, b_end)
    tl.store(p_gates + WRITE * BT, b_dt * b_end)
    tl.store(p_gates + LOG * BT, b_start)
    tl.store(p_gates + REST * BT, (b_sum - b_start.to(tl.float64)).to(tl.float32))


class Factors(NamedTuple):
    """What `prepare` computes for all chunks; C B^T only where it is wanted."""

    cb: Tensor | None
    gates: Tensor


def prepare(call: Call, *, cb: bool) -> Factors:
    (_, dt, A, B, C, _, _, dt_bias), chunks = call.inputs, call.chunks
    gates = chunks.empty(chunks.count, call.H, ROWS.value, chunks.size, dtype=torch.float32)
    factors = Factors(call.intra(call.G, torch.float32) if cb else None, gates)
    tiles = call.tiles("prepare")
    BM = min(64, chunks.size)
    products = chunks.count * call.G * cdiv(chunks.size, BM) ** 2 if cb else 0
    B = B if cb else None
    launch(
        ssd_prepare_fwd_kernel,
        products + chunks.count * call.H,
        *(dt, A, B, C, dt_bias, chunks.start.cu_seqlens, *factors),
        *(*call.options.dt_limit, chunks.T, chunks.sequences, products, call.N),
        *(dt.stride(), strides(B, 4), C.stride(), *A.stride(), *strides(dt_bias, 1)),
        H=call.H,
        G=call.G,
        SOFTPLUS=call.options.dt_softplus,
        BM=BM,
        BI=tiles.tile,
        **chunks.constants,
        tiles=tiles,
    )
    return factors
