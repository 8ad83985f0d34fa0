"""The backward of the gated delta rule in the symbols of `forward`: the inter-chunk scan, and what runs after what.

From dO and the gradient dS' of the state at the end of a chunk, in a scan that looks at neither V nor S:

    dR = P^T dO + diag(rk beta E) K dS'
    dV = W^T dR
    dS = G_C dS' + Q^T diag(scale rq G) dO - K^T diag(rk G) dV

The gradients of the other inputs then need no scan: `input_grads`.
"""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.chunks import load_tile, rest, sequence
from s0kernels.backends.triton.common.launch import launch, strides
from s0kernels.backends.triton.common.states import bank_size, reduce_state_grad, state_strides
from s0kernels.backends.triton.gated_delta_rule.call import Call
from s0kernels.backends.triton.gated_delta_rule.forward import scan_forward
from s0kernels.backends.triton.gated_delta_rule.input_grads import OF_CHUNKS, Scanned, input_grads
from s0kernels.backends.triton.gated_delta_rule.prepare import (
    A_K,
    A_Q,
    E_K,
    LAST,
    ROWS,
    Factors,
    any_in_parts,
    load_rest,
    parts_of,
    prepare,
)
from s0kernels.calls import DeltaInputs, DeltaOptions, Grads, Start, Wanted


