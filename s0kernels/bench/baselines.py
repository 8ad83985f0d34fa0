"""What `python -m s0kernels bench` and `benchmarks/` compare: inputs of both scans at the heads of real models, our
calls and those of other libraries.

S0 is one state for all sequences. The others want a copy for each sequence, which is part of their time.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from s0kernels import ops
from s0kernels.bench.check import errors

Values = dict[str, Tensor | None]  # inputs by name, "s0" for the state that all sequences share, "cu_seqlens"
Scan = Callable[[Values, bool], tuple[Tensor, Tensor]]  # (inputs, whether from S0) -> (output, final state)
Step = Callable[[Values, Tensor], Callable[[], object]]  # (inputs, a state per row) -> what advances it by one token

#: Heads of one layer. Qwen3.5: "Number of Linear Attention Heads" and "Head Dimension" in the model cards of
#: Qwen/Qwen3.5-0.8B and -4B; for 9B the defaults of transformers' Qwen3_5TextConfig, which are documented as that
#: model's. Falcon-H1: mamba_n_heads, mamba_d_head, mamba_n_groups, mamba_d_state of tiiuae/Falcon-H1-*'s config.json.
MODELS = {
    "qwen3.5-0.8b": ("gated_delta_rule", {"H": 16, "HV": 16, "K": 128, "V": 128}),
    "qwen3.5-4b": ("gated_delta_rule", {"H": 16, "HV": 32, "K": 128, "V": 128}),
    "qwen3.5-9b": ("gated_delta_rule", {"H": 16, "HV": 32, "K": 128, "V": 128}),
    "falcon-h1-0.5b": ("ssd", {"H": 24, "P": 64, "G": 1, "N": 128}),
    "falcon-h1-7b": ("ssd", {"H": 24, "P": 128, "G": 1, "N": 256}),
}

#: What errors may be, in those of the recurrence. The contract gives ours twice; others get room for another order of
#: sums (the gradient of A that transformers computes in fp32 was seen four times off) and none for a wrong result.
OUR_BUDGET, THEIR_BUDGET = 2.0, 8.0


@dataclass(frozen=True)
class Baseline:
    """`scan` and `step` load what they are named after, and raise where the library is missing."""

    package: str
    scan: Callable[[], Scan]
    step: Callable[[], Step] | None = None
    on_cpu: bool = False

    def unusable(self, device: str) -> str | None:
        """None, or the reason why not, found without importing the library: some do not survive that on a CPU."""
        try:
            version = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if not self.on_cpu and torch.device(device).type == "cpu":
            return f"needs a GPU ({f'{self.package} {version} is' if version else 'and is not'} installed)"
        return None if version else f"{self.package} is not installed"


@dataclass(frozen=True)
class Op:
    inputs: tuple[str, ...]  # the differentiable ones, S0 besides
    output: str  # the input whose shape and dtype the output has
    for_state: tuple[str, ...]  # what the backward of S0 alone has to read, beside the gradient of the output
    make: Callable[..., Values]
    scan: Callable[..., tuple[Tensor, Tensor]]  # ours: (inputs, whether from S0, backend)
    step: Callable[..., Callable[[], Tensor]]  # ours: (inputs, states, backend)
    work: Callable[[dict[str, int], bool], float]  # floating-point operations per token of a forward, and a backward
    step_work: Callable[[dict[str, int]], float]
    baselines: dict[str, Baseline]

    def leaves(self, values: Values, wanted: tuple[str, ...]) -> Values:
        tensors = (*self.inputs, "s0")
        return {n: x.detach().requires_grad_(n in wanted) if n in tensors else x for n, x in values.items()}

    def results(self, run: Scan, values: Values, weights: list[Tensor] | None = None) -> dict[str, Tensor]:
        """Output and final state, and the gradients of their products with `weights`."""
        wanted = (*self.inputs, "s0")
        leaves = self.leaves(values, wanted)
        found = run(leaves, True)
        named = {"output": found[0].detach(), "final_state": found[1].detach()}
        if weights is None:
            return named
        loss = sum((x * w.to(x)).sum() for x, w in zip(found, weights, strict=True))
        return named | dict(zip(wanted, torch.autograd.grad(loss, [leaves[n] for n in wanted]), strict=True))

    def out_of_budget(self, run: Scan, values: Values, times: float = THEIR_BUDGET) -> str | None:
        """None where the errors of outputs and gradients against the recurrence in fp64 are at most `times` those of
        the recurrence in the dtype of the inputs, and its rounding; else what is not."""
        plain = partial(self.scan, backend="reference")
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            weights = [torch.randn(x.shape, generator=random) for x in plain(values, True)]
        results = partial(self.results, weights=weights)
        return _beyond(results, plain, run, values, self.inputs[0], times)

    def step_out_of_budget(self, step: Step, values: Values, times: float = THEIR_BUDGET) -> str | None:
        """The same of the output of one token and of the states it leaves."""

        def results(step: Step, values: Values) -> dict[str, Tensor]:
            pool = state_for_each(values, values[self.inputs[0]].shape[0]).clone()
            found = step(values, pool)()
            output, final = found if isinstance(found, tuple) else (found, pool)
            return {"output": output.flatten(), "state": final}

        return _beyond(results, partial(self.step, backend="reference"), step, values, self.inputs[0], times)


def _beyond(results: Callable, plain: Callable, tried: Callable, values: Values, first: str, times: float):
    exact = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in values.items()}
    truth = {n: x.cpu() for n, x in results(plain, exact).items()}
    allowed, found = (errors([results(scan, values)], [truth]) for scan in (plain, tried))
    for name, error in found.items():
        budget = times * allowed[name] + torch.finfo(values[first].dtype).eps
        if not error <= budget:  # nor where it is NaN
            return f"error of {name}: {error:.1e}, allowed {budget:.1e}"
    return None


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


def state_for_each(values: Values, rows: int, state: bool = True) -> Tensor | None:
    """S0 copied for every sequence, as other libraries want it."""
    count = rows if values["cu_seqlens"] is None else values["cu_seqlens"].shape[0] - 1
    return values["s0"].expand(count, -1, -1, -1).contiguous() if state else None


def _long(ends: Tensor | None) -> Tensor | None:
    return None if ends is None else ends.long()


def _refuse_packed(values: Values) -> None:
    if values["cu_seqlens"] is not None:
        raise ValueError("no initial state for packed sequences")


def _torch_path(module: str, name: str) -> Callable:
    """transformers' own function in PyTorch, not the kernel from another library that it may stand for."""
    function = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    return getattr(function, "__wrapped__", function)


