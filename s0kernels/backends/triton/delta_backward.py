"""Kernels of the gated delta rule, backward, in the symbols of `delta_forward`.

From dO and the gradient dS' of the state at the end of a chunk, in `scan`, which looks at neither V nor S:

    dR = P^T dO + diag(rk beta E) K dS'
    dV = W^T dR
    dS = G_C dS' + Q^T diag(scale rq G) dO - K^T diag(rk G) dV

and with dM = strict_lower(-dV R^T) and dP = lower(dO R^T), the gradients of what W inverts and of P, in `inputs`, where
everything is known for all chunks at once:

    dQ = scale diag(G) dO S^T + (scale dP * D) diag(beta) K
    dK = -diag(G) dV S^T + diag(beta E) R dS'^T + diag(beta) (scale dP * D)^T Q
         + ((dM * D) diag(beta) + diag(beta) (dM * D)^T) K

of the normalised q and k. A log decay g_l takes part in every G_i with i >= l, every E_j with j < l, every D_ij with
j < l <= i and in G_C.
"""

import triton
import triton.language as tl

from s0kernels.backends.triton.delta_forward import A_K, A_Q, E_K, LAST, row_norm
from s0kernels.backends.triton.tiles import (
    chunk_of_slot,
    decay_matrix,
    decay_matrix_grad,
    load_tile,
    sequence,
)


