"""The backward of the gated delta rule in the symbols of `forward`: the inter-chunk scan, and what runs after what.

From dO and the gradient dS' of the state at the end of a chunk, in a scan that looks at neither V nor S:

    dR = P^T dO + diag(rk beta E) K dS'
    dV = W^T dR
    dS = G_C dS' + Q^T diag(scale rq G) dO - K^T diag(rk G) dV

The gradients of the other inputs then need no scan: `input_grads`.
"""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.chunks import rest, sequence, size_and_count
from s0kernels.backends.triton.common.descriptors import (
    element_type,
    has_descriptors,
    load_matrix,
    load_token_tile,
    of_matrices,
    of_tokens,
    store_matrix,
    store_token_tile,
)
from s0kernels.backends.triton.common.launch import kernel, launch, strides
from s0kernels.backends.triton.common.states import reduce_state_grad
from s0kernels.backends.triton.common.targets import target_of
from s0kernels.backends.triton.gated_delta_rule import forward
from s0kernels.backends.triton.gated_delta_rule.call import Call, chunk_size
from s0kernels.backends.triton.gated_delta_rule.input_grads import OF_CHUNKS, Scanned, input_grads
from s0kernels.backends.triton.gated_delta_rule.prepare import (
    A_K,
    A_Q,
    E_K,
    LAST,
    ROWS,
    TWO_PARTS,
    Factors,
    any_in_parts,
    empty_factors,
    parts_of,
    prepare,
)
from s0kernels.calls import DeltaInputs, DeltaKept, DeltaOptions, Grads, Start, Wanted


@triton.jit
def chunk_backward(
    b_dh,
    q,
    k,
    w,
    p,
    gates,
    do,
    dv,
    dh,
    dv_tiles,
    i_b,
    i_h,
    i_hv,
    i_v,
    i_t,
    at,
    rows,
    T,
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
    GENERAL: tl.constexpr,
):
    """dS^T before the chunk with index `at`, whose first token is i_t; `GENERAL` as in `chunk_forward`."""
    o_t, o_v = tl.arange(0, BT), i_v * BV + tl.arange(0, BV)
    dtype = element_type(q)
    PARTS: tl.constexpr = parts_of(dtype)
    p_gates = gates + at * ROWS * BT + o_t
    b_k = load_token_tile(k, sk, i_b, i_t, i_h, 0, rows, K, BT, BK)
    b_w = load_matrix(w, at * PARTS, BT, BT)
    # early, as loads of vectors wait for whatever was asked for before them
    b_a_k, b_e_k = tl.load(p_gates + A_K * BT), tl.load(p_gates + E_K * BT)
    b_last = tl.load(gates + at * ROWS * BT + LAST * BT + BT - 1)
    if do is not None:
        b_do = tl.trans(load_token_tile(do, so, i_b, i_t, i_hv, i_v * BV, rows, V, BT, BV))
        b_p = load_matrix(p, at, BT, BT)
        b_q = load_token_tile(q, sq, i_b, i_t, i_h, 0, rows, K, BT, BK)
        b_a_q = tl.load(p_gates + A_Q * BT)
        if GENERAL:
            b_do = tl.where((o_t < rows)[None, :], b_do, 0.0)
            b_q = tl.where((o_t < rows)[:, None], b_q, 0.0)
    if GENERAL:
        b_k = tl.where((o_t < rows)[:, None], b_k, 0.0)
    b_dhd = b_dh.to(dtype)
    if dh is not None:
        store_matrix(dh, at, b_dhd, V, K, i_v * BV, BV, BK)
    b_dr = tl.dot(b_dhd, tl.trans(b_k), input_precision=PRECISION) * b_e_k[None, :]
    b_dh *= b_last
    if do is not None:
        b_dr = tl.dot(b_do, b_p, b_dr, input_precision=PRECISION)
        b_read = (b_do.to(tl.float32) * b_a_q[None, :]).to(dtype)
        b_dh = tl.dot(b_read, b_q, b_dh, input_precision=PRECISION)
    b_dv = tl.dot(b_dr.to(dtype), b_w, input_precision=PRECISION)
    if GENERAL:
        fine = tl.load(gates + at * ROWS * BT + TWO_PARTS * BT) > 0.0
        b_w_rest = tl.where(fine, load_matrix(w, at * PARTS + 1, BT, BT), 0.0)
        b_dv = tl.dot(b_dr.to(dtype), b_w_rest, b_dv)
        b_dv = tl.dot(rest(b_dr, dtype), b_w, b_dv)
    if dv is not None:
        if dv_tiles is None or GENERAL:
            o_dv = (((tl.cast(i_b, tl.int64) * T + i_t) * HV + i_hv) * V + o_t[None, :] * (HV * V)) + o_v[:, None]
            tl.store(dv + o_dv, b_dv.to(dtype), mask=(o_t < rows)[None, :] & (o_v < V)[:, None])
        else:
            store_token_tile(dv_tiles, tl.trans(b_dv.to(dtype)), i_b, i_t, i_hv, i_v * BV)
    b_dv *= -b_a_k[None, :]
    b_dh = tl.dot(b_dv.to(dtype), b_k, b_dh, input_precision=PRECISION)
    if GENERAL:
        b_dh = tl.dot(rest(b_dv, dtype), b_k, b_dh)
    return b_dh


