"""One token through everything between a mixer's projections: convolution, gates, recurrence, norm and gate.

As Qwen3.5 and Falcon-H1 compute it. The convolution's window and the recurrent state are updated in place. Without
gradients; whole sequences go through `gated_delta_rule` and `ssd`.
"""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from s0kernels.backends._states import gather_states, state_dtype, store_states
from s0kernels.ops import _dispatch, _sequences, _transforms, _validation
from s0kernels.ops.gated_delta_rule import gated_delta_rule_step_reference
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
    state_indices: Tensor | None = None,
    tickets: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A token of a Qwen3.5 mixer:

        q, k, v = silu(conv(window, mixed));  g = -exp(A_log) softplus(a + dt_bias);  beta = sigmoid(b)
        S <- the gated delta rule with q and k normalised;  y = o / rms(o) * norm * silu(z)

    Args:
        mixed: [B, C], bf16, fp16 or fp32 (fp64 in `reference`), the inputs of q|k|v, C = 2 H K + HV V.
        z: [B, HV, V]; b, a: [B, HV]. These and the parameters are in any of the dtypes, each its own.
        conv_weight: [C, W]; conv_bias: [C] or None. A_log, dt_bias: [HV]. norm: [V].
        window: [B, C, W], the last W inputs, the newest last; with `state_indices` a pool [S, C, W]. Written.
        state: [B, HV, K, V] fp32 (fp64 with fp64 inputs), or a pool [S, HV, K, V]. Written.
        eps: of the norm.
        state_indices: [B] int32 or int64, rows of both pools; -1 starts from zero and stores nothing.
        tickets: int32, B H zeros, zeros again afterwards, that no other call in flight uses; where blocks count
            themselves. None makes some, which on a GPU is another launch.
        backend: "cuda", "cpu" or "reference"; None takes the first of these that supports the call.

    Returns:
        y [B, HV, V] in mixed's dtype.

    Raises:
        TypeError, ValueError: as in `gated_delta_rule_step`.
    """
    check = _checker(_DELTA, mixed)
    check.tensor("z", z, "B HV V", check.floats)
    check.tensor("b", b, "B HV", check.floats)
    check.tensor("a", a, "B HV", check.floats)
    check.tensor("norm", norm, "V", check.floats)
    _check_mixer(check, conv_weight, conv_bias, A_log, dt_bias, window, state, state_indices, "HV K V", mixed.dtype)
    heads, K, V = state.shape[1:]
    keys = mixed.shape[1] - heads * V
    if keys <= 0 or K == 0 or keys % (2 * K) or heads % (keys // (2 * K)):
        raise ValueError(
            f"{_DELTA}: mixed must have 2 H K + HV V channels, H a divisor of HV, got {mixed.shape[1]} for state "
            f"{list(state.shape)}"
        )
    _check_tickets(_DELTA, tickets, mixed, mixed.shape[0] * (keys // (2 * K)))
    tensors = {"mixed": mixed, "z": z, "b": b, "a": a, "conv_weight": conv_weight, "conv_bias": conv_bias}
    tensors |= {"A_log": A_log, "dt_bias": dt_bias, "norm": norm, "window": window, "state": state}
    _validation.check_no_grad(_DELTA, tensors)
    _transforms.refuse(_DELTA, *tensors.values())
    name = _dispatch.choose(
        _DELTA, backend, mixed.device, mixed.dtype, operator.index(max(K, V)), operator.index(window.shape[2])
    )
    return torch.ops.s0kernels.gated_delta_mixer_step(
        *(mixed, z, b, a, conv_weight, conv_bias, A_log, dt_bias, norm, window, state, state_indices, tickets, eps),
        name,
    )


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
    tickets: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A token of a Falcon-H1 or Bamba mixer:

        x, B, C = silu(conv(window, mixed));  dt = clamp(softplus(dt + dt_bias), dt_limit)
        S <- exp(-exp(A_log) dt) S + dt x B^T;  y = S C + D x
        y * silu(gate); or with a norm, over the heads of a group: norm(y) * silu(gate), or norm(y * silu(gate))

    Args:
        gate: [B, H P]; dt: [B, H].
        mixed: [B, C], bf16, fp16 or fp32 (fp64 in `reference`), the inputs of x|B|C, C = H P + 2 G N.
        A_log, D, dt_bias: [H]. norm: [H P], or None.
        state: [B, H, P, N] fp32 (fp64 with fp64 inputs), or a pool [S, H, P, N]. Written.
        gate_first: gate before the norm.
        tickets: as in `gated_delta_mixer_step`, B G of them.
        The others: as in `gated_delta_mixer_step`.

    Returns:
        y [B, H, P] in mixed's dtype.

    Raises:
        TypeError, ValueError: as in `ssd_step`.
    """
    check = _checker(_SSD, mixed)
    check.tensor("dt", dt, "B H", check.floats)
    check.tensor("D", D, "H", check.floats)
    _check_mixer(check, conv_weight, conv_bias, A_log, dt_bias, window, state, state_indices, "H P N", mixed.dtype)
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
    _check_tickets(_SSD, tickets, mixed, mixed.shape[0] * (shared // (2 * N)))
    _validation.check_flag(_SSD, "gate_first", gate_first)
    _validation.check_dt_limit(_SSD, dt_limit)
    tensors = {"gate": gate, "mixed": mixed, "dt": dt, "conv_weight": conv_weight, "conv_bias": conv_bias}
    tensors |= {"A_log": A_log, "D": D, "dt_bias": dt_bias, "norm": norm, "window": window, "state": state}
    _validation.check_no_grad(_SSD, tensors)
    _transforms.refuse(_SSD, *tensors.values())
    name = _dispatch.choose(
        _SSD, backend, mixed.device, mixed.dtype, operator.index(max(P, N)), operator.index(window.shape[2])
    )
    return torch.ops.s0kernels.ssd_mixer_step(
        *(gate, mixed, dt, conv_weight, conv_bias, A_log, D, dt_bias, norm, window, state, state_indices, tickets, eps),
        *(gate_first, float(dt_limit[0]), float(dt_limit[1]), name),
    )


# Validation


class _MixerChecker(_validation.Checker):
    floats: tuple[torch.dtype, ...]  # what may stand beside mixed


def _checker(op: str, mixed: Tensor) -> _MixerChecker:
    _validation.check_floating(op, "mixed", mixed)
    check = _MixerChecker(op, mixed.device)
    check.floats = _validation.FLOATS if mixed.dtype == torch.float64 else _validation.FLOATS[:3]
    check.tensor("mixed", mixed, "B C", (mixed.dtype,))
    return check


def _check_mixer(
    check, conv_weight, conv_bias, A_log, dt_bias, window, state, state_indices, state_dims: str, dtype: torch.dtype
) -> None:
    heads = state_dims.split()[0]
    check.tensor("conv_weight", conv_weight, "C W", check.floats)
    if conv_bias is not None:
        check.tensor("conv_bias", conv_bias, "C", check.floats)
    check.tensor("A_log", A_log, heads, check.floats)
    check.tensor("dt_bias", dt_bias, heads, check.floats)
    check.step_state(state, state_indices, state_dims, state_dtype(dtype))
    check.tensor("window", window, f"{'B' if state_indices is None else 'S'} C W", check.floats)
    if any(stride == 0 and size > 1 for stride, size in zip(window.stride(), window.shape, strict=True)):
        raise ValueError(f"{check.op}: window is written in place, so it must not be expanded, got {window.stride()=}")


def _check_tickets(op: str, tickets: Tensor | None, mixed: Tensor, count: int) -> None:
    if tickets is None:
        return
    fits = tickets.dtype == torch.int32 and tickets.device == mixed.device and tickets.is_contiguous()
    if not fits or tickets.numel() < count:
        raise ValueError(
            f"{op}: tickets must be {count} contiguous int32 on {mixed.device}, got {tickets.dtype} "
            f"{list(tickets.shape)} on {tickets.device}"
        )


# Reference


def _convolve(mixed: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, indices: Tensor | None) -> Tensor:
    """silu of the convolution at the new input, which the window takes in."""
    dtype = state_dtype(mixed.dtype)
    rows = gather_states(window, indices, (mixed.shape[0], *window.shape[1:]), window)
    moved = torch.cat([rows[..., 1:].to(dtype), mixed.to(dtype)[..., None]], dim=-1)
    store_states(window, indices, moved.to(window.dtype))
    sums = (moved * weight.to(dtype)).sum(-1)
    return F.silu(sums if bias is None else sums + bias.to(dtype))


def gated_delta_mixer_step_reference(
    mixed, z, b, a, conv_weight, conv_bias, A_log, dt_bias, norm, window, state, *, eps, state_indices=None
) -> Tensor:
    """`gated_delta_mixer_step` in PyTorch, in fp32 or fp64 throughout; the oracle for the kernels."""
    dtype, (heads, K, V) = state_dtype(mixed.dtype), state.shape[1:]
    z, b, a, A_log, dt_bias, norm = (x.to(dtype) for x in (z, b, a, A_log, dt_bias, norm))
    keys = (mixed.shape[1] - heads * V) // 2
    q, k, v = _convolve(mixed, conv_weight, conv_bias, window, state_indices).split([keys, keys, heads * V], dim=1)
    q, k, v = q.unflatten(1, (-1, K)), k.unflatten(1, (-1, K)), v.unflatten(1, (heads, V))
    g = -A_log.exp() * F.softplus(a + dt_bias)
    options = {"use_qk_l2norm": True, "state_indices": state_indices}
    o = gated_delta_rule_step_reference(q, k, v, g, b.sigmoid(), state, **options)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps)
    return (o * norm * F.silu(z)).to(mixed.dtype)


def ssd_mixer_step_reference(
    gate, mixed, dt, conv_weight, conv_bias, A_log, D, dt_bias, norm, window, state, *, eps=0.0, gate_first=False,
    dt_limit=(0.0, float("inf")), state_indices=None,
) -> Tensor:  # fmt: skip
    """`ssd_mixer_step` in PyTorch, in fp32 or fp64 throughout; the oracle for the kernels."""
    dtype, (heads, P, N) = state_dtype(mixed.dtype), state.shape[1:]
    gate, dt, A_log, D, dt_bias = (t.to(dtype) for t in (gate, dt, A_log, D, dt_bias))
    group = (mixed.shape[1] - heads * P) // 2
    convolved = _convolve(mixed, conv_weight, conv_bias, window, state_indices)
    x, B, C = convolved.split([heads * P, group, group], dim=1)
    x, B, C = x.unflatten(1, (heads, P)), B.unflatten(1, (-1, N)), C.unflatten(1, (-1, N))
    options = {"D": D, "dt_bias": dt_bias, "dt_softplus": True, "dt_limit": dt_limit, "state_indices": state_indices}
    y = ssd_step_reference(x, dt, -A_log.exp(), B, C, state, **options).flatten(1)
    if norm is not None:
        y = y * F.silu(gate) if gate_first else y
        groups = y.unflatten(1, (B.shape[1], -1))
        y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(1) * norm.to(dtype)
    y = y if norm is not None and gate_first else y * F.silu(gate)
    return y.unflatten(1, (heads, P)).to(mixed.dtype)


# Registration: opaque to torch.compile; not by custom_op, whose wrappers would take as long as a small model's step

_library = torch.library.Library("s0kernels", "FRAGMENT")
_library.define(
    "gated_delta_mixer_step(Tensor mixed, Tensor z, Tensor b, Tensor a, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor A_log, Tensor dt_bias, Tensor norm, Tensor(a!) window, Tensor(b!) state, Tensor? state_indices, "
    "Tensor(c!)? tickets, float eps, str backend) -> Tensor"
)
_library.define(
    "ssd_mixer_step(Tensor gate, Tensor mixed, Tensor dt, Tensor conv_weight, Tensor? conv_bias, Tensor A_log, "
    "Tensor D, Tensor dt_bias, Tensor? norm, Tensor(a!) window, Tensor(b!) state, Tensor? state_indices, "
    "Tensor(c!)? tickets, float eps, bool gate_first, float dt_min, float dt_max, str backend) -> Tensor"
)


def _delta_op(
    mixed, z, b, a, conv_weight, conv_bias, A_log, dt_bias, norm, window, state, indices, tickets, eps, backend
) -> Tensor:
    inputs = (mixed, z, b, a, conv_weight, conv_bias, A_log, dt_bias, norm, window, state)
    _sequences.check_values(1, None, indices, state, unique=True)
    increment_version((window, state))  # kernels write behind autograd's back
    with _dispatch.without_autocast(mixed.device):
        if backend == "reference":
            return gated_delta_mixer_step_reference(*inputs, eps=eps, state_indices=indices)
        step = _dispatch.ready(backend).gated_delta_mixer_step
        return step(*inputs, eps=eps, state_indices=indices, tickets=tickets)


def _ssd_op(
    gate, mixed, dt, conv_weight, conv_bias, A_log, D, dt_bias, norm, window, state, indices, tickets, eps, gate_first,
    dt_min, dt_max, backend,
) -> Tensor:  # fmt: skip
    inputs = (gate, mixed, dt, conv_weight, conv_bias, A_log, D, dt_bias, norm, window, state)
    options = {"eps": eps, "gate_first": gate_first, "dt_limit": (dt_min, dt_max), "state_indices": indices}
    _sequences.check_values(1, None, indices, state, unique=True)
    increment_version((window, state))  # kernels write behind autograd's back
    with _dispatch.without_autocast(mixed.device):
        if backend == "reference":
            return ssd_mixer_step_reference(*inputs, **options)
        return _dispatch.ready(backend).ssd_mixer_step(*inputs, **options, tickets=tickets)


_library.impl("gated_delta_mixer_step", _delta_op, "CompositeExplicitAutograd")
_library.impl("ssd_mixer_step", _ssd_op, "CompositeExplicitAutograd")


@torch.library.register_fake("s0kernels::gated_delta_mixer_step")
def _(mixed, z, *others):
    return mixed.new_empty(z.shape)


@torch.library.register_fake("s0kernels::ssd_mixer_step")
def _(gate, mixed, dt, conv_weight, conv_bias, A_log, D, dt_bias, norm, window, state, *others):
    return mixed.new_empty(mixed.shape[0], *state.shape[1:3])
