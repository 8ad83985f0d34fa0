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

import torch
import triton
import triton.language as tl
from torch import Tensor

from s0kernels.backends.triton.common.launch import empty_grads, kernel, launch
from s0kernels.backends.triton.common.tiles import Tiles
from s0kernels.backends.triton.ssd.call import Call
from s0kernels.backends.triton.ssd.group_grads import groups
from s0kernels.backends.triton.ssd.head_grads import HeadGrads, Scanned, heads
from s0kernels.backends.triton.ssd.prepare import Factors

#: inputs whose gradients come through that of the log decays
OF_DECAYS = {"dt", "A", "dt_bias"}
#: inputs without tokens, whose gradients are sums over all chunks
SCALARS = ("A", "D", "dt_bias")


@kernel
def ssd_sums_bwd_kernel(
    dA,  # None, or [chunks, H] in fp64, as dD and dbias
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
        b_sum = tl.zeros([BC], tl.float64)
        for i in range(0, chunks, BC):
            o_c = i + tl.arange(0, BC)
            b_sum += tl.load(x + o_c.to(tl.int64) * H + tl.program_id(0), mask=o_c < chunks, other=0.0)
        tl.store(out + tl.program_id(0), tl.sum(b_sum).to(tl.float32))


def input_grads(call: Call, factors: Factors, do: Tensor, scanned: Scanned, names: frozenset[str]) -> dict[str, Tensor]:
    """Those of `names`, which are names of inputs."""
    found = empty_grads(call.inputs, names - {*SCALARS})
    size = (call.chunks.count, call.H)
    parts = {name: call.chunks.empty(*size, dtype=torch.float64) for name in SCALARS if name in names}
    dcb = call.intra(call.H) if names & {"B", "C"} else None
    dx, dz, ddt = map(found.get, ("x", "z", "dt"))
    dA, dD, dbias = map(parts.get, SCALARS)
    out = HeadGrads(dx, dz, ddt, dcb, dA, dD, dbias)
    heads(call, factors, do, scanned, out, bool(names & OF_DECAYS))
    if dcb is not None:
        groups(call, factors.gates, do, scanned, dcb, found)
    return found | sum_over_chunks(call, parts)
