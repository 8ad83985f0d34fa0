"""Compare results with the recurrence in fp64: for one implementation before it is timed, and for every op on every
usable backend to check a device."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s0kernels import ops
from s0kernels.bench.inputs import NOT_INPUTS, WEIGHTS, Heads, Values, mixer_inputs, nearly_equal_keys, scan_inputs
from s0kernels.calls import Call
from s0kernels.ops import mixer_steps, registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: number of sets of inputs over which errors are averaged: the error of a sum to one number per head varies by a factor
#: of five
DRAWS = 3
#: Allowed errors, in multiples of the error of the recurrence. The contract allows our kernels twice that error. The
#: budget of other libraries allows another order of sums (the gradient of A that transformers computes in fp32 had four
#: times the error), but no wrong result.
OUR_BUDGET, THEIR_BUDGET = 2.0, 8.0
#: allowed errors of our kernels with nearly equal keys and beta at 2, where chunks amplify rounding: in multiples of
#: the error of the recurrence, and in roundings of the dtype
AMPLIFIED_BUDGET, AMPLIFIED_ROUNDINGS = 5.0, 12.0
#: tensors that models keep in fp32 if activations are in half precision
_FP32 = (*WEIGHTS, "g", "A_log", "state", "initial_state")
_ROWS, _TOKENS, _STEPS, _STATES = 2, 80, 3, 3
_HEADS: dict[str, Heads] = {
    "gated_delta_rule": {"H": 4, "HV": 8, "K": 64, "V": 128},
    "ssd": {"H": 8, "P": 64, "G": 4, "N": 128},
}
_LARGEST, _WIDTH = 128, 4  # largest dimension of these heads; width of the convolution

Errors = dict[str, float]
Results = dict[str, Tensor]


# One implementation


def gradients(
    run: Callable[[Values], Sequence[Tensor]],
    values: Values,
    weights: Sequence[Tensor] | None = None,
    wanted: Sequence[str] | None = None,
) -> Results:
    """Return output, final state and, as d<name>, the gradients of <output, w0> + <final_state, w1> for all inputs or
    those in `wanted`. Without `weights`, random weights are used, the same in every call."""
    if wanted is None:
        wanted = [n for n in values if n not in NOT_INPUTS or n == "initial_state"]
    leaves = {
        n: x.detach().clone().requires_grad_(n in wanted) if x.is_floating_point() else x for n, x in values.items()
    }
    found = run(leaves)
    if weights is None:
        random = torch.Generator().manual_seed(0)
        weights = [torch.randn(x.shape, generator=random, dtype=torch.float64) for x in found]
    loss = torch.stack([(x * w.to(x)).sum() for x, w in zip(found, weights, strict=True)]).sum()
    grads = torch.autograd.grad(loss, [leaves[n] for n in wanted], materialize_grads=True)
    named = dict(zip((f"d{n}" for n in wanted), grads, strict=True))
    return {"output": found[0].detach(), "final_state": found[1].detach()} | named


def errors(found: Sequence[Results], truth: Sequence[Results]) -> Errors:
    """Return the root mean square of the difference divided by that of the truth, over all draws. The truth is fp64 on
    the CPU."""

    def square(name: str, minus: bool) -> float:
        draws = zip(found, truth, strict=True)
        return sum(float(((a[name].cpu().double() if minus else 0) - b[name]).square().mean()) for a, b in draws)

    return {name: (square(name, True) / square(name, False)) ** 0.5 for name in truth[0]}


class Judge:
    """The recurrence on some inputs, in fp64 and in their own dtype, as the reference for implementations.

    `results(implementation, values)` runs an implementation; `recurrence` is the trusted one.
    """

    def __init__(self, results: Callable[[Callable, Values], Results], recurrence: Callable, values: Values):
        self._results, self.values = results, values
        exact = {n: x.double() if x.is_floating_point() else x for n, x in values.items()}
        self._truth = {n: x.cpu() for n, x in results(recurrence, exact).items()}
        self._allowed = self._errors(recurrence)
        self._rounding = torch.finfo(next(iter(values.values())).dtype).eps

    def _errors(self, run: Callable) -> Errors:
        return errors([self._results(run, self.values)], [self._truth])

    def beyond(self, tried: Callable, times: float) -> str | None:
        """Return None if all errors are at most `times` those of the recurrence in the dtype of the inputs, plus
        rounding; else name the first error that is larger."""
        for name, error in self._errors(tried).items():
            budget = times * self._allowed[name] + self._rounding
            if not error <= budget:  # also true for NaN
                return f"error of {name}: {error:.1e}, allowed {budget:.1e}"
        return None


# Every op


class Row(NamedTuple):
    """The largest error of all results, relative to fp64, and the allowed error. The results include the gradients of
    scans and the states that steps write. If the backend fails, `worst` is the message of the failure, and `error` is
    NaN."""

    device: str
    op: str
    backend: str
    dtype: str
    error: float
    budget: float
    worst: str

    @property
    def passed(self) -> bool:
        return self.error <= self.budget < torch.inf  # False for NaN


#: the tensors that a step updates
_WRITTEN = ("state", "window")
_OPTIONS = {
    "gated_delta_rule": {"use_qk_l2norm": True},
    "ssd": {"dt_softplus": True},
    "gated_delta_mixer": {"eps": 1e-6},
    "ssd_mixer": {"eps": 1e-6},
}


def _inputs(op: str, seed: int) -> Values:
    """Make fp64 inputs with a bank of three states. In the inputs of a step the first dimension is the tokens."""
    family = "gated_delta_rule" if op.startswith("gated_delta") else "ssd"
    options = {"seed": seed, "dtype": torch.float64}
    if "mixer" in op:
        return mixer_inputs(family, _HEADS[family], (_STEPS, _ROWS), width=_WIDTH, states=_STATES, **options)
    sizes = (_STEPS, _ROWS) if op.endswith("_step") else (_ROWS, _TOKENS)
    values = scan_inputs(family, _HEADS[family], sizes, extras=True, rates=(0.08, 0.12), **options)
    first = values["initial_state"]
    return values | {"initial_state": torch.stack([first, *(first.roll(i + 1, 0) for i in range(_STATES - 1))])}


def _results(op: str, values: Values, backend: str) -> Results:
    run = getattr(mixer_steps if "mixer" in op else ops, op)
    rows = torch.tensor([2, 0], device=next(iter(values.values())).device)
    options = _OPTIONS[op.removesuffix("_step")] | {"state_indices": rows, "backend": backend}
    if not op.endswith("_step"):
        return gradients(lambda leaves: run(**leaves, **options), values)
    constant = {n: values[n] for n in ("A_log", "norm", "conv_weight", "conv_bias") if n in values}
    written = {n: values[n].clone() for n in _WRITTEN if n in values}
    if not written:
        written = {"state": values["initial_state"].clone()}
    tokens = {n: x for n, x in values.items() if n not in (*constant, *written)}
    outputs = []
    for place in range(_STEPS):
        of_token = {n: x if n in WEIGHTS else x[place] for n, x in tokens.items() if n not in NOT_INPUTS}
        outputs.append(run(**of_token, **constant, **written, **options))
    return {"output": torch.stack(outputs), **written}


class _Case(NamedTuple):
    """A case of an op: its fp64 inputs, and the allowed error in multiples of the recurrence's error and in
    roundings."""

    op: str
    name: str
    inputs: list[Values]
    times: float = OUR_BUDGET
    roundings: float = 1.0


def _cases() -> Iterator[_Case]:
    for op in registry.OPS:
        yield _Case(op, op, [_inputs(op, seed) for seed in range(DRAWS)])
    op = "gated_delta_rule"
    draws = [nearly_equal_keys(_inputs(op, seed), 0.1, (1.96, 2.0), seed) for seed in range(DRAWS)]
    yield _Case(op, f"{op}, nearly equal keys", draws, AMPLIFIED_BUDGET, AMPLIFIED_ROUNDINGS)


def _places(op: str, dtype: torch.dtype) -> list[tuple[torch.device, str]]:
    """The devices, and which backends they have for an op."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    backends = [backend for backend in registry.ORDER if backend != "reference"]
    calls = [(device, backend, Call(op, device, dtype, _LARGEST, _WIDTH)) for device in devices for backend in backends]
    return [(device, backend) for device, backend, call in calls if not registry.unusable(backend, call)]


