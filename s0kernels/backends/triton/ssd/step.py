"""One token of Mamba-2 SSD."""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import torch
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.launch import cdiv, kernel, launch, power_of_two, strides
from s0kernels.backends.triton.common.states import state_row
from s0kernels.backends.triton.common.tiles import choose_tiles
from s0kernels.backends.triton.ssd.call import TILES
from s0kernels.backends.triton.ssd.forward import finish_output, split_index
from s0kernels.backends.triton.ssd.prepare import clamp, softplus
from s0kernels.calls import Pool, SSDInputs, SSDOptions


@kernel
def ssd_step_kernel(
    x,  # [B, H, P], any strides
    dt,  # [B, H], any strides
    A,  # [H], any stride
    B,  # [B, G, N], any strides, as C
    C,
    D,  # None, or [H], any stride
    z,  # None, or [B, H, P], any strides
    dt_bias,  # None, or [H], any stride
    h,  # [.., H, P, N] in fp32, any strides; written
    indices,  # None, or the row of h for each row of the batch
    y,  # [B, H, P]
    low,
    high,
    S,
    sx,
    sdt,
    sB,
    sC,
    sz,
    sh,
    sA,
    sD,
    sbias,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    """A program per (tile of P, head, row of the batch)."""
    _, i_p, i_h, i_b = split_index(tl.program_id(0), H, P, N, BP, BN)
    i_g = i_h // (H // G)
    o_p, o_n = i_p * BP + tl.arange(0, BP), tl.arange(0, BN)
    m_p, m_n = o_p < P, o_n < N
    row, zero, none = state_row(indices, i_b, S)
    i_b = i_b.to(tl.int64)
    m_h = m_p[:, None] & m_n[None, :] & ((zero | none) == 0)
    p_h = h + row * sh[0] + i_h.to(tl.int64) * sh[1] + o_p[:, None] * sh[2] + o_n[None, :] * sh[3]
    b_h = tl.load(p_h, mask=m_h, other=0.0)
    b_x = tl.load(x + i_b * sx[0] + i_h * sx[1] + o_p * sx[2], mask=m_p, other=0.0).to(tl.float32)
    b_B = tl.load(B + i_b * sB[0] + i_g * sB[1] + o_n * sB[2], mask=m_n, other=0.0).to(tl.float32)
    b_C = tl.load(C + i_b * sC[0] + i_g * sC[1] + o_n * sC[2], mask=m_n, other=0.0).to(tl.float32)
    b_dt = tl.load(dt + i_b * sdt[0] + i_h * sdt[1]).to(tl.float32)
    if dt_bias is not None:
        b_dt += tl.load(dt_bias + i_h * sbias).to(tl.float32)
    if SOFTPLUS:
        b_dt = softplus(b_dt)
    b_dt = clamp(b_dt, low, high)
    b_h = b_h * tl.exp(b_dt * tl.load(A + i_h * sA).to(tl.float32)) + (b_dt * b_x)[:, None] * b_B[None, :]
    b_y = tl.sum(b_h * b_C[None, :], axis=1)
    o_z = i_b * sz[0] + i_h * sz[1] + o_p * sz[2]
    b_y = finish_output(b_y, b_x, D, i_h * sD, z, o_z, m_p)
    b_y = tl.where(none, float("nan"), b_y)
    tl.store(y + (i_b * H + i_h) * P + o_p, b_y.to(y.dtype.element_ty), mask=m_p)
    tl.store(p_h, b_h, mask=m_h)


def ssd_step(inputs: SSDInputs, pool: Pool, options: SSDOptions) -> Tensor:
    x, dt, A, B, C, D, z, dt_bias = inputs
    (rows, H, P), (_, G, N) = x.shape, B.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles = choose_tiles(TILES["step", x.element_size()], x.device)
    BP = min(tiles.tile, power_of_two(P))
    launch(
        ssd_step_kernel,
        rows * H * cdiv(P, BP),
        *(*inputs, *pool, y, *options.dt_limit, pool.state.shape[0]),
        *(x.stride(), dt.stride(), B.stride(), C.stride(), strides(z, 3), pool.state.stride()),
        *(*A.stride(), *strides(D, 1), *strides(dt_bias, 1)),
        H=H,
        G=G,
        P=P,
        N=N,
        SOFTPLUS=options.dt_softplus,
        BP=BP,
        BN=power_of_two(N),
        tiles=tiles,
    )
    return y
