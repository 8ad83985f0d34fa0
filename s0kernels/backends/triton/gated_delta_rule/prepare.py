"""What the forward and the backward of the gated delta rule take of q, k, g and beta, for all chunks at once.

In the symbols of `forward`: W, P, and factors of the rows. W amplifies what is rounded where keys are nearly equal and
beta is near 2, which the sums of squares of its rows show. There it is computed anew with finer products, written in
two parts, and the scans of that head and sequence have their operands in two parts, too. Otherwise they run as if there
were none of this.
"""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.chunks import (
    AMPLIFIES,
    decay_matrix,
    diagonal_blocks,
    invert_blocks,
    invert_unit_lower,
    load_tile,
    load_tokens,
    locate_chunk,
    merge_blocks,
    rest,
    running_sums,
)
from s0kernels.backends.triton.common.launch import kernel, launch
from s0kernels.backends.triton.gated_delta_rule.call import Call

# The rows of `gates`, [chunks, HV, ROWS, BT] in fp32.
A_Q = tl.constexpr(0)  # scale rq G
A_K = tl.constexpr(1)  # rk G
E_K = tl.constexpr(2)  # rk beta E
LAST = tl.constexpr(3)  # G, whose last is G_C
R_Q = tl.constexpr(4)  # rq
R_K = tl.constexpr(5)  # rk
TO_END = tl.constexpr(6)  # rk E
TWO_PARTS = tl.constexpr(7)  # the first of the row: 1 where W is in two parts, else 0
ROWS = tl.constexpr(8)


@triton.jit
def row_norms(b_squares, NORMALISE: tl.constexpr):
    """rsqrt(sum(x^2) + 1e-6) of each row of x, from the diagonal of x x^T; or 1."""
    o_t = tl.arange(0, b_squares.shape[0])
    b_sum = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_squares, 0.0), axis=1)
    return tl.rsqrt(b_sum + 1e-6) if NORMALISE else tl.full(b_sum.shape, 1.0, tl.float32)


@triton.constexpr_function
def parts_of(dtype):
    """In how many parts W may be."""
    return 1 if dtype == tl.float32 else 2


@triton.jit
def inverse(b_kk, b_rk, b_beta, never, dtype: tl.constexpr, BT: tl.constexpr):
    """(I + strict_lower(diag(rk) K K^T diag(rk beta)))^-1. The decays come later: W is diag(G) times this times
    diag(G)^-1, so this times D, element by element."""
    b_rk_beta = -b_rk * b_beta
    b_n = b_kk * b_rk[:, None] * b_rk_beta[None, :]
    if dtype == tl.float32:
        return invert_unit_lower(-b_n, BT, False)
    else:
        FINE: tl.constexpr = dtype == tl.float16  # of which bf16 would round away what is gained
        return merge_blocks(invert_blocks(diagonal_blocks(b_n, BT), FINE), b_n, never, BT, FINE)


@triton.jit
def fine_inverse(
    k, g, beta, sk, sg, sb, rows, K: tl.constexpr, NORMALISE: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr
):
    """W with finer products, for inputs in fp32 in fp64, and with the decays in what is inverted, where they keep small
    what keys that nobody normalised make large. All is loaded again, so that nothing waits for this in registers."""
    b_k = load_tile(k, tl.arange(0, BT), tl.arange(0, BK), sk[1], sk[3], rows, K)
    b_g = load_tokens(g, tl.arange(0, BT), sg[1], rows)
    b_beta = load_tokens(beta, tl.arange(0, BT), sb[1], rows)
    if b_k.dtype == tl.float32:
        b_k = b_k.to(tl.float64)
        b_a = tl.dot(b_k, tl.trans(b_k), input_precision="ieee", out_dtype=tl.float64)
    else:
        b_a = tl.dot(b_k, tl.trans(b_k))
    b_rk = row_norms(b_a.to(tl.float32), NORMALISE)
    b_a *= (decay_matrix(b_g, BT) * b_rk[:, None] * (b_rk * b_beta)[None, :]).to(b_a.dtype)
    return invert_unit_lower(b_a, BT, True).to(tl.float32)


