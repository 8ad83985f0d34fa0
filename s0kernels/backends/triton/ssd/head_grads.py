"""Gradients of Mamba-2 SSD that are of one head: of x, z, dt, and what A, D and dt_bias get of a chunk."""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.chunks import load_tile, locate_chunk
from s0kernels.backends.triton.common.launch import cdiv, kernel, launch, power_of_two, strides
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
    causal_blocks,
    clamp,
    decays,
    load_causal,
    load_raw_dt,
    softplus,
)


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
    dA: Tensor | None  # [chunks, H] in fp64 each: what every chunk adds
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
def intra_grads(
    x,
    z,
    cb,
    gates,
    do,
    dcb,
    sx,
    sz,
    so,
    rows,
    tiles,
    P: tl.constexpr,
    DECAYS: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
):
    """From K = dY X^T of a chunk and head: K diag(dt) * D is written; column sums of M * K are returned, and what the
    sums of log decays get that end at a token, less what those get that begin there, in fp64; [BT] each."""
    o_t = tl.arange(0, BT)
    b_k = tl.zeros([BT, BT], tl.float32)
    for i_p in tl.range(tiles):
        o_p = i_p * BP + tl.arange(0, BP)
        b_x = load_tile(x, o_t, o_p, sx[1], sx[3], rows, P)
        b_dy = load_dy(do, z, o_t, o_p, so[1], so[3], sz[1], sz[3], rows, P)
        b_high = b_dy.to(x.dtype.element_ty)
        b_k = tl.dot(b_high, tl.trans(b_x), b_k, input_precision=PRECISION)
        if z is not None and x.dtype.element_ty != tl.float32:
            # dY in two parts: what it is rounded to is most of the error of sums to one number, which cancel
            b_low = (b_dy - b_high.to(tl.float32)).to(x.dtype.element_ty)
            b_k = tl.dot(b_low, tl.trans(b_x), b_k, input_precision=PRECISION)
    b_dt = tl.load(gates + DT * BT + o_t)
    b_k *= decays(gates, o_t, o_t, BT)
    if dcb is not None:
        p_dcb = dcb + o_t[:, None] * BT + o_t[None, :]
        tl.store(p_dcb, (b_k * b_dt[None, :]).to(dcb.dtype.element_ty), mask=causal_blocks(o_t, o_t))
    if DECAYS:
        b_k *= load_causal(cb, o_t, o_t, BT)
        b_sums = (b_k * b_dt[None, :]).to(tl.float64)
        return tl.sum(b_k, axis=0), tl.sum(b_sums, axis=1) - tl.sum(b_sums, axis=0)
    else:
        return tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float64)


