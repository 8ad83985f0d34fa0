"""The forward of Mamba-2 SSD.

With a = dt A, G_i = exp(a_1 + .. + a_i), E_i = exp(a_{i+1} + .. + a_C) and D_ij = exp(a_{j+1} + .. + a_i) inside a
chunk of C tokens, S [P, N] the state at its start and S' at its end:

    M   = lower(C B^T * D)
    Y   = diag(G) C S^T + M diag(dt) X
    S'  = G_C S + X^T diag(dt E) B

M diag(dt) and the factors of the rows depend on dt, A, B and C alone: `prepare` computes them for all chunks at once,
and C B^T once for the heads of a group. The scan computes Y^T: every product then has what was just computed, or S, on
its left, where tensor cores take it from registers, and what was loaded on its right. S' needs no sum over N, so that
where only states are wanted a program may have a tile of N as well.
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
    load_tile,
    load_tokens,
    locate_chunk,
    product,
    sequence,
)
from s0kernels.backends.triton.common.launch import cdiv, forced_schedule, launch, power_of_two, strides
from s0kernels.backends.triton.common.states import bank_size, state_row, state_strides
from s0kernels.backends.triton.common.targets import target_of
from s0kernels.backends.triton.ssd.call import Call
from s0kernels.calls import SSDInputs, SSDOptions, Start

#: the widest N that a program of the fused scan has at once
WIDEST = 256

# The rows of `gates`, [chunks, H, ROWS, BT] in fp32.
DT = tl.constexpr(0)  # dt, processed; 0 at pads
START = tl.constexpr(1)  # G, whose last is G_C
END = tl.constexpr(2)  # E
WRITE = tl.constexpr(3)  # dt E
ROWS = tl.constexpr(4)


@triton.jit
def softplus(b_x):
    """log(1 + exp(x)) as max(x, 0) + log1p(u), u = exp(-|x|), with log1p(u) = 2 artanh(s), s = u / (2 + u) <= 1/3, by
    its series: exact to fp32 however small u is, where a logarithm near 1 is not."""
    b_u = tl.exp(-tl.abs(b_x))
    b_s = b_u / (2.0 + b_u)
    b_square = b_s * b_s
    b_sum = 1.0 / 17
    for i in tl.static_range(8):
        b_sum = b_sum * b_square + 1.0 / (15 - 2 * i)
    return tl.maximum(b_x, 0.0) + 2 * b_s * b_sum


@triton.jit
def load_raw_dt(dt, stride, dt_bias, o_bias, rows, BT: tl.constexpr):
    """dt + dt_bias, [BT]."""
    b_dt = load_tokens(dt, tl.arange(0, BT), stride, rows)
    if dt_bias is not None:
        b_dt += tl.load(dt_bias + o_bias).to(tl.float32)
    return b_dt


@triton.jit
def clamp(b_x, low, high):
    """Between the limits; NaN stays."""
    b_x = tl.where(b_x < low, low, b_x)
    return tl.where(b_x > high, high, b_x)


@triton.jit
def silu(b_x):
    return b_x * tl.sigmoid(b_x)


@triton.jit
def ssd_prepare_fwd_kernel(
    dt,  # [B, T, H], any strides
    A,  # [H], any stride, as dt_bias
    B,  # None where neither cb nor p is wanted, or [B, T, G, N], any strides, as C
    C,
    dt_bias,  # or None
    cu_seqlens,
    cb,  # None, or [chunks, G, BT, BT], dtype of B: C B^T
    p,  # None, or [chunks, H, BT, BT], dtype of B: M diag(dt)
    gates,  # [chunks, H, ROWS, BT]
    low,
    high,
    T,
    NSEQ,
    heads,  # of a program
    inner,  # N, where loops over it are not to be unrolled
    sdt,
    sB,
    sC,
    sA,
    sbias,
    H: tl.constexpr,
    G: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BI: tl.constexpr,
    BQ: tl.constexpr,
):
    """A program per (chunk, `heads` heads of a group)."""
    shares = H // heads
    i_c, i_first = tl.program_id(0) // shares, tl.program_id(0) % shares * heads
    i_b, i_t, rows = locate_chunk(cu_seqlens, i_c, NSEQ, T, BT, BQ)
    if rows <= 0:
        return
    i_b, i_t, i_c, i_g = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), i_c.to(tl.int64), i_first // (H // G)
    o_t = tl.arange(0, BT)
    o_tile = o_t[:, None] * BT + o_t[None, :]
    if B is not None:
        p_B, p_C = (B + i_b * sB[0] + i_t * sB[1] + i_g * sB[2]), (C + i_b * sC[0] + i_t * sC[1] + i_g * sC[2])
        b_cb = product(p_C, p_B, sC[1], sC[3], sB[3], sB[1], rows, inner, rows, BT, BI, BT, PRECISION)
        if cb is not None and i_first % (H // G) == 0:
            tl.store(cb + (i_c * G + i_g) * BT * BT + o_tile, b_cb.to(cb.dtype.element_ty))
    for i in tl.range(heads, disable_licm=True):
        i_h = i_first + i
        at = i_c * H + i_h
        p_dt = dt + i_b * sdt[0] + i_t * sdt[1] + i_h * sdt[2]
        b_dt = load_raw_dt(p_dt, sdt[1], dt_bias, i_h * sbias, rows, BT)
        if SOFTPLUS:
            b_dt = softplus(b_dt)
        b_dt = tl.where(o_t < rows, clamp(b_dt, low, high), 0.0)
        b_log = b_dt * tl.load(A + i_h * sA).to(tl.float32)
        b_decay = decay_matrix(b_log, BT)
        b_end = tl.sum(tl.where(o_t[:, None] == BT - 1, b_decay, 0.0), axis=0)
        p_gates = gates + at * ROWS * BT + o_t
        tl.store(p_gates + DT * BT, b_dt)
        tl.store(p_gates + START * BT, tl.exp(tl.cumsum(b_log, axis=0)))
        tl.store(p_gates + END * BT, b_end)
        tl.store(p_gates + WRITE * BT, b_dt * b_end)
        if p is not None:
            tl.store(p + at * BT * BT + o_tile, (b_cb * b_decay * b_dt[None, :]).to(p.dtype.element_ty))


class Factors(NamedTuple):
    """What `prepare` computes for all chunks; C B^T and M diag(dt) only where they are wanted."""

    cb: Tensor | None
    p: Tensor | None
    gates: Tensor


def prepare(call: Call, *, cb: bool = False, p: bool = False) -> Factors:
    (_, dt, A, B, C, _, _, dt_bias), chunks = call.inputs, call.chunks
    gates = chunks.empty(chunks.count, call.H, ROWS.value, chunks.size, dtype=torch.float32)
    factors = Factors(call.intra(call.G) if cb else None, call.intra(call.H) if p else None, gates)
    B = B if cb or p else None
    tiles, heads = call.tiles("prepare"), _heads_of_a_program(call)
    launch(
        ssd_prepare_fwd_kernel,
        chunks.count * (call.H // heads),
        *(dt, A, B, C, dt_bias, chunks.start.cu_seqlens, *factors),
        *(*call.options.dt_limit, chunks.T, chunks.sequences, heads, call.N),
        *(dt.stride(), strides(B, 4), C.stride(), *A.stride(), *strides(dt_bias, 1)),
        H=call.H,
        G=call.G,
        SOFTPLUS=call.options.dt_softplus,
        BI=tiles.tile,
        **chunks.constants,
        tiles=tiles,
    )
    return factors


def _heads_of_a_program(call: Call) -> int:
    """Of those that share C B^T, as many as leave every multiprocessor two programs."""
    H, group, chunks = call.H, call.H // call.G, call.chunks.count
    programs = 2 * target_of(call.chunks.like.device).processors
    fit = [n for n in range(1, group + 1) if group % n == 0 and chunks * (H // n) >= programs]
    return max(fit, default=1)


@triton.jit
def finish_output(b_y, b_x, D, o_D, z, o_z, m_z):
    """(Y + D x) silu(z), in whatever orientation; D and z or None."""
    if D is not None:
        b_y += b_x.to(tl.float32) * tl.load(D + o_D).to(tl.float32)
    if z is not None:
        b_y *= silu(tl.load(z + o_z, mask=m_z, other=0.0).to(tl.float32))
    return b_y


@triton.jit
def scan_forward(
    pid,
    x,
    B,
    C,
    D,
    z,
    p,
    gates,
    h0,
    indices,
    cu_seqlens,
    y,
    h,
    ht,
    T,
    NSEQ,
    S,
    sx,
    sB,
    sC,
    sz,
    sh,
    sD,
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
    """The chunks of one (tile of N, tile of P, head, sequence), in turn; all of N is one tile where y is wanted."""
    i_n, i_p, i_h, i_q = split_index(pid, H, P, N, BP, BN)
    i_b, bos, length, i_c0, wrong = sequence(cu_seqlens, i_q, NSEQ, T, BT, BQ)
    o_t, o_p, o_n = tl.arange(0, BT), i_p * BP + tl.arange(0, BP), i_n * BN + tl.arange(0, BN)
    m_h = (o_p < P)[:, None] & (o_n < N)[None, :]
    dtype = x.dtype.element_ty
    b_h = tl.zeros([BP, BN], tl.float32)
    if h0 is not None:
        row, zero, none = state_row(indices, i_q, S)
        p_h0 = h0 + row * sh[0] + i_h * sh[1] + o_p[:, None] * sh[2] + o_n[None, :] * sh[3]
        b_h = tl.load(p_h0, mask=m_h & ((zero | none) == 0), other=0.0)
        b_h = tl.where(none, float("nan"), b_h)
    b_h = tl.where(wrong, float("nan"), b_h)

    i_b, bos, i_c0 = tl.cast(i_b, tl.int64), tl.cast(bos, tl.int64), tl.cast(i_c0, tl.int64)
    i_g = i_h // (H // G)
    p_x = x + i_b * sx[0] + bos * sx[1] + i_h * sx[2]
    p_B = B + i_b * sB[0] + bos * sB[1] + i_g * sB[2]
    p_C = C + i_b * sC[0] + bos * sC[1] + i_g * sC[2]
    o_h = o_p[:, None] * N + o_n[None, :]
    for i_c in tl.range(tl.cdiv(length, BT), disable_licm=True):
        rows = length - i_c * BT
        i_t = tl.cast(i_c, tl.int64) * BT
        at = (i_c0 + i_c) * H + i_h
        p_gates = gates + at * ROWS * BT + o_t
        if h is not None:
            tl.store(h + at * P * N + o_h, b_h.to(dtype), mask=m_h)
        b_x = tl.trans(load_tile(p_x + i_t * sx[1], o_t, o_p, sx[1], sx[3], rows, P))
        if y is not None:
            b_C = load_tile(p_C + i_t * sC[1], o_t, o_n, sC[1], sC[3], rows, N)
            b_y = tl.dot(b_h.to(dtype), tl.trans(b_C), input_precision=PRECISION)
            b_y *= tl.load(p_gates + START * BT)[None, :]
            b_p = tl.load(p + at * BT * BT + o_t[:, None] * BT + o_t[None, :])
            b_y = tl.dot(b_x, tl.trans(b_p), b_y, input_precision=PRECISION)
            m_y = (o_t < rows)[None, :] & (o_p < P)[:, None]
            at_z = i_b * sz[0] + (bos + i_t) * sz[1] + i_h * sz[2]
            o_z = at_z + o_t[None, :] * sz[1] + o_p[:, None] * sz[3]
            b_y = finish_output(b_y, b_x, D, i_h * sD, z, o_z, m_y)
            p_y = y + ((i_b * T + bos + i_t) * H + i_h) * P + o_t[None, :] * (H * P) + o_p[:, None]
            tl.store(p_y, b_y.to(dtype), mask=m_y)
        b_B = load_tile(p_B + i_t * sB[1], o_t, o_n, sB[1], sB[3], rows, N)
        b_write = (b_x.to(tl.float32) * tl.load(p_gates + WRITE * BT)[None, :]).to(dtype)
        b_last = tl.load(gates + at * ROWS * BT + START * BT + BT - 1)
        b_h = tl.dot(b_write, b_B, b_h * b_last, input_precision=PRECISION)
    if ht is not None:
        tl.store(ht + (i_q.to(tl.int64) * H + i_h) * P * N + o_h, b_h, mask=m_h)


@triton.jit
def split_index(pid, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """(tile of N, tile of P, head, sequence or chunk) of a program."""
    tiles_p: tl.constexpr = (P + BP - 1) // BP
    tiles_n: tl.constexpr = 1 if N == 0 else (N + BN - 1) // BN  # what has no state has D x
    i_ph = pid // tiles_n
    i_h = i_ph // tiles_p
    return pid % tiles_n, i_ph % tiles_p, i_h % H, i_h // H


@triton.jit
def ssd_scan_fwd_kernel(
    x,  # [B, T, H, P], any strides sx
    B,  # [B, T, G, N], any strides sB, as C
    C,
    D,  # None, or [H], any stride sD
    z,  # None, or [B, T, H, P], any strides sz
    p,
    gates,
    h0,  # None, or [.., H, P, N] in fp32, any strides sh; sh[0] is 0 where all sequences share one
    indices,  # None, or the row of h0 for each sequence
    cu_seqlens,
    y,  # None, or [B, T, H, P]
    h,  # None, or [chunks, H, P, N]: S of every chunk
    ht,  # None, or [NSEQ, H, P, N] in fp32
    T,
    NSEQ,
    S,
    sx,
    sB,
    sC,
    sz,
    sh,
    sD,
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
    """A program per (tile of N, tile of P, head, sequence)."""
    scan_forward(
        *(tl.program_id(0), x, B, C, D, z, p, gates, h0, indices, cu_seqlens, y, h, ht, T, NSEQ, S),
        *(sx, sB, sC, sz, sh, sD, H, G, P, N, PRECISION, BT, BP, BN, BQ),
    )


class ScanOutputs(NamedTuple):
    """What a scan from the start writes; None where it is not wanted."""

    y: Tensor | None = None
    h: Tensor | None = None
    ht: Tensor | None = None


def scan(call: Call, factors: Factors, out: ScanOutputs) -> None:
    """With y, a program has all of N, without a tile of it."""
    (x, _, _, B, C, D, z, _), chunks = call.inputs, call.chunks
    tiles, blocks, programs = call.scan_tiles(out.y is not None)
    state = chunks.start.state
    launch(
        ssd_scan_fwd_kernel,
        programs,
        *(x, B, C, D, z, factors.p, factors.gates, *chunks.start, *out),
        *(chunks.T, chunks.sequences, bank_size(state)),
        *(x.stride(), B.stride(), C.stride(), strides(z, 4), state_strides(state), *strides(D, 1)),
        **call.sizes,
        **blocks,
        **chunks.constants,
        tiles=tiles,
    )


@triton.jit
def ssd_output_fwd_kernel(
    x,  # [B, T, H, P], any strides sx
    C,  # [B, T, G, N], any strides sC
    D,  # None, or [H], any stride sD
    z,  # None, or [B, T, H, P], any strides sz
    p,
    gates,
    h,  # [chunks, H, P, N]
    cu_seqlens,
    y,  # [B, T, H, P]
    T,
    NSEQ,
    inner,  # N, where loops over it are not to be unrolled
    sx,
    sC,
    sz,
    sD,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BI: tl.constexpr,
    BQ: tl.constexpr,
):
    """Y from the states: a program per (tile of P, head, chunk)."""
    _, i_p, i_h, i_c = split_index(tl.program_id(0), H, P, N, BP, N)
    i_b, i_t, rows = locate_chunk(cu_seqlens, i_c, NSEQ, T, BT, BQ)
    if rows <= 0:
        return
    o_t, o_p = tl.arange(0, BT), i_p * BP + tl.arange(0, BP)
    i_b, i_t, at = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), i_c.to(tl.int64) * H + i_h
    p_C = C + i_b * sC[0] + i_t * sC[1] + i_h // (H // G) * sC[2]
    p_h = h + at * P * N + i_p * BP * N
    b_y = product(p_C, p_h, sC[1], sC[3], 1, N, rows, inner, P - i_p * BP, BT, BI, BP, PRECISION)
    b_y *= tl.load(gates + at * ROWS * BT + START * BT + o_t)[:, None]
    b_x = load_tile(x + i_b * sx[0] + i_t * sx[1] + i_h * sx[2], o_t, o_p, sx[1], sx[3], rows, P)
    b_p = tl.load(p + at * BT * BT + o_t[:, None] * BT + o_t[None, :])
    b_y = tl.dot(b_p, b_x, b_y, input_precision=PRECISION)
    m_y = (o_t < rows)[:, None] & (o_p < P)[None, :]
    o_z = i_b * sz[0] + (i_t + o_t)[:, None] * sz[1] + i_h * sz[2] + o_p[None, :] * sz[3]
    b_y = finish_output(b_y, b_x, D, i_h * sD, z, o_z, m_y)
    p_y = y + ((i_b * T + i_t) * H + i_h) * P + o_t[:, None] * (H * P) + o_p[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_y)


def output(call: Call, factors: Factors, h: Tensor, y: Tensor) -> None:
    (x, _, _, _, C, D, z, _), chunks, tiles = call.inputs, call.chunks, call.tiles("output")
    BP = min(tiles.tile, power_of_two(call.P))
    launch(
        ssd_output_fwd_kernel,
        chunks.count * call.H * cdiv(call.P, BP),
        *(x, C, D, z, factors.p, factors.gates, h, chunks.start.cu_seqlens, y, chunks.T, chunks.sequences, call.N),
        *(x.stride(), C.stride(), strides(z, 4), *strides(D, 1)),
        **call.sizes,
        BP=BP,
        BI=tiles.tile,
        **chunks.constants,
        tiles=tiles,
    )


def is_split(call: Call) -> bool:
    """Whether a kernel of its own computes the output, for all chunks at once: where a tile of P with all of N has no
    room in the registers, or scans are long and so few that most of the chip would watch."""
    if call.N > WIDEST:
        return True
    if forced := forced_schedule():
        return forced == "split"
    chunks, programs = call.chunks, call.scan_tiles(True).programs
    long = 1024 * chunks.sequences <= chunks.B * chunks.T
    return long and 2 * programs <= target_of(chunks.like.device).processors


def ssd_forward(
    inputs: SSDInputs, start: Start, options: SSDOptions, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    call = Call.of(inputs, inputs.x.shape[3], start, options)
    y, final = call.tokens(), call.final_states(output_final_state)
    ht = final if output_final_state else None
    split, factors = is_split(call), prepare(call, p=True)
    if split:
        h = call.chunk_states()
        scan(call, factors, ScanOutputs(h=h, ht=ht))
        output(call, factors, h, y)
    else:
        scan(call, factors, ScanOutputs(y=y, ht=ht))
    return y, final
