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

from s0kernels.backends.triton.common.chunks import load_tile, locate_chunk, rest, sequence
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
from s0kernels.backends.triton.common.launch import cdiv, forced_schedule, kernel, launch, power_of_two
from s0kernels.backends.triton.common.states import bank_size, state_row, state_strides
from s0kernels.backends.triton.common.targets import target_of
from s0kernels.backends.triton.gated_delta_rule.call import Call
from s0kernels.backends.triton.gated_delta_rule.prepare import (
    A_K,
    A_Q,
    E_K,
    LAST,
    ROWS,
    TWO_PARTS,
    Factors,
    any_in_parts,
    parts_of,
    prepare,
)
from s0kernels.calls import DeltaInputs, DeltaKept, DeltaOptions, Start


@triton.jit
def chunk_forward(
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
    o_tiles,
    r_tiles,
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
    sv,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GENERAL: tl.constexpr,
):
    """S^T after the chunk with index `at`, whose first token is i_t. `GENERAL`: W, what it is multiplied with, and what
    is written to S have two parts, and what a descriptor reads beyond `rows` is another sequence's."""
    o_t, o_v = tl.arange(0, BT), i_v * BV + tl.arange(0, BV)
    dtype = element_type(q)
    PARTS: tl.constexpr = parts_of(dtype)
    p_gates = gates + at * ROWS * BT + o_t
    b_k = load_token_tile(k, sk, i_b, i_t, i_h, 0, rows, K, BT, BK)
    b_v = load_token_tile(v, sv, i_b, i_t, i_hv, i_v * BV, rows, V, BT, BV)
    b_w = load_matrix(w, at * PARTS, BT, BT)
    # early, as loads of vectors wait for whatever was asked for before them
    b_a_k, b_e_k = tl.load(p_gates + A_K * BT), tl.load(p_gates + E_K * BT)
    b_last = tl.load(gates + at * ROWS * BT + LAST * BT + BT - 1)
    if o is not None:
        b_q = load_token_tile(q, sq, i_b, i_t, i_h, 0, rows, K, BT, BK)
        b_p = load_matrix(p, at, BT, BT)
        b_a_q = tl.load(p_gates + A_Q * BT)
    if GENERAL:
        b_k = tl.where((o_t < rows)[:, None], b_k, 0.0)
    b_hd = b_h.to(dtype)
    if h is not None:
        store_matrix(h, at, b_hd, V, K, i_v * BV, BV, BK)
    b_err = tl.trans(b_v).to(tl.float32)
    b_err -= tl.dot(b_hd, tl.trans(b_k), input_precision=PRECISION) * b_a_k[None, :]
    if GENERAL:
        b_err = tl.where((o_t < rows)[None, :], b_err, 0.0)
    b_r = tl.dot(b_err.to(dtype), tl.trans(b_w), input_precision=PRECISION)
    if GENERAL:
        fine = tl.load(gates + at * ROWS * BT + TWO_PARTS * BT) > 0.0
        b_w_rest = tl.where(fine, load_matrix(w, at * PARTS + 1, BT, BT), 0.0)
        b_r = tl.dot(b_err.to(dtype), tl.trans(b_w_rest), b_r)
        b_r = tl.dot(rest(b_err, dtype), tl.trans(b_w), b_r)
    at_o = ((tl.cast(i_b, tl.int64) * T + i_t) * HV + i_hv) * V
    o_o = at_o + o_t[None, :] * (HV * V) + o_v[:, None]
    m_o = (o_t < rows)[None, :] & (o_v < V)[:, None]
    if r is not None:
        if r_tiles is None or GENERAL:
            tl.store(r + o_o, b_r.to(dtype), mask=m_o)
        else:
            store_token_tile(r_tiles, tl.trans(b_r.to(dtype)), i_b, i_t, i_hv, i_v * BV)
    if o is not None:
        b_o = tl.dot(b_hd, tl.trans(b_q), input_precision=PRECISION) * b_a_q[None, :]
        b_o = tl.dot(b_r.to(dtype), tl.trans(b_p), b_o, input_precision=PRECISION)
        if o_tiles is None or GENERAL:
            tl.store(o + o_o, b_o.to(dtype), mask=m_o)
        else:
            store_token_tile(o_tiles, tl.trans(b_o.to(dtype)), i_b, i_t, i_hv, i_v * BV)
    b_write = b_r * b_e_k[None, :]
    b_h = tl.dot(b_write.to(dtype), b_k, b_h * b_last, input_precision=PRECISION)
    if GENERAL:
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
    o_tiles,
    r_tiles,
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
    b_h = tl.zeros([BV, BK], tl.float32)
    if h0 is not None:
        row, zero, none = state_row(indices, i_q, S)
        p_h0 = h0 + row * sh[0] + i_hv.to(tl.int64) * sh[1] + o_v[:, None] * sh[3] + o_k[None, :] * sh[2]
        b_h = tl.load(p_h0, mask=m_h & ((zero | none) == 0), other=0.0)
        b_h = tl.where(none, float("nan"), b_h)
    b_h = tl.where(wrong, float("nan"), b_h)

    chunks, whole = tl.cdiv(length, BT), tl.cdiv(length, BT)
    if cu_seqlens is not None and isinstance(k, tl.tensor_descriptor):
        whole = length // BT
    i_c0 = tl.cast(i_c0, tl.int64)
    PARTS: tl.constexpr = parts_of(element_type(q))
    done = 0
    if PARTS == 1 or not any_in_parts(gates, i_c0, i_hv, length, HV, BT):
        for i_c in tl.range(whole):
            b_h = chunk_forward(
                *(b_h, q, k, v, w, p, gates, o, r, h, o_tiles, r_tiles, i_b, i_h, i_hv, i_v, bos + i_c * BT),
                *((i_c0 + i_c) * HV + i_hv, length - i_c * BT, T, sq, sk, sv, HV, K, V, PRECISION, BT, BK, BV, False),
            )
        done = whole
    if PARTS > 1:
        for i_c in tl.range(done, chunks, num_stages=1):  # others would take shared memory from the loop above
            b_h = chunk_forward(
                *(b_h, q, k, v, w, p, gates, o, r, h, o_tiles, r_tiles, i_b, i_h, i_hv, i_v, bos + i_c * BT),
                *((i_c0 + i_c) * HV + i_hv, length - i_c * BT, T, sq, sk, sv, HV, K, V, PRECISION, BT, BK, BV, True),
            )
    if ht is not None:
        tl.store(ht + i_qh.to(tl.int64) * K * V + o_v[:, None] + o_k[None, :] * V, b_h, mask=m_h)


