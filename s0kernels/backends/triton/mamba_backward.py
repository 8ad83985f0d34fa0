"""Kernels of Mamba-2 SSD, backward, in the symbols of `mamba_forward`.

With dY = dO silu(z) and the gradient dS' of the state at the end of a chunk, from the last chunk to the first:

    dS = G_C dS' + dY^T diag(G) C

which needs neither x, B nor S. Where everything is known for all chunks at once, with K = lower(dY X^T):

    dX  = diag(dt) (M^T dY + diag(E) B dS'^T) + D dY
    ddt = A da + column sums of M * K + rows of E X * (B dS'^T)
    dC  = sum over the heads of a group of  diag(G) dY S + (K diag(dt) * D) B
    dB  = sum over the heads of a group of  diag(dt E) X dS' + (K diag(dt) * D)^T C

A log decay a_l takes part in every G_i with i >= l, every E_j with j < l, every D_ij with j < l <= i and in G_C.
"""

import triton
import triton.language as tl

from s0kernels.backends.triton.mamba_forward import (
    DT,
    END,
    ROWS,
    START,
    WRITE,
    clamp,
    load_raw_dt,
    silu,
    softplus,
    split_index,
    walk_forward,
)
from s0kernels.backends.triton.tiles import chunk_of_slot, decay_matrix, decay_matrix_grad, load_tile, sequence


@triton.jit
def silu_slope(b_x):
    b_sigmoid = tl.sigmoid(b_x)
    return b_sigmoid * (1.0 + b_x * (1.0 - b_sigmoid))


@triton.jit
def load_dy(do, z, o_t, o_p, so_t, so_p, sz_t, sz_p, rows, P):
    """dO silu(z), [BT, BP] in fp32. `do` and `z` have 64-bit offsets to the corner."""
    b_dy = load_tile(do, o_t, o_p, so_t, so_p, rows, P).to(tl.float32)
    if z is not None:
        b_dy *= silu(load_tile(z, o_t, o_p, sz_t, sz_p, rows, P).to(tl.float32))
    return b_dy


@triton.jit
def at_token(x, stride, i_b, i_t, i_h):
    """Where the row of a head at a token begins. Not for None: in Triton 3.6 no function returns it."""
    return x + i_b * stride[0] + i_t * stride[1] + i_h * stride[2]


