"""The forward of the gated delta rule.

With rq and rk the factors that normalise q and k (1 without), G_i = exp(g_1 + .. + g_i), E_i = exp(g_{i+1} + .. + g_C)
and D_ij = exp(g_{j+1} + .. + g_i) inside a chunk of C tokens, S the state at its start and S' at its end:

    W   = (I + strict_lower(diag(rk) K K^T diag(rk beta) * D))^-1
    P   = lower(scale diag(rq) Q K^T diag(rk beta) * D)
    R   = W (V - diag(rk G) K S)                     the residual; a token writes beta R
    O   = scale diag(rq G) Q S + P R
    S'  = G_C S + K^T diag(rk beta E) R

W, P and the factors of the rows depend on q, k, g and beta alone: `prepare` computes them for all chunks at once. The
scan carries S^T: every product then has what was just computed on its left, where tensor cores take it from registers,
and what was loaded on its right, so a step of the chain waits for no shared memory.
"""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.chunks import load_tile, locate_chunk, sequence
from s0kernels.backends.triton.common.launch import cdiv, forced_schedule, launch, power_of_two
from s0kernels.backends.triton.common.states import bank_size, state_row, state_strides
from s0kernels.backends.triton.common.targets import target_of
from s0kernels.backends.triton.gated_delta_rule.call import Call
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
    rest,
)
from s0kernels.calls import DeltaInputs, DeltaKept, DeltaOptions, Start


