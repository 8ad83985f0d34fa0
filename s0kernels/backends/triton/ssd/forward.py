"""The forward of Mamba-2 SSD.

With a = dt A, G_i = exp(a_1 + .. + a_i), E_i = exp(a_{i+1} + .. + a_C) and D_ij = exp(a_{j+1} + .. + a_i) inside a
chunk of C tokens, S [P, N] the state at its start and S' at its end:

    M   = lower(C B^T * D)
    Y   = diag(G) C S^T + M diag(dt) X
    S'  = G_C S + X^T diag(dt E) B

`prepare` computes C B^T once for the heads of a group, and the factors of rows. The scan from chunk to chunk then has
one product, X^T diag(dt E) B, and no sum over P or N, so that its programs have tiles of a state. The output of all
chunks is computed at once, from the states that the scan left.
"""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.chunks import load_tile, locate_chunk, product, sequence
from s0kernels.backends.triton.common.launch import cdiv, kernel, launch, power_of_two, strides
from s0kernels.backends.triton.common.states import bank_size, state_row, state_strides
from s0kernels.backends.triton.ssd.call import Call
from s0kernels.backends.triton.ssd.prepare import (
    DT,
    LOG2E,
    ROWS,
    START,
    WRITE,
    Factors,
    at_token,
    decays,
    load_causal,
    prepare,
)
from s0kernels.calls import SSDInputs, SSDOptions, Start


@triton.jit
def sigmoid(b_x):
    """By a reciprocal square root, which chips have, and no division, which takes them eight instructions."""
    b_root = tl.rsqrt(1.0 + tl.exp2(b_x * -LOG2E))
    return b_root * b_root


@triton.jit
def silu(b_x):
    return b_x * sigmoid(b_x)


@triton.jit
def finish_output(b_y, b_x, D, o_D, z, o_z, m_z):
    """(Y + D x) silu(z), in whatever orientation; D and z or None."""
    if D is not None:
        b_y += b_x.to(tl.float32) * tl.load(D + o_D).to(tl.float32)
    if z is not None:
        b_y *= silu(tl.load(z + o_z, mask=m_z, other=0.0).to(tl.float32))
    return b_y