def count() -> int:
    """Of the rows that there will be."""
    return sum(len(_places(case.op, dtype)) for case in _cases() for dtype in DTYPES)


def rows() -> Iterator[Row]:
    """Yield one row per case, dtype, device and backend. A budget is a multiple of the recurrence's error in the same
    dtype, plus a number of roundings."""
    for case in _cases():
        op = case.op
        for dtype in DTYPES:
            draws = [
                {name: x.to(torch.float32 if name in _FP32 else dtype) for name, x in e.items()} for e in case.inputs
            ]
            truth = [_results(op, {name: x.double() for name, x in d.items()}, "reference") for d in draws]
            plain = errors([_results(op, d, "reference") for d in draws], truth)
            rounding = case.roundings * torch.finfo(dtype).eps
            budgets = {name: case.times * error + rounding for name, error in plain.items()}
            for device, backend in _places(op, dtype):
                here = [{name: x.to(device) for name, x in d.items()} for d in draws]
                yield _row(case, backend, here, truth, budgets, dtype)


def _row(case: _Case, backend: str, draws: list, truth: list, budgets: Errors, dtype: torch.dtype) -> Row:
    device = next(iter(draws[0].values())).device
    place = str(device), case.name, backend, str(dtype).removeprefix("torch.")
    try:
        found = errors([_results(case.op, d, backend) for d in draws], truth)
    except RuntimeError as error:
        return Row(*place, torch.nan, torch.nan, str(error).partition("\n")[0])
    ratio = {name: found[name] / budgets[name] for name in budgets}
    worst = max(ratio, key=lambda name: torch.inf if ratio[name] != ratio[name] else ratio[name])
    return Row(*place, found[worst], budgets[worst], worst)
