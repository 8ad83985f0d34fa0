"""Every op on every backend that this machine can use, against the recurrence in fp64: before a device is trusted."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from s0kernels import ops
from s0kernels.ops import _dispatch, mixer_steps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: sets of inputs, over which errors are averaged: what a sum to one number a head loses varies by a factor of five
DRAWS = 3
#: what models keep in fp32 beside activations in half precision
_FP32 = ("g", "A", "D", "dt_bias", "A_log", "state", "initial_state")
#: sequences, tokens of a scan, tokens of a step, groups, heads, the two sizes of a state, width of the convolution
_B, _T, _STEPS, _G, _H, _D, _E, _W = 2, 80, 3, 4, 8, 64, 128, 4


class Row(NamedTuple):
    """Largest error of all results (of scans with the gradients, of steps with what they write), relative to fp64, and
    what is allowed. Where the backend fails, `worst` is its error, and `error` is NaN."""

    device: str
    op: str
    backend: str
    dtype: str
    error: float
    budget: float
    worst: str

    @property
    def passed(self) -> bool:
        return self.error <= self.budget < torch.inf  # never for NaN


def _inputs(op: str, seed: int) -> dict[str, Tensor]:
    """fp64 inputs by name, with a bank of three states; those of a step have their tokens first."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    at = (_STEPS, _B) if op.endswith("_step") else (_B, _T)
    state = "state" if op.endswith("_step") else "initial_state"
    delta, mixer = op.startswith("gated_delta"), "mixer" in op
    if mixer:
        channels = 2 * _G * _D + _H * _E if delta else _H * _D + 2 * _G * _E
        tensors = {"mixed": normal(*at, channels), "A_log": normal(_H), "dt_bias": normal(_H)}
        tensors |= {"conv_weight": normal(channels, _W), "conv_bias": normal(channels)}
        tensors |= {"window": normal(3, channels, _W)}
        if delta:
            tensors |= {"z": normal(*at, _H, _E), "b": normal(*at, _H), "a": normal(*at, _H), "norm": normal(_E)}
        else:
            tensors |= {"gate": normal(*at, _H * _D), "dt": normal(*at, _H), "D": normal(_H), "norm": normal(_H * _D)}
    elif delta:
        tensors = {"q": normal(*at, _G, _D), "k": normal(*at, _G, _D), "v": normal(*at, _H, _E)}
        tensors |= {"g": -0.1 * normal(*at, _H).abs(), "beta": normal(*at, _H).sigmoid()}
    else:
        tensors = {"x": normal(*at, _H, _D), "dt": normal(*at, _H), "A": -0.1 - 0.02 * normal(_H).clamp(-2, 2)}
        tensors |= {"B": normal(*at, _G, _E), "C": normal(*at, _G, _E), "D": normal(_H), "z": normal(*at, _H, _D)}
        tensors |= {"dt_bias": normal(_H)}
    return tensors | {state: normal(3, _H, _D, _E)}


#: what a step is given a token of
_OF_TOKENS = ("mixed", "z", "b", "a", "gate", "dt", "q", "k", "v", "g", "beta", "x", "B", "C")
_OPTIONS = {
    "gated_delta_rule": {"use_qk_l2norm": True},
    "ssd": {"dt_softplus": True},
    "gated_delta_rule_step": {"use_qk_l2norm": True},
    "ssd_step": {"dt_softplus": True},
    "gated_delta_mixer_step": {"eps": 1e-6},
    "ssd_mixer_step": {"eps": 1e-6},
}


def _results(op: str, tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    run = getattr(mixer_steps if "mixer" in op else ops, op)
    rows = torch.tensor([2, 0], device=next(iter(tensors.values())).device)
    options = _OPTIONS[op] | {"state_indices": rows, "backend": backend}
    if not op.endswith("_step"):
        return _scan_results(run, tensors, options)
    written = {name: tensors[name].clone() for name in ("state", "window") if name in tensors}
    constant = {name: x for name, x in tensors.items() if name not in (*_OF_TOKENS, *written)}
    outputs = []
    for token in range(_STEPS):
        of_token = {name: x[token] for name, x in tensors.items() if name in _OF_TOKENS}
        outputs.append(run(**of_token, **constant, **written, **options))
    return {"output": torch.stack(outputs), **written}


def _scan_results(scan, tensors: dict[str, Tensor], options: dict) -> dict[str, Tensor]:
    """Output, final state, and the gradients of a fixed random sum of both."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    results = scan(**leaves, **options)
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=random, dtype=torch.float64) for x in results]
    loss = sum((x * weight.to(x)).sum() for x, weight in zip(results, weights, strict=True))
    found = {"output": results.output.detach(), "final_state": results.final_state.detach()}
    return found | dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def errors(found: list[dict[str, Tensor]], truth: list[dict[str, Tensor]]) -> dict[str, float]:
    """Root mean square, over all draws, of the difference over that of the truth, which is fp64 on the CPU."""

    def square(name: str, minus: bool) -> float:
        draws = zip(found, truth, strict=True)
        return sum(float(((a[name].cpu().double() if minus else 0) - b[name]).square().mean()) for a, b in draws)

    return {name: (square(name, True) / square(name, False)) ** 0.5 for name in truth[0]}


def rows() -> Iterator[Row]:
    """One row per op, dtype, device and backend; a budget is twice the error of the recurrence in the same dtype, and
    the rounding of that dtype."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for op in _dispatch.OPS:
        exact = [_inputs(op, seed) for seed in range(DRAWS)]
        for dtype in DTYPES:
            draws = [{name: x.to(torch.float32 if name in _FP32 else dtype) for name, x in e.items()} for e in exact]
            truth = [_results(op, {name: x.double() for name, x in d.items()}, "reference") for d in draws]
            plain = errors([_results(op, d, "reference") for d in draws], truth)
            budgets = {name: 2 * error + torch.finfo(dtype).eps for name, error in plain.items()}
            for device in devices:
                here = [{name: x.to(device) for name, x in d.items()} for d in draws]
                for backend in _dispatch.ORDER:
                    if backend != "reference" and not _dispatch.unusable(backend, op, device, dtype, _E, _W):
                        yield _row(op, backend, here, truth, budgets, dtype)


def _row(op: str, backend: str, draws: list, truth: list, budgets: dict[str, float], dtype: torch.dtype) -> Row:
    device = next(iter(draws[0].values())).device
    place = str(device), op, backend, str(dtype).removeprefix("torch.")
    try:
        found = errors([_results(op, d, backend) for d in draws], truth)
    except RuntimeError as error:
        return Row(*place, torch.nan, torch.nan, str(error).partition("\n")[0])
    ratio = {name: found[name] / budgets[name] for name in budgets}
    worst = max(ratio, key=lambda name: torch.inf if ratio[name] != ratio[name] else ratio[name])
    return Row(*place, found[worst], budgets[worst], worst)
