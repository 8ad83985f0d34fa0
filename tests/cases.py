"""Inputs of the scans, defined once: named cases with a non-zero initial state, grouped heads and K != V."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from s0kernels.bench.check import AMPLIFIED_BUDGET, AMPLIFIED_ROUNDINGS, errors, gradients
from s0kernels.bench.inputs import nearly_equal_keys, scan_inputs
from s0kernels.calls import Call
from s0kernels.heads import MODELS as HEADS
from s0kernels.ops import gated_delta_rule, gated_delta_rule_step, registry, ssd, ssd_step

#: the models without those that repeat the heads of an earlier model
FAMILIES = [model for i, (model, heads) in enumerate(HEADS.items()) if heads not in list(HEADS.values())[:i]]
#: the reason why the compiled kernels cannot be tested, or None
NO_CPU_KERNELS = registry.unusable("cpu", Call("ssd", torch.device("cpu"), torch.float32))
BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(NO_CPU_KERNELS is not None, reason=f"backend cpu {NO_CPU_KERNELS}")),
    "torch",
    "reference",
]
CHUNKED = BACKENDS[:2]
USABLE = ["torch", "reference"] if NO_CPU_KERNELS else ["cpu", "torch", "reference"]

INDICES = ("state_indices", "cu_seqlens")
STATE_KINDS = ("shared", "each", "bank")


@dataclass
class Problem:
    """One call: `tensors` are differentiable arguments, `options` the other arguments."""

    op: str
    tensors: dict[str, Tensor]
    options: dict

    def run(self, backend: str | None, **changes):
        call = {**self.tensors, **self.options, **changes}
        if self.op == "gated_delta_rule":
            positional = [call.pop(name) for name in ("q", "k", "v", "g", "beta")]
            return gated_delta_rule(*positional, backend=backend, **call)
        positional = [call.pop(name) for name in ("x", "dt", "A", "B", "C")]
        return ssd(*positional, backend=backend, **call)

    def to(self, dtype: torch.dtype, scalars: torch.dtype | None = None) -> "Problem":
        """Convert inputs to `dtype` (g, beta, dt, A, D, dt_bias to `scalars`) and states to fp32 or fp64."""
        states = torch.float64 if dtype == torch.float64 else torch.float32
        kinds = dict.fromkeys(("g", "beta", "dt", "A", "D", "dt_bias"), scalars or dtype) | {"initial_state": states}
        return replace(self, tensors={name: x.detach().to(kinds.get(name, dtype)) for name, x in self.tensors.items()})

    def gradients(self, backend: str | None, weights: tuple[Tensor, Tensor], wanted: list[str] | None = None) -> dict:
        """Return output, final state and the gradients of <output, w0> + <final_state, w1>, by name."""
        return gradients(lambda leaves: replace(self, tensors=leaves).run(backend), self.tensors, weights, wanted)

    def with_columns(self) -> "Problem":
        """Return the same problem with indices that are columns of a table, as servers keep them."""
        strided = {name: torch.stack([x, x + 1], dim=1)[:, 0] for name, x in self.options.items() if name in INDICES}
        return replace(self, options=self.options | strided)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return fixed random gradients of output and final state."""
        generator = torch.Generator().manual_seed(7)
        result = self.run("torch")
        return tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in result)


def with_state(problem: Problem, kind: str | None, sequences: int) -> Problem:
    shape = problem.tensors.pop("initial_state").shape
    generator = torch.Generator().manual_seed(3)
    leading = {"shared": (), "each": (sequences,), "bank": (sequences + 2,), None: None}[kind]
    if leading is not None:
        state = torch.randn(*leading, *shape, generator=generator, dtype=torch.float64)
        problem.tensors["initial_state"] = state
    if kind == "bank":
        indices = [(3 * i) % (sequences + 2) if i != 1 else -1 for i in range(sequences)]
        indices[-1] = indices[0]  # a repeated row: its gradient is a sum
        problem.options["state_indices"] = torch.tensor(indices, dtype=torch.int32)
    return problem


def packing(values: dict[str, Tensor], B: int) -> tuple[dict, int]:
    """Return (options, number of sequences) for inputs that hold their boundaries."""
    ends = values.pop("cu_seqlens", None)
    return ({}, B) if ends is None else ({"cu_seqlens": ends}, len(ends) - 1)


