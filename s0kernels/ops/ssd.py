"""The Mamba-2 scan, structured state space duality (Dao and Gu 2024, arXiv 2405.21060, eq. 16), from any initial state.

Per head, with S in R^{P x N}, group = head // (H / G):

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T
    y_t = S_t C_t + D x_t,  times silu(z_t) where z is given

with dt = clamp(softplus(dt + dt_bias), dt_limit), each part only where asked for. S_0 is `initial_state`. It enters
once, before the first token of every sequence, and is differentiable.
"""

import functools
import operator

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from s0kernels.backends import _states
from s0kernels.ops import _dispatch, _sequences, _transforms, _validation
from s0kernels.ops.output import ScanOutput

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
        dt_limit: (lowest, highest), clamps dt last.
        initial_state: fp32 (fp64 with fp64 inputs): one state shared by all sequences [H, P, N], one per sequence
            [NSEQ, H, P, N], or with `state_indices` a bank [S, H, P, N]. None means zero.
        state_indices: [NSEQ] int32 or int64, rows of the bank; -1 means the zero state.
        cu_seqlens: [NSEQ + 1] int32 or int64, from 0 to T: the sequences packed into the single row (B = 1).
            None means one sequence per row, NSEQ = B.
        output_final_state: return the state after each sequence's last token. True by default, unlike mamba_ssm.
        chunk_size: tokens per chunk; None leaves it to the backend, and `reference` has no chunks.
        backend: "triton" (GPUs), "cpu" (compiled), "torch" (chunked, any device) or "reference" (token by token); None
            takes the first of these that supports the call.

    Returns:
        ScanOutput(output [B, T, H, P] in x's dtype, final_state [NSEQ, H, P, N] fp32 or fp64, or None).
        Sequences without tokens end in their initial state.

    Differentiable in every tensor but the indices; only gradients that are asked for are computed, and where nothing
    but `initial_state` requires grad neither x nor the states are looked at. The gradient of `initial_state` has its
    shape, in its dtype, summed over sequences in a fixed order. Forward mode and torch.func's derivatives go through
    `reference` alone, which None takes for them; so do second derivatives, for which it has to be named. vmap calls a
    backend for one entry after the other.

    Raises:
        NotImplementedError: a derivative that the backend does not have.
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message. The values
            of `cu_seqlens` and `state_indices` are checked for CPU tensors; on a GPU a bad state index gives NaN
            for its sequence, and S0KERNELS_CHECK=1 turns on the check at the price of a synchronisation.
    """
    _validate_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, state_indices, cu_seqlens)
    _validation.check_flag(_SCAN, "output_final_state", output_final_state)
    _validation.check_chunk_size(_SCAN, chunk_size)
    transform = _transforms.find(x, dt, A, B, C, D, z, dt_bias, initial_state)
    name = _dispatch.choose(_SCAN, backend, x.device, x.dtype, transform=transform)
    if name == "reference":
        return ssd_reference(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            initial_state=initial_state,
            state_indices=state_indices,
            cu_seqlens=cu_seqlens,
            output_final_state=output_final_state,
        )
    output, final_state = torch.ops.s0kernels.ssd(
        *(x, dt, A, B, C, D, z, dt_bias, initial_state, state_indices, cu_seqlens),
        *(dt_softplus, float(dt_limit[0]), float(dt_limit[1]), output_final_state, chunk_size or 0, name),
    )
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
        state: fp32 (fp64 with fp64 inputs), [B, H, P, N], or with `state_indices` a pool [S, H, P, N]. Written.
        state_indices: [B] int32 or int64, rows of the pool. Only these rows change; -1 computes from the zero state
            and stores nothing.
        backend: as in `ssd`.

    Returns:
        y [B, H, P] in x's dtype.

    Raises:
        TypeError, ValueError: as in `ssd`; also when a row is named twice, and when gradients are enabled and an
            input requires one (there is no backward).
    """
    _validate_step(x, dt, A, B, C, state, D, z, dt_bias, dt_softplus, dt_limit, state_indices)
    name = _dispatch.choose(_STEP, backend, x.device, x.dtype, operator.index(max(state.shape[-2:])))
    return torch.ops.s0kernels.ssd_step(
        *(x, dt, A, B, C, state, D, z, dt_bias, state_indices),
        *(dt_softplus, float(dt_limit[0]), float(dt_limit[1]), name),
    )


# Validation


def _validate_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, indices, cu_seqlens) -> None:
    _validation.check_floating(_SCAN, "x", x)
    check = _validation.Checker(_SCAN, x.device)
    check.tensor("x", x, "B T H P", (x.dtype,))
    _check_inputs(check, x, dt, A, B, C, D, z, dt_bias, "B T")
    check.sequences(cu_seqlens)
    check.state("initial_state", initial_state, indices, "H P N", _states.state_dtype(x.dtype))
    _validation.check_flag(_SCAN, "dt_softplus", dt_softplus)
    _validation.check_dt_limit(_SCAN, dt_limit)


