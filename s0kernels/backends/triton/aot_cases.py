"""The calls that are compiled ahead of time: tensors of the device "meta", which have no memory."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from s0kernels.backends import triton as backend
from s0kernels.backends.triton.common.launch import SCHEDULE
from s0kernels.calls import DeltaInputs, DeltaOptions, Grads, Pool, SSDInputs, SSDOptions, Start, Wanted
from s0kernels.heads import MODELS

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
    #: whether the forward keeps results for the backward
    kept: bool = False
    #: whether the tokens of a channel lie side by side, as after a convolution
    channels_first: bool = False

    def dtype_of_gates(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.gates == "fp32" else dtype


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
    "ssd": {name: values for name, values in _LEVELS.items() if name != "schedule"}
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


def _channels_first(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 1 else x


class DeltaSizes(NamedTuple):
    """Of a call of the gated delta rule."""

    H: int
    HV: int
    K: int
    V: int
    B: int = 8
    T: int = 1024
    dtype: torch.dtype = torch.bfloat16

    op = "gated_delta_rule"
    output = "v"  # has the shape of
    backwards = ("all", "state")

    @property
    def state(self) -> tuple[int, ...]:
        return self.HV, self.K, self.V

    def arguments(self, rows: int, length: int, how: Given) -> tuple[DeltaInputs, DeltaOptions]:
        q, k, v = (_empty(rows, length, *x, dtype=self.dtype) for x in ((self.H, self.K),) * 2 + ((self.HV, self.V),))
        g, beta = (_empty(rows, length, self.HV, dtype=how.dtype_of_gates(self.dtype)) for _ in range(2))
        return DeltaInputs(q, k, v, g, beta), DeltaOptions(self.K**-0.5, how.normalise)


class SSDSizes(NamedTuple):
    """Of a call of Mamba-2 SSD."""

    H: int
    P: int
    G: int
    N: int
    B: int = 8
    T: int = 1024
    dtype: torch.dtype = torch.bfloat16

    op = "ssd"
    output = "x"
    backwards = ("all", "frozen", "state")

    @property
    def state(self) -> tuple[int, ...]:
        return self.H, self.P, self.N

    def arguments(self, rows: int, length: int, how: Given) -> tuple[SSDInputs, SSDOptions]:
        x, B, C = (
            _empty(rows, length, *x, dtype=self.dtype) for x in ((self.H, self.P), (self.G, self.N), (self.G, self.N))
        )
        dt = _empty(rows, length, self.H, dtype=how.dtype_of_gates(self.dtype))
        A = _empty(self.H, dtype=torch.float32)
        optional = (A if how.D else None, x if how.z else None, A if how.dt_bias else None)
        return SSDInputs(x, dt, A, B, C, *optional), SSDOptions(how.softplus, 0.0, 1.0)


def _start(B: int, shape: tuple[int, ...], how: Given) -> Start:
    """Where sequences start, of B rows of T tokens; those of a packed batch are of one row."""
    leading = {None: None, "shared": (), "each": (B,), "bank": (B + 2,)}[how.state]
    return Start(
        None if leading is None else _empty(*leading, *shape, dtype=torch.float32),
        _empty(B, dtype=torch.int32) if how.state == "bank" else None,
        _empty(B + 1, dtype=torch.int32) if how.packed else None,
    )


@contextlib.contextmanager
def _scheduled(schedule: str | None) -> Iterator[None]:
    before = os.environ.pop(SCHEDULE, None)
    try:
        if schedule is not None:
            os.environ[SCHEDULE] = schedule
        yield
    finally:
        os.environ.pop(SCHEDULE, None)
        if before is not None:
            os.environ[SCHEDULE] = before


def calls_of(sizes: DeltaSizes | SSDSizes, how: Given = EVERYTHING, backwards: tuple[str, ...] = ()) -> Calls:
    """The calls of an op; without `backwards` with all that are told apart."""
    run_forward, run_backward, run_step = (getattr(backend, f"{sizes.op}_{x}") for x in ("forward", "backward", "step"))
    rows, length = (1, sizes.B * sizes.T) if how.packed else (sizes.B, sizes.T)
    inputs, options = sizes.arguments(rows, length, how)
    if how.channels_first:
        inputs = inputs._replace(**{n: _channels_first(x) for n, x in inputs._asdict().items() if x is not None})
    start, given = _start(sizes.B, sizes.state, how), {n: x for n, x in inputs._asdict().items() if x is not None}
    of_tokens = {name: x for name, x in given.items() if x.dim() > 1}

    kept = (getattr(backend, f"{sizes.op}_keep")(inputs, start, options, frozenset(given)),) if how.kept else ()

    def forward():
        with _scheduled(how.schedule):
            return run_forward(inputs, start, options, how.final, *kept)

    def backward(of: str):
        output, final = getattr(inputs, sizes.output), _empty(sizes.B, *sizes.state, dtype=torch.float32)
        grads = Grads(None if how.gradients == "final state" else output, None if how.gradients == "output" else final)
        names = {"all": set(given), "frozen": set(of_tokens), "state": set()}[of] | _state_wanted(of, how)
        shape = () if start.state is None else tuple(start.state.shape)
        run_backward(grads, inputs, start, options, Wanted(frozenset(names), shape), *kept)

    def step():
        pool = Pool(_empty(sizes.B + 2, *sizes.state, dtype=torch.float32), start.indices)
        first = {name: _empty(sizes.B, *x.shape[2:], dtype=x.dtype) for name, x in of_tokens.items()}
        run_step(inputs._replace(**first), pool, options)

    calls: Calls = {"forward": forward, "step": step}
    wanted = [of for of in backwards or sizes.backwards if of != "state" or how.state is not None]
    return calls | {_BACKWARDS[of]: functools.partial(backward, of) for of in wanted}


_BACKWARDS = {"all": "backward", "frozen": "frozen backward", "state": "state-only backward"}


def _state_wanted(inputs: str, how: Given) -> set[str]:
    """A state for each sequence stands for those that nobody tunes: its gradient is wanted alone, or not at all."""
    return set() if how.state is None or (how.state == "each" and inputs != "state") else {"initial_state"}


def _of(model: str, **changes) -> DeltaSizes | SSDSizes:
    op, heads = MODELS[model]
    return {"gated_delta_rule": DeltaSizes, "ssd": SSDSizes}[op](**{**heads, **changes})


#: The heads of every family of models, in bf16 where nothing else is said.
_FAMILIES = {
    "delta rule 128/128": _of("qwen3.5-4b"),
    "delta rule 128/128, few heads": _of("qwen3.5-4b", B=1, T=8192, H=4, HV=8),
    "delta rule 64/64 fp16": _of("qwen3.5-4b", K=64, V=64, dtype=torch.float16),
    "delta rule 256/256": _of("qwen3.5-4b", K=256, V=256),
    "delta rule 128/128 fp32": _of("qwen3.5-4b", dtype=torch.float32),
    "Qwen3.5, fewer heads": _of("qwen3.5-0.8b"),
    "Lara-mini": _of("lara-mini"),
    "OLMo-Hybrid": _of("olmo-hybrid"),
    "Falcon-H1-7B": _of("falcon-h1-7b"),
    "Falcon-H1-7B, one sequence": _of("falcon-h1-7b", B=1, T=8192),
    "Falcon-H1-0.5B": _of("falcon-h1-0.5b"),
    "Falcon-H1-1.5B": _of("falcon-h1-1.5b"),
    "Falcon-H1-3B": _of("falcon-h1-3b"),
    "Falcon-H1-34B": _of("falcon-h1-34b"),
    "Bamba, Granite": _of("bamba"),
    "Granite, N 256": _of("granite-4-h"),
    "Nemotron-H": _of("nemotron-h"),
    "Zamba2, 80 heads": _of("zamba2-2.7b"),
    "Zamba2, 112 heads": _of("zamba2-7b"),
    "Mamba-2 2.7B fp16": _of("mamba2-2.7b", dtype=torch.float16),
    "Falcon-H1-7B fp32": _of("falcon-h1-7b", dtype=torch.float32),
}
#: What is compiled, by name.
CASES: dict[str, Callable[[], Calls]] = {
    name: functools.partial(calls_of, sizes) for name, sizes in _FAMILIES.items()
} | {
    "delta rule 128/128, kept": functools.partial(calls_of, _of("qwen3.5-4b"), Given(kept=True)),
    "delta rule 128/128, kept, packed": functools.partial(
        calls_of, _of("qwen3.5-4b"), Given(kept=True, packed=True, state="bank")
    ),
    "delta rule 128/128, channels first": functools.partial(calls_of, _of("qwen3.5-4b"), Given(channels_first=True)),
    "Falcon-H1-7B, channels first": functools.partial(calls_of, _of("falcon-h1-7b"), Given(channels_first=True)),
    "Falcon-H1-7B, no optional input": functools.partial(
        calls_of, _of("falcon-h1-7b"), Given(D=False, z=False, dt_bias=False)
    ),
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


def _row(sizes: DeltaSizes | SSDSizes, row: dict) -> Callable[[], Calls]:
    how = Given(**{name: value for name, value in row.items() if name != "inputs"})
    return functools.partial(calls_of, sizes, how, (row["inputs"],))


#: Small heads, their optional arguments in pairs.
PAIRS: dict[str, Callable[[], Calls]] = {
    f"{sizes.op}, options {i}": _row(sizes, row)
    for sizes in (_of("qwen3.5-4b", K=64, V=64), _of("zamba2-2.7b"))
    for i, row in enumerate(pairwise(LEVELS[sizes.op]))
}
