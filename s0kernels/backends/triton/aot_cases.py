"""The calls that are compiled ahead of time: tensors of the device "meta", which have no memory."""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from s0kernels.backends.triton.gated_delta_rule import (
    gated_delta_rule_backward,
    gated_delta_rule_forward,
    gated_delta_rule_step,
)
from s0kernels.backends.triton.ssd import ssd_backward, ssd_forward, ssd_step
from s0kernels.calls import DeltaInputs, DeltaOptions, Grads, Pool, SSDInputs, SSDOptions, Start, Wanted

Calls = dict[str, Callable[[], object]]


class Given(NamedTuple):
    """What may be absent from a call, or given in more ways than one. `gradients` are those that come back: of the
    output, the final state, or both."""

    state: str = "shared"
    packed: bool = False
    final: bool = True
    gates: str = "as the others"
    schedule: str | None = None
    gradients: str = "both"
    normalise: bool = True
    D: bool = True
    z: bool = True
    dt_bias: bool = True
    softplus: bool = True


EVERYTHING = Given()
_LEVELS = {
    "state": ("shared", None, "each", "bank"),
    "packed": (False, True),
    "final": (True, False),
    "gates": ("as the others", "fp32"),
    "schedule": ("fused", "split"),
    "gradients": ("both", "output", "final state"),
}
LEVELS = {
    "gated_delta_rule": _LEVELS | {"inputs": ("all", "state"), "normalise": (True, False)},
    "ssd": _LEVELS
    | {"inputs": ("all", "frozen", "state"), **dict.fromkeys(("D", "z", "dt_bias", "softplus"), (True, False))},
}


def pairwise(levels: dict[str, tuple]) -> list[dict]:
    """Few rows in which any two options meet in every combination of theirs: each row begins with a pair that is still
    wanting, and takes of every other option the value that completes the most of them."""
    names = list(levels)
    wanting = {
        ((a, x), (b, y)) for i, a in enumerate(names) for b in names[i + 1 :] for x in levels[a] for y in levels[b]
    }
    rows = []
    while wanting:
        row = dict(min(wanting, key=repr))
        for name in names:
            if name not in row:
                row[name] = max(levels[name], key=lambda x, n=name, r=row: len(_pairs(r | {n: x}, names) & wanting))
        wanting -= _pairs(row, names)
        rows.append({name: row[name] for name in names})
    return rows


def _pairs(row: dict, names: list[str]) -> set:
    given = [(name, row[name]) for name in names if name in row]
    return {(x, y) for i, x in enumerate(given) for y in given[i + 1 :]}


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _start(B: int, shape: tuple[int, ...], how: Given) -> tuple[Start, Tensor]:
    """Where sequences start, of B rows of T tokens (those of a packed batch are of one row), and their final states."""
    leading = {None: None, "shared": (), "each": (B,), "bank": (B + 2,)}[how.state]
    start = Start(
        None if leading is None else _empty(*leading, *shape, dtype=torch.float32),
        _empty(B, dtype=torch.int32) if how.state == "bank" else None,
        _empty(B + 1, dtype=torch.int32) if how.packed else None,
    )
    return start, _empty(B, *shape, dtype=torch.float32)


def _wanted(names: set[str], start: Start) -> Wanted:
    return Wanted(frozenset(names), () if start.state is None else tuple(start.state.shape))


def _scheduled(how: Given, run: Callable[[], object]) -> Callable[[], object]:
    """The call under the schedule that is asked for."""

    def call():
        before = os.environ.pop("S0KERNELS_TRITON_SCHEDULE", None)
        try:
            if how.schedule is not None:
                os.environ["S0KERNELS_TRITON_SCHEDULE"] = how.schedule
            run()
        finally:
            os.environ.pop("S0KERNELS_TRITON_SCHEDULE", None)
            if before is not None:
                os.environ["S0KERNELS_TRITON_SCHEDULE"] = before

    return call