def _validate_step(x, dt, A, B, C, state, D, z, dt_bias, dt_softplus, dt_limit, state_indices) -> None:
    _validation.check_floating(_STEP, "x", x)
    check = _validation.Checker(_STEP, x.device)
    check.tensor("x", x, "B H P", (x.dtype,))
    _check_inputs(check, x, dt, A, B, C, D, z, dt_bias, "B")
    check.step_state(state, state_indices, "H P N", _states.state_dtype(x.dtype))
    _validation.check_flag(_STEP, "dt_softplus", dt_softplus)
    _validation.check_dt_limit(_STEP, dt_limit)
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "state": state}
    _validation.check_no_grad(_STEP, tensors)
    _transforms.refuse(_STEP, *tensors.values())


def _check_inputs(check: _validation.Checker, x, dt, A, B, C, D, z, dt_bias, rows: str) -> None:
    scalars = (x.dtype, torch.float32)
    check.tensor("dt", dt, f"{rows} H", scalars)
    check.tensor("A", A, "H", scalars)
    check.tensor("B", B, f"{rows} G N", (x.dtype,))
    check.multiple("H", "G", "x")
    check.tensor("C", C, f"{rows} G N", (x.dtype,))
    if D is not None:
        check.tensor("D", D, "H", scalars)
    if z is not None:
        check.tensor("z", z, f"{rows} H P", (x.dtype,))
    if dt_bias is not None:
        check.tensor("dt_bias", dt_bias, "H", scalars)


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
    """`ssd` token by token in fp32, or fp64 for fp64 inputs. The oracle for every other backend.

    Plain PyTorch: torch.compile unrolls it, without the checks of index values, and cannot trace `cu_seqlens`.
    """
    dtype = _states.state_dtype(x.dtype)
    nseq = _sequences.num_sequences(x.shape[0], cu_seqlens)
    if not torch.compiler.is_compiling():
        _sequences.check_values(x.shape[1], cu_seqlens, state_indices, initial_state)
    like = x.new_empty(0, dtype=dtype)
    states = _states.gather_states(initial_state, state_indices, (nseq, *x.shape[2:], B.shape[3]), like)
    with _dispatch.without_autocast(x.device):
        steps = _states.process_dt(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
        scan = functools.partial(_reference_scan, A=A.to(dtype))
        output, final_state = _sequences.scan_each(scan, (x, steps, B, C), states, cu_seqlens)
        if D is not None:
            output = output + D.to(dtype)[:, None] * x
        if z is not None:
            output = output * torch.nn.functional.silu(z.to(dtype))
    return ScanOutput(output.to(x.dtype), final_state if output_final_state else None)


def _reference_scan(x, dt, B, C, state, *, A) -> tuple[Tensor, Tensor]:
    x, B, C = (t.to(state.dtype) for t in (x, B, C))
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
    outputs = []
    for t in range(x.shape[1]):  # products and sums, no matrix products: autocast leaves those alone, backward too
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
    """`ssd_step` as a scan over one token; the oracle for every other backend."""
    output, final_state = ssd_reference(
        x.unsqueeze(1),
        dt.unsqueeze(1),
        A,
        B.unsqueeze(1),
        C.unsqueeze(1),
        D=D,
        z=None if z is None else z.unsqueeze(1),
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=state,
        state_indices=state_indices,
    )
    _states.store_states(state, state_indices, final_state)
    return output.squeeze(1)


# Registration: opaque to torch.compile, so that backends may look at values

# the differentiable ones, in the order of the schema
_INPUTS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


@torch.library.custom_op("s0kernels::ssd", mutates_args=())
def _scan_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    output_final_state: bool,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _sequences.check_values(x.shape[1], cu_seqlens, state_indices, initial_state)
    with _dispatch.without_autocast(x.device):
        return _dispatch.ready(backend).ssd_forward(
            *(x, dt, A, B, C, D, z, dt_bias, initial_state, state_indices, cu_seqlens),
            dt_softplus=dt_softplus,
            dt_limit=(dt_min, dt_max),
            output_final_state=output_final_state,
            chunk_size=chunk_size or None,
        )


@_scan_op.register_fake
def _(
    x, dt, A, B, C, D, z, dt_bias, h0, indices, cu_seqlens, softplus, dt_min, dt_max, output_final_state, chunk, backend
):
    nseq = _sequences.num_sequences(x.shape[0], cu_seqlens) if output_final_state else 0
    final = x.new_empty((nseq, x.shape[2], x.shape[3], B.shape[3]), dtype=_states.state_dtype(x.dtype))
    return x.new_empty(x.shape), final


@torch.library.custom_op("s0kernels::ssd_backward", mutates_args=())
def _backward_op(
    doutput: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor | None,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    state_shape: list[int],
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that `needs` asks for, in the order of `_INPUTS`. x, B, D and initial_state may be None where only
    the initial state's is wanted; its shape is `state_shape`."""
    wanted = [name for name, need in zip(_INPUTS, needs, strict=True) if need]
    with _dispatch.without_autocast(dt.device):
        found = _dispatch.ready(backend).ssd_backward(
            *(doutput, dfinal_state, x, dt, A, B, C, D, z, dt_bias, initial_state, state_indices, cu_seqlens),
            state_shape=tuple(state_shape),
            dt_softplus=dt_softplus,
            dt_limit=(dt_min, dt_max),
            chunk_size=chunk_size or None,
            wanted=frozenset(wanted),
        )
    inputs = dict(zip(_INPUTS, (x, dt, A, B, C, D, z, dt_bias), strict=False))
    return [_states.as_gradient(found[name], inputs.get(name)) for name in wanted]


@_backward_op.register_fake
def _(do, dfinal, x, dt, A, B, C, D, z, dt_bias, h0, indices, cu_seqlens, state_shape, *options):
    needs = options[-1]
    grads = [t.new_empty(t.shape) for t, need in zip((x, dt, A, B, C, D, z, dt_bias), needs, strict=False) if need]
    if needs[-1]:
        grads.append(C.new_empty(state_shape, dtype=_states.state_dtype(C.dtype)))
    return grads


def _setup_context(ctx, inputs, output) -> None:
    x, dt, A, B, C, D, z, dt_bias, initial_state, state_indices, cu_seqlens, softplus, low, high, _, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.needs = list(ctx.needs_input_grad[: len(_INPUTS)])
    ctx.arguments = len(inputs)
    ctx.options = ([] if initial_state is None else list(initial_state.shape), softplus, low, high, *rest)
    if not any(ctx.needs[:-1]):  # only the initial state: x, B, D and the states have no part in its gradient
        x = B = D = initial_state = None
    ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, initial_state, state_indices, cu_seqlens)


def _backward(ctx, doutput, dfinal_state):
    if doutput is None and dfinal_state is None:
        return (None,) * ctx.arguments
    _transforms.check_gradients(_SCAN, doutput, dfinal_state)
    found = iter(torch.ops.s0kernels.ssd_backward(doutput, dfinal_state, *ctx.saved_tensors, *ctx.options, ctx.needs))
    grads = [next(found) if need else None for need in ctx.needs]
    return (*grads, *[None] * (ctx.arguments - len(grads)))


_scan_op.register_autograd(_backward, setup_context=_setup_context)
_scan_op.register_vmap(_transforms.one_by_one(_scan_op))
_backward_op.register_autograd(_transforms.no_second_derivative(_SCAN))
_backward_op.register_vmap(_transforms.one_by_one(_backward_op))


def _step_op(x, dt, A, B, C, state, D, z, dt_bias, state_indices, dt_softplus, dt_min, dt_max, backend) -> Tensor:
    _sequences.check_values(1, None, state_indices, state, unique=True)
    increment_version(state)  # kernels write behind autograd's back
    step = ssd_step_reference if backend == "reference" else _dispatch.ready(backend).ssd_step
    options = {"D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": (dt_min, dt_max)}
    with _dispatch.without_autocast(x.device):
        return step(x, dt, A, B, C, state, state_indices=state_indices, **options)


# not by custom_op, whose wrappers would take as long as the step of a small model
_library = torch.library.Library("s0kernels", "FRAGMENT")
_library.define(
    "ssd_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor(a!) state, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, Tensor? state_indices, bool dt_softplus, float dt_min, float dt_max, str backend) -> Tensor"
)
_library.impl("ssd_step", _step_op, "CompositeExplicitAutograd")


@torch.library.register_fake("s0kernels::ssd_step")
def _(x, dt, A, B, C, state, D, z, dt_bias, state_indices, dt_softplus, dt_min, dt_max, backend):
    return x.new_empty(x.shape)
