"""The passes that are timed: a pass over a scan, or one token, by our library or another one, and their work."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from s0kernels import ops
from s0kernels.bench.baselines import BASELINES, Baseline, Scan, Step
from s0kernels.bench.check import OUR_BUDGET, THEIR_BUDGET, Judge, gradients
from s0kernels.bench.inputs import NOT_INPUTS, WEIGHTS, Heads, Values, scan_inputs, state_for_each, token
from s0kernels.bench.measure import Case
from s0kernels.heads import MODELS
from s0kernels.ops import registry

OURS = "s0kernels"
PASSES = {"forward": "forward", "training": "forward + backward", "state": "backward of S0 alone", "step": "one token"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Op:
    name: str
    output: str  # name of the input whose shape and dtype the output has
    for_state: tuple[str, ...]  # the inputs that the backward of S0 alone reads, beside the gradient of the output
    work: Callable[[Heads, bool], float]  # floating-point operations per token of a forward, and a backward
    step_work: Callable[[Heads], float]

    @property
    def baselines(self) -> dict[str, Baseline]:
        return BASELINES[self.name]

    def options(self, values: Values) -> dict:
        return {"use_qk_l2norm": True} if self.name == "gated_delta_rule" else {"dt_softplus": "dt_bias" in values}

    def scan(self, values: Values, state: bool, backend: str | None) -> tuple[Tensor, Tensor]:
        """Run our scan, from S0 or from zero."""
        given = {n: x for n, x in values.items() if state or n not in ("initial_state", "state_indices")}
        return getattr(ops, self.name)(**given, **self.options(values), backend=backend)

    def step(self, values: Values, pool: Tensor, backend: str | None, **options) -> Callable[[], Tensor]:
        """Return a function that advances `pool` by the first token."""
        one, step = token(values), getattr(ops, f"{self.name}_step")
        return partial(step, **one, state=pool, **self.options(values), backend=backend, **options)

    def by(self, name: str, backend: str | None = None) -> Scan:
        """Return the scan called `name`: ours on `backend`, that of one of our backends, or that of another library."""
        if name in (OURS, *registry.ORDER):
            return partial(self.scan, backend=backend if name == OURS else name)
        return self.baselines[name].scan()

    def step_by(self, name: str, backend: str | None = None) -> Step:
        if name in (OURS, *registry.ORDER):
            return partial(self.step, backend=backend if name == OURS else name)
        make = self.baselines[name].step
        if make is None:
            raise ValueError("has no function for one token")
        return make()

    def judge(self, values: Values, *, step: bool = False) -> Judge:
        """Return a judge for outputs and gradients of the scan, or for the output and the new states of one token."""

        def of_scan(scan: Scan, values: Values) -> dict[str, Tensor]:
            return gradients(lambda leaves: scan(leaves, True), values)

        def of_step(step: Step, values: Values) -> dict[str, Tensor]:
            pool = state_for_each(values, values[self.output].shape[0]).clone()
            found = step(values, pool)()
            output, final = found if isinstance(found, tuple) else (found, pool)
            return {"output": output.flatten(), "state": final}

        recurrence = partial(self.step if step else self.scan, backend="reference")
        return Judge(of_step if step else of_scan, recurrence, values)

    def why_not(self, name: str, judge: Judge, backend: str | None = None, *, step: bool = False) -> str | None:
        """Return None if the implementation is available and right, so that it may be timed; else the reason why
        not."""
        ours = name in (OURS, *registry.ORDER)
        if not ours and (reason := self.baselines[name].unusable(str(judge.values["initial_state"].device))):
            return reason
        try:
            run = self.step_by(name, backend) if step else self.by(name, backend)
            return judge.beyond(run, OUR_BUDGET if ours else THEIR_BUDGET)
        except Exception as error:  # an error in one library must not end the measurement of the others
            return brief(error)


def _delta_work(heads: Heads, backward: bool) -> float:
    """Return the operations per token, counted for the compiled kernels: chunks have 32 tokens, and the
    backward recomputes states. Work that heads share counts half."""
    K, V, C = heads["K"], heads["V"], 32
    forward, back = 6 * K * V + C * (K + 2 * V), 16 * K * V + C * (3.5 * K + 5 * V)
    return heads["HV"] * (forward + back * backward)


def _ssd_work(heads: Heads, backward: bool) -> float:
    """Return the operations per token, counted for the compiled kernels: chunks have 64 tokens. Work that heads share
    counts a quarter."""
    N, P, C = heads["N"], heads["P"], 64
    forward, back = 4 * N * P + C * (N / 4 + P), 10 * N * P + C * (3 * N / 4 + 2 * P)
    return heads["H"] * (forward + back * backward)


SCANS = {
    "gated_delta_rule": Op(
        *("gated_delta_rule", "v", ("q", "k", "g", "beta"), _delta_work),
        lambda heads: 6 * heads["HV"] * heads["K"] * heads["V"],
    ),
    "ssd": Op("ssd", "x", ("dt", "A", "C"), _ssd_work, lambda heads: 4 * heads["H"] * heads["P"] * heads["N"]),
}


class Shape(NamedTuple):
    model: str
    batch: int
    length: int

    @classmethod
    def parse(cls, text: str, default: str = "") -> "Shape":
        model, _, sizes = text.lower().partition(":")
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", sizes or default)
        if model not in MODELS or not found:
            names = ", ".join(MODELS)
            raise ValueError(f"--shape must be MODEL or MODEL:BATCHxLENGTH, MODEL among {names}; got {text!r}")
        return cls(model, int(found[1]), int(found[2]))

    @property
    def op(self) -> Op:
        return SCANS[MODELS[self.model][0]]

    @property
    def heads(self) -> Heads:
        return MODELS[self.model][1]

    def values(self, device: str, dtype: torch.dtype) -> Values:
        return scan_inputs(self.op.name, self.heads, (self.batch, self.length), device=device, dtype=dtype)

    def __str__(self) -> str:
        return f"{self.model}:{self.batch}x{self.length}"


def case(op: Op, run: Scan, values: Values, what: str, state: bool = True, learns: bool = True) -> Case:
    """Return a pass over a scan, with or without S0, and with or without the gradient of S0. In addition to PASSES,
    `what` may be "backward" (all gradients) or "frozen" (gradients of activations and S0), which omit the forward."""
    weight = torch.ones_like(values[op.output])
    if what == "forward":

        def forward():
            with torch.no_grad():
                return run(values, state)

        return forward
    wanted = ["initial_state"] * (state and learns)
    if what != "state":
        wanted += [n for n in values if n not in NOT_INPUTS and not (what == "frozen" and n in WEIGHTS)]
    leaves = {n: x.detach().requires_grad_(n in wanted) if x.is_floating_point() else x for n, x in values.items()}
    inputs = [leaves[n] for n in wanted]
    if what == "training":

        def training():
            output, _ = run(leaves, state)
            return torch.autograd.grad(output, inputs, weight)

        return training
    output, _ = run(leaves, state)
    return lambda: torch.autograd.grad(output, inputs, weight, retain_graph=True)


def step_case(op: Op, step: Step, values: Values) -> Case:
    rows = values[op.output].shape[0]
    run = step(values, state_for_each(values, rows).clone())

    def without_grad():
        with torch.no_grad():
            return run()

    return without_grad


def traffic(op: Op, values: Values, what: str, rows: int) -> int:
    """Return the bytes that a pass must move: inputs and given gradients read once, results written once."""

    def size(*names: str) -> int:
        return sum(values[n].nbytes for n in names)

    initial = values["initial_state"]
    state = initial.nbytes if initial.dim() == 3 else initial[0].nbytes
    tokens, output, states = size(*(n for n in values if n not in NOT_INPUTS)), size(op.output), rows * state
    if what == "step":
        return tokens + output + 2 * states
    if what == "state":
        return size(*op.for_state) + output + state
    forward = tokens + output + state + states
    return forward + (what == "training") * (2 * tokens + output + 2 * state)


def operations(shape: Shape, what: str) -> float | None:
    """Return the floating-point operations of a pass. The count is the same for every implementation."""
    if what == "state":
        return None
    if what == "step":
        return shape.batch * shape.op.step_work(shape.heads)
    return shape.batch * shape.length * shape.op.work(shape.heads, what == "training")


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
