"""Gradients of the inputs of Mamba-2 SSD, for all chunks at once, from what the scans of `backward` left.

With K = lower(dY X^T):

    dX  = diag(dt) (M^T dY + diag(E) B dS'^T) + D dY
    ddt = A da + column sums of M * K + rows of E X * (B dS'^T)
    dC  = sum over the heads of a group of  diag(G) dY S + (K diag(dt) * D) B
    dB  = sum over the heads of a group of  diag(dt E) X dS' + (K diag(dt) * D)^T C

A log decay a_l takes part in every G_i with i >= l, every E_j with j < l, every D_ij with j < l <= i and in G_C.
"""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.chunks import load_tile, locate_chunk
from s0kernels.backends.triton.common.launch import cdiv, empty_grads, launch, power_of_two, strides
from s0kernels.backends.triton.common.tiles import Tiles
from s0kernels.backends.triton.ssd.call import Call
from s0kernels.backends.triton.ssd.forward import sigmoid, silu
from s0kernels.backends.triton.ssd.prepare import (
    DT,
    END,
    ROWS,
    START,
    WRITE,
    Factors,
    at_token,
    clamp,
    decays,
    load_causal,
    load_raw_dt,
    softplus,
    store_causal,
)

#: inputs whose gradients come through that of the log decays
OF_DECAYS = {"dt", "A", "dt_bias"}
#: inputs without tokens, whose gradients are sums over all chunks
SCALARS = ("A", "D", "dt_bias")


class Scanned(NamedTuple):
    """What the scans of the backward write, [chunks, H, P, N]; None where it is not wanted."""

    h: Tensor | None
    dh: Tensor | None


class HeadGrads(NamedTuple):
    """What the kernel of the heads writes, in its order; None where it is not wanted."""

    dx: Tensor | None
    dz: Tensor | None
    ddt: Tensor | None
    dcb: Tensor | None
    dA: Tensor | None  # [chunks, H] each: what every chunk adds
    dD: Tensor | None
    dbias: Tensor | None


@triton.jit
def load_dy(do, z, o_t, o_p, so_t, so_p, sz_t, sz_p, rows, P):
    """dO silu(z), [BT, BP] in fp32. `do` and `z` have 64-bit offsets to the corner."""
    b_dy = load_tile(do, o_t, o_p, so_t, so_p, rows, P).to(tl.float32)
    if z is not None:
        b_dy *= silu(load_tile(z, o_t, o_p, sz_t, sz_p, rows, P).to(tl.float32))
    return b_dy


