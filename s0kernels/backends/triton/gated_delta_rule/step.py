"""One token of the gated delta rule."""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import torch
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.launch import cdiv, kernel, launch, power_of_two
from s0kernels.backends.triton.common.states import state_row
from s0kernels.backends.triton.common.tiles import choose_tiles
from s0kernels.backends.triton.gated_delta_rule.call import TILES
from s0kernels.calls import DeltaInputs, DeltaOptions, Pool


@kernel
def gated_delta_rule_step_kernel(
    q,  # [B, H, K], any strides, as k
    k,
    v,  # [B, HV, V], any strides
    g,  # [B, HV], any strides, as beta
    beta,
    h,  # [.., HV, K, V] in fp32, any strides; written
    indices,  # None, or the row of h for each row of the batch
    o,  # [B, HV, V]
    scale,
    S,
    sq,
    sk,
    sv,
    sg,
    sb,
    sh,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    NORMALISE: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """A program per (tile of V, value head, row of the batch)."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    i_v, i_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_b, i_hv = i_bh // HV, i_bh % HV
    i_h = i_hv // (HV // H)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    row, zero, none = state_row(indices, i_b, S)
    i_b = i_b.to(tl.int64)
    m_h = m_k[:, None] & m_v[None, :] & ((zero | none) == 0)
    p_h = h + row * sh[0] + i_hv.to(tl.int64) * sh[1] + o_k[:, None] * sh[2] + o_v[None, :] * sh[3]
    b_h = tl.load(p_h, mask=m_h, other=0.0)
    b_q = tl.load(q + i_b * sq[0] + i_h * sq[1] + o_k * sq[2], mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(k + i_b * sk[0] + i_h * sk[1] + o_k * sk[2], mask=m_k, other=0.0).to(tl.float32)
    b_v = tl.load(v + i_b * sv[0] + i_hv * sv[1] + o_v * sv[2], mask=m_v, other=0.0).to(tl.float32)
    b_g = tl.load(g + i_b * sg[0] + i_hv * sg[1]).to(tl.float32)
    b_beta = tl.load(beta + i_b * sb[0] + i_hv * sb[1]).to(tl.float32)
    if NORMALISE:
        b_q *= tl.rsqrt(tl.sum(b_q * b_q) + 1e-6)
        b_k *= tl.rsqrt(tl.sum(b_k * b_k) + 1e-6)
    b_h *= tl.exp(b_g)
    b_h += b_k[:, None] * (b_beta * (b_v - tl.sum(b_h * b_k[:, None], axis=0)))[None, :]
    b_o = tl.sum(b_h * (b_q * scale)[:, None], axis=0)
    b_o = tl.where(none, float("nan"), b_o)
    tl.store(o + (i_b * HV + i_hv) * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
    tl.store(p_h, b_h, mask=m_h)


def gated_delta_rule_step(inputs: DeltaInputs, pool: Pool, options: DeltaOptions) -> Tensor:
    q, k, v, g, beta = inputs
    (B, HV, V), (_, H, K) = v.shape, q.shape
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tiles = choose_tiles(TILES["step", v.element_size()], v.device)
    tile = min(tiles.tile, power_of_two(V))
    launch(
        gated_delta_rule_step_kernel,
        B * HV * cdiv(V, tile),
        *(*inputs, *pool, o, options.scale, pool.state.shape[0]),
        *(q.stride(), k.stride(), v.stride(), g.stride(), beta.stride(), pool.state.stride()),
        H=H,
        HV=HV,
        K=K,
        V=V,
        NORMALISE=options.use_qk_l2norm,
        BK=power_of_two(K),
        BV=tile,
        tiles=tiles,
    )
    return o
