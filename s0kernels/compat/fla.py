"""flash-linear-attention's functions for the gated delta rule (`fla.ops.gated_delta_rule`, version 0.6.0).

Signatures and semantics are FLA's. The final state is returned only if requested. States may be [K, V] or [V, K], and
may have any floating dtype; they are computed and returned in fp32. If q, k and v have different dtypes, the widest is
used for the computation, and the output has that of v. There are three extensions: any device works; an `initial_state`
without a leading dimension is shared by all sequences; and all gradients exist, including that of the initial state,
also in `fused_recurrent_gated_delta_rule`. An argument that is not supported raises ValueError or TypeError.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from s0kernels.calls import DeltaInputs
from s0kernels.compat._dtypes import as_scalar, under_the_name, widest
from s0kernels.ops import gated_delta_rule

__all__ = ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context=None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """S' = exp(g_t) S;  S = S' + beta_t k_t (v_t - S'^T k_t)^T;  o_t = scale S^T q_t

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V].
        g: [B, T, HV], log decays. With `use_gate_in_kernel` the log decay is -exp(A_log) * softplus(g + dt_bias).
        beta: [B, T, HV]. With `use_beta_sigmoid_in_kernel` a sigmoid is applied, and with `allow_neg_eigval` the result
            is doubled.
        scale: factor on the output; None means 1 / sqrt(K).
        initial_state: [N, HV, K, V], or [N, HV, V, K] with `state_v_first`; without N, one state for all sequences.
        cu_seqlens: [N + 1], the sequences packed into one row.
        cu_seqlens_cpu, chunk_indices: ignored; FLA uses them to save work on the host.
        cp_context: must be None; context parallelism is not supported.
        kwargs: `use_gate_in_kernel`, `A_log` [HV], `dt_bias` [HV], `chunk_size`, and the older name
            `transpose_state_layout` of `state_v_first`.

    Returns:
        (o [B, T, HV, V], final state). The final state is in fp32 and in the layout of the initial state, or None if
        not requested.
    """
    if cp_context is not None:
        raise ValueError("chunk_gated_delta_rule: cp_context must be None: context parallelism is not supported")
    state_v_first = _state_layout(state_v_first, kwargs)
    use_gate = kwargs.pop("use_gate_in_kernel", False)
    A_log, dt_bias = kwargs.pop("A_log", None), kwargs.pop("dt_bias", None)
    chunk_size = kwargs.pop("chunk_size", None)
    _refuse("chunk_gated_delta_rule", kwargs)
    gates = _Gates(use_gate, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    options = {"scale": scale, "cu_seqlens": cu_seqlens, "output_final_state": output_final_state}
    options |= {"use_qk_l2norm": use_qk_l2norm_in_kernel, "chunk_size": chunk_size}
    inputs = DeltaInputs(q, k, v, g, beta)
    return _run("chunk_gated_delta_rule", inputs, gates, initial_state, state_v_first, **options)


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Like `chunk_gated_delta_rule`. g None means no decay, beta None means 1. gk and gv (decays per channel) must be
    None."""
    for name, value in (("gk", gk), ("gv", gv)):
        if value is not None:
            raise ValueError(
                f"fused_recurrent_gated_delta_rule: {name} must be None: decays per channel are not supported"
            )
    state_v_first = _state_layout(state_v_first, kwargs)
    _refuse("fused_recurrent_gated_delta_rule", kwargs)
    if g is None and use_gate_in_kernel:
        raise ValueError("fused_recurrent_gated_delta_rule: use_gate_in_kernel needs g")
    g = v.new_zeros(v.shape[:3]) if g is None else g
    beta = v.new_ones(v.shape[:3]) if beta is None else beta
    gates = _Gates(use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    options = {"scale": scale, "cu_seqlens": cu_seqlens, "output_final_state": output_final_state}
    options |= {"use_qk_l2norm": use_qk_l2norm_in_kernel}
    inputs = DeltaInputs(q, k, v, g, beta)
    return _run("fused_recurrent_gated_delta_rule", inputs, gates, initial_state, state_v_first, **options)


def _state_layout(state_v_first: bool, kwargs: dict) -> bool:
    if "transpose_state_layout" not in kwargs:
        return state_v_first
    if state_v_first:
        raise ValueError("state_v_first and transpose_state_layout, its older name, must not both be given")
    warnings.warn("transpose_state_layout is deprecated; use state_v_first", DeprecationWarning, stacklevel=3)
    return kwargs.pop("transpose_state_layout")


def _refuse(function: str, kwargs: dict) -> None:
    if kwargs:
        raise TypeError(f"{function}: got an unexpected keyword argument {next(iter(kwargs))!r}")


class _Gates(NamedTuple):
    """The options by which g and beta are computed."""

    use_gate: bool
    A_log: Tensor | None
    dt_bias: Tensor | None
    use_sigmoid: bool
    allow_neg_eigval: bool


def _run(
    function: str, inputs: DeltaInputs, gates: _Gates, initial_state: Tensor | None, state_v_first: bool, **options
) -> tuple[Tensor, Tensor | None]:
    q, k, v, g, beta = inputs
    if gates.allow_neg_eigval and not gates.use_sigmoid:
        raise ValueError(f"{function}: allow_neg_eigval needs use_beta_sigmoid_in_kernel")
    if gates.use_gate:
        if gates.A_log is None:
            raise ValueError(f"{function}: use_gate_in_kernel needs A_log")
        g = g.float() if gates.dt_bias is None else g.float() + gates.dt_bias.float()
        g = -gates.A_log.float().exp() * torch.nn.functional.softplus(g)
    if gates.use_sigmoid:
        beta = beta.float().sigmoid() * (2.0 if gates.allow_neg_eigval else 1.0)
    dtype = widest(q, k, v)
    if initial_state is not None:
        initial_state = initial_state.to(torch.float64 if dtype == torch.float64 else torch.float32)
        initial_state = initial_state.mT if state_v_first else initial_state
    with under_the_name(function, "gated_delta_rule"):
        output, final_state = gated_delta_rule(
            *(x.to(dtype) for x in (q, k, v)),
            *(as_scalar(x, dtype) for x in (g, beta)),
            initial_state=initial_state,
            **options,
        )
    final_state = final_state.mT if state_v_first and final_state is not None else final_state
    return output.to(v.dtype), final_state