@kernel
def gated_delta_rule_scan_bwd_kernel(
    q,  # [B, T, H, K], any strides sq, as k; or descriptors of all from q to p, and of do
    k,
    w,
    p,
    gates,
    do,  # None, or [B, T, HV, V], any strides so
    dht,  # None, or [NSEQ, HV, K, V] in fp32, any strides st
    cu_seqlens,
    dv,  # None, or [B, T, HV, V]
    dh,  # None, or [chunks, HV, V, K]: dS'^T of every chunk; a pointer or a descriptor
    dh0,  # None, or [NSEQ, HV, K, V] in fp32
    dv_tiles,  # None, or a descriptor of dv
    T,
    NSEQ,
    sq,
    sk,
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
    """A program per (tile of V, value head, sequence): its chunks from the last to the first."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    i_v, i_qh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_q, i_hv = i_qh // HV, i_qh % HV
    i_h = i_hv // (HV // H)
    i_b, bos, length, i_c0, wrong = sequence(cu_seqlens, i_q, NSEQ, T, BT, BQ)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_h = (o_v < V)[:, None] & (o_k < K)[None, :]
    b_dh = tl.zeros([BV, BK], tl.float32)
    if dht is not None:
        p_dht = dht + tl.cast(i_q, tl.int64) * st[0] + i_hv.to(tl.int64) * st[1]
        p_dht += o_v[:, None] * st[3] + o_k[None, :] * st[2]
        b_dh = tl.load(p_dht, mask=m_h, other=0.0)
    b_dh = tl.where(wrong, float("nan"), b_dh)

    chunks, whole = tl.cdiv(length, BT), tl.cdiv(length, BT)
    if cu_seqlens is not None and isinstance(k, tl.tensor_descriptor):
        whole = length // BT
    i_c0 = tl.cast(i_c0, tl.int64)
    PARTS: tl.constexpr = parts_of(element_type(q))
    if PARTS > 1:
        if any_in_parts(gates, i_c0, i_hv, length, HV, BT):
            whole = 0
        for i in tl.range(chunks - whole, num_stages=1):  # others would take shared memory from the loop below
            i_c = chunks - 1 - i
            b_dh = chunk_backward(
                *(b_dh, q, k, w, p, gates, do, dv, dh, dv_tiles, i_b, i_h, i_hv, i_v, bos + i_c * BT),
                *((i_c0 + i_c) * HV + i_hv, length - i_c * BT, T, sq, sk, so, HV, K, V, PRECISION, BT, BK, BV, True),
            )
    for i in tl.range(whole):
        i_c = whole - 1 - i
        b_dh = chunk_backward(
            *(b_dh, q, k, w, p, gates, do, dv, dh, dv_tiles, i_b, i_h, i_hv, i_v, bos + i_c * BT),
            *((i_c0 + i_c) * HV + i_hv, length - i_c * BT, T, sq, sk, so, HV, K, V, PRECISION, BT, BK, BV, False),
        )
    if dh0 is not None:
        tl.store(dh0 + i_qh.to(tl.int64) * K * V + o_v[:, None] + o_k[None, :] * V, b_dh, mask=m_h)


class ScanOutputs(NamedTuple):
    """What a scan from the end writes; None where it is not wanted."""

    dv: Tensor | None = None
    dh: Tensor | None = None
    dh0: Tensor | None = None


def scan(call: Call, factors: Factors, grads: Grads, out: ScanOutputs) -> None:
    (q, k, *_), chunks = call.inputs, call.chunks
    tiles, blocks, programs = call.scan_tiles
    read, do, dh, dv_tiles = (q, k, factors.w, factors.p), grads.output, out.dh, None
    if described := descriptors(call, factors, do, out):
        read, do, *stored = described
        sharing = programs > target_of(q.device).processors
        tiles = call.tiles("descriptor scan bwd", sharing)
        if not sharing:  # what descriptors store goes through memory that a second program needs
            dh, dv_tiles = stored
    launch(
        gated_delta_rule_scan_bwd_kernel,
        programs,
        *(*read, factors.gates, do, grads.final_state, chunks.start.cu_seqlens, out.dv, dh, out.dh0, dv_tiles),
        *(chunks.T, chunks.sequences, q.stride(), k.stride()),
        *(strides(grads.output, 4), strides(grads.final_state, 4)),
        V=call.V,
        **blocks,
        **call.constants,
        tiles=tiles,
    )


def descriptors(call: Call, factors: Factors, do: Tensor | None, out: ScanOutputs) -> tuple | None:
    """(of q, k, w and p, of do, of dh, of dv), or None where the scan takes pointers."""
    (q, k, *_), BK, BT, BV = call.inputs, call.constants["BK"], call.chunks.size, call.scan_tiles.blocks["BV"]
    if q.element_size() != 2 or not has_descriptors(q.device):
        return None
    read = (of_tokens(q, BT, BK), of_tokens(k, BT, BK), of_matrices(factors.w, BT, BT), of_matrices(factors.p, BT, BT))
    tensors = (do, out.dh, out.dv)
    others = (
        None if do is None else of_tokens(do, BT, BV),
        None if out.dh is None else of_matrices(out.dh, BV, BK),
        None if out.dv is None else of_tokens(out.dv, BT, BV),
    )
    if None in read or any(x is not None and y is None for x, y in zip(tensors, others, strict=True)):
        return None
    return read, *others


def gated_delta_rule_keep(inputs: DeltaInputs, start: Start, options: DeltaOptions, names: frozenset[str]) -> DeltaKept:
    """Memory for what a forward leaves for the backward that computes the gradients `names`: what `prepare` makes, for
    any of them; residuals and states, which the scan from the end does without. Sizes may be symbols."""
    (q, _, v, g, _) = inputs
    BT, count = size_and_count(q, start, chunk_size(q, options))
    factors = empty_factors(q, count, g.shape[2], BT)
    if not names & OF_CHUNKS:
        return DeltaKept(*factors)
    h = torch.empty(count, g.shape[2], v.shape[3], q.shape[3], dtype=q.dtype, device=q.device)
    return DeltaKept(*factors, torch.empty(v.shape, dtype=q.dtype, device=q.device), h)


def readable(do: Tensor) -> Tensor:
    """As descriptors can read it, if need be a copy: of a gradient that was expanded, say. Three kernels read it."""
    if do.element_size() != 2 or not has_descriptors(do.device) or of_tokens(do, 16, 16) is not None:
        return do
    return do.contiguous()


def gated_delta_rule_backward(
    grads: Grads,
    inputs: DeltaInputs,
    start: Start,
    options: DeltaOptions,
    wanted: Wanted,
    kept: DeltaKept | None = None,
) -> dict[str, Tensor]:
    names, of_chunks = wanted.names, wanted.names & OF_CHUNKS
    call = Call.of(inputs, grads.columns(3), start, options)
    if grads.output is not None:
        grads = grads._replace(output=readable(grads.output.to(inputs.q.dtype)))
    factors = prepare(call) if kept is None else Factors(*kept[:3])
    dv = call.tokens() if of_chunks or "v" in names else None
    dh = call.chunk_states() if of_chunks else None
    dh0 = call.final_states() if "initial_state" in names else None
    scan(call, factors, grads, ScanOutputs(dv, dh, dh0))
    found = {}
    if dv is not None and dh is not None:
        r, h = (None, None) if kept is None else kept[3:]
        if r is None or h is None:
            r, h = call.tokens(), call.chunk_states()
            forward.scan(call, factors, forward.ScanOutputs(r=r, h=h))
        found = input_grads(call, factors.gates, grads.output, Scanned(r, dv, h, dh), of_chunks)
    if dv is not None and "v" in names:
        found["v"] = dv
    if dh0 is not None:
        found["initial_state"] = reduce_state_grad(dh0, wanted.state_shape, start.indices)
    return found