@triton.jit
def split_index(pid, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """(tile of N, tile of P, head, sequence or chunk) of a program."""
    tiles_p: tl.constexpr = (P + BP - 1) // BP
    tiles_n: tl.constexpr = 1 if N == 0 else (N + BN - 1) // BN  # what has no state has D x
    i_ph = pid // tiles_n
    i_h = i_ph // tiles_p
    return pid % tiles_n, i_ph % tiles_p, i_h % H, i_h // H


@triton.jit
def scan_forward(
    pid,
    x,
    B,
    gates,
    h0,
    indices,
    cu_seqlens,
    h,
    ht,
    T,
    NSEQ,
    S,
    sx,
    sB,
    sh,
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
    """The chunks of one (tile of N, tile of P, head, sequence), in turn."""
    i_n, i_p, i_h, i_q = split_index(pid, H, P, N, BP, BN)
    i_b, bos, length, i_c0, wrong = sequence(cu_seqlens, i_q, NSEQ, T, BT, BQ)
    o_t, o_p, o_n = tl.arange(0, BT), i_p * BP + tl.arange(0, BP), i_n * BN + tl.arange(0, BN)
    m_h = (o_p < P)[:, None] & (o_n < N)[None, :]
    b_h = tl.zeros([BP, BN], tl.float32)
    if h0 is not None:
        row, zero, none = state_row(indices, i_q, S)
        p_h0 = h0 + row * sh[0] + i_h.to(tl.int64) * sh[1] + o_p[:, None] * sh[2] + o_n[None, :] * sh[3]
        b_h = tl.load(p_h0, mask=m_h & ((zero | none) == 0), other=0.0)
        b_h = tl.where(none, float("nan"), b_h)
    b_h = tl.where(wrong, float("nan"), b_h)

    i_b, bos, i_c0 = tl.cast(i_b, tl.int64), tl.cast(bos, tl.int64), tl.cast(i_c0, tl.int64)
    p_x, p_B = at_token(x, sx, i_b, bos, i_h), at_token(B, sB, i_b, bos, i_h // (H // G))
    o_h = o_p[:, None] * N + o_n[None, :]
    chunks = tl.cdiv(length, BT)
    b_last = tl.load(last_of(gates, i_c0, i_h, H, BT), mask=chunks > 0, other=0.0)
    for i_c in tl.range(chunks, disable_licm=True):
        i_t = tl.cast(i_c, tl.int64) * BT
        at = (i_c0 + i_c) * H + i_h
        # the next chunk's: what only scales an accumulator is not loaded ahead of its use
        b_next = tl.load(last_of(gates, i_c0 + tl.minimum(i_c + 1, chunks - 1), i_h, H, BT))
        b_x = load_tile(p_x + i_t * sx[1], o_t, o_p, sx[1], sx[3], length - i_c * BT, P)
        b_B = load_tile(p_B + i_t * sB[1], o_t, o_n, sB[1], sB[3], length - i_c * BT, N)
        b_write = tl.load(gates + at * ROWS * BT + WRITE * BT + o_t)
        tl.store(h + at * P * N + o_h, b_h.to(h.dtype.element_ty), mask=m_h)
        b_write = (tl.trans(b_x).to(tl.float32) * b_write[None, :]).to(x.dtype.element_ty)
        b_h = tl.dot(b_write, b_B, b_h * b_last, input_precision=PRECISION)
        b_last = b_next
    if ht is not None:
        tl.store(ht + (i_q.to(tl.int64) * H + i_h) * P * N + o_h, b_h, mask=m_h)


@triton.jit
def last_of(gates, i_c, i_h, H: tl.constexpr, BT: tl.constexpr):
    """Where G_C of a chunk lies."""
    return gates + (i_c * H + i_h) * ROWS * BT + START * BT + BT - 1


@kernel
def ssd_scan_fwd_kernel(
    x,  # [B, T, H, P], any strides sx
    B,  # [B, T, G, N], any strides sB
    gates,
    h0,  # None, or [.., H, P, N] in fp32, any strides sh; sh[0] is 0 where all sequences share one
    indices,  # None, or the row of h0 for each sequence
    cu_seqlens,
    h,  # [chunks, H, P, N]: S of every chunk
    ht,  # None, or [NSEQ, H, P, N] in fp32
    T,
    NSEQ,
    S,
    sx,
    sB,
    sh,
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
        *(tl.program_id(0), x, B, gates, h0, indices, cu_seqlens, h, ht, T, NSEQ, S),
        *(sx, sB, sh, H, G, P, N, PRECISION, BT, BP, BN, BQ),
    )


def scan(call: Call, factors: Factors, h: Tensor, ht: Tensor | None) -> None:
    (x, _, _, B, _, _, _, _), chunks = call.inputs, call.chunks
    tiles, blocks, programs = call.scan_tiles()
    state = chunks.start.state
    launch(
        ssd_scan_fwd_kernel,
        programs,
        *(x, B, factors.gates, *chunks.start, h, ht, chunks.T, chunks.sequences, bank_size(state)),
        *(x.stride(), B.stride(), state_strides(state)),
        **call.sizes,
        **blocks,
        **chunks.constants,
        tiles=tiles,
    )


@kernel
def ssd_output_fwd_kernel(
    x,  # [B, T, H, P], any strides sx
    C,  # [B, T, G, N], any strides sC
    D,  # None, or [H], any stride sD
    z,  # None, or [B, T, H, P], any strides sz
    cb,
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
    BM: tl.constexpr,
    BP: tl.constexpr,
    BI: tl.constexpr,
    BQ: tl.constexpr,
):
    """Y from the states: a program per (BM tokens of a chunk, tile of P, head, chunk)."""
    tiles: tl.constexpr = BT // BM
    i_m = tl.program_id(0) % tiles * BM
    _, i_p, i_h, i_c = split_index(tl.program_id(0) // tiles, H, P, N, BP, N)
    i_b, i_t, rows = locate_chunk(cu_seqlens, i_c, NSEQ, T, BT, BQ)
    if i_m >= rows:
        return
    i_b, i_t, at, i_g = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), i_c.to(tl.int64) * H + i_h, i_h // (H // G)
    o_t, o_m, o_j, o_p = tl.arange(0, BM), i_m + tl.arange(0, BM), tl.arange(0, BM), i_p * BP + tl.arange(0, BP)
    p_gates = gates + at * ROWS * BT
    p_h = h + at * P * N + i_p * BP * N
    p_C = at_token(C, sC, i_b, i_t + i_m, i_g)
    b_y = product(p_C, p_h, sC[1], sC[3], 1, N, rows - i_m, inner, P - i_p * BP, BM, BI, BP, PRECISION)
    b_y *= tl.load(p_gates + START * BT + o_m)[:, None]
    p_x = at_token(x, sx, i_b, i_t, i_h)
    p_cb = cb + (i_c.to(tl.int64) * G + i_g) * BT * BT
    for j in range(0, i_m + BM, BM):
        b_x = load_tile(p_x + j * sx[1], o_j, o_p, sx[1], sx[3], rows - j, P)
        b_m = load_causal(p_cb, o_m, j + o_j, BT) * decays(p_gates, o_m, j + o_j, BT)
        b_m *= tl.load(p_gates + DT * BT + j + o_j)[None, :]
        b_y = tl.dot(b_m.to(x.dtype.element_ty), b_x, b_y, input_precision=PRECISION)
    m_y = (o_m < rows)[:, None] & (o_p < P)[None, :]
    p_x = at_token(x, sx, i_b, i_t + i_m, i_h)
    b_x = 0.0 if D is None else load_tile(p_x, o_t, o_p, sx[1], sx[3], rows - i_m, P)
    o_z = i_b * sz[0] + (i_t + o_m)[:, None] * sz[1] + i_h.to(tl.int64) * sz[2] + o_p[None, :] * sz[3]
    b_y = finish_output(b_y, b_x, D, i_h * sD, z, o_z, m_y)
    p_y = y + ((i_b * T + i_t) * H + i_h) * P + o_m[:, None] * (H * P) + o_p[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_y)


def output(call: Call, factors: Factors, h: Tensor, y: Tensor) -> None:
    (x, _, _, _, C, D, z, _), chunks, tiles = call.inputs, call.chunks, call.tiles("output")
    BP, BM = min(tiles.tile, power_of_two(call.P)), min(64, chunks.size)
    launch(
        ssd_output_fwd_kernel,
        chunks.count * call.H * cdiv(call.P, BP) * (chunks.size // BM),
        *(x, C, D, z, *factors, h, chunks.start.cu_seqlens, y, chunks.T, chunks.sequences, call.N),
        *(x.stride(), C.stride(), strides(z, 4), *strides(D, 1)),
        **call.sizes,
        BM=BM,
        BP=BP,
        BI=min(tiles.tile, 64),
        **chunks.constants,
        tiles=tiles,
    )


def ssd_forward(
    inputs: SSDInputs, start: Start, options: SSDOptions, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    call = Call.of(inputs, inputs.x.shape[3], start, options)
    y, final, h = call.tokens(), call.final_states(output_final_state), call.chunk_states()
    factors = prepare(call, cb=True)
    scan(call, factors, h, final if output_final_state else None)
    output(call, factors, h, y)
    return y, final
