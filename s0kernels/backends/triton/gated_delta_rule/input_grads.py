"""Gradients of q, k, g and beta, for all chunks at once, from what the scans of `backward` left.

With dM = strict_lower(-dV R^T) and dP = lower(dO R^T), the gradients of what W inverts and of P, in `intra`, and then

    dQ = scale diag(G) dO S^T + (scale dP * D) diag(beta) K
    dK = -diag(G) dV S^T + diag(beta E) R dS'^T + diag(beta) (scale dP * D)^T Q
         + ((dM * D) diag(beta) + diag(beta) (dM * D)^T) K

of the normalised q and k. A log decay g_l takes part in every G_i with i >= l, every E_j with j < l, every D_ij with
j < l <= i and in G_C.
"""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.chunks import decay_matrix, load_tile, load_tokens, locate_chunk
from s0kernels.backends.triton.common.descriptors import (
    has_descriptors,
    load_matrix,
    load_token_tile,
    of_matrices,
    of_tokens,
)
from s0kernels.backends.triton.common.launch import empty_grads, kernel, launch, power_of_two, strides
from s0kernels.backends.triton.gated_delta_rule.call import Call
from s0kernels.backends.triton.gated_delta_rule.prepare import A_K, A_Q, E_K, LAST, R_K, R_Q, ROWS, TO_END

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


