"""Every backend that this machine can use, against the recurrence in fp64: to run before trusting a device."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from s0kernels import ops
from s0kernels.ops import _dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: what models keep in fp32 beside activations in half precision
_FP32 = ("g", "A", "D", "dt_bias", "initial_state")


class Row(NamedTuple):
    """Largest error of the output, the final state and all gradients, relative to fp64, and what is allowed."""

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


def _inputs(op: str) -> dict[str, Tensor]:
    """Two sequences of 150 tokens from a bank of three states; fp64."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    B, T, G, H, D, E = 2, 150, 2, 4, 64, 128
    if op == "gated_delta_rule":
        tensors = {"q": normal(B, T, G, D), "k": normal(B, T, G, D), "v": normal(B, T, H, E)}
        tensors |= {"g": -0.1 * normal(B, T, H).abs(), "beta": normal(B, T, H).sigmoid()}
        return tensors | {"initial_state": normal(3, H, D, E)}
    tensors = {"x": normal(B, T, H, D), "dt": normal(B, T, H), "A": -0.1 * normal(H).abs()}
    tensors |= {"B": normal(B, T, G, E), "C": normal(B, T, G, E), "D": normal(H), "z": normal(B, T, H, D)}
    return tensors | {"dt_bias": normal(H), "initial_state": normal(3, H, D, E)}


def _results(op: str, tensors: dict[str, Tensor], backend: str, weights: list[Tensor] | None) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    names = {"gated_delta_rule": ("q", "k", "v", "g", "beta"), "ssd": ("x", "dt", "A", "B", "C")}[op]
    options = {"use_qk_l2norm": True} if op == "gated_delta_rule" else {"dt_softplus": True}
    rest = {name: x for name, x in leaves.items() if name not in names}
    rows = torch.tensor([2, 0], device=tensors["initial_state"].device)
    scan = getattr(ops, op)
    output, final = scan(*(leaves[n] for n in names), **rest, **options, state_indices=rows, backend=backend)
    found = {"output": output.detach(), "final_state": final.detach()}
    if weights is None:
        return found
    loss = (output * weights[0].to(output)).sum() + (final * weights[1].to(final)).sum()
    return found | dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square of the difference over that of the truth, which is fp64 on the CPU."""
    return {
        name: float((found[name].cpu().double() - x).square().mean().sqrt() / x.square().mean().sqrt())
        for name, x in truth.items()
    }


def rows() -> Iterator[Row]:
    """One row per device, op, backend and dtype; a budget is twice the error of the recurrence in the same dtype, and
    the rounding of that dtype."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for op in ("gated_delta_rule", "ssd"):
        exact = _inputs(op)
        generator = torch.Generator().manual_seed(1)
        shapes = _results(op, exact, "reference", None).values()
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in shapes]
        for dtype in DTYPES:
            tensors = {name: x.to(torch.float32 if name in _FP32 else dtype) for name, x in exact.items()}
            truth = _results(op, {name: x.double() for name, x in tensors.items()}, "reference", weights)
            plain = errors(_results(op, tensors, "reference", weights), truth)
            budgets = {name: 2 * error + torch.finfo(dtype).eps for name, error in plain.items()}
            for device in devices:
                here = {name: x.to(device) for name, x in tensors.items()}
                for backend in _dispatch.ORDER:
                    if backend == "reference" or _dispatch.unusable(backend, op, device, dtype):
                        continue
                    found = errors(_results(op, here, backend, weights), truth)
                    ratio = {n: found[n] / budgets[n] for n in truth}
                    worst = max(ratio, key=lambda n, r=ratio: torch.inf if r[n] != r[n] else r[n])
                    kind = str(dtype).removeprefix("torch.")
                    yield Row(str(device), op, backend, kind, found[worst], budgets[worst], worst)