@triton.jit
def walk_backward(
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
    i_b, bos, length, i_s, wrong = sequence(cu_seqlens, i_q, NSEQ, T, BT, BQ)
    o_t, o_p, o_n = tl.arange(0, BT), i_p * BP + tl.arange(0, BP), i_n * BN + tl.arange(0, BN)
    m_h = (o_p < P)[:, None] & (o_n < N)[None, :]
    i_b, bos, i_s, i_q = tl.cast(i_b, tl.int64), tl.cast(bos, tl.int64), tl.cast(i_s, tl.int64), i_q.to(tl.int64)
    b_dh = tl.zeros([BP, BN], tl.float32)
    if dht is not None:
        p_dht = dht + i_q * sh[0] + i_h * sh[1] + o_p[:, None] * sh[2] + o_n[None, :] * sh[3]
        b_dh = tl.load(p_dht, mask=m_h, other=0.0)
    b_dh = tl.where(wrong, float("nan"), b_dh)

    o_h = o_p[:, None] * N + o_n[None, :]
    chunks = tl.cdiv(length, BT)
    for i in range(chunks):
        i_c = chunks - 1 - i
        rows = length - i_c * BT
        i_t = bos + tl.cast(i_c, tl.int64) * BT
        at = (i_s + i_c) * H + i_h
        p_gates = gates + at * ROWS * BT + START * BT
        if dh is not None:
            tl.store(dh + at * P * N + o_h, b_dh.to(dh.dtype.element_ty), mask=m_h)
        p_do, p_z = at_token(do, so, i_b, i_t, i_h), (z if z is None else at_token(z, sz, i_b, i_t, i_h))
        b_dy = load_dy(p_do, p_z, o_t, o_p, so[1], so[3], sz[1], sz[3], rows, P)
        b_C = load_tile(at_token(C, sC, i_b, i_t, i_h // (H // G)), o_t, o_n, sC[1], sC[3], rows, N)
        b_read = (tl.trans(b_dy) * tl.load(p_gates + o_t)[None, :]).to(do.dtype.element_ty)
        b_dh = tl.dot(b_read, b_C, b_dh * tl.load(p_gates + BT - 1), input_precision=PRECISION)
    if dh0 is not None:
        tl.store(dh0 + (i_q * H + i_h) * P * N + o_h, b_dh, mask=m_h)


@triton.jit
def ssd_scan_bwd_kernel(
    x,  # None, or [B, T, H, P], any strides; then the states are made again, too
    B,  # None, or [B, T, G, N], any strides, as C
    C,
    z,  # None, or [B, T, H, P], any strides
    gates,
    h0,  # as in the forward
    indices,
    cu_seqlens,
    do,  # [B, T, H, P], any strides so
    dht,  # None, or [NSEQ, H, P, N] in fp32, any strides st
    h,  # None, or [slots, H, P, N]: S of every chunk
    dh,  # None, or [slots, H, P, N]: dS' of every chunk
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
    """`programs` walk from the end, one per (tile of N, tile of P, head, sequence). Where S is wanted, as many walk
    from the start beside them."""
    if tl.program_id(0) < programs:
        walk_backward(
            *(tl.program_id(0), C, z, gates, do, dht, cu_seqlens, dh, dh0, T, NSEQ, sC, sz, so, st),
            *(H, G, P, N, PRECISION, BT, BP, BN, BQ),
        )
    elif h is not None:
        walk_forward(
            *(tl.program_id(0) - programs, x, B, C, None, None, None, gates, h0, indices, cu_seqlens, None, h, None),
            *(T, NSEQ, S, sx, sB, sC, sz, sh, 0, H, G, P, N, PRECISION, BT, BP, BN, BQ),
        )


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
    cb,  # [slots, G, BT, BT]: C B^T
    gates,
    do,  # [B, T, H, P], any strides
    h,  # [slots, H, P, N], or None where none of dt, A and z is wanted
    dh,  # [slots, H, P, N], or None where none of dt, A and x is wanted
    cu_seqlens,
    dx,  # None, or [B, T, H, P], as dz
    dz,
    ddt,  # None, or [B, T, H]
    dcb,  # None, or [slots, H, BT, BT]: K diag(dt) * D
    dA,  # None, or [slots, H] in fp32, as dD and dbias: what each chunk adds
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
    """A program per (slot, head): its tiles of P in turn, then what sums over P."""
    i_s, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_b, i_t, rows = chunk_of_slot(cu_seqlens, i_s, NSEQ, T, BT, BQ)
    i_b, i_t, at, i_g = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), tl.program_id(0).to(tl.int64), i_h // (H // G)
    o_t = tl.arange(0, BT)
    dtype = x.dtype.element_ty
    o_tile = o_t[:, None] * BT + o_t[None, :]
    if rows <= 0:
        store_sums(dA, dD, dbias, at, 0.0, 0.0, 0.0)
        return
    p_gates = gates + at * ROWS * BT + o_t
    b_dt = tl.load(p_gates + DT * BT)
    b_a = tl.load(A + i_h * sA).to(tl.float32)
    b_decay = decay_matrix(b_dt * b_a, BT)
    p_cb = cb + (i_s.to(tl.int64) * G + i_g) * BT * BT + o_tile
    b_p = (tl.load(p_cb).to(tl.float32) * b_decay * b_dt[None, :]).to(dtype)
    b_k = tl.zeros([BT, BT], tl.float32)
    b_starts, b_ends = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
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
        p_do, p_z = at_token(do, so, i_b, i_t, i_h), (z if z is None else at_token(z, sz, i_b, i_t, i_h))
        b_x = load_tile(at_token(x, sx, i_b, i_t, i_h), o_t, o_p, sx[1], sx[3], rows, P)
        b_dy = load_dy(p_do, p_z, o_t, o_p, so[1], so[3], sz[1], sz[3], rows, P)
        b_k = tl.dot(b_dy.to(dtype), tl.trans(b_x), b_k, input_precision=PRECISION)
        b_start *= tl.load(p_gates + START * BT)[:, None]
        if DECAYS:
            b_starts += tl.sum(b_start * b_dy, axis=1)
            b_ends += tl.sum(b_end * b_x.to(tl.float32), axis=1)
        o_out = ((i_b * T + i_t + o_t)[:, None] * H + i_h) * P + o_p[None, :]
        b_skip = 0.0 if D is None else tl.load(D + i_h * sD).to(tl.float32)
        if dx is not None:
            b_end *= tl.load(p_gates + WRITE * BT)[:, None]
            b_end = tl.dot(tl.trans(b_p), b_dy.to(dtype), b_end, input_precision=PRECISION)
            tl.store(dx + o_out, (b_end + b_skip * b_dy).to(dtype), mask=mask)
        if dz is not None:
            b_start = tl.dot(b_p, b_x, b_start, input_precision=PRECISION) + b_skip * b_x.to(tl.float32)
            b_slope = silu_slope(load_tile(p_z, o_t, o_p, sz[1], sz[3], rows, P).to(tl.float32))
            b_do = load_tile(p_do, o_t, o_p, so[1], so[3], rows, P).to(tl.float32)
            tl.store(dz + o_out, (b_do * b_start * b_slope).to(dtype), mask=mask)

    b_skips = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_k, 0.0))
    b_k *= b_decay
    if dcb is not None:
        tl.store(dcb + at * BT * BT + o_tile, (b_k * b_dt[None, :]).to(dtype))
    b_rates, b_biases = 0.0, 0.0
    if DECAYS:
        # the policy makes this another load than the one above, so that C B^T is not kept in registers
        b_k *= tl.load(p_cb, eviction_policy="evict_first").to(tl.float32)
        b_da = decay_grad(b_k * b_dt[None, :], b_starts, b_ends * tl.load(p_gates + WRITE * BT), BT)
        b_da += b_carried * tl.load(gates + at * ROWS * BT + START * BT + BT - 1)
        b_rates = tl.sum(b_da * b_dt)
        b_ddt = b_a * b_da + tl.sum(b_k, axis=0) + b_ends * tl.load(p_gates + END * BT)
        b_raw = load_raw_dt(dt + i_b * sdt[0] + i_t * sdt[1] + i_h * sdt[2], sdt[1], dt_bias, i_h * sbias, rows, BT)
        b_ddt = dt_grad(b_ddt, b_raw, low, high, SOFTPLUS)
        b_biases = tl.sum(tl.where(o_t < rows, b_ddt, 0.0))
        if ddt is not None:
            tl.store(ddt + (i_b * T + i_t + o_t) * H + i_h, b_ddt.to(ddt.dtype.element_ty), mask=o_t < rows)
    store_sums(dA, dD, dbias, at, b_rates, b_skips, b_biases)


@triton.jit
def decay_grad(b_pairs, b_starts, b_ends, BT: tl.constexpr):
    """da from the gradients of the sums of a: of those in D [BT, BT], in G and in E [BT]."""
    b_da = decay_matrix_grad(b_pairs, BT) + tl.cumsum(b_starts, axis=0, reverse=True)
    return b_da + tl.cumsum(b_ends, axis=0) - b_ends


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
    dA,  # None, or [slots, H], as dD and dbias
    dD,
    dbias,
    dA_sum,  # None, or [H], as dD_sum and dbias_sum
    dD_sum,
    dbias_sum,
    slots,
    H,
    BS: tl.constexpr,
):
    """Sums over the slots, in their order: a program per head."""
    sum_slots(dA, dA_sum, slots, H, BS)
    sum_slots(dD, dD_sum, slots, H, BS)
    sum_slots(dbias, dbias_sum, slots, H, BS)