@kernel
def gated_delta_rule_intra_bwd_kernel(
    q,  # [B, T, H, K], any strides sq, as k
    k,
    g,  # [B, T, HV], any strides sg, as beta
    beta,
    gates,
    do,  # None, or [B, T, HV, V], any strides so; a pointer or a descriptor, as r and dv
    r,  # [B, T, HV, V], as dv
    dv,
    cu_seqlens,
    dm,  # [chunks, HV, BT, BT]: diag(rk) (dM * D) diag(rk beta)
    dp,  # [chunks, HV, BT, BT]: diag(scale rq) (dP * D) diag(rk beta)
    pg,  # [B, T, HV] in fp32: of a token what dM and dP have in its row, less what they have in its column
    pbeta,  # [B, T, HV] in fp32: what dbeta has through dM and dP
    scale,
    T,
    NSEQ,
    inner,  # V, where loops over it are not to be unrolled
    sq,
    sk,
    sg,
    sb,
    so,
    sv,  # of r and dv
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
    o_t, o_k, at = tl.arange(0, BT), tl.arange(0, BK), tl.program_id(0).to(tl.int64)
    dtype = q.dtype.element_ty
    b_m, b_p = tl.zeros([BT, BT], tl.float32), tl.zeros([BT, BT], tl.float32)
    for i in range(0, inner, BI):
        b_r = tl.trans(load_token_tile(r, sv, i_b, i_t, i_hv, i, rows, V, BT, BI))
        b_dv = load_token_tile(dv, sv, i_b, i_t, i_hv, i, rows, V, BT, BI)
        b_m = tl.dot(b_dv, b_r, b_m, input_precision=PRECISION)
        if do is not None:
            b_do = load_token_tile(do, so, i_b, i_t, i_hv, i, rows, V, BT, BI)
            b_p = tl.dot(b_do, b_r, b_p, input_precision=PRECISION)

    at_b, at_t = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64)
    i_h, i_hv = (i_hv // (HV // H)).to(tl.int64), i_hv.to(tl.int64)
    o_tile = at * BT * BT + o_t[:, None] * BT + o_t[None, :]
    o_row = tl.where(o_t < rows, o_t, -1)  # a descriptor reads what lies beyond the sequence
    b_g = load_tokens(g + at_b * sg[0] + at_t * sg[1] + i_hv * sg[2], o_t, sg[1], rows)
    b_beta = load_tokens(beta + at_b * sb[0] + at_t * sb[1] + i_hv * sb[2], o_t, sb[1], rows)
    b_rk = tl.load(gates + at * ROWS * BT + R_K * BT + o_t)
    b_decay = decay_matrix(b_g, BT) * b_rk[None, :]
    b_k = load_tile(k + at_b * sk[0] + at_t * sk[1] + i_h * sk[2], o_t, o_k, sk[1], sk[3], rows, K)
    b_m = tl.where(o_row[:, None] > o_t[None, :], b_m * b_decay * -b_rk[:, None], 0.0)
    tl.store(dm + o_tile, (b_m * b_beta[None, :]).to(dtype))
    b_m *= tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    if do is not None:
        b_rq = tl.load(gates + at * ROWS * BT + R_Q * BT + o_t) * scale
        b_q = load_tile(q + at_b * sq[0] + at_t * sq[1] + i_h * sq[2], o_t, o_k, sq[1], sq[3], rows, K)
        b_p = tl.where(o_row[:, None] >= o_t[None, :], b_p * b_decay * b_rq[:, None], 0.0)
        tl.store(dp + o_tile, (b_p * b_beta[None, :]).to(dtype))
        b_m += b_p * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    at_g, b_column = (at_b * T + at_t + o_t) * HV + i_hv, tl.sum(b_m, axis=0)
    tl.store(pbeta + at_g, b_column, mask=o_t < rows)
    tl.store(pg + at_g, tl.sum(b_m * b_beta[None, :], axis=1) - b_column * b_beta, mask=o_t < rows)


def read_tokens(x: Tensor | None, call: Call, BI: int):
    """x [B, T, HV, V], or a descriptor of it in tiles of [BT, BI] where kernels take one."""
    if x is None or x.element_size() != 2 or not has_descriptors(x.device):
        return x
    return of_tokens(x, call.chunks.size, BI) or x


def read_states(x: Tensor, call: Call, BI: int):
    """x [chunks, HV, V, K], or a descriptor of it in tiles of [BI, BK] where kernels take one."""
    if x.element_size() != 2 or not has_descriptors(x.device):
        return x
    return of_matrices(x, BI, call.constants["BK"]) or x


def intra(call: Call, gates: Tensor, do: Tensor | None, scanned: Scanned) -> Intra:
    (q, k, _, g, beta), chunks, tiles = call.inputs, call.chunks, call.tiles("intra")
    pg, pbeta = (chunks.empty(*g.shape, dtype=torch.float32) for _ in range(2))
    out, BI = Intra(call.intra(), call.intra(), pg, pbeta), min(tiles.tile, power_of_two(call.V))
    launch(
        gated_delta_rule_intra_bwd_kernel,
        chunks.count * call.HV,
        *(q, k, g, beta, gates, *(read_tokens(x, call, BI) for x in (do, scanned.r, scanned.dv))),
        *(chunks.start.cu_seqlens, *out, call.options.scale, chunks.T, chunks.sequences, call.V),
        *(q.stride(), k.stride(), g.stride(), beta.stride(), strides(do, 4), scanned.r.stride()),
        V=call.V,
        BI=BI,
        **call.constants,
        tiles=tiles,
    )
    return out


@triton.jit
def load_values(x, sx, i_b, i_t, i_hv, i_v, rows, V, BT: tl.constexpr, BV: tl.constexpr):
    """`load_token_tile` in fp32, zero beyond `rows` however it is read."""
    b_x = load_token_tile(x, sx, i_b, i_t, i_hv, i_v, rows, V, BT, BV)
    return tl.where((tl.arange(0, BT) < rows)[:, None], b_x, 0.0).to(tl.float32)


@triton.jit
def load_state_rows(x, at, i_v, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """[BV, BK] from row i_v on of the state [V, K] of that number in x, a pointer or a descriptor; zero beyond it."""
    if isinstance(x, tl.tensor_descriptor):
        return tl.reshape(x.load([at.to(tl.int32), i_v, 0]), [BV, BK])
    else:
        base = x + at.to(tl.int64) * K * V + i_v * K
        return load_tile(base, tl.arange(0, BV), tl.arange(0, BK), K, 1, V - i_v, K)


@kernel
def gated_delta_rule_inputs_bwd_kernel(
    q,  # [B, T, H, K], any strides sq, as k
    k,
    beta,  # [B, T, HV], any strides
    gates,
    do,  # None, or [B, T, HV, V], any strides so; a pointer or a descriptor, as r, dv, h and dh
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
    sv,  # of r and dv
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BI: tl.constexpr,
    BQ: tl.constexpr,
):
    """A program per (chunk, key head): its value heads in turn, their sums in registers. Of h and dh, which are most of
    what is read, a tile is read once and goes into everything that it is in."""
    i_c, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_b, i_t, rows = locate_chunk(cu_seqlens, i_c, NSEQ, T, BT, BQ)
    if rows <= 0:
        return
    o_t, o_k = tl.arange(0, BT), tl.arange(0, BK)
    dtype = q.dtype.element_ty
    at_b, at_t, i_c = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), i_c.to(tl.int64)
    at_h = i_h.to(tl.int64)
    p_q = q + at_b * sq[0] + at_t * sq[1] + at_h * sq[2]
    p_k = k + at_b * sk[0] + at_t * sk[1] + at_h * sk[2]
    b_q = load_tile(p_q, o_t, o_k, sq[1], sq[3], rows, K)
    b_k = load_tile(p_k, o_t, o_k, sk[1], sk[3], rows, K)
    b_dq, b_dk = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.float32)
    for i_r in tl.range(R, disable_licm=True):
        i_hv = i_h * R + i_r
        at = i_c * HV + i_hv
        b_dm = load_matrix(dm, at, BT, BT)
        b_dk = tl.dot(b_dm + tl.trans(b_dm), b_k, b_dk, input_precision=PRECISION)  # one of the two is zero everywhere
        if do is not None:
            b_dp = load_matrix(dp, at, BT, BT)
            b_dq = tl.dot(b_dp, b_k, b_dq, input_precision=PRECISION)
            b_dk = tl.dot(tl.trans(b_dp), b_q, b_dk, input_precision=PRECISION)

        p_gates = gates + at * ROWS * BT + o_t
        b_a_q, b_a_k, b_e_k = tl.load(p_gates + A_Q * BT), tl.load(p_gates + A_K * BT), tl.load(p_gates + E_K * BT)
        # by token what log G and log E have, and of V's rows what the decay of the whole chunk has
        b_start, b_end = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
        b_through = tl.zeros([BI], tl.float32)
        for i in range(0, inner, BI):
            b_h = load_state_rows(h, at, i, V, K, BI, BK)
            b_x = load_values(dv, sv, i_b, i_t, i_hv, i, rows, V, BT, BI) * -b_a_k[:, None]
            b_start += tl.sum(b_x * tl.dot(b_k, tl.trans(b_h), input_precision=PRECISION), axis=1)
            b_dk = tl.dot(b_x.to(dtype), b_h, b_dk, input_precision=PRECISION)
            if do is not None:
                b_x = load_values(do, so, i_b, i_t, i_hv, i, rows, V, BT, BI) * b_a_q[:, None]
                b_start += tl.sum(b_x * tl.dot(b_q, tl.trans(b_h), input_precision=PRECISION), axis=1)
                b_dq = tl.dot(b_x.to(dtype), b_h, b_dq, input_precision=PRECISION)
            b_dh = load_state_rows(dh, at, i, V, K, BI, BK)
            b_through += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), axis=1)
            b_x = load_values(r, sv, i_b, i_t, i_hv, i, rows, V, BT, BI)
            b_end += tl.sum(b_x * tl.dot(b_k, tl.trans(b_dh), input_precision=PRECISION), axis=1)
            b_dk = tl.dot((b_x * b_e_k[:, None]).to(dtype), b_dh, b_dk, input_precision=PRECISION)

        at_g = (at_b * T + at_t + o_t) * HV + i_hv
        b_end *= tl.load(p_gates + TO_END * BT)
        if dbeta is not None:
            b_dbeta = tl.load(pbeta + at_g, mask=o_t < rows, other=0.0) + b_end
            tl.store(dbeta + at_g, b_dbeta.to(dbeta.dtype.element_ty), mask=o_t < rows)
        if dg is not None:
            b_end *= load_tokens(beta + at_b * sb[0] + at_t * sb[1] + tl.cast(i_hv, tl.int64) * sb[2], o_t, sb[1], rows)
            b_start += tl.load(pg + at_g, mask=o_t < rows, other=0.0)
            b_dg = tl.cumsum(b_start, axis=0, reverse=True) + tl.cumsum(b_end, axis=0) - b_end
            b_dg += tl.load(gates + at * ROWS * BT + LAST * BT + BT - 1) * tl.sum(b_through)
            tl.store(dg + at_g, b_dg.to(dg.dtype.element_ty), mask=o_t < rows)

    at_x = ((at_b * T + at_t) * H + i_h) * K
    p_norms = gates + (i_c * HV + i_h * R) * ROWS * BT + o_t
    if dq is not None:
        b_norm = tl.load(p_norms + R_Q * BT)
        store_input_grad(dq + at_x, b_dq, p_q, sq[1], sq[3], b_norm, rows, H, K, NORMALISE, BT, BK)
    if dk is not None:
        b_norm = tl.load(p_norms + R_K * BT)
        store_input_grad(dk + at_x, b_dk, p_k, sk[1], sk[3], b_norm, rows, H, K, NORMALISE, BT, BK)


