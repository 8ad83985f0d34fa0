"""Gradients of Mamba-2 SSD that are sums over the heads of a group: of B and C."""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.chunks import load_tile, locate_chunk
from s0kernels.backends.triton.common.launch import cdiv, kernel, launch, power_of_two, strides
from s0kernels.backends.triton.ssd.call import Call
from s0kernels.backends.triton.ssd.head_grads import Scanned, load_dy
from s0kernels.backends.triton.ssd.prepare import ROWS, START, WRITE, at_token, load_causal


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
    b_intra = tl.zeros([BT, BT], tl.float32)
    for i_r in tl.range(R, loop_unroll_factor=4):
        b_intra += load_causal(intra + i_r * BT * BT, o_t, o_t, BT)
    b_intra = (tl.trans(b_intra) if TRANSPOSE else b_intra).to(other.dtype.element_ty)
    b_sum = tl.dot(b_intra, load_tile(other, o_t, o_n, so[1], so[3], rows, cols), input_precision=PRECISION)
    tiles = tl.cdiv(inner, BP)
    for i in tl.range(R * tiles, disable_licm=True):
        i_r, i_p = i // tiles, i % tiles * BP
        at_r = tl.cast(i_r, tl.int64)
        p_v = v + at_r * sv[2] + i_p * sv[3]
        p_z = z if z is None else z + at_r * sz[2] + i_p * sz[3]
        b_v = load_dy(p_v, p_z, o_t, o_p, sv[1], sv[3], sz[1], sz[3], rows, inner - i_p)
        b_gate = tl.load(gates + i_r * ROWS * BT + GATE * BT + o_t)
        b_states = load_tile(states + (i_r * P + i_p) * N, o_p, o_n, N, 1, inner - i_p, cols)
        b_v = (b_v * b_gate[:, None]).to(v.dtype.element_ty)
        b_sum = tl.dot(b_v, b_states, b_sum, input_precision=PRECISION)
    return b_sum


@kernel
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