@kernel
def gated_delta_rule_prepare_fwd_kernel(
    q,  # [B, T, H, K], any strides sq, as k
    k,
    g,  # [B, T, HV], any strides sg, as beta
    beta,
    cu_seqlens,
    w,  # [chunks, HV, PARTS, BT, BT], dtype of q
    p,  # [chunks, HV, BT, BT]
    gates,  # [chunks, HV, ROWS, BT]
    scale,
    T,
    NSEQ,
    sq,
    sk,
    sg,
    sb,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BQ: tl.constexpr,
):
    """A program per (chunk, value head)."""
    i_c, i_hv = tl.program_id(0) // HV, tl.program_id(0) % HV
    i_b, i_t, rows = locate_chunk(cu_seqlens, i_c, NSEQ, T, BT, BQ)
    if rows <= 0:
        return
    i_b, i_t, at = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), tl.program_id(0).to(tl.int64)
    i_h, i_hv = (i_hv // (HV // H)).to(tl.int64), i_hv.to(tl.int64)
    o_t, o_k = tl.arange(0, BT), tl.arange(0, BK)
    dtype = q.dtype.element_ty
    PARTS: tl.constexpr = parts_of(dtype)
    p_k = k + i_b * sk[0] + i_t * sk[1] + i_h * sk[2]
    p_g, p_beta = g + i_b * sg[0] + i_t * sg[1] + i_hv * sg[2], beta + i_b * sb[0] + i_t * sb[1] + i_hv * sb[2]
    b_k = load_tile(p_k, o_t, o_k, sk[1], sk[3], rows, K)
    b_g = load_tokens(p_g, o_t, sg[1], rows)
    b_beta = load_tokens(p_beta, o_t, sb[1], rows)
    b_kk = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    b_rk = row_norms(b_kk, NORMALISE)
    b_w = inverse(b_kk, b_rk, b_beta, T < 0, dtype, BT)
    small = tl.min((tl.sum(b_w * b_w, axis=1) <= AMPLIFIES).to(tl.int32)) > 0  # not where one is not a number
    b_decay = decay_matrix(b_g, BT)
    p_w = w + at * PARTS * BT * BT + o_t[:, None] * BT + o_t[None, :]
    tl.store(p_w, (b_w * b_decay).to(dtype), mask=small)
    b_q = load_tile(q + i_b * sq[0] + i_t * sq[1] + i_h * sq[2], o_t, o_k, sq[1], sq[3], rows, K)
    b_rq = row_norms(tl.dot(b_q, tl.trans(b_q), input_precision=PRECISION), NORMALISE)
    b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_p = b_qk * b_decay * (scale * b_rq)[:, None] * (b_rk * b_beta)[None, :]
    tl.store(p + at * BT * BT + o_t[:, None] * BT + o_t[None, :], b_p.to(p.dtype.element_ty))

    b_high, b_low = running_sums(b_g)
    last = o_t == BT - 1
    b_left = tl.sum(tl.where(last, b_high, 0.0), axis=0) - b_high + (tl.sum(tl.where(last, b_low, 0.0), axis=0) - b_low)
    b_from_start, b_to_end = tl.exp2(b_high + b_low), b_rk * tl.exp2(b_left)
    p_gates = gates + at * ROWS * BT + o_t
    tl.store(p_gates + A_Q * BT, scale * b_rq * b_from_start)
    tl.store(p_gates + A_K * BT, b_rk * b_from_start)
    tl.store(p_gates + E_K * BT, b_beta * b_to_end)
    tl.store(p_gates + LAST * BT, b_from_start)
    tl.store(p_gates + R_Q * BT, b_rq)
    tl.store(p_gates + R_K * BT, b_rk)
    tl.store(p_gates + TO_END * BT, b_to_end)

    p_mark = gates + at * ROWS * BT + TWO_PARTS * BT
    if small:
        tl.store(p_mark, 0.0)
    else:
        b_w = fine_inverse(p_k, p_g, p_beta, sk, sg, sb, rows, K, NORMALISE, BT, BK)
        tl.store(p_w, b_w.to(dtype))
        amplifies = tl.max((tl.sum(b_w * b_w, axis=1) > AMPLIFIES).to(tl.int32)) > 0
        tl.store(p_mark, tl.where(amplifies, 1.0, 0.0))
        if PARTS > 1:
            tl.store(p_w + BT * BT, rest(b_w, dtype), mask=amplifies)


class Factors(NamedTuple):
    """What `prepare` computes for all chunks."""

    w: Tensor
    p: Tensor
    gates: Tensor


def empty_factors(like: Tensor, count: int, HV: int, BT: int) -> Factors:
    """Memory for those of `count` chunks, of inputs like `like`."""
    new = functools.partial(torch.empty, dtype=like.dtype, device=like.device)
    gates = new(count, HV, ROWS.value, BT, dtype=torch.float32)
    return Factors(new(count, HV, 2 if like.element_size() == 2 else 1, BT, BT), new(count, HV, BT, BT), gates)


def prepare(call: Call, factors: Factors | None = None) -> Factors:
    """`factors`: memory to write to."""
    (q, k, _, g, beta), chunks = call.inputs, call.chunks
    if factors is None:
        factors = empty_factors(q, chunks.count, call.HV, chunks.size)
    launch(
        gated_delta_rule_prepare_fwd_kernel,
        chunks.count * call.HV,
        *(q, k, g, beta, chunks.start.cu_seqlens, *factors, call.options.scale, chunks.T, chunks.sequences),
        *(q.stride(), k.stride(), g.stride(), beta.stride()),
        NORMALISE=call.options.use_qk_l2norm,
        **call.constants,
        tiles=call.tiles("prepare"),
    )
    return factors


@triton.jit
def any_in_parts(gates, i_c0, i_hv, length, HV: tl.constexpr, BT: tl.constexpr):
    """Whether W is in two parts in any chunk of a head and sequence."""
    found = 0.0
    for i in range(0, tl.cdiv(length, BT), 64):
        o_c = i + tl.arange(0, 64)
        p_fine = gates + ((i_c0 + o_c) * HV + i_hv) * ROWS * BT + TWO_PARTS * BT
        found = tl.maximum(found, tl.max(tl.load(p_fine, mask=o_c * BT < length, other=0.0)))
    return found > 0.0