@triton.jit
def sum_slots(x, out, slots, H, BS: tl.constexpr):
    if out is not None:
        b_sum = tl.zeros([BS], tl.float32)
        for i in range(0, slots, BS):
            o_s = i + tl.arange(0, BS)
            b_sum += tl.load(x + o_s.to(tl.int64) * H + tl.program_id(0), mask=o_s < slots, other=0.0)
        tl.store(out + tl.program_id(0), tl.sum(b_sum))


@triton.jit
def group_grad(
    v,
    z,
    gates,
    states,
    pairs,
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
    """Sum over R heads of diag(gate) v silu(z) states + pairs other, [BT, BN]. All pointers are at the first head; z is
    None or [.., P] like v, and pairs are transposed on demand."""
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
    b_pairs = tl.zeros([BT, BT], tl.float32)
    for i_r in tl.range(R, disable_licm=True):
        b_pairs += tl.load(pairs + i_r * BT * BT + o_t[:, None] * BT + o_t[None, :]).to(tl.float32)
    b_pairs = (tl.trans(b_pairs) if TRANSPOSE else b_pairs).to(other.dtype.element_ty)
    b_other = load_tile(other, o_t, o_n, so[1], so[3], rows, cols)
    return tl.dot(b_pairs, b_other, b_sum, input_precision=PRECISION)


@triton.jit
def ssd_groups_bwd_kernel(
    x,  # [B, T, H, P], any strides
    B,  # [B, T, G, N], any strides, as C
    C,
    z,  # None, or [B, T, H, P], any strides
    gates,
    do,  # [B, T, H, P], any strides
    h,  # [slots, H, P, N], None without dC
    dh,  # [slots, H, P, N], None without dB
    dcb,  # [slots, H, BT, BT]
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
    """A program per (tile of N, one of dC and dB, group, slot), the heads of the group in turn."""
    wanted: tl.constexpr = 2 if dB is not None and dC is not None else 1
    tiles: tl.constexpr = (N + BN - 1) // BN
    i_n, i_wgs = tl.program_id(0) % tiles * BN, tl.program_id(0) // tiles
    i_w, i_g, i_s = i_wgs % wanted, i_wgs // wanted % G, i_wgs // wanted // G
    i_b, i_t, rows = chunk_of_slot(cu_seqlens, i_s, NSEQ, T, BT, BQ)
    if rows <= 0:
        return
    i_b, i_t, i_h = tl.cast(i_b, tl.int64), tl.cast(i_t, tl.int64), i_g * (H // G)
    at = i_s.to(tl.int64) * H + i_h
    p_gates, p_pairs = gates + at * ROWS * BT, dcb + at * BT * BT
    o_t, o_n = tl.arange(0, BT), i_n + tl.arange(0, BN)
    o_out = ((i_b * T + i_t + o_t)[:, None] * G + i_g) * N + o_n[None, :]
    mask = (o_t < rows)[:, None] & (o_n < N)[None, :]
    if dC is not None and i_w == 0:
        p_B = at_token(B, sB, i_b, i_t, i_g) + i_n * sB[3]
        b_dC = group_grad(
            *(at_token(do, so, i_b, i_t, i_h), (z if z is None else at_token(z, sz, i_b, i_t, i_h))),
            *(p_gates, h + at * P * N + i_n, p_pairs),
            *(p_B, so, sz, sB, rows, R, inner, N - i_n, START, False, P, N, PRECISION, BT, BP, BN),
        )
        tl.store(dC + o_out, b_dC.to(dC.dtype.element_ty), mask=mask)
    if dB is not None and i_w == wanted - 1:
        p_C = at_token(C, sC, i_b, i_t, i_g) + i_n * sC[3]
        b_dB = group_grad(
            *(at_token(x, sx, i_b, i_t, i_h), None, p_gates, dh + at * P * N + i_n, p_pairs),
            *(p_C, sx, sz, sC, rows, R, inner, N - i_n, WRITE, True, P, N, PRECISION, BT, BP, BN),
        )
        tl.store(dB + o_out, b_dB.to(dB.dtype.element_ty), mask=mask)