# The gated delta rule

_DELTA = ("q", "k", "v", "g", "beta")


def _delta_values(sizes, heads, device, dtype, channel_first=False) -> Values:
    torch.manual_seed(0)
    B, T, ends = _sizes(sizes, device)
    H, HV, K, V = (heads[name] for name in ("H", "HV", "K", "V"))
    tokens = partial(_tokens, B, T, device=device, dtype=dtype, channel_first=channel_first)
    values = {"q": tokens(H, K), "k": tokens(H, K), "v": tokens(HV, V)}
    values |= {"g": -0.1 * torch.rand(B, T, HV, device=device), "beta": torch.rand(B, T, HV, device=device).to(dtype)}
    return values | {"s0": 0.1 * torch.randn(HV, K, V, device=device), "cu_seqlens": ends}


def _delta(values: Values, state: bool, backend: str | None):
    inputs = (values[n] for n in _DELTA)
    return ops.gated_delta_rule(*inputs, use_qk_l2norm=True, backend=backend, **_from(values, state))


def _delta_step(values: Values, pool: Tensor, backend: str | None, **options) -> Callable[[], Tensor]:
    first = [values[n][:, 0] for n in _DELTA]
    return partial(ops.gated_delta_rule_step, *first, pool, use_qk_l2norm=True, backend=backend, **options)


def _delta_work(heads: dict[str, int], backward: bool) -> float:
    """Of the compiled kernels, whose chunks have 32 tokens and whose backward computes states anew; what heads share
    is counted once by 2."""
    K, V, C = heads["K"], heads["V"], 32
    forward, back = 6 * K * V + C * (K + 2 * V), 16 * K * V + C * (3.5 * K + 5 * V)
    return heads["HV"] * (forward + back * backward)


def _like_fla(function: Callable) -> Scan:
    def run(values: Values, state: bool):
        h0 = state_for_each(values, values["q"].shape[0], state)
        inputs = {n: values[n] for n in _DELTA[3:]} | {"initial_state": h0}
        if values["cu_seqlens"] is not None:
            inputs["cu_seqlens"] = _long(values["cu_seqlens"])
        options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
        return function(*(values[n] for n in _DELTA[:3]), **inputs, **options)

    return run


def _like_fla_step(function: Callable) -> Step:
    def prepare(values: Values, pool: Tensor):
        token = {n: values[n][:, :1] for n in _DELTA}
        inputs, rest = [token[n] for n in _DELTA[:3]], {n: token[n] for n in _DELTA[3:]}
        options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
        return lambda: function(*inputs, **rest, initial_state=pool, **options)

    return prepare


def _fla_delta(name: str) -> Callable:
    return getattr(importlib.import_module("fla.ops.gated_delta_rule"), name)


def _transformers_delta(kind: str) -> Callable:
    return _torch_path("qwen3_5.modeling_qwen3_5", f"torch_{kind}_gated_delta_rule")


def _transformers_delta_scan() -> Scan:
    run = _like_fla(_transformers_delta("chunk"))

    def dense(values: Values, state: bool):
        _refuse_packed(values)
        return run(values, state)

    return dense


# Mamba-2

_MAMBA = ("x", "dt", "A", "B", "C")