@triton.jit
def gated_delta_rule_scan_bwd_kernel(
    q,  # [B, T, H, K], any strides, as k
    k,
    w,
    p,
    gates,
    do,  # None, or [B, T, HV, V], any strides
    dht,  # None, or [N, HV, K, V] in fp32, any strides
    cu_seqlens,
    dv,  # None, or [B, T, HV, V]
    dh,  # None, or [slots, HV, V, K]: dS'^T of every chunk
    dh0,  # None, or [N, HV, K, V] in fp32
    T,
    N,
    sqb,
    sqt,
    sqh,
    sqk,
    skb,
    skt,
    skh,
    skk,
    sob,
    sot,
    soh,
    sov,
    shn,
    shh,
    shk,
    shv,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
):
    """A program per (tile of V, value head, sequence) walks the chunks backwards."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    i_v, i_nh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_n, i_hv = i_nh // HV, i_nh % HV
    i_b, bos, length, i_s, wrong = sequence(cu_seqlens, i_n, N, T, BT, BN)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_h = (o_v < V)[:, None] & (o_k < K)[None, :]
    dtype = q.dtype.element_ty
    b_dh = tl.zeros([BV, BK], tl.float32)
    if dht is not None:
        p_dht = dht + i_n.to(tl.int64) * shn + i_hv * shh + o_v[:, None] * shv + o_k[None, :] * shk
        b_dh = tl.load(p_dht, mask=m_h, other=0.0)
    b_dh = tl.where(wrong, float("nan"), b_dh)

    i_b, bos, i_s = tl.cast(i_b, tl.int64), tl.cast(bos, tl.int64), tl.cast(i_s, tl.int64)
    p_q = q + i_b * sqb + bos * sqt + i_hv // (HV // H) * sqh
    p_k = k + i_b * skb + bos * skt + i_hv // (HV // H) * skh
    at_v = ((i_b * T + bos) * HV + i_hv) * V
    o_tile = o_t[:, None] * BT + o_t[None, :]
    chunks = tl.cdiv(length, BT)
    for i in range(chunks):
        i_c = chunks - 1 - i
        rows = length - i_c * BT
        i_t = tl.cast(i_c, tl.int64) * BT
        at = (i_s + i_c) * HV + i_hv
        if dh is not None:
            tl.store(dh + at * K * V + o_v[:, None] * K + o_k[None, :], b_dh.to(dtype), mask=m_h)
        b_k = load_tile(p_k + i_t * skt, o_t, o_k, skt, skk, rows, K)
        b_w = tl.load(w + at * BT * BT + o_tile)
        p_gates = gates + at * 4 * BT
        b_dr = tl.dot(b_dh.to(dtype), tl.trans(b_k), input_precision=PRECISION)
        b_dr *= tl.load(p_gates + E_K * BT + o_t)[None, :]
        b_dh *= tl.load(p_gates + LAST * BT + BT - 1)
        if do is not None:
            b_q = load_tile(p_q + i_t * sqt, o_t, o_k, sqt, sqk, rows, K)
            b_p = tl.load(p + at * BT * BT + o_tile)
            p_do = do + i_b * sob + (bos + i_t) * sot + i_hv * soh
            b_do = tl.trans(load_tile(p_do, o_t, o_v, sot, sov, rows, V))
            b_dr = tl.dot(b_do, b_p, b_dr, input_precision=PRECISION)
            b_read = (b_do.to(tl.float32) * tl.load(p_gates + A_Q * BT + o_t)[None, :]).to(dtype)
            b_dh = tl.dot(b_read, b_q, b_dh, input_precision=PRECISION)
        b_dv = tl.dot(b_dr.to(dtype), b_w, input_precision=PRECISION)
        if dv is not None:
            m_v = (o_t < rows)[None, :] & (o_v < V)[:, None]
            p_dv = dv + at_v + i_t * (HV * V) + o_t[None, :] * (HV * V) + o_v[:, None]
            tl.store(p_dv, b_dv.to(dtype), mask=m_v)
        b_dv = (b_dv * -tl.load(p_gates + A_K * BT + o_t)[None, :]).to(dtype)
        b_dh = tl.dot(b_dv, b_k, b_dh, input_precision=PRECISION)
    if dh0 is not None:
        tl.store(dh0 + i_nh.to(tl.int64) * K * V + o_v[:, None] + o_k[None, :] * V, b_dh, mask=m_h)


@triton.jit
def gated_delta_rule_inputs_bwd_kernel(
    q,  # [B, T, H, K], any strides, as k
    k,
    g,  # [B, T, HV], any strides, as beta
    beta,
    do,  # None, or [B, T, HV, V], any strides
    r,  # [B, T, HV, V], as dv
    dv,
    h,  # [slots, HV, V, K], as dh
    dh,
    cu_seqlens,
    dq,  # None, or [B, T, H, K], as dk
    dk,
    dg,  # None, or [B, T, HV], as dbeta
    dbeta,
    scale,
    T,
    N,
    sqb,
    sqt,
    sqh,
    sqk,
    skb,
    skt,
    skh,
    skk,
    sgb,
    sgt,
    sgh,
    sbb,
    sbt,
    sbh,
    sob,
    sot,
    soh,
    sov,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
):
    """A program per (slot, key head): the value heads of a key head in turn, their sums in registers."""
    i_s, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_b, i_t, rows = chunk_of_slot(cu_seqlens, i_s, N, T, BT, BN)
    if rows <= 0:
        return
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    m_t = o_t < rows
    dtype = q.dtype.element_ty
    i_b, i_t, i_s = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), i_s.to(tl.int64)
    b_q = load_tile(q + i_b * sqb + i_t * sqt + i_h * sqh, o_t, o_k, sqt, sqk, rows, K)
    b_k = load_tile(k + i_b * skb + i_t * skt + i_h * skh, o_t, o_k, skt, skk, rows, K)
    b_rq, b_rk = row_norm(b_q, NORMALISE), row_norm(b_k, NORMALISE)
    b_q = (b_q.to(tl.float32) * b_rq[:, None]).to(dtype)
    b_k = (b_k.to(tl.float32) * b_rk[:, None]).to(dtype)
    b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    b_kk = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    b_dq, b_dk = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.float32)
    strict = o_t[:, None] > o_t[None, :]
    for i_r in range(HV // H):
        i_hv = i_h * (HV // H) + i_r
        b_g = tl.load(g + i_b * sgb + i_t * sgt + i_hv * sgh + o_t * sgt, mask=m_t, other=0.0).to(tl.float32)
        b_beta = tl.load(beta + i_b * sbb + i_t * sbt + i_hv * sbh + o_t * sbt, mask=m_t, other=0.0).to(tl.float32)
        b_from_start = tl.exp(tl.cumsum(b_g, axis=0))
        b_decay = decay_matrix(b_g, BT)
        b_to_end = tl.sum(tl.where(o_t[:, None] == BT - 1, b_decay, 0.0), axis=0)
        at_v = ((i_b * T + i_t) * HV + i_hv) * V
        b_r = load_tile(r + at_v, o_t, o_v, HV * V, 1, rows, V)
        b_dv = load_tile(dv + at_v, o_t, o_v, HV * V, 1, rows, V)
        at_h = (i_s * HV + i_hv) * K * V
        b_h = load_tile(h + at_h, o_v, o_k, K, 1, V, K)
        b_dh = load_tile(dh + at_h, o_v, o_k, K, 1, V, K)

        # what W inverts, and P
        b_dm = tl.where(strict, -tl.dot(b_dv, tl.trans(b_r), input_precision=PRECISION), 0.0) * b_decay
        b_dbeta = tl.sum(b_dm * b_kk, axis=0)
        b_pairs = b_dm * b_kk
        b_dm = (b_dm * b_beta[None, :]).to(dtype)
        b_dk = tl.dot(b_dm, b_k, b_dk, input_precision=PRECISION)
        b_dk = tl.dot(tl.trans(b_dm), b_k, b_dk, input_precision=PRECISION)
        b_start = tl.zeros([BT], tl.float32)
        if do is not None:
            p_do = do + i_b * sob + i_t * sot + i_hv * soh
            b_do = load_tile(p_do, o_t, o_v, sot, sov, rows, V)
            b_dp = tl.dot(b_do, tl.trans(b_r), input_precision=PRECISION) * b_decay
            b_dbeta += tl.sum(b_dp * b_qk, axis=0)
            b_pairs += b_dp * b_qk
            b_dp = (b_dp * b_beta[None, :] * scale).to(dtype)
            b_dq = tl.dot(b_dp, b_k, b_dq, input_precision=PRECISION)
            b_dk = tl.dot(tl.trans(b_dp), b_q, b_dk, input_precision=PRECISION)
            b_part = tl.dot(b_do, b_h, input_precision=PRECISION) * (scale * b_from_start)[:, None]
            b_start += tl.sum(b_part * b_q.to(tl.float32), axis=1)
            b_dq += b_part

        # the states at both ends
        b_part = tl.dot(b_dv, b_h, input_precision=PRECISION) * -b_from_start[:, None]
        b_start += tl.sum(b_part * b_k.to(tl.float32), axis=1)
        b_dk += b_part
        b_part = tl.dot(b_r, b_dh, input_precision=PRECISION) * b_to_end[:, None]
        b_end = tl.sum(b_part * b_k.to(tl.float32), axis=1)
        b_dbeta += b_end
        b_end *= b_beta
        b_dk += b_part * b_beta[:, None]

        at_g = (i_b * T + i_t + o_t) * HV + i_hv
        if dbeta is not None:
            tl.store(dbeta + at_g, b_dbeta.to(dbeta.dtype.element_ty), mask=m_t)
        if dg is not None:
            b_last = tl.sum(tl.where(o_t == BT - 1, b_from_start, 0.0))
            b_carried = b_last * tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32))
            b_dg = decay_matrix_grad(b_pairs * b_beta[None, :], BT) + tl.cumsum(b_start, axis=0, reverse=True)
            b_dg += tl.cumsum(b_end, axis=0) - b_end + b_carried
            tl.store(dg + at_g, b_dg.to(dg.dtype.element_ty), mask=m_t)
    m_k = m_t[:, None] & (o_k < K)[None, :]
    at_k = ((i_b * T + i_t + o_t[:, None]) * H + i_h) * K + o_k[None, :]
    if dq is not None:
        tl.store(dq + at_k, row_norm_grad(b_dq, b_q, b_rq, NORMALISE).to(dq.dtype.element_ty), mask=m_k)
    if dk is not None:
        tl.store(dk + at_k, row_norm_grad(b_dk, b_k, b_rk, NORMALISE).to(dk.dtype.element_ty), mask=m_k)


@triton.jit
def row_norm_grad(b_dx, b_x, b_norm, NORMALISE: tl.constexpr):
    """Through x -> x * norm, from the normalised x."""
    if NORMALISE:
        b_x = b_x.to(tl.float32)
        b_dx = b_norm[:, None] * (b_dx - b_x * tl.sum(b_x * b_dx, axis=1)[:, None])
    return b_dx
