"""The backward of Mamba-2 SSD in the symbols of `forward`: the inter-chunk scan, and what runs after what.

With dY = dO silu(z) and the gradient dS' of the state at the end of a chunk, from the last chunk to the first:

    dS = G_C dS' + dY^T diag(G) C

which needs neither x, B nor S. The gradients of the inputs then need no scan: `input_grads`.
"""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.chunks import load_tile, sequence
from s0kernels.backends.triton.common.launch import kernel, launch, strides
from s0kernels.backends.triton.common.states import bank_size, reduce_state_grad, state_strides
from s0kernels.backends.triton.ssd.call import Call
from s0kernels.backends.triton.ssd.forward import last_of, scan_forward, split_index
from s0kernels.backends.triton.ssd.head_grads import Scanned, load_dy
from s0kernels.backends.triton.ssd.input_grads import OF_DECAYS, input_grads
from s0kernels.backends.triton.ssd.prepare import ROWS, START, at_token, prepare
from s0kernels.calls import Grads, SSDInputs, SSDOptions, Start, Wanted


@triton.jit
def scan_backward(
    pid,
    C,
    z,
    gates,
    do,
    dht,
    cu_seqlens,
    dh,
    dh0,
    T,
    NSEQ,
    sC,
    sz,
    so,
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
    """The chunks of one (tile of N, tile of P, head, sequence), from the last to the first."""
    i_n, i_p, i_h, i_q = split_index(pid, H, P, N, BP, BN)
    i_b, bos, length, i_c0, wrong = sequence(cu_seqlens, i_q, NSEQ, T, BT, BQ)
    o_t, o_p, o_n = tl.arange(0, BT), i_p * BP + tl.arange(0, BP), i_n * BN + tl.arange(0, BN)
    m_h = (o_p < P)[:, None] & (o_n < N)[None, :]
    i_b, bos, i_c0, i_q = tl.cast(i_b, tl.int64), tl.cast(bos, tl.int64), tl.cast(i_c0, tl.int64), i_q.to(tl.int64)
    b_dh = tl.zeros([BP, BN], tl.float32)
    if dht is not None:
        p_dht = dht + i_q * sh[0] + i_h.to(tl.int64) * sh[1] + o_p[:, None] * sh[2] + o_n[None, :] * sh[3]
        b_dh = tl.load(p_dht, mask=m_h, other=0.0)
    b_dh = tl.where(wrong, float("nan"), b_dh)

    o_h = o_p[:, None] * N + o_n[None, :]
    chunks = tl.cdiv(length, BT)
    b_last = tl.load(last_of(gates, i_c0 + tl.maximum(chunks - 1, 0), i_h, H, BT), mask=chunks > 0, other=0.0)
    for i in tl.range(chunks, disable_licm=True):
        i_c = chunks - 1 - i
        rows = length - i_c * BT
        i_t = bos + tl.cast(i_c, tl.int64) * BT
        at = (i_c0 + i_c) * H + i_h
        b_next = tl.load(last_of(gates, i_c0 + tl.maximum(i_c - 1, 0), i_h, H, BT))  # as in the forward
        p_do, p_z = at_token(do, so, i_b, i_t, i_h), (z if z is None else at_token(z, sz, i_b, i_t, i_h))
        b_dy = load_dy(p_do, p_z, o_t, o_p, so[1], so[3], sz[1], sz[3], rows, P)
        b_C = load_tile(at_token(C, sC, i_b, i_t, i_h // (H // G)), o_t, o_n, sC[1], sC[3], rows, N)
        b_start = tl.load(gates + at * ROWS * BT + START * BT + o_t)
        if dh is not None:
            tl.store(dh + at * P * N + o_h, b_dh.to(dh.dtype.element_ty), mask=m_h)
        b_read = (tl.trans(b_dy) * b_start[None, :]).to(do.dtype.element_ty)
        b_dh = tl.dot(b_read, b_C, b_dh * b_last, input_precision=PRECISION)
        b_last = b_next
    if dh0 is not None:
        tl.store(dh0 + (i_q * H + i_h) * P * N + o_h, b_dh, mask=m_h)


@kernel
def ssd_scan_bwd_kernel(
    x,  # None, or [B, T, H, P], any strides; then the states are recomputed, too
    B,  # None, or [B, T, G, N], any strides, as C
    C,
    z,  # None, or [B, T, H, P], any strides
    gates,
    h0,  # as in the forward
    indices,
    cu_seqlens,
    do,  # [B, T, H, P], any strides so
    dht,  # None, or [NSEQ, H, P, N] in fp32, any strides st
    h,  # None, or [chunks, H, P, N]: S of every chunk
    dh,  # None, or [chunks, H, P, N]: dS' of every chunk
    dh0,  # None, or [NSEQ, H, P, N] in fp32
    T,
    NSEQ,
    S,
    programs,
    sx,
    sB,
    sC,
    sz,
    sh,
    so,
    st,
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
    """`programs` scan from the end, one per (tile of N, tile of P, head, sequence). Where S is wanted, as many scan
    from the start beside them."""
    if tl.program_id(0) < programs:
        scan_backward(
            *(tl.program_id(0), C, z, gates, do, dht, cu_seqlens, dh, dh0, T, NSEQ, sC, sz, so, st),
            *(H, G, P, N, PRECISION, BT, BP, BN, BQ),
        )
    elif h is not None:
        scan_forward(
            *(tl.program_id(0) - programs, x, B, gates, h0, indices, cu_seqlens, h, None, T, NSEQ, S),
            *(sx, sB, sh, H, G, P, N, PRECISION, BT, BP, BN, BQ),
        )


def scan(call: Call, gates: Tensor, grads: Grads, out: Scanned, dh0: Tensor | None) -> None:
    """Where h is wanted, the states are recomputed beside it."""
    (x, _, _, B, C, _, z, _), chunks = call.inputs, call.chunks
    from_end, from_start = out.dh is not None or dh0 is not None, out.h is not None
    tiles, blocks, programs = call.scan_tiles(from_end + from_start)
    state, (do, dht) = chunks.start.state, grads
    launch(
        ssd_scan_bwd_kernel,
        (from_end + from_start) * programs,
        *(x, B, C, z, gates, *chunks.start, do, dht, *out, dh0),
        *(chunks.T, chunks.sequences, bank_size(state), from_end * programs),
        *(
            strides(x, 4),
            strides(B, 4),
            C.stride(),
            strides(z, 4),
            state_strides(state),
            strides(do, 4),
            strides(dht, 4),
        ),
        **call.sizes,
        **blocks,
        **chunks.constants,
        tiles=tiles,
    )


def ssd_backward(
    grads: Grads, inputs: SSDInputs, start: Start, options: SSDOptions, wanted: Wanted
) -> dict[str, Tensor]:
    C, names = inputs.C, wanted.names
    P = grads.columns(2)
    call = Call.of(inputs, P, start, options)
    do = C.new_zeros(1).expand(*inputs.dt.shape, P) if grads.output is None else grads.output.to(C.dtype)
    of_chunks = names - {"initial_state"}
    factors = prepare(call, cb=bool(of_chunks))
    decays = bool(names & OF_DECAYS)
    h = call.chunk_states() if decays or names & {"z", "C"} else None
    dh = call.chunk_states() if decays or names & {"x", "B"} else None
    dh0 = call.final_states() if "initial_state" in names else None
    scan(call, factors.gates, grads._replace(output=do), Scanned(h, dh), dh0)
    found = input_grads(call, factors, do, Scanned(h, dh), of_chunks) if of_chunks else {}
    if dh0 is not None:
        found["initial_state"] = reduce_state_grad(dh0, wanted.state_shape, start.indices)
    return found