@triton.jit
def chunks_forward(
    b_h,
    q,
    k,
    v,
    w,
    p,
    gates,
    o,
    r,
    h,
    i_c0,
    i_hv,
    i_v,
    length,
    at_o,
    sq,
    sk,
    sv,
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
    """S^T after `length` tokens. `IN_PARTS`: the products with W, and what is written to S, have operands in two."""
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_h = (o_v < V)[:, None] & (o_k < K)[None, :]
    dtype = q.dtype.element_ty
    o_o = o_t[None, :] * (HV * V) + o_v[:, None]
    o_tile = o_t[:, None] * BT + o_t[None, :]
    # two parts are not pipelined, which would take shared memory from what runs without them
    for i_c in tl.range(tl.cdiv(length, BT), num_stages=1 if IN_PARTS else None):
        rows = length - i_c * BT
        i_t = tl.cast(i_c, tl.int64) * BT
        at = (i_c0 + i_c) * HV + i_hv
        if h is not None:
            tl.store(h + at * K * V + o_v[:, None] * K + o_k[None, :], b_h.to(dtype), mask=m_h)
        b_k = load_tile(k + i_t * sk[1], o_t, o_k, sk[1], sk[3], rows, K)
        b_v = load_tile(v + i_t * sv[1], o_t, o_v, sv[1], sv[3], rows, V)
        b_w = tl.load(w + at * PARTS * BT * BT + o_tile)
        p_gates = gates + at * ROWS * BT + o_t
        b_hd = b_h.to(dtype)
        b_err = tl.dot(b_hd, tl.trans(b_k), input_precision=PRECISION) * tl.load(p_gates + A_K * BT)[None, :]
        b_err = tl.trans(b_v).to(tl.float32) - b_err
        b_r = tl.dot(b_err.to(dtype), tl.trans(b_w), input_precision=PRECISION)
        if IN_PARTS:
            b_w_rest = load_rest(w, gates, at, BT)
            b_r = tl.dot(b_err.to(dtype), tl.trans(b_w_rest), b_r)
            b_r = tl.dot(rest(b_err, dtype), tl.trans(b_w), b_r)
        m_o = (o_t < rows)[None, :] & (o_v < V)[:, None]
        if r is not None:
            tl.store(r + at_o + i_t * (HV * V) + o_o, b_r.to(dtype), mask=m_o)
        if o is not None:
            b_q = load_tile(q + i_t * sq[1], o_t, o_k, sq[1], sq[3], rows, K)
            b_p = tl.load(p + at * BT * BT + o_tile)
            b_o = tl.dot(b_hd, tl.trans(b_q), input_precision=PRECISION) * tl.load(p_gates + A_Q * BT)[None, :]
            b_o = tl.dot(b_r.to(dtype), tl.trans(b_p), b_o, input_precision=PRECISION)
            tl.store(o + at_o + i_t * (HV * V) + o_o, b_o.to(dtype), mask=m_o)
        b_write = b_r * tl.load(p_gates + E_K * BT)[None, :]
        b_last = tl.load(gates + at * ROWS * BT + LAST * BT + BT - 1)
        b_h = tl.dot(b_write.to(dtype), b_k, b_h * b_last, input_precision=PRECISION)
        if IN_PARTS:
            b_h = tl.dot(rest(b_write, dtype), b_k, b_h)
    return b_h


@triton.jit
def scan_forward(
    pid,
    q,
    k,
    v,
    w,
    p,
    gates,
    h0,
    indices,
    cu_seqlens,
    o,
    r,
    h,
    ht,
    T,
    NSEQ,
    S,
    sq,
    sk,
    sv,
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
    """The chunks of one (tile of V, value head, sequence), in turn."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    i_v, i_qh = pid % tiles, pid // tiles
    i_q, i_hv = i_qh // HV, i_qh % HV
    i_h = i_hv // (HV // H)
    i_b, bos, length, i_c0, wrong = sequence(cu_seqlens, i_q, NSEQ, T, BT, BQ)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_h = (o_v < V)[:, None] & (o_k < K)[None, :]
    dtype = q.dtype.element_ty
    PARTS: tl.constexpr = parts_of(dtype)
    b_h = tl.zeros([BV, BK], tl.float32)
    if h0 is not None:
        row, zero, none = state_row(indices, i_q, S)
        p_h0 = h0 + row * sh[0] + i_hv * sh[1] + o_v[:, None] * sh[3] + o_k[None, :] * sh[2]
        b_h = tl.load(p_h0, mask=m_h & ((zero | none) == 0), other=0.0)
        b_h = tl.where(none, float("nan"), b_h)
    b_h = tl.where(wrong, float("nan"), b_h)

    i_b, bos, i_c0 = tl.cast(i_b, tl.int64), tl.cast(bos, tl.int64), tl.cast(i_c0, tl.int64)
    p_q = q + i_b * sq[0] + bos * sq[1] + i_h * sq[2]
    p_k = k + i_b * sk[0] + bos * sk[1] + i_h * sk[2]
    p_v = v + i_b * sv[0] + bos * sv[1] + i_hv * sv[2]
    at_o = ((i_b * T + bos) * HV + i_hv) * V
    if PARTS > 1 and any_in_parts(gates, i_c0, i_hv, length, HV, BT):
        b_h = chunks_forward(
            *(b_h, p_q, p_k, p_v, w, p, gates, o, r, h, i_c0, i_hv, i_v, length, at_o, sq, sk, sv),
            *(HV, K, V, PRECISION, BT, BK, BV, PARTS, True),
        )
    else:
        b_h = chunks_forward(
            *(b_h, p_q, p_k, p_v, w, p, gates, o, r, h, i_c0, i_hv, i_v, length, at_o, sq, sk, sv),
            *(HV, K, V, PRECISION, BT, BK, BV, PARTS, False),
        )
    if ht is not None:
        tl.store(ht + i_qh.to(tl.int64) * K * V + o_v[:, None] + o_k[None, :] * V, b_h, mask=m_h)


@triton.jit
def gated_delta_rule_scan_fwd_kernel(
    q,  # [B, T, H, K], any strides sq, as k
    k,
    v,  # [B, T, HV, V], any strides sv
    w,
    p,
    gates,
    h0,  # None, or [.., HV, K, V] in fp32, any strides sh; sh[0] is 0 where all sequences share one
    indices,  # None, or the row of h0 for each sequence
    cu_seqlens,
    o,  # None, or [B, T, HV, V]
    r,  # None, or [B, T, HV, V]
    h,  # None, or [chunks, HV, V, K]: S^T of every chunk
    ht,  # None, or [NSEQ, HV, K, V] in fp32
    T,
    NSEQ,
    S,
    sq,
    sk,
    sv,
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
    """A program per (tile of V, value head, sequence)."""
    scan_forward(
        *(tl.program_id(0), q, k, v, w, p, gates, h0, indices, cu_seqlens, o, r, h, ht, T, NSEQ, S, sq, sk, sv, sh),
        *(H, HV, K, V, PRECISION, BT, BK, BV, BQ),
    )


class ScanOutputs(NamedTuple):
    """What a scan from the start writes; None where it is not wanted."""

    o: Tensor | None = None
    r: Tensor | None = None
    h: Tensor | None = None
    ht: Tensor | None = None


def scan(call: Call, factors: Factors, out: ScanOutputs) -> None:
    (q, k, v, _, _), chunks = call.inputs, call.chunks
    tiles, blocks, programs = call.scan_tiles
    state = chunks.start.state
    launch(
        gated_delta_rule_scan_fwd_kernel,
        programs,
        *(q, k, v, *factors, *chunks.start, *out, chunks.T, chunks.sequences, bank_size(state)),
        *(q.stride(), k.stride(), v.stride(), state_strides(state)),
        V=call.V,
        **blocks,
        **call.constants,
        tiles=tiles,
    )


@triton.jit
def gated_delta_rule_output_fwd_kernel(
    q,  # [B, T, H, K], any strides sq
    p,
    gates,
    r,  # [B, T, HV, V]
    h,  # [chunks, HV, V, K]
    cu_seqlens,
    o,  # [B, T, HV, V]
    T,
    NSEQ,
    sq,
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
    """O from the states and residuals: a program per (tile of V, value head, chunk)."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    i_v, i_sh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_c, i_hv = i_sh // HV, i_sh % HV
    i_b, i_t, rows = locate_chunk(cu_seqlens, i_c, NSEQ, T, BT, BQ)
    if rows <= 0:
        return
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    i_b, i_t, at = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), i_sh.to(tl.int64)
    b_q = load_tile(q + i_b * sq[0] + i_t * sq[1] + i_hv // (HV // H) * sq[2], o_t, o_k, sq[1], sq[3], rows, K)
    b_h = load_tile(h + at * K * V, o_v, o_k, K, 1, V, K)
    b_o = tl.dot(b_q, tl.trans(b_h), input_precision=PRECISION)
    b_o *= tl.load(gates + at * ROWS * BT + A_Q * BT + o_t)[:, None]
    at_o = ((i_b * T + i_t) * HV + i_hv) * V
    b_r = load_tile(r + at_o, o_t, o_v, HV * V, 1, rows, V)
    b_p = tl.load(p + at * BT * BT + o_t[:, None] * BT + o_t[None, :])
    b_o = tl.dot(b_p, b_r, b_o, input_precision=PRECISION)
    m_o = (o_t < rows)[:, None] & (o_v < V)[None, :]
    tl.store(o + at_o + o_t[:, None] * (HV * V) + o_v[None, :], b_o.to(o.dtype.element_ty), mask=m_o)


def output(call: Call, factors: Factors, scanned: ScanOutputs, o: Tensor) -> None:
    q, chunks, tiles = call.inputs.q, call.chunks, call.tiles("output")
    BV = min(tiles.tile, power_of_two(call.V))
    launch(
        gated_delta_rule_output_fwd_kernel,
        chunks.count * call.HV * cdiv(call.V, BV),
        *(q, factors.p, factors.gates, scanned.r, scanned.h, chunks.start.cu_seqlens, o),
        *(chunks.T, chunks.sequences, q.stride()),
        V=call.V,
        BV=BV,
        **call.constants,
        tiles=tiles,
    )


def is_split(call: Call) -> bool:
    """Whether a kernel of its own computes the output, for all chunks at once: where scans are long and so few that
    most of the chip would watch."""
    if forced := forced_schedule():
        return forced == "split"
    chunks = call.chunks
    long = 1024 * chunks.sequences <= chunks.B * chunks.T
    return long and 4 * call.scan_tiles.programs <= target_of(chunks.like.device).processors


def gated_delta_rule_forward(
    inputs: DeltaInputs, start: Start, options: DeltaOptions, output_final_state: bool, kept: DeltaKept | None = None
) -> tuple[Tensor, Tensor]:
    call = Call.of(inputs, inputs.v.shape[3], start, options)
    o, final = call.tokens(), call.final_states(output_final_state)
    ht = final if output_final_state else None
    split, factors = is_split(call), prepare(call, None if kept is None else Factors(*kept[:3]))
    r, h = (None, None) if kept is None else kept[3:]
    if split:
        scanned = ScanOutputs(r=call.tokens() if r is None else r, h=call.chunk_states() if h is None else h, ht=ht)
        scan(call, factors, scanned)
        output(call, factors, scanned, o)
    else:
        scan(call, factors, ScanOutputs(o, r, h, ht))
    return o, final
