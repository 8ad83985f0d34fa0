"""The gated delta rule (Yang et al. 2024, "Gated Delta Networks", arXiv 2412.06464, eq. 10) from any initial state.

Per value head, with S in R^{K x V}, key head = value head // (HV / H):

    S'_t = exp(g_t) S_{t-1}
    S_t  = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T
    o_t  = scale * S_t^T q_t

S_0 is `initial_state`. It enters once, before the first token of every sequence, and is differentiable.
"""

import functools
import operator

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from s0kernels.backends import _states
from s0kernels.ops import _dispatch, _sequences, _transforms, _validation
from s0kernels.ops.output import ScanOutput

_SCAN = "gated_delta_rule"
_STEP = "gated_delta_rule_step"


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm: bool = False,
    output_final_state: bool = True,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> ScanOutput:
    """Scan whole sequences with the gated delta rule:

        S'_t = exp(g_t) S_{t-1};  S_t = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T;  o_t = scale * S_t^T q_t

    Args:
        q, k: [B, T, H, K], bf16, fp16, fp32 or fp64, any strides.
        v: [B, T, HV, V], q's dtype; HV a multiple of H.
        g: [B, T, HV], q's dtype or fp32; natural logarithm of the decay, <= 0. A pad has g = 0 and beta = 0.
        beta: [B, T, HV], q's dtype or fp32; writing strength, usually in [0, 1].
        scale: factor on the output; None means 1 / sqrt(K).
        initial_state: fp32 (fp64 with fp64 inputs): one state shared by all sequences [HV, K, V], one per sequence
            [NSEQ, HV, K, V], or with `state_indices` a bank [S, HV, K, V]. None means zero.
        state_indices: [NSEQ] int32 or int64, rows of the bank; -1 means the zero state.
        cu_seqlens: [NSEQ + 1] int32 or int64, from 0 to T: the sequences packed into the single row (B = 1).
            None means one sequence per row, NSEQ = B.
        use_qk_l2norm: replace q and k by x * rsqrt(sum(x^2) + 1e-6).
        output_final_state: return the state after each sequence's last token. True by default, unlike FLA.
        chunk_size: tokens per chunk; None leaves it to the backend, and `reference` has no chunks.
        backend: "triton" (GPUs), "cpu" (compiled), "torch" (chunked, any device) or "reference" (token by token); None
            takes the first of these that supports the call.

    Returns:
        ScanOutput(output [B, T, HV, V] in q's dtype, final_state [NSEQ, HV, K, V] fp32 or fp64, or None).
        Sequences without tokens end in their initial state.

    Differentiable in every tensor but the indices; only gradients that are asked for are computed, and where nothing
    but `initial_state` requires grad neither v nor the states are looked at. The gradient of `initial_state` has its
    shape, in its dtype, summed over sequences in a fixed order. Forward mode and torch.func's derivatives go through
    `reference` alone, which None takes for them; so do second derivatives, for which it has to be named. vmap calls a
    backend for one entry after the other.

    Raises:
        NotImplementedError: a derivative that the backend does not have.
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message. The values
            of `cu_seqlens` and `state_indices` are checked for CPU tensors; on a GPU a bad state index gives NaN
            for its sequence, and S0KERNELS_CHECK=1 turns on the check at the price of a synchronisation.
    """
    _validate_scan(q, k, v, g, beta, scale, initial_state, state_indices, cu_seqlens, use_qk_l2norm)
    _validation.check_flag(_SCAN, "output_final_state", output_final_state)
    _validation.check_chunk_size(_SCAN, chunk_size)
    transform = _transforms.find(q, k, v, g, beta, initial_state)
    name = _dispatch.choose(_SCAN, backend, q.device, q.dtype, transform=transform)
    if name == "reference":
        return gated_delta_rule_reference(
            q,
            k,
            v,
            g,
            beta,
            scale=scale,
            initial_state=initial_state,
            state_indices=state_indices,
            cu_seqlens=cu_seqlens,
            use_qk_l2norm=use_qk_l2norm,
            output_final_state=output_final_state,
        )
    output, final_state = torch.ops.s0kernels.gated_delta_rule(
        *(q, k, v, g, beta, initial_state, state_indices, cu_seqlens),
        *(_scale(scale, q), use_qk_l2norm, output_final_state, chunk_size or 0, name),
    )
    return ScanOutput(output, final_state if output_final_state else None)


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advance every sequence by one token, updating its state in place:

        S' = exp(g) S;  S <- S' + beta k (v - S'^T k)^T;  o = scale * S^T q

    Args:
        q, k: [B, H, K], bf16, fp16, fp32 or fp64.
        v: [B, HV, V], q's dtype; HV a multiple of H.
        g, beta: [B, HV], q's dtype or fp32 (g <= 0 is the log decay).
        state: fp32 (fp64 with fp64 inputs), [B, HV, K, V], or with `state_indices` a pool [S, HV, K, V]. Written.
        scale: factor on the output; None means 1 / sqrt(K).
        use_qk_l2norm: replace q and k by x * rsqrt(sum(x^2) + 1e-6).
        state_indices: [B] int32 or int64, rows of the pool. Only these rows change; -1 computes from the zero state
            and stores nothing.
        backend: as in `gated_delta_rule`.

    Returns:
        o [B, HV, V] in q's dtype.

    Raises:
        TypeError, ValueError: as in `gated_delta_rule`; also when a row is named twice, and when gradients are enabled
            and an input requires one (there is no backward).
    """
    _validate_step(q, k, v, g, beta, state, scale, use_qk_l2norm, state_indices)
    name = _dispatch.choose(_STEP, backend, q.device, q.dtype, operator.index(max(state.shape[-2:])))
    scale = _scale(scale, q)
    return torch.ops.s0kernels.gated_delta_rule_step(q, k, v, g, beta, state, state_indices, scale, use_qk_l2norm, name)


# Validation


def _validate_scan(q, k, v, g, beta, scale, initial_state, state_indices, cu_seqlens, use_qk_l2norm) -> None:
    _validation.check_floating(_SCAN, "q", q)
    check = _validation.Checker(_SCAN, q.device)
    check.tensor("q", q, "B T H K", (q.dtype,))
    check.tensor("k", k, "B T H K", (q.dtype,))
    check.tensor("v", v, "B T HV V", (q.dtype,))
    check.multiple("HV", "H", "v")
    check.tensor("g", g, "B T HV", (q.dtype, torch.float32))
    check.tensor("beta", beta, "B T HV", (q.dtype, torch.float32))
    check.sequences(cu_seqlens)
    check.state("initial_state", initial_state, state_indices, "HV K V", _states.state_dtype(q.dtype))
    _validation.check_scale(_SCAN, scale)
    _validation.check_flag(_SCAN, "use_qk_l2norm", use_qk_l2norm)


def _validate_step(q, k, v, g, beta, state, scale, use_qk_l2norm, state_indices) -> None:
    _validation.check_floating(_STEP, "q", q)
    check = _validation.Checker(_STEP, q.device)
    check.tensor("q", q, "B H K", (q.dtype,))
    check.tensor("k", k, "B H K", (q.dtype,))
    check.tensor("v", v, "B HV V", (q.dtype,))
    check.multiple("HV", "H", "v")
    check.tensor("g", g, "B HV", (q.dtype, torch.float32))
    check.tensor("beta", beta, "B HV", (q.dtype, torch.float32))
    check.step_state(state, state_indices, "HV K V", _states.state_dtype(q.dtype))
    _validation.check_scale(_STEP, scale)
    _validation.check_flag(_STEP, "use_qk_l2norm", use_qk_l2norm)
    _validation.check_no_grad(_STEP, {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state})
    _transforms.refuse(_STEP, q, k, v, g, beta, state)


def _scale(scale: float | None, q: Tensor) -> float:
    return float(scale) if scale is not None else max(q.shape[-1], 1) ** -0.5


# Reference: the recurrence as written, token by token, differentiated by autograd


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm: bool = False,
    output_final_state: bool = True,
) -> ScanOutput:
    """`gated_delta_rule` token by token in fp32, or fp64 for fp64 inputs. The oracle for every other backend.

    Plain PyTorch: torch.compile unrolls it, without the checks of index values, and cannot trace `cu_seqlens`.
    """
    nseq = _sequences.num_sequences(q.shape[0], cu_seqlens)
    if not torch.compiler.is_compiling():
        _sequences.check_values(q.shape[1], cu_seqlens, state_indices, initial_state)
    like = q.new_empty(0, dtype=_states.state_dtype(q.dtype))
    states = _states.gather_states(initial_state, state_indices, (nseq, v.shape[2], q.shape[3], v.shape[3]), like)
    scan = functools.partial(_reference_scan, scale=_scale(scale, q), use_qk_l2norm=use_qk_l2norm)
    with _dispatch.without_autocast(q.device):
        output, final_state = _sequences.scan_each(scan, (q, k, v, g, beta), states, cu_seqlens)
    return ScanOutput(output.to(q.dtype), final_state if output_final_state else None)


def _reference_scan(q, k, v, g, beta, state, *, scale, use_qk_l2norm) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = (x.to(state.dtype) for x in (q, k, v, g, beta))
    if use_qk_l2norm:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    group = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
    outputs = []
    for t in range(q.shape[1]):  # products and sums, no matrix products: autocast leaves those alone, backward too
        state = state * g[:, t, :, None, None].exp()
        error = v[:, t] - (state * k[:, t, :, :, None]).sum(-2)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        outputs.append(scale * (state * q[:, t, :, :, None]).sum(-2))
    return (torch.stack(outputs, dim=1) if outputs else v.clone()), state.clone()


def gated_delta_rule_step_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`gated_delta_rule_step` as a scan over one token; the oracle for every other backend."""
    output, final_state = gated_delta_rule_reference(
        *(x.unsqueeze(1) for x in (q, k, v, g, beta)),
        scale=scale,
        initial_state=state,
        state_indices=state_indices,
        use_qk_l2norm=use_qk_l2norm,
    )
    _states.store_states(state, state_indices, final_state)
    return output.squeeze(1)


# Registration: opaque to torch.compile, so that backends may look at values

_INPUTS = ("q", "k", "v", "g", "beta", "initial_state")  # the differentiable ones, in the order of the schema


@torch.library.custom_op("s0kernels::gated_delta_rule", mutates_args=())
def _scan_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    output_final_state: bool,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _sequences.check_values(q.shape[1], cu_seqlens, state_indices, initial_state)
    with _dispatch.without_autocast(q.device):
        return _dispatch.ready(backend).gated_delta_rule_forward(
            *(q, k, v, g, beta, initial_state, state_indices, cu_seqlens),
            scale=scale,
            use_qk_l2norm=use_qk_l2norm,
            output_final_state=output_final_state,
            chunk_size=chunk_size or None,
        )


@_scan_op.register_fake
def _(q, k, v, g, beta, initial_state, state_indices, cu_seqlens, scale, l2norm, output_final_state, chunk, backend):
    dtype = _states.state_dtype(q.dtype)
    nseq = _sequences.num_sequences(q.shape[0], cu_seqlens) if output_final_state else 0
    final = q.new_empty((nseq, v.shape[2], q.shape[3], v.shape[3]), dtype=dtype)
    return q.new_empty(v.shape), final


@torch.library.custom_op("s0kernels::gated_delta_rule_backward", mutates_args=())
def _backward_op(
    doutput: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    state_shape: list[int],
    scale: float,
    use_qk_l2norm: bool,
    chunk_size: int,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that `needs` asks for, in the order of `_INPUTS`. v and initial_state may be None where only the
    initial state's is wanted; its shape is `state_shape`."""
    wanted = [name for name, need in zip(_INPUTS, needs, strict=True) if need]
    with _dispatch.without_autocast(q.device):
        found = _dispatch.ready(backend).gated_delta_rule_backward(
            *(doutput, dfinal_state, q, k, v, g, beta, initial_state, state_indices, cu_seqlens),
            state_shape=tuple(state_shape),
            scale=scale,
            use_qk_l2norm=use_qk_l2norm,
            chunk_size=chunk_size or None,
            wanted=frozenset(wanted),
        )
    inputs = dict(zip(_INPUTS, (q, k, v, g, beta), strict=False))
    return [_states.as_gradient(found[name], inputs.get(name)) for name in wanted]


@_backward_op.register_fake
def _(do, dfinal, q, k, v, g, beta, h0, indices, cu_seqlens, state_shape, scale, l2norm, chunk, backend, needs):
    grads = [x.new_empty(x.shape) for x, need in zip((q, k, v, g, beta), needs, strict=False) if need]
    if needs[-1]:
        grads.append(q.new_empty(state_shape, dtype=_states.state_dtype(q.dtype)))
    return grads


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, g, beta, initial_state, state_indices, cu_seqlens, scale, l2norm, _, chunk_size, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.needs = list(ctx.needs_input_grad[: len(_INPUTS)])
    ctx.arguments = len(inputs)
    ctx.options = ([] if initial_state is None else list(initial_state.shape), scale, l2norm, chunk_size, backend)
    if not any(ctx.needs[:-1]):  # only the initial state: v and the states have no part in its gradient
        v = initial_state = None
    ctx.save_for_backward(q, k, v, g, beta, initial_state, state_indices, cu_seqlens)


def _backward(ctx, doutput, dfinal_state):
    if doutput is None and dfinal_state is None:
        return (None,) * ctx.arguments
    _transforms.check_gradients(_SCAN, doutput, dfinal_state)
    found = iter(
        torch.ops.s0kernels.gated_delta_rule_backward(
            doutput, dfinal_state, *ctx.saved_tensors, *ctx.options, ctx.needs
        )
    )
    grads = [next(found) if need else None for need in ctx.needs]
    return (*grads, *[None] * (ctx.arguments - len(grads)))


_scan_op.register_autograd(_backward, setup_context=_setup_context)
_scan_op.register_vmap(_transforms.one_by_one(_scan_op))
_backward_op.register_autograd(_transforms.no_second_derivative(_SCAN))
_backward_op.register_vmap(_transforms.one_by_one(_backward_op))


def _step_op(q, k, v, g, beta, state, state_indices, scale, use_qk_l2norm, backend) -> Tensor:
    _sequences.check_values(1, None, state_indices, state, unique=True)
    increment_version(state)  # kernels write behind autograd's back
    step = gated_delta_rule_step_reference if backend == "reference" else _dispatch.ready(backend).gated_delta_rule_step
    with _dispatch.without_autocast(q.device):
        return step(q, k, v, g, beta, state, scale=scale, use_qk_l2norm=use_qk_l2norm, state_indices=state_indices)


# not by custom_op, whose wrappers would take as long as the step of a small model
_library = torch.library.Library("s0kernels", "FRAGMENT")
_library.define(
    "gated_delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, "
    "Tensor? state_indices, float scale, bool use_qk_l2norm, str backend) -> Tensor"
)
_library.impl("gated_delta_rule_step", _step_op, "CompositeExplicitAutograd")


@torch.library.register_fake("s0kernels::gated_delta_rule_step")
def _(q, k, v, g, beta, state, state_indices, scale, use_qk_l2norm, backend):
    return q.new_empty(v.shape)
