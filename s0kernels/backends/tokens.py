"""Run one token through the operators of `csrc/token/operators.h`, which the libraries for CPUs and GPUs share.

`library` is the namespace of one of them, `torch.ops.s0kernels_cpu` or `torch.ops.s0kernels_cuda`.
"""

import torch
from torch import Tensor

from s0kernels.calls import (
    Call,
    DeltaInputs,
    DeltaMixerInputs,
    DeltaMixerOptions,
    DeltaOptions,
    MixerPool,
    Pool,
    SSDInputs,
    SSDMixerInputs,
    SSDMixerOptions,
    SSDOptions,
)

#: maximum of K, V, P and N, and maximum width of a convolution
MAX_HEAD_SIZE = 256
MAX_WINDOW = 8


def too_large(call: Call) -> str | None:
    if call.size > MAX_HEAD_SIZE:
        return f"is for heads of up to {MAX_HEAD_SIZE}, got {call.size}"
    return f"is for convolutions of up to {MAX_WINDOW}, got {call.width}" if call.width > MAX_WINDOW else None


def gated_delta_rule_step(library, inputs: DeltaInputs, pool: Pool, options: DeltaOptions) -> Tensor:
    output = torch.empty(inputs.v.shape, dtype=inputs.v.dtype, device=inputs.v.device)
    without_mixer = (None,) * 7
    library.gated_delta_rule_step(
        *(*inputs, *without_mixer, 0.0, pool.state, pool.indices, output),
        *(options.use_qk_l2norm, False, options.scale),
    )
    return output


def ssd_step(library, inputs: SSDInputs, pool: Pool, options: SSDOptions) -> Tensor:
    x, dt, A, B, C, D, z, dt_bias = inputs
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    without_mixer = (None,) * 3
    library.ssd_step(
        *(x, dt, A, B, C, D, dt_bias, *without_mixer, z, None, 0.0, False, pool.state, pool.indices),
        *(output, False, options.dt_softplus, *options.dt_limit),
    )
    return output


def gated_delta_mixer_step(library, inputs: DeltaMixerInputs, pool: MixerPool, options: DeltaMixerOptions) -> Tensor:
    mixed, z, b, a, conv_weight, conv_bias, A_log, dt_bias, norm = inputs
    _, heads, K, V = pool.state.shape
    values = heads * V
    keys = (mixed.shape[1] - values) // 2
    q, k, v = mixed.split([keys, keys, values], dim=1)
    output = torch.empty(z.shape, dtype=mixed.dtype, device=mixed.device)
    library.gated_delta_rule_step(
        *(q.unflatten(1, (-1, K)), k.unflatten(1, (-1, K)), v.unflatten(1, (heads, V)), a, b, A_log, dt_bias),
        *(conv_weight, conv_bias, pool.window, z, norm, options.eps, pool.state, pool.indices),
        *(output, True, options.allow_neg_eigval, K**-0.5),
    )
    return output


def ssd_mixer_step(library, inputs: SSDMixerInputs, pool: MixerPool, options: SSDMixerOptions) -> Tensor:
    gate, mixed, dt, conv_weight, conv_bias, A_log, D, dt_bias, norm = inputs
    _, heads, P, N = pool.state.shape
    group = (mixed.shape[1] - heads * P) // 2
    x, B, C = mixed.split([heads * P, group, group], dim=1)
    x, gate = (t.unflatten(1, (heads, P)) for t in (x, gate))
    B, C = (t.unflatten(1, (-1, N)) for t in (B, C))
    output = torch.empty(x.shape, dtype=mixed.dtype, device=mixed.device)
    library.ssd_step(
        *(x, dt, A_log, B, C, D, dt_bias, conv_weight, conv_bias, pool.window, gate, norm, options.eps),
        *(options.gate_first, pool.state, pool.indices, output, True, True, *options.dt_limit),
    )
    return output