@triton.jit
def through_states(
    B,
    C,
    h,
    dh,
    sB,
    sC,
    rows,
    inner,
    cols,
    N: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(B dS'^T, C S^T, both [BT, BP], and the sum of S * dS'), zero for what there is no state of."""
    o_t, o_p, o_i = tl.arange(0, BT), tl.arange(0, BP), tl.arange(0, BI)
    b_end, b_start = tl.zeros([BT, BP], tl.float32), tl.zeros([BT, BP], tl.float32)
    b_both = tl.zeros([BP, BI], tl.float32)
    for i in range(0, inner, BI):
        if dh is not None:
            b_dh = load_tile(dh + i, o_p, o_i, N, 1, cols, inner - i)
            b_B = load_tile(B + i * sB[3], o_t, o_i, sB[1], sB[3], rows, inner - i)
            b_end = tl.dot(b_B, tl.trans(b_dh), b_end, input_precision=PRECISION)
        if h is not None:
            b_h = load_tile(h + i, o_p, o_i, N, 1, cols, inner - i)
            b_C = load_tile(C + i * sC[3], o_t, o_i, sC[1], sC[3], rows, inner - i)
            b_start = tl.dot(b_C, tl.trans(b_h), b_start, input_precision=PRECISION)
            if dh is not None:
                b_both += b_h.to(tl.float32) * b_dh.to(tl.float32)
    return b_end, b_start, tl.sum(b_both)


@triton.jit
def ssd_heads_bwd_kernel(
    x,  # [B, T, H, P], any strides
    dt,  # [B, T, H], any strides
    A,  # [H], any stride, as D and dt_bias
    B,  # [B, T, G, N], any strides, as C
    C,
    D,  # or None
    z,  # None, or [B, T, H, P], any strides
    dt_bias,  # or None
    cb,  # [chunks, G, BT, BT]: C B^T
    gates,
    do,  # [B, T, H, P], any strides
    h,  # [chunks, H, P, N], or None where none of dt, A and z is wanted
    dh,  # [chunks, H, P, N], or None where none of dt, A and x is wanted
    cu_seqlens,
    dx,  # None, or [B, T, H, P], as dz
    dz,
    ddt,  # None, or [B, T, H]
    dcb,  # None, or [chunks, H, BT, BT]: K diag(dt) * D
    dA,  # None, or [chunks, H] in fp32, as dD and dbias: what each chunk adds
    dD,
    dbias,
    low,
    high,
    T,
    NSEQ,
    inner,  # N, where loops over it are not to be unrolled
    tiles,  # of P, for the same reason
    sx,
    sdt,
    sB,
    sC,
    sz,
    so,
    sA,
    sD,
    sbias,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    DECAYS: tl.constexpr,  # whether the gradient of the log decays is wanted
    SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BI: tl.constexpr,
    BQ: tl.constexpr,
):
    """A program per (chunk, head): its tiles of P in turn, then what sums over P."""
    i_c, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_b, i_t, rows = locate_chunk(cu_seqlens, i_c, NSEQ, T, BT, BQ)
    i_b, i_t, at, i_g = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), tl.program_id(0).to(tl.int64), i_h // (H // G)
    o_t = tl.arange(0, BT)
    dtype = x.dtype.element_ty
    if rows <= 0:
        store_sums(dA, dD, dbias, at, 0.0, 0.0, 0.0)
        return
    p_gates = gates + at * ROWS * BT + o_t
    b_dt = tl.load(p_gates + DT * BT)
    p_cb = cb + (i_c.to(tl.int64) * G + i_g) * BT * BT
    b_p = load_causal(p_cb, o_t, o_t, False, BT) * decays(gates + at * ROWS * BT, o_t, o_t, False, BT)
    b_p = (b_p * b_dt[None, :]).to(dtype)
    b_k = tl.zeros([BT, BT], tl.float32)
    b_starts, b_ends, b_skips = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    b_carried = 0.0
    for i_p in tl.range(tiles, disable_licm=True):
        o_p = i_p * BP + tl.arange(0, BP)
        mask = (o_t < rows)[:, None] & (o_p < P)[None, :]
        at_p = at * P * N + i_p * BP * N
        p_h, p_dh = (h if h is None else h + at_p), (dh if dh is None else dh + at_p)
        b_end, b_start, b_both = through_states(
            *(at_token(B, sB, i_b, i_t, i_g), at_token(C, sC, i_b, i_t, i_g), p_h, p_dh, sB, sC),
            *(rows, inner, P - i_p * BP, N, BT, BP, BI, PRECISION),
        )
        b_carried += b_both
        b_x = load_tile(at_token(x, sx, i_b, i_t, i_h), o_t, o_p, sx[1], sx[3], rows, P)
        b_do = load_tile(at_token(do, so, i_b, i_t, i_h), o_t, o_p, so[1], so[3], rows, P).to(tl.float32)
        b_dy = b_do
        if z is not None:
            b_z = load_tile(at_token(z, sz, i_b, i_t, i_h), o_t, o_p, sz[1], sz[3], rows, P).to(tl.float32)
            b_dy = b_do * silu(b_z)
        b_k = tl.dot(b_x, tl.trans(b_dy.to(dtype)), b_k, input_precision=PRECISION)
        b_start *= tl.load(p_gates + START * BT)[:, None]
        if DECAYS:
            b_starts += tl.sum(b_start * b_dy, axis=1)
            b_ends += tl.sum(b_end * b_x.to(tl.float32), axis=1)
        if dD is not None:
            b_skips += tl.sum(b_dy * b_x.to(tl.float32), axis=1)
        o_out = ((i_b * T + i_t + o_t)[:, None] * H + i_h) * P + o_p[None, :]
        b_skip = 0.0 if D is None else tl.load(D + i_h * sD).to(tl.float32)
        if dx is not None:
            b_end *= tl.load(p_gates + WRITE * BT)[:, None]
            b_end = tl.dot(tl.trans(b_p), b_dy.to(dtype), b_end, input_precision=PRECISION)
            tl.store(dx + o_out, (b_end + b_skip * b_dy).to(dtype), mask=mask)
        if dz is not None:
            b_start = tl.dot(b_p, b_x, b_start, input_precision=PRECISION) + b_skip * b_x.to(tl.float32)
            b_sigmoid = sigmoid(b_z)
            b_slope = b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid))
            tl.store(dz + o_out, (b_do * b_start * b_slope).to(dtype), mask=mask)

    p_cb = cb + (i_c.to(tl.int64) * G + i_g) * BT * BT
    b_k *= decays(gates + at * ROWS * BT, o_t, o_t, True, BT)
    if dcb is not None:
        store_causal(dcb + at * BT * BT, o_t, o_t, b_k * b_dt[:, None], True, BT)
    b_rates, b_biases = 0.0, 0.0
    if DECAYS:
        b_k *= load_causal(p_cb, o_t, o_t, True, BT)
        b_a = tl.load(A + i_h * sA).to(tl.float32)
        b_da = decay_grad(b_k * b_dt[:, None], b_starts, b_ends * tl.load(p_gates + WRITE * BT))
        b_da += b_carried * tl.load(gates + at * ROWS * BT + START * BT + BT - 1)
        b_rates = tl.sum(b_da * b_dt)
        b_ddt = b_a * b_da + tl.sum(b_k, axis=1) + b_ends * tl.load(p_gates + END * BT)
        b_raw = load_raw_dt(dt + i_b * sdt[0] + i_t * sdt[1] + i_h * sdt[2], sdt[1], dt_bias, i_h * sbias, rows, BT)
        b_ddt = dt_grad(b_ddt, b_raw, low, high, SOFTPLUS)
        b_biases = tl.sum(tl.where(o_t < rows, b_ddt, 0.0))
        if ddt is not None:
            tl.store(ddt + (i_b * T + i_t + o_t) * H + i_h, b_ddt.to(ddt.dtype.element_ty), mask=o_t < rows)
    store_sums(dA, dD, dbias, at, b_rates, tl.sum(b_skips), b_biases)


def heads(call: Call, factors: Factors, do: Tensor, scanned: Scanned, out: HeadGrads, decays: bool) -> None:
    (x, dt, A, B, C, D, z, dt_bias), chunks, tiles = call.inputs, call.chunks, call.tiles("heads")
    BP = min(tiles.tile, power_of_two(call.P))
    launch(
        ssd_heads_bwd_kernel,
        chunks.count * call.H,
        *(*call.inputs, factors.cb, factors.gates, do, *scanned, chunks.start.cu_seqlens, *out),
        *(*call.options.dt_limit, chunks.T, chunks.sequences, call.N, cdiv(call.P, BP)),
        *(x.stride(), dt.stride(), B.stride(), C.stride(), strides(z, 4), do.stride()),
        *(*A.stride(), *strides(D, 1), *strides(dt_bias, 1)),
        **call.sizes,
        DECAYS=decays,
        SOFTPLUS=call.options.dt_softplus,
        BP=BP,
        BI=min(64, chunks.size),
        **chunks.constants,
        tiles=tiles,
    )


@triton.jit
def decay_grad(b_intra, b_starts, b_ends):
    """da from the gradients of the sums of a: of those in D^T [BT, BT], in G and in E [BT].

    Of D those with j < l <= i count for a_l: what begins before l is what begins and ends after it less than what ends
    after it. The difference is taken in fp64, so that nothing is left where nothing crosses l, behind a reset."""
    b_ending, b_beginning = tl.sum(b_intra.to(tl.float64), axis=0), tl.sum(b_intra.to(tl.float64), axis=1)
    b_da = tl.cumsum(b_ending - b_beginning + b_starts, axis=0, reverse=True)
    return b_da.to(tl.float32) + tl.cumsum(b_ends, axis=0) - b_ends


@triton.jit
def dt_grad(b_ddt, b_raw, low, high, SOFTPLUS: tl.constexpr):
    """Through clamp (the bounds included) and softplus to dt + dt_bias."""
    b_before = softplus(b_raw) if SOFTPLUS else b_raw
    b_ddt = tl.where(clamp(b_before, low, high) == b_before, b_ddt, 0.0)
    return b_ddt * tl.sigmoid(b_raw) if SOFTPLUS else b_ddt


@triton.jit
def store_sums(dA, dD, dbias, at, b_rates, b_skips, b_biases):
    if dA is not None:
        tl.store(dA + at, b_rates)
    if dD is not None:
        tl.store(dD + at, b_skips)
    if dbias is not None:
        tl.store(dbias + at, b_biases)


@triton.jit
def ssd_sums_bwd_kernel(
    dA,  # None, or [chunks, H], as dD and dbias
    dD,
    dbias,
    dA_sum,  # None, or [H], as dD_sum and dbias_sum
    dD_sum,
    dbias_sum,
    chunks,
    H,
    BC: tl.constexpr,
):
    """Sums over the chunks, in their order: a program per head."""
    sum_chunks(dA, dA_sum, chunks, H, BC)
    sum_chunks(dD, dD_sum, chunks, H, BC)
    sum_chunks(dbias, dbias_sum, chunks, H, BC)


def sum_over_chunks(call: Call, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """[chunks, H] to [H], each."""
    sums = {name: call.chunks.empty(call.H, dtype=torch.float32) for name in parts}
    if sums:
        rows = [found.get(name) for found in (parts, sums) for name in SCALARS]
        launch(ssd_sums_bwd_kernel, call.H, *rows, call.chunks.count, call.H, BC=256, tiles=Tiles(256, 4, 1))
    return sums


@triton.jit
def sum_chunks(x, out, chunks, H, BC: tl.constexpr):
    if out is not None:
        b_sum = tl.zeros([BC], tl.float32)
        for i in range(0, chunks, BC):
            o_c = i + tl.arange(0, BC)
            b_sum += tl.load(x + o_c.to(tl.int64) * H + tl.program_id(0), mask=o_c < chunks, other=0.0)
        tl.store(out + tl.program_id(0), tl.sum(b_sum))


@triton.jit
def group_grad(
    v,
    z,
    gates,
    states,
    intra,
    other,
    sv,
    sz,
    so,
    rows,
    R,
    inner,
    cols,
    GATE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum over R heads of diag(gate) v silu(z) states + intra other, [BT, BN]. All pointers are at the first head; z is
    None or [.., P] like v, and intra is transposed on demand."""
    o_t, o_p, o_n = tl.arange(0, BT), tl.arange(0, BP), tl.arange(0, BN)
    tiles = tl.cdiv(inner, BP)
    b_sum = tl.zeros([BT, BN], tl.float32)
    for i in tl.range(R * tiles, disable_licm=True):
        i_r, i_p = i // tiles, i % tiles * BP
        p_v = v + i_r * sv[2] + i_p * sv[3]
        p_z = z if z is None else z + i_r * sz[2] + i_p * sz[3]
        b_v = load_dy(p_v, p_z, o_t, o_p, sv[1], sv[3], sz[1], sz[3], rows, inner - i_p)
        b_gate = tl.load(gates + i_r * ROWS * BT + GATE * BT + o_t)
        b_states = load_tile(states + (i_r * P + i_p) * N, o_p, o_n, N, 1, inner - i_p, cols)
        b_v = (b_v * b_gate[:, None]).to(v.dtype.element_ty)
        b_sum = tl.dot(b_v, b_states, b_sum, input_precision=PRECISION)
    b_intra = tl.zeros([BT, BT], tl.float32)
    for i_r in tl.range(R, disable_licm=True):
        b_intra += load_causal(intra + i_r * BT * BT, o_t, o_t, False, BT)
    b_intra = (tl.trans(b_intra) if TRANSPOSE else b_intra).to(other.dtype.element_ty)
    b_other = load_tile(other, o_t, o_n, so[1], so[3], rows, cols)
    return tl.dot(b_intra, b_other, b_sum, input_precision=PRECISION)


@triton.jit
def ssd_groups_bwd_kernel(
    x,  # [B, T, H, P], any strides
    B,  # [B, T, G, N], any strides, as C
    C,
    z,  # None, or [B, T, H, P], any strides
    gates,
    do,  # [B, T, H, P], any strides
    h,  # [chunks, H, P, N], None without dC
    dh,  # [chunks, H, P, N], None without dB
    dcb,  # [chunks, H, BT, BT]
    cu_seqlens,
    dB,  # None, or [B, T, G, N], as dC
    dC,
    T,
    NSEQ,
    R,  # H // G, where loops over it are not to be unrolled
    inner,  # P, for the same reason
    sx,
    sB,
    sC,
    sz,
    so,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BQ: tl.constexpr,
):
    """A program per (tile of N, one of dC and dB, group, chunk), the heads of the group in turn."""
    wanted: tl.constexpr = 2 if dB is not None and dC is not None else 1
    tiles: tl.constexpr = (N + BN - 1) // BN
    i_n, i_wgs = tl.program_id(0) % tiles * BN, tl.program_id(0) // tiles
    i_w, i_g, i_c = i_wgs % wanted, i_wgs // wanted % G, i_wgs // wanted // G
    i_b, i_t, rows = locate_chunk(cu_seqlens, i_c, NSEQ, T, BT, BQ)
    if rows <= 0:
        return
    i_b, i_t, i_h = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), i_g * (H // G)
    at = i_c.to(tl.int64) * H + i_h
    p_gates, p_intra = gates + at * ROWS * BT, dcb + at * BT * BT
    o_t, o_n = tl.arange(0, BT), i_n + tl.arange(0, BN)
    o_out = ((i_b * T + i_t + o_t)[:, None] * G + i_g) * N + o_n[None, :]
    mask = (o_t < rows)[:, None] & (o_n < N)[None, :]
    if dC is not None and i_w == 0:
        p_B = at_token(B, sB, i_b, i_t, i_g) + i_n * sB[3]
        b_dC = group_grad(
            *(at_token(do, so, i_b, i_t, i_h), (z if z is None else at_token(z, sz, i_b, i_t, i_h))),
            *(p_gates, h + at * P * N + i_n, p_intra),
            *(p_B, so, sz, sB, rows, R, inner, N - i_n, START, False, P, N, PRECISION, BT, BP, BN),
        )
        tl.store(dC + o_out, b_dC.to(dC.dtype.element_ty), mask=mask)
    if dB is not None and i_w == wanted - 1:
        p_C = at_token(C, sC, i_b, i_t, i_g) + i_n * sC[3]
        b_dB = group_grad(
            *(at_token(x, sx, i_b, i_t, i_h), None, p_gates, dh + at * P * N + i_n, p_intra),
            *(p_C, sx, sz, sC, rows, R, inner, N - i_n, WRITE, True, P, N, PRECISION, BT, BP, BN),
        )
        tl.store(dB + o_out, b_dB.to(dB.dtype.element_ty), mask=mask)


def groups(call: Call, gates: Tensor, do: Tensor, scanned: Scanned, dcb: Tensor, found: dict[str, Tensor]) -> None:
    dB, dC = found.get("B"), found.get("C")
    (x, _, _, B, C, _, z, _), chunks, tiles = call.inputs, call.chunks, call.tiles("groups")
    BN = min(tiles.tile, power_of_two(call.N))
    wanted = (dB is not None) + (dC is not None)
    launch(
        ssd_groups_bwd_kernel,
        chunks.count * call.G * wanted * cdiv(call.N, BN),
        *(x, B, C, z, gates, do, *scanned, dcb, chunks.start.cu_seqlens, dB, dC),
        *(chunks.T, chunks.sequences, call.H // call.G, call.P),
        *(x.stride(), B.stride(), C.stride(), strides(z, 4), do.stride()),
        **call.sizes,
        BP=min(64, tiles.tile, power_of_two(call.P)),
        BN=BN,
        **chunks.constants,
        tiles=tiles,
    )


def input_grads(call: Call, factors: Factors, do: Tensor, scanned: Scanned, names: frozenset[str]) -> dict[str, Tensor]:
    """Those of `names`, which are names of inputs."""
    found = empty_grads(call.inputs, names - {*SCALARS})
    size = (call.chunks.count, call.H)
    parts = {name: call.chunks.empty(*size, dtype=torch.float32) for name in SCALARS if name in names}
    dcb = call.intra(call.H) if names & {"B", "C"} else None
    dx, dz, ddt = map(found.get, ("x", "z", "dt"))
    dA, dD, dbias = map(parts.get, SCALARS)
    out = HeadGrads(dx, dz, ddt, dcb, dA, dD, dbias)
    heads(call, factors, do, scanned, out, bool(names & OF_DECAYS))
    if dcb is not None:
        groups(call, factors.gates, do, scanned, dcb, found)
    return found | sum_over_chunks(call, parts)