def input_grads(
    call: Call, gates: Tensor, do: Tensor | None, scanned: Scanned, names: frozenset[str]
) -> dict[str, Tensor]:
    """Those of `names`, which are of OF_CHUNKS."""
    (q, k, _, _, beta), chunks, tiles = call.inputs, call.chunks, call.tiles("inputs")
    dm, dp, pg, pbeta = intra(call, gates, do, scanned)
    found, BI = empty_grads(call.inputs, names), min(tiles.tile, power_of_two(call.V))
    dq, dk, dg, dbeta = map(found.get, ("q", "k", "g", "beta"))
    launch(
        gated_delta_rule_inputs_bwd_kernel,
        chunks.count * call.H,
        *(q, k, beta, gates, *(read_tokens(x, call, BI) for x in (do, scanned.r, scanned.dv))),
        *(*(read_states(x, call, BI) for x in (scanned.h, scanned.dh)), dm, dp, chunks.start.cu_seqlens),
        *(dq, dk, pg, pbeta, dg, dbeta, chunks.T, chunks.sequences, call.HV // call.H, call.V),
        *(q.stride(), k.stride(), beta.stride(), strides(do, 4), scanned.r.stride()),
        V=call.V,
        NORMALISE=call.options.use_qk_l2norm,
        BI=BI,
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