@kernel
def gated_delta_rule_scan_fwd_kernel(
    q,  # [B, T, H, K], any strides sq, as k; or descriptors of all from q to p
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
    h,  # None, or [chunks, HV, V, K]: S^T of every chunk; a pointer or a descriptor
    ht,  # None, or [NSEQ, HV, K, V] in fp32
    o_tiles,  # None, or a descriptor of o
    r_tiles,  # None, or a descriptor of r
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
        *(tl.program_id(0), q, k, v, w, p, gates, h0, indices, cu_seqlens, o, r, h, ht, o_tiles, r_tiles, T, NSEQ, S),
        *(sq, sk, sv, sh, H, HV, K, V, PRECISION, BT, BK, BV, BQ),
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
    state, strides = chunks.start.state, (q.stride(), k.stride(), v.stride())
    read, h, stored = (q, k, v, factors.w, factors.p), out.h, (None, None)
    if described := descriptors(call, factors, out):
        read, h, stored = described
        # states on their way to memory leave no room for a second program
        sharing = out.h is None and programs > target_of(q.device).processors
        tiles = call.tiles("descriptor scan", sharing)
    launch(
        gated_delta_rule_scan_fwd_kernel,
        programs,
        *(*read, factors.gates, *chunks.start, out.o, out.r, h, out.ht, *stored),
        *(chunks.T, chunks.sequences, bank_size(state), *strides, state_strides(state)),
        V=call.V,
        **blocks,
        **call.constants,
        tiles=tiles,
    )


def descriptors(call: Call, factors: Factors, out: ScanOutputs) -> tuple[tuple, object, tuple] | None:
    """(of what is read, of h, of what is stored by token), or None where the scan takes pointers."""
    (q, k, v, _, _), BK, BT, BV = call.inputs, call.constants["BK"], call.chunks.size, call.scan_tiles.blocks["BV"]
    if q.element_size() != 2 or not has_descriptors(q.device):
        return None
    read = (of_tokens(q, BT, BK), of_tokens(k, BT, BK), of_tokens(v, BT, BV))
    read += (of_matrices(factors.w, BT, BT), of_matrices(factors.p, BT, BT))
    h = None if out.h is None else of_matrices(out.h, BV, BK)
    stored = tuple(None if x is None else of_tokens(x, BT, BV) for x in (out.o, out.r))
    if None in read or any(
        x is not None and y is None for x, y in zip((out.h, out.o, out.r), (h, *stored), strict=True)
    ):
        return None
    return read, h, stored


@kernel
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
    i_h = (i_hv // (HV // H)).to(tl.int64)
    b_q = load_tile(q + i_b * sq[0] + i_t * sq[1] + i_h * sq[2], o_t, o_k, sq[1], sq[3], rows, K)
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
