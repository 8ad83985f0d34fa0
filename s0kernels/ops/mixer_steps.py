"""One token through everything between the projections of a mixer: convolution, gates, recurrence, norm, output gate.

The formulas are those of Qwen3.5 and Falcon-H1. The window of the convolution and the recurrent state are updated in
place. There are no gradients. Whole sequences go through `gated_delta_rule` and `ssd`.
"""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from s0kernels.backends.shared import gather_states, store_states
from s0kernels.calls import DeltaMixerInputs, DeltaMixerOptions, MixerPool, SSDMixerInputs, SSDMixerOptions, state_dtype
from s0kernels.ops import registry, transforms, validation
from s0kernels.ops.gated_delta_rule import gated_delta_rule_step_reference
from s0kernels.ops.registration import register_step
from s0kernels.ops.ssd import ssd_step_reference

_DELTA = "gated_delta_mixer_step"
_SSD = "ssd_mixer_step"


def gated_delta_mixer_step(
    mixed: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    norm: Tensor,
    window: Tensor,
    state: Tensor,
    *,
    eps: float,
    allow_neg_eigval: bool = False,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute one token of a Qwen3.5 or OLMo-Hybrid mixer:

        q, k, v = silu(conv(window, mixed));  g = -exp(A_log) softplus(a + dt_bias);  beta = sigmoid(b), or twice that
        S <- the gated delta rule with q and k normalised;  y = o / rms(o) * norm * silu(z)

    Args:
        mixed: [B, C], bf16, fp16 or fp32 (fp64 in `reference`), the inputs of q|k|v, C = 2 H K + HV V.
        z: [B, HV, V]; b, a: [B, HV]. Each of these and each parameter may have any of the dtypes.
        conv_weight: [C, W]; conv_bias: [C] or None. A_log, dt_bias: [HV]. norm: [V].
        window: [B, C, W], the last W inputs, the newest last; with `state_indices` a pool [S, C, W]. Updated.
        state: [B, HV, K, V] fp32 (fp64 with fp64 inputs), or a pool [S, HV, K, V]. Updated.
        eps: added to the mean square in the norm.
        allow_neg_eigval: use beta = 2 sigmoid(b), so that a token can reverse the state's component along its key.
        state_indices: [B] int32 or int64, rows of both pools; -1 starts from zero and stores nothing.
        backend: "cuda", "cpu" or "reference"; None takes the first of these that supports the call.

    Returns:
        y [B, HV, V] in mixed's dtype.

    Raises:
        TypeError, ValueError: as in `gated_delta_rule_step`.
    """
    inputs = DeltaMixerInputs(mixed, z, b, a, conv_weight, conv_bias, A_log, dt_bias, norm)
    pool = MixerPool(window, state, state_indices)
    check = _checker(_DELTA, mixed)
    check.tensor("z", z, "B HV V", check.floats)
    check.tensor("b", b, "B HV", check.floats)
    check.tensor("a", a, "B HV", check.floats)
    check.tensor("norm", norm, "V", check.floats)
    _check_mixer(check, inputs, pool, "HV K V")
    validation.check_flag(_DELTA, "allow_neg_eigval", allow_neg_eigval)
    heads, K, V = state.shape[1:]
    keys = mixed.shape[1] - heads * V
    if keys <= 0 or K == 0 or keys % (2 * K) or heads % (keys // (2 * K)):
        raise ValueError(
            f"{_DELTA}: mixed must have 2 H K + HV V channels, H a divisor of HV, got {mixed.shape[1]} for state "
            f"{list(state.shape)}"
        )
    return _delta_op(*inputs, *pool, eps, allow_neg_eigval, _choose(_DELTA, inputs, pool, backend))


def ssd_mixer_step(
    gate: Tensor,
    mixed: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm: Tensor | None,
    window: Tensor,
    state: Tensor,
    *,
    eps: float = 0.0,
    gate_first: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute one token of a Falcon-H1 or Bamba mixer:

        x, B, C = silu(conv(window, mixed));  dt = clamp(softplus(dt + dt_bias), dt_limit)
        S <- exp(-exp(A_log) dt) S + dt x B^T;  y = S C + D x
        y * silu(gate); or with a norm, over the heads of a group: norm(y) * silu(gate), or norm(y * silu(gate))

    Args:
        gate: [B, H P]; dt: [B, H].
        mixed: [B, C], bf16, fp16 or fp32 (fp64 in `reference`), the inputs of x|B|C, C = H P + 2 G N.
        A_log, D, dt_bias: [H]. norm: [H P], or None.
        state: [B, H, P, N] fp32 (fp64 with fp64 inputs), or a pool [S, H, P, N]. Updated.
        gate_first: apply the gate before the norm.
        The other arguments are those of `gated_delta_mixer_step`.

    Returns:
        y [B, H, P] in mixed's dtype.

    Raises:
        TypeError, ValueError: as in `ssd_step`.
    """
    inputs = SSDMixerInputs(gate, mixed, dt, conv_weight, conv_bias, A_log, D, dt_bias, norm)
    pool = MixerPool(window, state, state_indices)
    check = _checker(_SSD, mixed)
    check.tensor("dt", dt, "B H", check.floats)
    check.tensor("D", D, "H", check.floats)
    _check_mixer(check, inputs, pool, "H P N")
    heads, P, N = state.shape[1:]
    check.sizes["H*P"] = heads * P
    check.tensor("gate", gate, "B H*P", check.floats)
    if norm is not None:
        check.tensor("norm", norm, "H*P", check.floats)
    shared = mixed.shape[1] - heads * P
    if shared <= 0 or N == 0 or shared % (2 * N) or heads % (shared // (2 * N)):
        raise ValueError(
            f"{_SSD}: mixed must have H P + 2 G N channels, G a divisor of H, got {mixed.shape[1]} for state "
            f"{list(state.shape)}"
        )
    validation.check_flag(_SSD, "gate_first", gate_first)
    validation.check_dt_limit(_SSD, dt_limit)
    options = SSDMixerOptions(eps, gate_first, float(dt_limit[0]), float(dt_limit[1]))
    return _ssd_op(*inputs, *pool, *options, _choose(_SSD, inputs, pool, backend))


# Validation


class _MixerChecker(validation.Checker):
    floats: tuple[torch.dtype, ...]  # the dtypes that the other inputs may have


def _checker(op: str, mixed: Tensor) -> _MixerChecker:
    check = _MixerChecker(op, "mixed", mixed)
    check.floats = validation.FLOATS if mixed.dtype == torch.float64 else validation.FLOATS[:3]
    check.tensor("mixed", mixed, "B C", (mixed.dtype,))
    return check


def _check_mixer(check: _MixerChecker, inputs: DeltaMixerInputs | SSDMixerInputs, pool: MixerPool, dims: str) -> None:
    heads = dims.split()[0]
    check.tensor("conv_weight", inputs.conv_weight, "C W", check.floats)
    if inputs.conv_bias is not None:
        check.tensor("conv_bias", inputs.conv_bias, "C", check.floats)
    check.tensor("A_log", inputs.A_log, heads, check.floats)
    check.tensor("dt_bias", inputs.dt_bias, heads, check.floats)
    check.pool(pool, dims)
    check.tensor("window", pool.window, f"{'B' if pool.indices is None else 'S'} C W", check.floats)
    check.writable("window", pool.window)


def _choose(op: str, inputs: DeltaMixerInputs | SSDMixerInputs, pool: MixerPool, backend: str | None) -> str:
    validation.check_no_grad(op, inputs, window=pool.window, state=pool.state)
    transforms.refuse(op, *inputs, pool.window, pool.state)
    size, width = operator.index(max(pool.state.shape[2:])), operator.index(pool.window.shape[2])
    return registry.choose(backend, op, inputs.mixed.device, inputs.mixed.dtype, size, width)


# Reference


def _convolve(inputs: DeltaMixerInputs | SSDMixerInputs, pool: MixerPool) -> Tensor:
    """Append the new input to the window, and return silu of the convolution there."""
    mixed, window, dtype = inputs.mixed, pool.window, state_dtype(inputs.mixed.dtype)
    rows = gather_states(window, pool.indices, (mixed.shape[0], *window.shape[1:]), window)
    moved = torch.cat([rows[..., 1:].to(dtype), mixed.to(dtype)[..., None]], dim=-1)
    store_states(window, pool.indices, moved.to(window.dtype))
    sums = (moved * inputs.conv_weight.to(dtype)).sum(-1)
    return F.silu(sums if inputs.conv_bias is None else sums + inputs.conv_bias.to(dtype))


def gated_delta_mixer_step_reference(
    mixed, z, b, a, conv_weight, conv_bias, A_log, dt_bias, norm, window, state, *, eps, allow_neg_eigval=False,
    state_indices=None,
) -> Tensor:  # fmt: skip
    """`gated_delta_mixer_step` in PyTorch, in fp32 or fp64 throughout. The kernels are tested against it."""
    inputs = DeltaMixerInputs(mixed, z, b, a, conv_weight, conv_bias, A_log, dt_bias, norm)
    return _delta_reference(inputs, MixerPool(window, state, state_indices), DeltaMixerOptions(eps, allow_neg_eigval))


def _delta_reference(inputs: DeltaMixerInputs, pool: MixerPool, options: DeltaMixerOptions) -> Tensor:
    mixed, dtype, (heads, K, V) = inputs.mixed, state_dtype(inputs.mixed.dtype), pool.state.shape[1:]
    z, b, a, A_log, dt_bias, norm = (
        x.to(dtype) for x in (inputs.z, inputs.b, inputs.a, inputs.A_log, inputs.dt_bias, inputs.norm)
    )
    keys = (mixed.shape[1] - heads * V) // 2
    q, k, v = _convolve(inputs, pool).split([keys, keys, heads * V], dim=1)
    q, k, v = q.unflatten(1, (-1, K)), k.unflatten(1, (-1, K)), v.unflatten(1, (heads, V))
    g = -A_log.exp() * F.softplus(a + dt_bias)
    step = {"use_qk_l2norm": True, "state_indices": pool.indices}
    beta = b.sigmoid() * (2 if options.allow_neg_eigval else 1)
    o = gated_delta_rule_step_reference(q, k, v, g, beta, pool.state, **step)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + options.eps)
    return (o * norm * F.silu(z)).to(mixed.dtype)


def ssd_mixer_step_reference(
    gate, mixed, dt, conv_weight, conv_bias, A_log, D, dt_bias, norm, window, state, *, eps=0.0, gate_first=False,
    dt_limit=(0.0, float("inf")), state_indices=None,
) -> Tensor:  # fmt: skip
    """`ssd_mixer_step` in PyTorch, in fp32 or fp64 throughout. The kernels are tested against it."""
    inputs = SSDMixerInputs(gate, mixed, dt, conv_weight, conv_bias, A_log, D, dt_bias, norm)
    options = SSDMixerOptions(eps, gate_first, *dt_limit)
    return _ssd_reference(inputs, MixerPool(window, state, state_indices), options)


def _ssd_reference(inputs: SSDMixerInputs, pool: MixerPool, options: SSDMixerOptions) -> Tensor:
    mixed, dtype, (heads, P, N) = inputs.mixed, state_dtype(inputs.mixed.dtype), pool.state.shape[1:]
    gate, dt, A_log, D, dt_bias = (
        t.to(dtype) for t in (inputs.gate, inputs.dt, inputs.A_log, inputs.D, inputs.dt_bias)
    )
    group = (mixed.shape[1] - heads * P) // 2
    x, B, C = _convolve(inputs, pool).split([heads * P, group, group], dim=1)
    x, B, C = x.unflatten(1, (heads, P)), B.unflatten(1, (-1, N)), C.unflatten(1, (-1, N))
    step = {"D": D, "dt_bias": dt_bias, "dt_softplus": True, "dt_limit": options.dt_limit}
    y = ssd_step_reference(x, dt, -A_log.exp(), B, C, pool.state, state_indices=pool.indices, **step).flatten(1)
    if inputs.norm is not None:
        y = y * F.silu(gate) if options.gate_first else y
        groups = y.unflatten(1, (B.shape[1], -1))
        y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + options.eps)).flatten(1)
        y = y * inputs.norm.to(dtype)
    y = y if inputs.norm is not None and options.gate_first else y * F.silu(gate)
    return y.unflatten(1, (heads, P)).to(mixed.dtype)


_delta_op = register_step(
    _DELTA,
    (DeltaMixerInputs, MixerPool, DeltaMixerOptions),
    _delta_reference,
    lambda inputs, _: inputs.mixed.new_empty(inputs.z.shape),
)
_ssd_op = register_step(
    _SSD,
    (SSDMixerInputs, MixerPool, SSDMixerOptions),
    _ssd_reference,
    lambda inputs, pool: inputs.mixed.new_empty(inputs.mixed.shape[0], *pool.state.shape[1:3]),
)
