"""Gradients of q, k, g and beta, for all chunks at once, from what the scans of `backward` left.

With dM = strict_lower(-dV R^T) and dP = lower(dO R^T), the gradients of what W inverts and of P, in `intra`, and then

    dQ = scale diag(G) dO S^T + (scale dP * D) diag(beta) K
    dK = -diag(G) dV S^T + diag(beta E) R dS'^T + diag(beta) (scale dP * D)^T Q
         + ((dM * D) diag(beta) + diag(beta) (dM * D)^T) K

of the normalised q and k. A log decay g_l takes part in every G_i with i >= l, every E_j with j < l, every D_ij with
j < l <= i and in G_C.
"""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.chunks import (
    decay_matrix,
    decay_matrix_grad,
    load_tile,
    load_tokens,
    locate_chunk,
    product,
)
from s0kernels.backends.triton.common.launch import empty_grads, launch, power_of_two, strides
from s0kernels.backends.triton.gated_delta_rule.call import Call
from s0kernels.backends.triton.gated_delta_rule.prepare import A_K, A_Q, LAST, R_K, R_Q, ROWS, TO_END

#: the inputs whose gradients are computed here
OF_CHUNKS = {"q", "k", "g", "beta"}


class Scanned(NamedTuple):
    """What the scans of forward and backward wrote."""

    r: Tensor  # [B, T, HV, V], the residuals, as dv
    dv: Tensor
    h: Tensor  # [chunks, HV, V, K]: S^T of every chunk, as dh: dS'^T
    dh: Tensor


class Intra(NamedTuple):
    """What `intra` computes, [chunks, HV, BT, BT] and [B, T, HV]."""

    dm: Tensor
    dp: Tensor
    pg: Tensor
    pbeta: Tensor