@kernel
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
    dcb,  # None, or [chunks, H, BT, BT]: K diag(dt) * D; blocks above the diagonal are not written
    dA,  # None, or [chunks, H] in fp64, as dD and dbias: what each chunk adds
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
    """A program per (chunk, head): first what is inside the chunk, then its tiles of P in turn."""
    i_c, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_b, i_t, rows = locate_chunk(cu_seqlens, i_c, NSEQ, T, BT, BQ)
    i_b, i_t, at, i_g = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), tl.program_id(0).to(tl.int64), i_h // (H // G)
    o_t = tl.arange(0, BT)
    dtype = x.dtype.element_ty
    if rows <= 0:
        store_sums(dA, dD, dbias, at, 0.0, 0.0, 0.0)
        return
    p_gates = gates + at * ROWS * BT
    p_cb = cb + (i_c.to(tl.int64) * G + i_g) * BT * BT
    p_x, p_do = at_token(x, sx, i_b, i_t, i_h), at_token(do, so, i_b, i_t, i_h)
    # None is assigned in pairs alone
    p_z, p_dcb = (z if z is None else at_token(z, sz, i_b, i_t, i_h)), (dcb if dcb is None else dcb + at * BT * BT)
    b_columns, b_crossing = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float64)
    if DECAYS or dcb is not None:
        b_columns, b_crossing = intra_grads(
            *(p_x, p_z, p_cb, p_gates, p_do, p_dcb, sx, sz, so, rows, tiles, P, DECAYS, PRECISION, BT, BP)
        )
    b_dt = tl.load(p_gates + DT * BT + o_t)
    b_p = (load_causal(p_cb, o_t, o_t, BT) * decays(p_gates, o_t, o_t, BT) * b_dt[None, :]).to(dtype)
    b_starts, b_ends, b_skips = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    b_carried = 0.0
    for i_p in tl.range(tiles, disable_licm=True):
        o_p = i_p * BP + tl.arange(0, BP)
        mask = (o_t < rows)[:, None] & (o_p < P)[None, :]
        at_p = at * P * N + i_p * BP * N
        p_h, p_dh = (h if h is None else h + at_p), (dh if dh is None else dh + at_p)
        o_out = ((i_b * T + i_t + o_t)[:, None] * H + i_h) * P + o_p[None, :]
        b_skip = 0.0 if D is None else tl.load(D + i_h * sD).to(tl.float32)
        b_end, b_start, b_both = through_states(
            *(at_token(B, sB, i_b, i_t, i_g), at_token(C, sC, i_b, i_t, i_g), p_h, p_dh, sB, sC),
            *(rows, inner, P - i_p * BP, N, BT, BP, BI, PRECISION),
        )
        b_carried += b_both
        b_x = load_tile(p_x, o_t, o_p, sx[1], sx[3], rows, P)
        b_dy = load_dy(p_do, p_z, o_t, o_p, so[1], so[3], sz[1], sz[3], rows, P)
        b_start *= tl.load(p_gates + START * BT + o_t)[:, None]
        if DECAYS:
            b_starts += tl.sum(b_start * b_dy, axis=1)
            b_ends += tl.sum(b_end * b_x.to(tl.float32), axis=1)
        if dD is not None:
            b_skips += tl.sum(b_dy * b_x.to(tl.float32), axis=1)
        if dx is not None:
            b_end *= tl.load(p_gates + WRITE * BT + o_t)[:, None]
            b_end = tl.dot(tl.trans(b_p), b_dy.to(dtype), b_end, input_precision=PRECISION)
            tl.store(dx + o_out, (b_end + b_skip * b_dy).to(dtype), mask=mask)
        if dz is not None:
            b_start = tl.dot(b_p, b_x, b_start, input_precision=PRECISION) + b_skip * b_x.to(tl.float32)
            # loads of another policy than those of dY: what is equal would be kept in registers meanwhile
            o_do, o_z = o_t[:, None] * so[1] + o_p[None, :] * so[3], o_t[:, None] * sz[1] + o_p[None, :] * sz[3]
            b_do = tl.load(p_do + o_do, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            b_z = tl.load(p_z + o_z, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            b_sigmoid = sigmoid(b_z)
            b_slope = b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid))
            tl.store(dz + o_out, (b_do * b_start * b_slope).to(dtype), mask=mask)

    b_rates, b_biases = 0.0, 0.0
    if DECAYS:
        b_a = tl.load(A + i_h * sA).to(tl.float32)
        # in fp64: of D those with j < l <= i count for a_l, what ends after it less what begins after it, a difference
        # in which nothing is left where nothing crosses l, as behind a reset
        b_ending = b_ends.to(tl.float64) * tl.load(p_gates + WRITE * BT + o_t)
        b_da = tl.cumsum(b_crossing + b_starts, axis=0, reverse=True) + tl.cumsum(b_ending, axis=0) - b_ending
        b_da += b_carried * tl.load(p_gates + START * BT + BT - 1)
        b_rates = tl.sum(b_da * b_dt)
        b_ddt = b_a * b_da + b_columns + b_ends.to(tl.float64) * tl.load(p_gates + END * BT + o_t)
        b_raw = load_raw_dt(at_token(dt, sdt, i_b, i_t, i_h), sdt[1], dt_bias, i_h * sbias, rows, BT)
        b_ddt = dt_grad(b_ddt, b_raw, low, high, SOFTPLUS)
        b_biases = tl.sum(tl.where(o_t < rows, b_ddt, 0.0))
        if ddt is not None:
            tl.store(ddt + (i_b * T + i_t + o_t) * H + i_h, b_ddt.to(ddt.dtype.element_ty), mask=o_t < rows)
    store_sums(dA, dD, dbias, at, b_rates, tl.sum(b_skips.to(tl.float64)), b_biases)


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
