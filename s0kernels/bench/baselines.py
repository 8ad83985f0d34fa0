"""Baselines: other libraries that have a scan or a step of one of the recurrences, called as their users call them.

S0 is one state for all sequences. The other libraries need a copy for each sequence, and the time for it counts.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from s0kernels.bench.inputs import Values, state_for_each, token

Scan = Callable[[Values, bool], tuple[Tensor, Tensor]]  # (inputs, whether from S0) -> (output, final state)
# (inputs, a state per row) -> a function that advances the state by one token and returns the output, or output and
# state
Step = Callable[[Values, Tensor], Callable[[], Tensor | tuple[Tensor, Tensor]]]

_DELTA = ("q", "k", "v", "g", "beta")
_SSD = ("x", "dt", "A", "B", "C")


@dataclass(frozen=True)
class Baseline:
    """`scan` and `step` load the scan and the step of a library. They raise if the library is missing."""

    package: str
    scan: Callable[[], Scan]
    step: Callable[[], Step] | None = None
    on_cpu: bool = False

    def unusable(self, device: str) -> str | None:
        """Return None if the library can be used, else the reason why not. The library is not imported, because some
        fail at import on a CPU."""
        try:
            version = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if not self.on_cpu and torch.device(device).type == "cpu":
            return f"needs a GPU ({f'{self.package} {version} is' if version else 'and is not'} installed)"
        return None if version else f"{self.package} is not installed"


def _start(values: Values, state: bool) -> Tensor | None:
    first = values["q"] if "q" in values else values["x"]
    return state_for_each(values, first.shape[0]) if state else None


def _ends(values: Values) -> dict[str, Tensor]:
    return {n: values[n].long() for n in ("cu_seqlens",) if n in values}


def _refuse_packed(values: Values) -> None:
    if "cu_seqlens" in values:
        raise ValueError("no initial state for packed sequences")


def _torch_path(module: str, name: str) -> Callable:
    """Return transformers' own function in PyTorch, not the kernel of another library that may replace it."""
    function = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    return getattr(function, "__wrapped__", function)


# The gated delta rule


def _like_fla(function: Callable) -> Scan:
    def run(values: Values, state: bool):
        inputs = {n: values[n] for n in _DELTA[3:]} | {"initial_state": _start(values, state)} | _ends(values)
        options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
        return function(*(values[n] for n in _DELTA[:3]), **inputs, **options)

    return run


def _like_fla_step(function: Callable) -> Step:
    def prepare(values: Values, pool: Tensor):
        first = {n: values[n][:, :1] for n in _DELTA}
        inputs, rest = [first[n] for n in _DELTA[:3]], {n: first[n] for n in _DELTA[3:]}
        options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
        return lambda: function(*inputs, **rest, initial_state=pool, **options)

    return prepare


def _fla_delta(name: str) -> Callable:
    return getattr(importlib.import_module("fla.ops.gated_delta_rule"), name)


def _flash_qla() -> Scan:
    return _like_fla(importlib.import_module("flash_qla").chunk_gated_delta_rule)


def _transformers_delta(kind: str) -> Callable:
    """Return the function of transformers. Some of its versions repeat the heads of keys, others need them repeated."""
    function = _torch_path("qwen3_5.modeling_qwen3_5", f"torch_{kind}_gated_delta_rule")

    def run(q: Tensor, k: Tensor, v: Tensor, **rest):
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
        return function(q, k, v, **rest)

    return run


def _transformers_delta_scan() -> Scan:
    run = _like_fla(_transformers_delta("chunk"))

    def dense(values: Values, state: bool):
        _refuse_packed(values)
        return run(values, state)

    return dense


# Mamba-2


def _extras(values: Values) -> dict:
    """Return D, z and dt_bias by their names, which all libraries share."""
    found = {n: values[n] for n in ("D", "z", "dt_bias") if n in values}
    return found | ({"dt_softplus": True} if found else {})


def _mamba_ssm(chunk_size: int) -> Scan:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore[reportMissingImports]

    def run(values: Values, state: bool):
        _refuse_packed(values)
        options = {"initial_states": _start(values, state), "return_final_states": True, **_extras(values)}
        return mamba_chunk_scan_combined(*(values[n] for n in _SSD), chunk_size, **options)

    return run


def _like_mamba_step(function: Callable) -> Step:
    def prepare(values: Values, pool: Tensor):
        one, (P, N) = token(values), pool.shape[2:]
        x, dt, A, B, C = (one[n] for n in _SSD)
        inputs = (x, dt[..., None].expand(-1, -1, P), A[:, None, None].expand(-1, P, N), B, C)
        return lambda: function(pool, *inputs)

    return prepare


def _mamba_ssm_step() -> Step:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update  # pyright: ignore[reportMissingImports]

    return _like_mamba_step(selective_state_update)


def _simple_gla() -> Scan:
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    def run(values: Values, state: bool):
        if _extras(values):
            raise ValueError("no D, z or dt_bias")
        x, dt, A, B, C = (values[n] for n in _SSD)
        B, C = (t.repeat_interleave(x.shape[2] // B.shape[2], dim=2) for t in (B, C))  # it needs B and C for every head
        options = {"scale": 1.0, "output_final_state": True, **_ends(values)}
        h0 = _start(values, state)
        h0 = None if h0 is None else h0.mT.contiguous()
        output, final = chunk_simple_gla(C, B, (x * dt[..., None]).to(x.dtype), dt * A, initial_state=h0, **options)
        return output, final.mT

    return run


def _transformers_ssd(name: str) -> Callable:
    return _torch_path("falcon_h1.modeling_falcon_h1", name)


def _transformers_ssd_scan() -> Scan:
    scan = _transformers_ssd("mamba2_chunk_scan")

    def run(values: Values, state: bool):
        _refuse_packed(values)
        if "z" in values:
            raise ValueError("no z")
        options = {"initial_states": _start(values, state), "return_final_states": True, **_extras(values)}
        return scan(*(values[n] for n in _SSD), chunk_size=128, **options)

    return run


#: by op and name
BASELINES: dict[str, dict[str, Baseline]] = {
    "gated_delta_rule": {
        "transformers": Baseline(
            "transformers",
            _transformers_delta_scan,
            lambda: _like_fla_step(_transformers_delta("recurrent")),
            on_cpu=True,
        ),
        "fla": Baseline(
            "flash-linear-attention",
            lambda: _like_fla(_fla_delta("chunk_gated_delta_rule")),
            lambda: _like_fla_step(_fla_delta("fused_recurrent_gated_delta_rule")),
        ),
        "flash-qla": Baseline("flash-qla", _flash_qla),
    },
    "ssd": {
        "transformers": Baseline(
            "transformers",
            _transformers_ssd_scan,
            lambda: _like_mamba_step(_transformers_ssd("mamba2_selective_state_update")),
            on_cpu=True,
        ),
        "mamba-ssm-128": Baseline("mamba-ssm", partial(_mamba_ssm, 128), _mamba_ssm_step),
        "mamba-ssm-256": Baseline("mamba-ssm", partial(_mamba_ssm, 256)),
        "fla-simple-gla": Baseline("flash-linear-attention", _simple_gla),
    },
}
