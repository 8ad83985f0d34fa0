"""What `gpu_scans.py` compares: inputs of both scans, our calls and those of other libraries."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from s0kernels import ops

Values = dict[str, Tensor | None]  # inputs by name, "s0" for the state that all sequences share, "cu_seqlens"
Scan = Callable[[Values, bool], tuple[Tensor, Tensor]]  # (inputs, whether from S0) -> (output, final state)


@dataclass(frozen=True)
class Op:
    inputs: tuple[str, ...]  # the differentiable ones, S0 besides
    heads: dict[str, int]
    small: dict[str, int]  # to try the script
    make: Callable[..., Values]
    ours: Scan
    reference: Scan
    step: Callable[..., Callable[[], Tensor]]
    rivals: dict[str, Callable[[], Scan]]  # loaders, which raise where a library is missing


def _tokens(B: int, T: int, *shape: int, device: str, dtype: torch.dtype, channel_first: bool) -> Tensor:
    x = torch.randn(B, T, *shape, device=device).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channel_first else x


def _sizes(sizes: tuple[int, int] | list[int], device: str) -> tuple[int, int, Tensor | None]:
    """(rows, T, cu_seqlens) of a dense batch (rows, T), or of the lengths of packed sequences."""
    if isinstance(sizes, tuple):
        return *sizes, None
    return 1, sum(sizes), torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32)


def _from(values: Values, state: bool) -> dict:
    return {"initial_state": values["s0"] if state else None, "cu_seqlens": values["cu_seqlens"]}


def _state_for_each(values: Values, rows: int, state: bool) -> Tensor | None:
    """S0 copied for every sequence, as other libraries want it."""
    count = rows if values["cu_seqlens"] is None else values["cu_seqlens"].shape[0] - 1
    return values["s0"].expand(count, -1, -1, -1).contiguous() if state else None


def _long(ends: Tensor | None) -> Tensor | None:
    return None if ends is None else ends.long()


# The gated delta rule, heads of Qwen3.5-4B

_DELTA = ("q", "k", "v", "g", "beta")


def _delta_values(sizes, heads, device, dtype, channel_first=False) -> Values:
    torch.manual_seed(0)
    B, T, ends = _sizes(sizes, device)
    H, HV, K, V = (heads[name] for name in ("H", "HV", "K", "V"))
    tokens = partial(_tokens, B, T, device=device, dtype=dtype, channel_first=channel_first)
    values = {"q": tokens(H, K), "k": tokens(H, K), "v": tokens(HV, V)}
    values |= {"g": -0.1 * torch.rand(B, T, HV, device=device), "beta": torch.rand(B, T, HV, device=device).to(dtype)}
    return values | {"s0": 0.1 * torch.randn(HV, K, V, device=device), "cu_seqlens": ends}


def _delta(scan: Callable, values: Values, state: bool):
    return scan(*(values[n] for n in _DELTA), use_qk_l2norm=True, **_from(values, state))


def _delta_step(values: Values, pool: Tensor, **options) -> Callable[[], Tensor]:
    first = [values[n][:, 0] for n in _DELTA]
    return partial(ops.gated_delta_rule_step, *first, pool, use_qk_l2norm=True, backend="triton", **options)


def _like_fla(function: Callable) -> Scan:
    def run(values: Values, state: bool):
        h0 = _state_for_each(values, values["q"].shape[0], state)
        options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
        inputs = {n: values[n] for n in _DELTA}
        return function(**inputs, initial_state=h0, cu_seqlens=_long(values["cu_seqlens"]), **options)

    return run


def _fla() -> Scan:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return _like_fla(chunk_gated_delta_rule)


def _flash_qla() -> Scan:
    from flash_qla import chunk_gated_delta_rule

    return _like_fla(chunk_gated_delta_rule)


# Mamba-2, heads of Falcon-H1-7B

_MAMBA = ("x", "dt", "A", "B", "C")


def _mamba_values(sizes, heads, device, dtype, channel_first=False) -> Values:
    torch.manual_seed(0)
    B, T, ends = _sizes(sizes, device)
    H, P, G, N = (heads[name] for name in ("H", "P", "G", "N"))
    tokens = partial(_tokens, B, T, device=device, dtype=dtype, channel_first=channel_first)
    values = {"x": tokens(H, P), "dt": 0.1 * torch.rand(B, T, H, device=device), "A": -torch.rand(H, device=device)}
    values |= {"B": tokens(G, N) / N**0.5, "C": tokens(G, N) / N**0.5}
    return values | {"s0": 0.1 * torch.randn(H, P, N, device=device), "cu_seqlens": ends}


def _mamba(scan: Callable, values: Values, state: bool):
    return scan(*(values[n] for n in _MAMBA), **_from(values, state))


def _mamba_step(values: Values, pool: Tensor, **options) -> Callable[[], Tensor]:
    first = [x if n == "A" else x[:, 0] for n, x in ((n, values[n]) for n in _MAMBA)]
    return partial(ops.ssd_step, *first, pool, backend="triton", **options)


def _mamba_ssm(chunk_size: int) -> Scan:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def run(values: Values, state: bool):
        if values["cu_seqlens"] is not None:
            raise ValueError("no initial state for packed sequences")
        h0 = _state_for_each(values, values["x"].shape[0], state)
        inputs = [values[n] for n in _MAMBA]
        return mamba_chunk_scan_combined(*inputs, chunk_size, initial_states=h0, return_final_states=True)

    return run


def _simple_gla() -> Scan:
    from fla.ops.simple_gla import chunk_simple_gla

    def run(values: Values, state: bool):
        x, dt, A, B, C = (values[n] for n in _MAMBA)
        repeat = x.shape[2] // B.shape[2]
        h0 = _state_for_each(values, x.shape[0], state)
        B, C = (t.repeat_interleave(repeat, dim=2) for t in (B, C))  # which it needs for every head
        options = {"scale": 1.0, "output_final_state": True, "cu_seqlens": _long(values["cu_seqlens"])}
        h0 = None if h0 is None else h0.mT.contiguous()
        output, final = chunk_simple_gla(C, B, (x * dt[..., None]).to(x.dtype), dt * A, initial_state=h0, **options)
        return output, final.mT

    return run


OPS = {
    "gated_delta_rule": Op(
        _DELTA,
        {"H": 16, "HV": 32, "K": 128, "V": 128},
        {"H": 1, "HV": 2, "K": 16, "V": 16},
        _delta_values,
        partial(_delta, partial(ops.gated_delta_rule, backend="triton")),
        partial(_delta, ops.gated_delta_rule_reference),
        _delta_step,
        {"FLA": _fla, "FlashQLA": _flash_qla},
    ),
    "ssd": Op(
        _MAMBA,
        {"H": 24, "P": 128, "G": 1, "N": 256},
        {"H": 2, "P": 16, "G": 1, "N": 16},
        _mamba_values,
        partial(_mamba, partial(ops.ssd, backend="triton")),
        partial(_mamba, ops.ssd_reference),
        _mamba_step,
        {
            "mamba_ssm, chunk 128": partial(_mamba_ssm, 128),
            "mamba_ssm, chunk 256": partial(_mamba_ssm, 256),
            "FLA simple_gla": _simple_gla,
        },
    ),
}
