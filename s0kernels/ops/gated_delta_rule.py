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

from s0kernels.backends import shared
from s0kernels.calls import DeltaInputs, DeltaKept, DeltaOptions, Pool, Start
from s0kernels.ops import registry, sequences, transforms, validation
from s0kernels.ops.output import ScanOutput
from s0kernels.ops.registration import Recurrence, register_scan, register_step

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
        beta: [B, T, HV], q's dtype or fp32; writing strength, in [0, 1], or in [0, 2] for negative eigenvalues.
        scale: factor on the output; None means 1 / sqrt(K).
        initial_state: fp32 (fp64 with fp64 inputs): one state shared by all sequences [HV, K, V], one per sequence
            [NSEQ, HV, K, V], or with `state_indices` a bank [S, HV, K, V]. None means zero.
        state_indices: [NSEQ] int32 or int64, rows of the bank; -1 means the zero state.
        cu_seqlens: [NSEQ + 1] int32 or int64, from 0 to T: the sequences packed into the single row (B = 1).
            None means one sequence per row, NSEQ = B.
        use_qk_l2norm: replace q and k by x * rsqrt(sum(x^2) + 1e-6).
        output_final_state: return the state after each sequence's last token. True by default, unlike FLA.
        chunk_size: tokens per chunk; None lets the backend choose. `reference` has no chunks.
        backend: "triton" (GPUs), "cpu" (compiled), "torch" (chunked, any device) or "reference" (token by token); None
            takes the first of these that supports the call.

    Returns:
        ScanOutput(output [B, T, HV, V] in q's dtype, final_state [NSEQ, HV, K, V] fp32 or fp64, or None).
        Sequences without tokens end in their initial state.

    All tensors but the indices are differentiable. Only the requested gradients are computed: if `initial_state` alone
    requires grad, the backward reads neither v nor the states. The gradient of `initial_state` has its shape and dtype,
    and is summed over sequences in a fixed order. "triton" keeps intermediate results for the backward, unless
    `recompute` or S0KERNELS_RECOMPUTE=1 says otherwise. Only `reference` supports forward mode and torch.func's
    derivatives, and backend=None chooses it for them. Only `reference` supports second derivatives too, and for these
    it must be named. vmap calls a backend for one entry after the other.

    Every backend takes beta up to 2. If beta is near 2, keys are nearly equal and nothing decays, then chunked scans
    amplify rounding errors, and the token-by-token recurrence does not. In fp32 the largest error of output, final
    state and gradients is then two to five times that of the recurrence. In half precision "cpu" and "torch" have the
    error of the recurrence. "triton" keeps intermediate results in the inputs' dtype: its error is about 3e-3 in fp16
    and 5e-2 in bf16, the same as with such keys at beta 1. Inputs in fp32 are more exact.

    Raises:
        NotImplementedError: the backend does not support this derivative.
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; the message names it. The values
            of `cu_seqlens` and `state_indices` are checked for CPU tensors. On a GPU a bad state index gives NaN for
            its sequence, and S0KERNELS_CHECK=1 turns on the check at the price of a synchronisation.
    """
    inputs, start = DeltaInputs(q, k, v, g, beta), Start(initial_state, state_indices, cu_seqlens)
    _check_inputs(validation.Checker(_SCAN, "q", q), inputs, "B T", scale, use_qk_l2norm).start(start, "HV K V")
    validation.check_scan(_SCAN, output_final_state, chunk_size)
    options = DeltaOptions(_scale(scale, q), use_qk_l2norm, chunk_size or 0)
    transform = transforms.find(*inputs, initial_state)
    name = registry.choose(backend, _SCAN, q.device, q.dtype, transform=transform)
    if name == "reference":
        output, final_state = _scan_reference(inputs, start, options)
    else:
        output, final_state = _scan_op(inputs, start, options, output_final_state, name)
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
        state: fp32 (fp64 with fp64 inputs), [B, HV, K, V], or with `state_indices` a pool [S, HV, K, V]. Updated.
        scale: factor on the output; None means 1 / sqrt(K).
        use_qk_l2norm: replace q and k by x * rsqrt(sum(x^2) + 1e-6).
        state_indices: [B] int32 or int64, rows of the pool. Only these rows change. -1 starts from the zero state and
            stores nothing.
        backend: as in `gated_delta_rule`.

    Returns:
        o [B, HV, V] in q's dtype.

    Raises:
        TypeError, ValueError: as in `gated_delta_rule`. Also if `state_indices` names a row twice, and if gradients are
            enabled and an input requires one (there is no backward).
    """
    inputs, pool = DeltaInputs(q, k, v, g, beta), Pool(state, state_indices)
    _check_inputs(validation.Checker(_STEP, "q", q), inputs, "B", scale, use_qk_l2norm).pool(pool, "HV K V")
    validation.check_no_grad(_STEP, inputs, state=state)
    transforms.refuse(_STEP, *inputs, state)
    name = registry.choose(backend, _STEP, q.device, q.dtype, operator.index(max(state.shape[-2:])))
    return _step_op(*inputs, *pool, *DeltaOptions(_scale(scale, q), use_qk_l2norm), name)


def _check_inputs(check: validation.Checker, inputs: DeltaInputs, rows: str, scale, l2norm) -> validation.Checker:
    dtype = inputs.q.dtype
    check.tensor("q", inputs.q, f"{rows} H K", (dtype,))
    check.tensor("k", inputs.k, f"{rows} H K", (dtype,))
    check.tensor("v", inputs.v, f"{rows} HV V", (dtype,))
    check.multiple("HV", "H", "v")
    check.tensor("g", inputs.g, f"{rows} HV", (dtype, torch.float32))
    check.tensor("beta", inputs.beta, f"{rows} HV", (dtype, torch.float32))
    validation.check_scale(check.op, scale)
    validation.check_flag(check.op, "use_qk_l2norm", l2norm)
    return check


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
    """`gated_delta_rule` token by token in fp32, or in fp64 for fp64 inputs. Every other backend is tested against it.

    It is plain PyTorch. torch.compile unrolls it without the checks of index values, and cannot trace `cu_seqlens`.
    """
    inputs, start = DeltaInputs(q, k, v, g, beta), Start(initial_state, state_indices, cu_seqlens)
    output, final_state = _scan_reference(inputs, start, DeltaOptions(_scale(scale, q), use_qk_l2norm))
    return ScanOutput(output, final_state if output_final_state else None)


def _scan_reference(inputs: DeltaInputs, start: Start, options: DeltaOptions) -> tuple[Tensor, Tensor]:
    with registry.without_autocast(inputs.q.device):
        states = sequences.starting_states(start, inputs.q, _state_shape(inputs))
        scan = functools.partial(_reference_scan, options=options)
        output, final_state = sequences.scan_each(scan, inputs, states, start.cu_seqlens)
    return output.to(inputs.q.dtype), final_state


def _state_shape(inputs: DeltaInputs) -> tuple[int, int, int]:
    return inputs.v.shape[-2], inputs.q.shape[-1], inputs.v.shape[-1]


def _reference_scan(q, k, v, g, beta, state, *, options: DeltaOptions) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = (x.to(state.dtype) for x in (q, k, v, g, beta))
    if options.use_qk_l2norm:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    group = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
    outputs = []
    for t in range(q.shape[1]):  # no matrix products: autocast would round them, in the backward too
        state = state * g[:, t, :, None, None].exp()
        error = v[:, t] - (state * k[:, t, :, :, None]).sum(-2)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        outputs.append(options.scale * (state * q[:, t, :, :, None]).sum(-2))
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
    """`gated_delta_rule_step` as a scan over one token. Every other backend is tested against it."""
    options = DeltaOptions(_scale(scale, q), use_qk_l2norm)
    return _step_reference(DeltaInputs(q, k, v, g, beta), Pool(state, state_indices), options)


def _step_reference(inputs: DeltaInputs, pool: Pool, options: DeltaOptions) -> Tensor:
    token = DeltaInputs(*(x.unsqueeze(1) for x in inputs))
    output, final_state = _scan_reference(token, Start(pool.state, pool.indices), options)
    shared.store_states(pool.state, pool.indices, final_state)
    return output.squeeze(1)


_scan_op = register_scan(
    Recurrence(_SCAN, DeltaInputs, DeltaOptions, "v", "q", _state_shape, unneeded=("v",), kept=DeltaKept)
)
_step_op = register_step(
    _STEP, (DeltaInputs, Pool, DeltaOptions), _step_reference, lambda inputs, _: inputs.q.new_empty(inputs.v.shape)
)
