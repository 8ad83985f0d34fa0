"""The Mamba-2 scan, structured state space duality (Dao and Gu 2024, arXiv 2405.21060, eq. 16), from any initial state.

Per head, with S in R^{P x N}, group = head // (H / G):

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T
    y_t = S_t C_t + D x_t,  times silu(z_t) where z is given

with dt = clamp(softplus(dt + dt_bias), dt_limit), each part only if requested. S_0 is `initial_state`. It enters once,
before the first token of every sequence, and is differentiable.
"""

import functools
import operator

import torch
from torch import Tensor

from s0kernels.backends import shared
from s0kernels.calls import Pool, SSDInputs, SSDOptions, Start, state_dtype
from s0kernels.ops import registry, sequences, transforms, validation
from s0kernels.ops.output import ScanOutput
from s0kernels.ops.registration import Recurrence, register_scan, register_step

_SCAN = "ssd"
_STEP = "ssd_step"
_NO_LIMIT = (0.0, float("inf"))


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    initial_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: bool = True,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> ScanOutput:
    """Scan whole sequences with the Mamba-2 recurrence:

        S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = (S_t C_t + D x_t) * silu(z_t)

    Args:
        x: [B, T, H, P], bf16, fp16, fp32 or fp64, any strides.
        dt: [B, T, H], x's dtype or fp32; step sizes, >= 0 once processed. A pad has dt = 0 after processing.
        A: [H], x's dtype or fp32; <= 0, the decay rate.
        B, C: [B, T, G, N], x's dtype; H a multiple of G.
        D: [H], x's dtype or fp32; skip connection, or None.
        z: [B, T, H, P], x's dtype; gate, or None.
        dt_bias: [H], x's dtype or fp32; added to dt first, or None.
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: (lowest, highest); dt is clamped to it last.
        initial_state: fp32 (fp64 with fp64 inputs): one state shared by all sequences [H, P, N], one per sequence
            [NSEQ, H, P, N], or with `state_indices` a bank [S, H, P, N]. None means zero.
        state_indices: [NSEQ] int32 or int64, rows of the bank; -1 means the zero state.
        cu_seqlens: [NSEQ + 1] int32 or int64, from 0 to T: the sequences packed into the single row (B = 1).
            None means one sequence per row, NSEQ = B.
        output_final_state: return the state after each sequence's last token. True by default, unlike mamba_ssm.
        chunk_size: tokens per chunk; None lets the backend choose. `reference` has no chunks.
        backend: "triton" (GPUs), "cpu" (compiled), "torch" (chunked, any device) or "reference" (token by token); None
            takes the first of these that supports the call.

    Returns:
        ScanOutput(output [B, T, H, P] in x's dtype, final_state [NSEQ, H, P, N] fp32 or fp64, or None).
        Sequences without tokens end in their initial state.

    All tensors but the indices are differentiable. Only the requested gradients are computed: if `initial_state` alone
    requires grad, the backward reads neither x nor the states. The gradient of `initial_state` has its shape and dtype,
    and is summed over sequences in a fixed order. Only `reference` supports forward mode and torch.func's derivatives,
    and backend=None chooses it for them. Only `reference` supports second derivatives too, and for these it must be
    named. vmap calls a backend for one entry after the other.

    Raises:
        NotImplementedError: the backend does not support this derivative.
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; the message names it. The values
            of `cu_seqlens` and `state_indices` are checked for CPU tensors. On a GPU a bad state index gives NaN for
            its sequence, and S0KERNELS_CHECK=1 turns on the check at the price of a synchronisation.
    """
    inputs = SSDInputs(x, dt, A, B, C, D, z, dt_bias)
    start = Start(initial_state, state_indices, cu_seqlens)
    _check_inputs(validation.Checker(_SCAN, "x", x), inputs, "B T", dt_softplus, dt_limit).start(start, "H P N")
    validation.check_scan(_SCAN, output_final_state, chunk_size)
    options = SSDOptions(dt_softplus, float(dt_limit[0]), float(dt_limit[1]), chunk_size or 0)
    transform = transforms.find(*inputs, initial_state)
    name = registry.choose(backend, _SCAN, x.device, x.dtype, transform=transform)
    if name == "reference":
        output, final_state = _scan_reference(inputs, start, options)
    else:
        output, final_state = _scan_op(inputs, start, options, output_final_state, name)
    return ScanOutput(output, final_state if output_final_state else None)


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advance every sequence by one token, updating its state in place:

        S <- exp(dt A) S + dt x B^T;  y = (S C + D x) * silu(z)

    Args:
        x, z: [B, H, P], bf16, fp16, fp32 or fp64.
        dt: [B, H], x's dtype or fp32; processed by `dt_bias`, `dt_softplus` and `dt_limit` as in `ssd`.
        A, D, dt_bias: [H], x's dtype or fp32.
        B, C: [B, G, N], x's dtype; H a multiple of G.
        state: fp32 (fp64 with fp64 inputs), [B, H, P, N], or with `state_indices` a pool [S, H, P, N]. Updated.
        state_indices: [B] int32 or int64, rows of the pool. Only these rows change. -1 starts from the zero state and
            stores nothing.
        backend: as in `ssd`.

    Returns:
        y [B, H, P] in x's dtype.

    Raises:
        TypeError, ValueError: as in `ssd`. Also if `state_indices` names a row twice, and if gradients are enabled and
            an input requires one (there is no backward).
    """
    inputs, pool = SSDInputs(x, dt, A, B, C, D, z, dt_bias), Pool(state, state_indices)
    _check_inputs(validation.Checker(_STEP, "x", x), inputs, "B", dt_softplus, dt_limit).pool(pool, "H P N")
    validation.check_no_grad(_STEP, inputs, state=state)
    transforms.refuse(_STEP, *inputs, state)
    name = registry.choose(backend, _STEP, x.device, x.dtype, operator.index(max(state.shape[-2:])))
    return _step_op(*inputs, *pool, *SSDOptions(dt_softplus, float(dt_limit[0]), float(dt_limit[1])), name)


def _check_inputs(check: validation.Checker, inputs: SSDInputs, rows: str, dt_softplus, dt_limit) -> validation.Checker:
    dtype = inputs.x.dtype
    scalars = (dtype, torch.float32)
    check.tensor("x", inputs.x, f"{rows} H P", (dtype,))
    check.tensor("dt", inputs.dt, f"{rows} H", scalars)
    check.tensor("A", inputs.A, "H", scalars)
    check.tensor("B", inputs.B, f"{rows} G N", (dtype,))
    check.multiple("H", "G", "x")
    check.tensor("C", inputs.C, f"{rows} G N", (dtype,))
    optional = {"D": ("H", scalars), "z": (f"{rows} H P", (dtype,)), "dt_bias": ("H", scalars)}
    for name, (dims, dtypes) in optional.items():
        if getattr(inputs, name) is not None:
            check.tensor(name, getattr(inputs, name), dims, dtypes)
    validation.check_flag(check.op, "dt_softplus", dt_softplus)
    validation.check_dt_limit(check.op, dt_limit)
    return check


# Reference: the recurrence as written, token by token, differentiated by autograd


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    initial_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: bool = True,
) -> ScanOutput:
    """`ssd` token by token in fp32, or in fp64 for fp64 inputs. Every other backend is tested against it.

    It is plain PyTorch. torch.compile unrolls it without the checks of index values, and cannot trace `cu_seqlens`.
    """
    inputs = SSDInputs(x, dt, A, B, C, D, z, dt_bias)
    start, options = Start(initial_state, state_indices, cu_seqlens), SSDOptions(dt_softplus, *dt_limit)
    output, final_state = _scan_reference(inputs, start, options)
    return ScanOutput(output, final_state if output_final_state else None)


def _scan_reference(inputs: SSDInputs, start: Start, options: SSDOptions) -> tuple[Tensor, Tensor]:
    x, dtype = inputs.x, state_dtype(inputs.x.dtype)
    states = sequences.starting_states(start, x, _state_shape(inputs))
    with registry.without_autocast(x.device):
        steps = shared.process_dt(inputs, options)
        scan = functools.partial(_reference_scan, A=inputs.A.to(dtype))
        output, final_state = sequences.scan_each(scan, (x, steps, inputs.B, inputs.C), states, start.cu_seqlens)
        if inputs.D is not None:
            output = output + inputs.D.to(dtype)[:, None] * x
        if inputs.z is not None:
            output = output * torch.nn.functional.silu(inputs.z.to(dtype))
    return output.to(x.dtype), final_state


def _state_shape(inputs: SSDInputs) -> tuple[int, int, int]:
    return inputs.x.shape[-2], inputs.x.shape[-1], inputs.B.shape[-1]


def _reference_scan(x, dt, B, C, state, *, A) -> tuple[Tensor, Tensor]:
    x, B, C = (t.to(state.dtype) for t in (x, B, C))
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
    outputs = []
    for t in range(x.shape[1]):  # no matrix products: autocast would round them, in the backward too
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1))
    return (torch.stack(outputs, dim=1) if outputs else x.clone()), state.clone()


def ssd_step_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`ssd_step` as a scan over one token. Every other backend is tested against it."""
    inputs, options = SSDInputs(x, dt, A, B, C, D, z, dt_bias), SSDOptions(dt_softplus, *dt_limit)
    return _step_reference(inputs, Pool(state, state_indices), options)


def _step_reference(inputs: SSDInputs, pool: Pool, options: SSDOptions) -> Tensor:
    token = {name: getattr(inputs, name).unsqueeze(1) for name in ("x", "dt", "B", "C")}
    z = None if inputs.z is None else inputs.z.unsqueeze(1)
    output, final_state = _scan_reference(inputs._replace(**token, z=z), Start(pool.state, pool.indices), options)
    shared.store_states(pool.state, pool.indices, final_state)
    return output.squeeze(1)


_scan_op = register_scan(
    Recurrence(_SCAN, SSDInputs, SSDOptions, like="x", always="C", state_shape=_state_shape, unneeded=("x", "B", "D"))
)
_step_op = register_step(
    _STEP, (SSDInputs, Pool, SSDOptions), _step_reference, lambda inputs, _: inputs.x.new_empty(inputs.x.shape)
)