def delta_calls(
    B=1, T=8192, H=16, HV=32, K=128, V=128, dtype=torch.bfloat16, how=EVERYTHING, wanted=("all", "state")
) -> Calls:
    """Calls of the gated delta rule; the backwards are those of `wanted`."""
    rows, length = (1, B * T) if how.packed else (B, T)
    gates = torch.float32 if how.gates == "fp32" else dtype
    q, k, v = (_empty(rows, length, *heads, dtype=dtype) for heads in ((H, K), (H, K), (HV, V)))
    g, beta = (_empty(rows, length, HV, dtype=gates) for _ in range(2))
    start, final = _start(B, (HV, K, V), how)
    inputs, options = DeltaInputs(q, k, v, g, beta), DeltaOptions(K**-0.5, how.normalise)

    def forward():
        return gated_delta_rule_forward(inputs, start, options, how.final)

    def backward(of: str):
        names = {"all": {"q", "k", "v", "g", "beta"}, "state": set()}[of] | _state_wanted(of, how)
        gated_delta_rule_backward(_gradients(v, final, how), inputs, start, options, _wanted(names, start))

    def step():
        pool = Pool(_empty(B + 2, HV, K, V, dtype=torch.float32), start.indices)
        first = DeltaInputs(*(_empty(B, *x.shape[2:], dtype=x.dtype) for x in inputs))
        gated_delta_rule_step(first, pool, options)

    calls = {"forward": _scheduled(how, forward), "step": step}
    return calls | {_BACKWARDS[inputs]: functools.partial(backward, inputs) for inputs in wanted if _any(inputs, how)}


def ssd_calls(
    B=1, T=8192, H=24, P=128, N=256, G=1, dtype=torch.bfloat16, how=EVERYTHING, wanted=("all", "frozen", "state")
) -> Calls:
    """Calls of Mamba-2 SSD; the backwards are those of `wanted`."""
    rows, length = (1, B * T) if how.packed else (B, T)
    x, b, c = (_empty(rows, length, *heads, dtype=dtype) for heads in ((H, P), (G, N), (G, N)))
    dt = _empty(rows, length, H, dtype=torch.float32 if how.gates == "fp32" else dtype)
    A = _empty(H, dtype=torch.float32)
    optional = {"D": A if how.D else None, "z": x if how.z else None, "dt_bias": A if how.dt_bias else None}
    start, final = _start(B, (H, P, N), how)
    inputs, options = SSDInputs(x, dt, A, b, c, **optional), SSDOptions(how.softplus, 0.0, 1.0)

    def forward():
        return ssd_forward(inputs, start, options, how.final)

    def backward(of: str):
        tokens = {"x", "dt", "B", "C", "z"}
        names = {"all": tokens | {"A", "D", "dt_bias"}, "frozen": tokens, "state": set()}[of]
        names = names - {name for name, value in optional.items() if value is None} | _state_wanted(of, how)
        ssd_backward(_gradients(x, final, how), inputs, start, options, _wanted(names, start))

    def step():
        pool = Pool(_empty(B + 2, H, P, N, dtype=torch.float32), start.indices)
        of_tokens = {name: value for name, value in inputs._asdict().items() if value is not None and value.dim() > 1}
        first = {name: _empty(B, *value.shape[2:], dtype=value.dtype) for name, value in of_tokens.items()}
        ssd_step(inputs._replace(**first), pool, options)

    calls = {"forward": _scheduled(how, forward), "step": step}
    return calls | {_BACKWARDS[name]: functools.partial(backward, name) for name in wanted if _any(name, how)}


_BACKWARDS = {"all": "backward", "frozen": "frozen backward", "state": "state-only backward"}


def _any(inputs: str, how: Given) -> bool:
    """Whether anything wants a gradient."""
    return inputs != "state" or how.state is not None


def _state_wanted(inputs: str, how: Given) -> set[str]:
    """A state for each sequence stands for those that nobody tunes: its gradient is wanted alone, or not at all."""
    return set() if how.state is None or (how.state == "each" and inputs != "state") else {"initial_state"}


def _gradients(output: Tensor, final: Tensor, how: Given) -> Grads:
    return Grads(None if how.gradients == "final state" else output, None if how.gradients == "output" else final)