@triton.jit
def chunks_backward(
    b_dh,
    q,
    k,
    w,
    p,
    gates,
    do,
    dv,
    dh,
    i_c0,
    i_hv,
    i_v,
    length,
    at_do,
    at_v,
    sq,
    sk,
    so,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PARTS: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """dS^T before `length` tokens; `IN_PARTS` as in `chunks_forward`."""
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_h = (o_v < V)[:, None] & (o_k < K)[None, :]
    dtype = q.dtype.element_ty
    o_tile = o_t[:, None] * BT + o_t[None, :]
    chunks = tl.cdiv(length, BT)
    for i in tl.range(chunks, num_stages=1 if IN_PARTS else None):
        i_c = chunks - 1 - i
        rows = length - i_c * BT
        i_t = tl.cast(i_c, tl.int64) * BT
        at = (i_c0 + i_c) * HV + i_hv
        if dh is not None:
            tl.store(dh + at * K * V + o_v[:, None] * K + o_k[None, :], b_dh.to(dtype), mask=m_h)
        b_k = load_tile(k + i_t * sk[1], o_t, o_k, sk[1], sk[3], rows, K)
        b_w = tl.load(w + at * PARTS * BT * BT + o_tile)
        p_gates = gates + at * ROWS * BT + o_t
        b_dr = tl.dot(b_dh.to(dtype), tl.trans(b_k), input_precision=PRECISION)
        b_dr *= tl.load(p_gates + E_K * BT)[None, :]
        b_dh *= tl.load(gates + at * ROWS * BT + LAST * BT + BT - 1)
        if do is not None:
            b_q = load_tile(q + i_t * sq[1], o_t, o_k, sq[1], sq[3], rows, K)
            b_p = tl.load(p + at * BT * BT + o_tile)
            b_do = tl.trans(load_tile(do + at_do + i_t * so[1], o_t, o_v, so[1], so[3], rows, V))
            b_dr = tl.dot(b_do, b_p, b_dr, input_precision=PRECISION)
            b_read = (b_do.to(tl.float32) * tl.load(p_gates + A_Q * BT)[None, :]).to(dtype)
            b_dh = tl.dot(b_read, b_q, b_dh, input_precision=PRECISION)
        b_dv = tl.dot(b_dr.to(dtype), b_w, input_precision=PRECISION)
        if IN_PARTS:
            b_dv = tl.dot(b_dr.to(dtype), load_rest(w, gates, at, BT), b_dv)
            b_dv = tl.dot(rest(b_dr, dtype), b_w, b_dv)
        if dv is not None:
            m_v = (o_t < rows)[None, :] & (o_v < V)[:, None]
            p_dv = dv + at_v + i_t * (HV * V) + o_t[None, :] * (HV * V) + o_v[:, None]
            tl.store(p_dv, b_dv.to(dtype), mask=m_v)
        b_dv *= -tl.load(p_gates + A_K * BT)[None, :]
        b_dh = tl.dot(b_dv.to(dtype), b_k, b_dh, input_precision=PRECISION)
        if IN_PARTS:
            b_dh = tl.dot(rest(b_dv, dtype), b_k, b_dh)
    return b_dh


@triton.jit
def scan_backward(
    pid,
    q,
    k,
    w,
    p,
    gates,
    do,
    dht,
    cu_seqlens,
    dv,
    dh,
    dh0,
    T,
    NSEQ,
    sq,
    sk,
    so,
    sh,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BQ: tl.constexpr,
):
    """The chunks of one (tile of V, value head, sequence), from the last to the first."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    i_v, i_qh = pid % tiles, pid // tiles
    i_q, i_hv = i_qh // HV, i_qh % HV
    i_h = i_hv // (HV // H)
    i_b, bos, length, i_c0, wrong = sequence(cu_seqlens, i_q, NSEQ, T, BT, BQ)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_h = (o_v < V)[:, None] & (o_k < K)[None, :]
    dtype = q.dtype.element_ty
    PARTS: tl.constexpr = parts_of(dtype)
    b_dh = tl.zeros([BV, BK], tl.float32)
    if dht is not None:
        p_dht = dht + tl.cast(i_q, tl.int64) * sh[0] + i_hv * sh[1] + o_v[:, None] * sh[3] + o_k[None, :] * sh[2]
        b_dh = tl.load(p_dht, mask=m_h, other=0.0)
    b_dh = tl.where(wrong, float("nan"), b_dh)

    i_b, bos, i_c0 = tl.cast(i_b, tl.int64), tl.cast(bos, tl.int64), tl.cast(i_c0, tl.int64)
    p_q = q + i_b * sq[0] + bos * sq[1] + i_h * sq[2]
    p_k = k + i_b * sk[0] + bos * sk[1] + i_h * sk[2]
    at_do = i_b * so[0] + bos * so[1] + i_hv * so[2]
    at_v = ((i_b * T + bos) * HV + i_hv) * V
    if PARTS > 1 and any_in_parts(gates, i_c0, i_hv, length, HV, BT):
        b_dh = chunks_backward(
            *(b_dh, p_q, p_k, w, p, gates, do, dv, dh, i_c0, i_hv, i_v, length, at_do, at_v, sq, sk, so),
            *(HV, K, V, PRECISION, BT, BK, BV, PARTS, True),
        )
    else:
        b_dh = chunks_backward(
            *(b_dh, p_q, p_k, w, p, gates, do, dv, dh, i_c0, i_hv, i_v, length, at_do, at_v, sq, sk, so),
            *(HV, K, V, PRECISION, BT, BK, BV, PARTS, False),
        )
    if dh0 is not None:
        tl.store(dh0 + i_qh.to(tl.int64) * K * V + o_v[:, None] + o_k[None, :] * V, b_dh, mask=m_h)


@triton.jit
def gated_delta_rule_scan_bwd_kernel(
    q,  # [B, T, H, K], any strides sq, as k
    k,
    v,  # None, or [B, T, HV, V], any strides sv; then the states are recomputed, too
    w,
    p,
    gates,
    h0,  # as in the forward
    indices,
    cu_seqlens,
    do,  # None, or [B, T, HV, V], any strides so
    dht,  # None, or [NSEQ, HV, K, V] in fp32, any strides st
    r,  # None, or [B, T, HV, V], as dv
    dv,
    h,  # None, or [chunks, HV, V, K]: S^T, as dh: dS'^T of every chunk
    dh,
    dh0,  # None, or [NSEQ, HV, K, V] in fp32
    T,
    NSEQ,
    S,
    programs,
    sq,
    sk,
    sv,
    sh,
    so,
    st,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BQ: tl.constexpr,
):
    """`programs` scan from the end, one per (tile of V, value head, sequence). Where other gradients than that of the
    state are wanted, as many more scan from the start beside them."""
    if tl.program_id(0) < programs:
        scan_backward(
            *(tl.program_id(0), q, k, w, p, gates, do, dht, cu_seqlens, dv, dh, dh0, T, NSEQ, sq, sk, so, st),
            *(H, HV, K, V, PRECISION, BT, BK, BV, BQ),
        )
    elif v is not None:
        scan_forward(
            *(tl.program_id(0) - programs, q, k, v, w, p, gates, h0, indices, cu_seqlens, None, r, h, None, None, None),
            *(T, NSEQ, S, sq, sk, sv, sh, H, HV, K, V, PRECISION, BT, BK, BV, BQ),
        )


def scan(call: Call, factors: Factors, grads: Grads, out: Scanned, dh0: Tensor | None) -> None:
    """Where r is wanted, and so h and dh, the states are recomputed beside it."""
    (q, k, v, _, _), chunks = call.inputs, call.chunks
    tiles, blocks, programs = call.scan_tiles
    recompute = out.r is not None
    v, start = (v, chunks.start) if recompute else (None, Start(cu_seqlens=chunks.start.cu_seqlens))
    launch(
        gated_delta_rule_scan_bwd_kernel,
        2 * programs if recompute else programs,
        *(q, k, v, *factors, *start, *grads, *out, dh0, chunks.T, chunks.sequences, bank_size(start.state), programs),
        *(q.stride(), k.stride(), strides(v, 4), state_strides(start.state)),
        *(strides(grads.output, 4), strides(grads.final_state, 4)),
        V=call.V,
        **blocks,
        **call.constants,
        tiles=tiles,
    )


def gated_delta_rule_backward(
    grads: Grads, inputs: DeltaInputs, start: Start, options: DeltaOptions, wanted: Wanted
) -> dict[str, Tensor]:
    names = wanted.names
    call = Call.of(inputs, grads.columns(3), start, options)
    if grads.output is not None:
        grads = grads._replace(output=grads.output.to(inputs.q.dtype))
    of_chunks = names & OF_CHUNKS
    scanned = Scanned(dv=call.tokens() if of_chunks or "v" in names else None)
    if of_chunks:
        scanned = scanned._replace(r=call.tokens(), h=call.chunk_states(), dh=call.chunk_states())
    dh0 = call.final_states() if "initial_state" in names else None
    factors = prepare(call)
    scan(call, factors, grads, scanned, dh0)
    found = input_grads(call, factors.gates, grads.output, scanned, of_chunks) if of_chunks else {}
    if "v" in names and scanned.dv is not None:
        found["v"] = scanned.dv
    if dh0 is not None:
        found["initial_state"] = reduce_state_grad(dh0, wanted.state_shape, start.indices)
    return found