@triton.jit
def gated_delta_rule_intra_bwd_kernel(
    q,  # [B, T, H, K], any strides sq, as k
    k,
    g,  # [B, T, HV], any strides sg, as beta
    beta,
    gates,
    do,  # None, or [B, T, HV, V], any strides
    r,  # [B, T, HV, V], as dv
    dv,
    h,  # [chunks, HV, V, K], as dh
    dh,
    cu_seqlens,
    dm,  # [chunks, HV, BT, BT]: diag(rk) (dM * D) diag(rk beta)
    dp,  # [chunks, HV, BT, BT]: diag(scale rq) (dP * D) diag(rk beta)
    pg,  # [B, T, HV] in fp32: what dg has through dM, dP and the last decay; as pbeta, without that
    pbeta,
    scale,
    T,
    NSEQ,
    inner,  # V, where loops over it are not to be unrolled
    sq,
    sk,
    sg,
    sb,
    so,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BI: tl.constexpr,
    BQ: tl.constexpr,
):
    """The gradients of what W inverts and of P: a program per (chunk, value head)."""
    i_c, i_hv = tl.program_id(0) // HV, tl.program_id(0) % HV
    i_b, i_t, rows = locate_chunk(cu_seqlens, i_c, NSEQ, T, BT, BQ)
    if rows <= 0:
        return
    o_t, o_k = tl.arange(0, BT), tl.arange(0, BK)
    dtype = q.dtype.element_ty
    i_b, i_t, at = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), tl.program_id(0).to(tl.int64)
    at_v = ((i_b * T + i_t) * HV + i_hv) * V
    o_tile = at * BT * BT + o_t[:, None] * BT + o_t[None, :]
    b_g = load_tokens(g + i_b * sg[0] + i_t * sg[1] + i_hv * sg[2], o_t, sg[1], rows)
    b_beta = load_tokens(beta + i_b * sb[0] + i_t * sb[1] + i_hv * sb[2], o_t, sb[1], rows)
    b_rk = tl.load(gates + at * ROWS * BT + R_K * BT + o_t)
    b_decay = decay_matrix(b_g, BT) * b_rk[None, :]
    b_k = load_tile(k + i_b * sk[0] + i_t * sk[1] + i_hv // (HV // H) * sk[2], o_t, o_k, sk[1], sk[3], rows, K)

    b_d = product(dv + at_v, r + at_v, HV * V, 1, 1, HV * V, rows, inner, rows, BT, BI, BT, PRECISION)
    b_d = tl.where(o_t[:, None] > o_t[None, :], b_d * b_decay * -b_rk[:, None], 0.0)
    b_intra = b_d * tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    tl.store(dm + o_tile, (b_d * b_beta[None, :]).to(dtype))
    if do is not None:
        p_do = do + i_b * so[0] + i_t * so[1] + i_hv * so[2]
        b_rq = tl.load(gates + at * ROWS * BT + R_Q * BT + o_t) * scale
        b_d = product(p_do, r + at_v, so[1], so[3], 1, HV * V, rows, inner, rows, BT, BI, BT, PRECISION)
        b_d *= b_decay * b_rq[:, None]
        b_q = load_tile(q + i_b * sq[0] + i_t * sq[1] + i_hv // (HV // H) * sq[2], o_t, o_k, sq[1], sq[3], rows, K)
        b_intra += b_d * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        tl.store(dp + o_tile, (b_d * b_beta[None, :]).to(dtype))
    at_g = (i_b * T + i_t + o_t) * HV + i_hv
    tl.store(pbeta + at_g, tl.sum(b_intra, axis=0), mask=o_t < rows)
    b_last = tl.load(gates + at * ROWS * BT + LAST * BT + BT - 1)
    b_pg = b_last * inner_product(h + at * K * V, dh + at * K * V, K, inner, BK)
    tl.store(pg + at_g, b_pg + decay_matrix_grad(b_intra * b_beta[None, :], BT), mask=o_t < rows)


def intra(call: Call, gates: Tensor, do: Tensor | None, scanned: Scanned) -> Intra:
    (q, k, _, g, beta), chunks, tiles = call.inputs, call.chunks, call.tiles("intra")
    pg, pbeta = (chunks.empty(*g.shape, dtype=torch.float32) for _ in range(2))
    out = Intra(call.intra(), call.intra(), pg, pbeta)
    launch(
        gated_delta_rule_intra_bwd_kernel,
        chunks.count * call.HV,
        *(q, k, g, beta, gates, do, *scanned, chunks.start.cu_seqlens, *out),
        *(call.options.scale, chunks.T, chunks.sequences, call.V),
        *(q.stride(), k.stride(), g.stride(), beta.stride(), strides(do, 4)),
        V=call.V,
        BI=tiles.tile,
        **call.constants,
        tiles=tiles,
    )
    return out


@triton.jit
def gated_delta_rule_inputs_bwd_kernel(
    q,  # [B, T, H, K], any strides sq, as k
    k,
    beta,  # [B, T, HV], any strides
    gates,
    do,  # None, or [B, T, HV, V], any strides
    r,  # [B, T, HV, V], as dv
    dv,
    h,  # [chunks, HV, V, K], as dh
    dh,
    dm,  # [chunks, HV, BT, BT], as dp
    dp,
    cu_seqlens,
    dq,  # None, or [B, T, H, K], as dk
    dk,
    pg,  # [B, T, HV] in fp32, as pbeta
    pbeta,
    dg,  # None, or [B, T, HV], as dbeta
    dbeta,
    T,
    NSEQ,
    R,  # HV // H, where loops over it are not to be unrolled
    inner,  # V, for the same reason
    sq,
    sk,
    sb,
    so,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BI: tl.constexpr,
    BR: tl.constexpr,
    BQ: tl.constexpr,
):
    """A program per (chunk, key head): its value heads in turn, their sums in registers; dq first and then dk, so that
    one of the two is there at a time."""
    i_c, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_b, i_t, rows = locate_chunk(cu_seqlens, i_c, NSEQ, T, BT, BQ)
    if rows <= 0:
        return
    o_t, o_k, o_r = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BR)
    i_b, i_t, i_c = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), i_c.to(tl.int64)
    p_q = q + i_b * sq[0] + i_t * sq[1] + i_h * sq[2]
    p_k = k + i_b * sk[0] + i_t * sk[1] + i_h * sk[2]
    o_tile = o_t[:, None] * BT + o_t[None, :]
    b_reads = tl.zeros([BR, BT], tl.float32)  # of each value head: d(log G) through reading the state
    if do is not None:
        b_dq = tl.zeros([BT, BK], tl.float32)
        for i_r in tl.range(R, disable_licm=True):
            i_hv = i_h * R + i_r
            at = i_c * HV + i_hv
            b_dp = tl.load(dp + at * BT * BT + o_tile)
            b_dq = tl.dot(b_dp, load_tile(p_k, o_t, o_k, sk[1], sk[3], rows, K), b_dq, input_precision=PRECISION)
            p_do = do + i_b * so[0] + i_t * so[1] + i_hv * so[2]
            b_part = product(p_do, h + at * K * V, so[1], so[3], K, 1, rows, inner, K, BT, BI, BK, PRECISION)
            b_part *= tl.load(gates + at * ROWS * BT + A_Q * BT + o_t)[:, None]
            b_start = row_sums(b_part, p_q, sq[1], sq[3], rows, K, BT, BK)
            b_reads = tl.where((o_r == i_r)[:, None], b_start[None, :], b_reads)
            b_dq += b_part
        if dq is not None:
            p_dq = dq + ((i_b * T + i_t) * H + i_h) * K
            b_rq = tl.load(gates + (i_c * HV + i_h * R) * ROWS * BT + R_Q * BT + o_t)
            store_input_grad(p_dq, b_dq, p_q, sq[1], sq[3], b_rq, rows, H, K, NORMALISE, BT, BK)
    elif dq is not None:
        p_dq = dq + ((i_b * T + i_t) * H + i_h) * K
        store_input_grad(p_dq, tl.zeros([BT, BK], tl.float32), p_q, sq[1], sq[3], o_t, rows, H, K, False, BT, BK)

    b_dk = tl.zeros([BT, BK], tl.float32)
    for i_r in tl.range(R, disable_licm=True):
        i_hv = i_h * R + i_r
        at = i_c * HV + i_hv
        at_v = ((i_b * T + i_t) * HV + i_hv) * V
        p_gates = gates + at * ROWS * BT + o_t
        b_k = load_tile(p_k, o_t, o_k, sk[1], sk[3], rows, K)
        b_dm = tl.load(dm + at * BT * BT + o_tile)
        b_dk = tl.dot(b_dm, b_k, b_dk, input_precision=PRECISION)
        b_dk = tl.dot(tl.trans(b_dm), b_k, b_dk, input_precision=PRECISION)
        if do is not None:
            b_dp = tl.load(dp + at * BT * BT + o_tile)
            b_q = load_tile(p_q, o_t, o_k, sq[1], sq[3], rows, K)
            b_dk = tl.dot(tl.trans(b_dp), b_q, b_dk, input_precision=PRECISION)
        b_part = product(dv + at_v, h + at * K * V, HV * V, 1, K, 1, rows, inner, K, BT, BI, BK, PRECISION)
        b_part *= -tl.load(p_gates + A_K * BT)[:, None]
        b_start = row_sums(b_part, p_k, sk[1], sk[3], rows, K, BT, BK)
        b_dk += b_part
        b_part = product(r + at_v, dh + at * K * V, HV * V, 1, K, 1, rows, inner, K, BT, BI, BK, PRECISION)
        b_part *= tl.load(p_gates + TO_END * BT)[:, None]
        b_end = row_sums(b_part, p_k, sk[1], sk[3], rows, K, BT, BK)
        b_beta = load_tokens(beta + i_b * sb[0] + i_t * sb[1] + i_hv * sb[2], o_t, sb[1], rows)
        b_dk += b_part * b_beta[:, None]

        at_g = (i_b * T + i_t + o_t) * HV + i_hv
        b_start += tl.sum(tl.where((o_r == i_r)[:, None], b_reads, 0.0), axis=0)
        if dbeta is not None:
            b_dbeta = tl.load(pbeta + at_g, mask=o_t < rows, other=0.0) + b_end
            tl.store(dbeta + at_g, b_dbeta.to(dbeta.dtype.element_ty), mask=o_t < rows)
        if dg is not None:
            b_end *= b_beta
            b_dg = tl.load(pg + at_g, mask=o_t < rows, other=0.0)
            b_dg += tl.cumsum(b_start, axis=0, reverse=True) + tl.cumsum(b_end, axis=0) - b_end
            tl.store(dg + at_g, b_dg.to(dg.dtype.element_ty), mask=o_t < rows)
    if dk is not None:
        p_dk = dk + ((i_b * T + i_t) * H + i_h) * K
        b_rk = tl.load(gates + (i_c * HV + i_h * R) * ROWS * BT + R_K * BT + o_t)
        store_input_grad(p_dk, b_dk, p_k, sk[1], sk[3], b_rk, rows, H, K, NORMALISE, BT, BK)