def _mamba_values(sizes, heads, device, dtype, channel_first=False) -> Values:
    torch.manual_seed(0)
    B, T, ends = _sizes(sizes, device)
    H, P, G, N = (heads[name] for name in ("H", "P", "G", "N"))
    tokens = partial(_tokens, B, T, device=device, dtype=dtype, channel_first=channel_first)
    values = {"x": tokens(H, P), "dt": 0.1 * torch.rand(B, T, H, device=device), "A": -torch.rand(H, device=device)}
    values |= {"B": tokens(G, N) / N**0.5, "C": tokens(G, N) / N**0.5}
    return values | {"s0": 0.1 * torch.randn(H, P, N, device=device), "cu_seqlens": ends}


def _mamba(values: Values, state: bool, backend: str | None):
    return ops.ssd(*(values[n] for n in _MAMBA), backend=backend, **_from(values, state))


def _mamba_token(values: Values) -> list[Tensor]:
    return [values[n] if n == "A" else values[n][:, 0] for n in _MAMBA]


def _mamba_step(values: Values, pool: Tensor, backend: str | None, **options) -> Callable[[], Tensor]:
    return partial(ops.ssd_step, *_mamba_token(values), pool, backend=backend, **options)


def _mamba_work(heads: dict[str, int], backward: bool) -> float:
    """Of the compiled kernels, whose chunks have 64 tokens; what heads share is counted once by 4."""
    N, P, C = heads["N"], heads["P"], 64
    forward, back = 4 * N * P + C * (N / 4 + P), 10 * N * P + C * (3 * N / 4 + 2 * P)
    return heads["H"] * (forward + back * backward)


def _mamba_ssm(chunk_size: int) -> Scan:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def run(values: Values, state: bool):
        _refuse_packed(values)
        h0 = state_for_each(values, values["x"].shape[0], state)
        inputs = [values[n] for n in _MAMBA]
        return mamba_chunk_scan_combined(*inputs, chunk_size, initial_states=h0, return_final_states=True)

    return run


def _like_mamba_step(function: Callable) -> Step:
    def prepare(values: Values, pool: Tensor):
        x, dt, A, B, C = _mamba_token(values)
        P, N = pool.shape[2:]
        inputs = (x, dt[..., None].expand(-1, -1, P), A[:, None, None].expand(-1, P, N), B, C)
        return lambda: function(pool, *inputs)

    return prepare


def _mamba_ssm_step() -> Step:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    return _like_mamba_step(selective_state_update)


def _simple_gla() -> Scan:
    from fla.ops.simple_gla import chunk_simple_gla

    def run(values: Values, state: bool):
        x, dt, A, B, C = (values[n] for n in _MAMBA)
        repeat = x.shape[2] // B.shape[2]
        h0 = state_for_each(values, x.shape[0], state)
        B, C = (t.repeat_interleave(repeat, dim=2) for t in (B, C))  # which it needs for every head
        options = {"scale": 1.0, "output_final_state": True, "cu_seqlens": _long(values["cu_seqlens"])}
        h0 = None if h0 is None else h0.mT.contiguous()
        output, final = chunk_simple_gla(C, B, (x * dt[..., None]).to(x.dtype), dt * A, initial_state=h0, **options)
        return output, final.mT

    return run


def _transformers_mamba(name: str) -> Callable:
    return _torch_path("falcon_h1.modeling_falcon_h1", name)


def _transformers_mamba_scan() -> Scan:
    scan = _transformers_mamba("mamba2_chunk_scan")

    def run(values: Values, state: bool):
        _refuse_packed(values)
        h0 = state_for_each(values, values["x"].shape[0], state)
        inputs = [values[n] for n in _MAMBA]
        return scan(*inputs, chunk_size=128, initial_states=h0, return_final_states=True)

    return run


OPS = {
    "gated_delta_rule": Op(
        _DELTA,
        "v",
        ("q", "k", "g", "beta"),
        _delta_values,
        _delta,
        _delta_step,
        _delta_work,
        lambda heads: 6 * heads["HV"] * heads["K"] * heads["V"],
        {
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
            "flash-qla": Baseline(
                "flash-qla", lambda: _like_fla(importlib.import_module("flash_qla").chunk_gated_delta_rule)
            ),
        },
    ),
    "ssd": Op(
        _MAMBA,
        "x",
        ("dt", "A", "C"),
        _mamba_values,
        _mamba,
        _mamba_step,
        _mamba_work,
        lambda heads: 4 * heads["H"] * heads["P"] * heads["N"],
        {
            "transformers": Baseline(
                "transformers",
                _transformers_mamba_scan,
                lambda: _like_mamba_step(_transformers_mamba("mamba2_selective_state_update")),
                on_cpu=True,
            ),
            "mamba-ssm-128": Baseline("mamba-ssm", partial(_mamba_ssm, 128), _mamba_ssm_step),
            "mamba-ssm-256": Baseline("mamba-ssm", partial(_mamba_ssm, 256)),
            "fla-simple-gla": Baseline("flash-linear-attention", _simple_gla),
        },
    ),
}