#: decays from slow to fast
RATES = (1e-3, 10**0.5)


def delta_problem(
    T: int = 65,
    *,
    B: int = 2,
    H: int = 2,
    HV: int = 4,
    K: int = 8,
    V: int = 12,
    state: str | None = "shared",
    lengths: list[int] | None = None,
    seed: int = 0,
    **options,
) -> Problem:
    """Make fp64 inputs like those of a trained model, with unit keys."""
    heads, sizes = {"H": H, "HV": HV, "K": K, "V": V}, (B, T) if lengths is None else lengths
    tensors = scan_inputs("gated_delta_rule", heads, sizes, rates=RATES, seed=seed, dtype=torch.float64)
    packed, sequences = packing(tensors, B)
    options = {"use_qk_l2norm": True, **packed, **options}
    return with_state(Problem("gated_delta_rule", tensors, options), state, sequences)


def ssd_problem(
    T: int = 65,
    *,
    B: int = 2,
    H: int = 4,
    P: int = 6,
    G: int = 2,
    N: int = 10,
    state: str | None = "shared",
    lengths: list[int] | None = None,
    seed: int = 0,
    extras: bool = True,
    **options,
) -> Problem:
    """Make fp64 inputs; with `extras` also D, z, dt_bias, softplus and limits that clamp some steps."""
    heads, sizes = {"H": H, "P": P, "G": G, "N": N}, (B, T) if lengths is None else lengths
    tensors = scan_inputs("ssd", heads, sizes, extras=extras, rates=RATES, seed=seed, dtype=torch.float64)
    packed, sequences = packing(tensors, B)
    options = {**packed, **options}
    if extras:
        options = {"dt_softplus": True, "dt_limit": (0.1, 1.5), **options}
    return with_state(Problem("ssd", tensors, options), state, sequences)


MAKERS = {"gated_delta_rule": delta_problem, "ssd": ssd_problem}


def error(found: Tensor, truth: Tensor) -> float:
    """Return the root mean square of the difference, divided by that of the truth."""
    found, truth = found.detach(), truth.detach().double()
    return float((found.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt().clamp_min(1e-30))


def step(op, tensors, state, **options):
    """Return token `t` of a problem's tensors, [:, t]. Tensors without a time axis are kept."""
    if op == "gated_delta_rule":
        return gated_delta_rule_step(*(tensors[n] for n in ("q", "k", "v", "g", "beta")), state, **options)
    extras = {n: tensors[n] for n in ("D", "z", "dt_bias") if n in tensors}
    return ssd_step(*(tensors[n] for n in ("x", "dt", "A", "B", "C")), state, **extras, **options)


def token(problem, t):
    return {n: x[:, t] if x.dim() > 2 else x for n, x in problem.tensors.items() if n != "initial_state"}


def options_of(problem):
    return {n: v for n, v in problem.options.items() if n in ("use_qk_l2norm", "dt_softplus", "dt_limit", "scale")}


#: nearly equal keys: the noise, and the bounds of beta
NEARLY_EQUAL = [(0.03, (2.0, 2.0)), (0.1, (1.96, 2.0)), (0.3, (2.0, 2.0)), (0.1, (1.0, 1.0))]


def assert_nearly_equal_keys_are_survived(
    dtype: torch.dtype, run: Callable[[Problem, tuple[Tensor, Tensor]], dict], among=NEARLY_EQUAL, **sizes
) -> None:
    """Compare the gradients of `run(problem, weights)` over two draws with the recurrence in the same dtype."""
    for noise, beta in among:
        found, truth, plain = [], [], []
        for seed in range(2):
            problem = delta_problem(150, **{"B": 1, "H": 1, "HV": 2, "K": 32, "V": 24} | sizes, seed=seed)
            problem = replace(problem, tensors=nearly_equal_keys(problem.tensors, noise, beta, seed))
            problem = problem.to(dtype, None if dtype == torch.float64 else torch.float32)
            weights = problem.weights()
            truth.append(problem.to(torch.float64).gradients("reference", weights))
            plain.append(problem.gradients("reference", weights))
            found.append(run(problem, weights))
        allowed, rounding = errors(plain, truth), AMPLIFIED_ROUNDINGS * torch.finfo(dtype).eps
        for name, off in errors(found, truth).items():
            assert off <= AMPLIFIED_BUDGET * allowed[name] + rounding, (noise, beta, name)