def input_grads(
    call: Call, gates: Tensor, do: Tensor | None, scanned: Scanned, names: frozenset[str]
) -> dict[str, Tensor]:
    """Those of `names`, which are of OF_CHUNKS."""
    (q, k, _, _, beta), chunks, tiles = call.inputs, call.chunks, call.tiles("inputs")
    dm, dp, pg, pbeta = intra(call, gates, do, scanned)
    found = empty_grads(call.inputs, names)
    dq, dk, dg, dbeta = map(found.get, ("q", "k", "g", "beta"))
    launch(
        gated_delta_rule_inputs_bwd_kernel,
        chunks.count * call.H,
        *(q, k, beta, gates, do, *scanned, dm, dp, chunks.start.cu_seqlens, dq, dk, pg, pbeta, dg, dbeta),
        *(chunks.T, chunks.sequences, call.HV // call.H, call.V),
        *(q.stride(), k.stride(), beta.stride(), strides(do, 4)),
        V=call.V,
        NORMALISE=call.options.use_qk_l2norm,
        BI=tiles.tile,
        BR=power_of_two(call.HV // call.H, 1),
        **call.constants,
        tiles=tiles,
    )
    return found


@triton.jit
def store_input_grad(
    dx,
    b_dx,
    x,
    sxr,
    sxc,
    b_norm,
    rows,
    H: tl.constexpr,
    K: tl.constexpr,
    NORMALISE: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Through x -> x * norm, from the gradient as if the norm were a constant. The policy makes this load another one
    than those before, so that the tile is not kept in registers from there to here."""
    o_t, o_k = tl.arange(0, BT), tl.arange(0, BK)
    mask = (o_t < rows)[:, None] & (o_k < K)[None, :]
    if NORMALISE:
        p_x = x + o_t[:, None] * sxr + o_k[None, :] * sxc
        b_x = tl.load(p_x, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32) * b_norm[:, None]
        b_dx -= b_x * tl.sum(b_x * b_dx, axis=1)[:, None]
    tl.store(dx + o_t[:, None] * (H * K) + o_k[None, :], b_dx.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def row_sums(b_x, y, stride_row, stride_col, rows, cols, BT: tl.constexpr, BK: tl.constexpr):
    """Inner products of the rows of x, which are not rounded, with those of y: [BT]."""
    b_y = load_tile(y, tl.arange(0, BT), tl.arange(0, BK), stride_row, stride_col, rows, cols)
    return tl.sum(b_x * b_y.to(tl.float32), axis=1)


@triton.jit
def inner_product(x, y, K: tl.constexpr, V, BK: tl.constexpr):
    """Of two matrices [V, K], 16 rows at a time."""
    o_k = tl.arange(0, BK)
    b_sum = tl.zeros([16, BK], tl.float32)
    for i in range(0, V, 16):
        o_v = i + tl.arange(0, 16)
        b_x = load_tile(x, o_v, o_k, K, 1, V, K).to(tl.float32)
        b_sum += b_x * load_tile(y, o_v, o_k, K, 1, V, K).to(tl.float32)
    return tl.sum(b_sum)