#: What is compiled, by name: the heads of every family of models, in bf16 where nothing else is said.
CASES: dict[str, Callable[[], Calls]] = {
    "delta rule 128/128": functools.partial(delta_calls, B=8, T=1024),
    "delta rule 128/128, few heads": functools.partial(delta_calls, H=4, HV=8),
    "delta rule 64/64 fp16": functools.partial(delta_calls, B=8, T=1024, K=64, V=64, dtype=torch.float16),
    "delta rule 256/256": functools.partial(delta_calls, B=8, T=1024, K=256, V=256),
    "delta rule 128/128 fp32": functools.partial(delta_calls, B=8, T=1024, dtype=torch.float32),
    "Qwen3.5, fewer heads": functools.partial(delta_calls, B=8, T=1024, HV=16),
    "Lara-mini": functools.partial(delta_calls, B=8, T=1024, H=8, HV=16),
    "OLMo-Hybrid": functools.partial(delta_calls, B=8, T=1024, H=30, HV=30, K=96, V=192),
    "Falcon-H1-7B": functools.partial(ssd_calls, B=8, T=1024),
    "Falcon-H1-7B, one sequence": ssd_calls,
    "Falcon-H1-0.5B": functools.partial(ssd_calls, B=8, T=1024, P=64, N=128),
    "Falcon-H1-1.5B": functools.partial(ssd_calls, B=8, T=1024, H=48, P=64),
    "Falcon-H1-3B": functools.partial(ssd_calls, B=8, T=1024, H=32),
    "Falcon-H1-34B": functools.partial(ssd_calls, B=8, T=1024, H=32, G=2),
    "Bamba, Granite": functools.partial(ssd_calls, B=8, T=1024, H=128, P=64, N=128),
    "Granite, N 256": functools.partial(ssd_calls, B=8, T=1024, H=128, P=64),
    "Nemotron-H": functools.partial(ssd_calls, B=8, T=1024, H=128, P=64, N=128, G=8),
    "Zamba2, 80 heads": functools.partial(ssd_calls, B=8, T=1024, H=80, P=64, N=64),
    "Zamba2, 112 heads": functools.partial(ssd_calls, B=8, T=1024, H=112, P=64, N=64, G=2),
    "Mamba-2 2.7B fp16": functools.partial(ssd_calls, B=8, T=1024, H=80, P=64, N=128, dtype=torch.float16),
    "Falcon-H1-7B, no optional input": functools.partial(
        ssd_calls, B=8, T=1024, how=Given(D=False, z=False, dt_bias=False)
    ),
    "Falcon-H1-7B fp32": functools.partial(ssd_calls, B=8, T=1024, dtype=torch.float32),
}
#: the heads of Qwen3.5-4B and those of Falcon-H1-7B
FLAGSHIPS = ("delta rule 128/128", "Falcon-H1-7B")
#: cases that are more than other numbers of heads
SIZES = (
    *FLAGSHIPS,
    "delta rule 128/128, few heads",
    "delta rule 64/64 fp16",
    "delta rule 256/256",
    "delta rule 128/128 fp32",
    "OLMo-Hybrid",
    "Falcon-H1-7B, one sequence",
    "Falcon-H1-0.5B",
    "Falcon-H1-1.5B",
    "Zamba2, 80 heads",
    "Falcon-H1-7B fp32",
)


def _row(maker: Callable[..., Calls], row: dict, **sizes) -> Callable[[], Calls]:
    options = dict(row)
    wanted = (options.pop("inputs"),)
    return functools.partial(maker, B=8, T=1024, how=Given(**options), wanted=wanted, **sizes)


#: Small heads, their optional arguments in pairs.
PAIRS: dict[str, Callable[[], Calls]] = {
    f"{op}, options {i}": _row(maker, row, **sizes)
    for op, maker, sizes in (
        ("gated_delta_rule", delta_calls, {"K": 64, "V": 64}),
        ("ssd", ssd_calls, {"H": 80, "P": 64, "N": 64}),
    )
    for i, row in enumerate(pairwise(LEVELS[op]))
}
