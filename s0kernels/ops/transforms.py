"""Detect and refuse derivatives that compiled kernels do not have: forward mode, torch.func's transforms, second
derivatives.

The references are plain PyTorch and have them all. torch does not tell a kernel that it is being transformed, so a
transform that is not looked for here would be lost without an error.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable)


def constant_in_graphs(function: Function) -> Function:
    """Mark a function like `torch.compiler.assume_constant_result`, without its import of the compiler, which takes a
    second."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


@constant_in_graphs  # torch guards a graph by the transform levels that it was traced in
def _level() -> str | None:
    """Name the transform that is active in this thread, whatever tensors it applies to; None if there is none."""
    stack = get_interpreter_stack()
    if stack is not None and any(level.key() in (TransformType.Grad, TransformType.Jvp) for level in stack):
        return "torch.func's grad, vjp, jvp, jacrev and jacfwd"
    return "forward-mode differentiation (dual numbers)" if forward_ad._current_level >= 0 else None


def find(*tensors: Tensor | None) -> str | None:
    """Name the transform that these tensors take part in and that a kernel would miss; None if there is none. vmap does
    not count, because it calls the kernels."""
    name = _level()
    if name is None or torch.compiler.is_compiling():  # a traced tensor cannot be asked whether it takes part
        return name
    return name if any(x is not None and _is_transformed(x) for x in tensors) else None


def _is_transformed(x: Tensor) -> bool:
    return is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None


def refuse(op: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError if a tensor takes part in a transform, for ops that no backend can transform."""
    name = find(*tensors)
    if name is not None:
        raise NotImplementedError(
            f"{op}: {name} is not supported; the scan with backend='reference' and T = 1 supports it"
        )


def check_gradients(op: str, *grads: Tensor | None) -> None:
    """Raise NotImplementedError if a gradient takes part in a transform. The kernel would lose it, or torch would fail
    with an obscure message."""
    name = find(*grads)
    if any(grad is not None and is_legacy_batchedtensor(grad) for grad in grads):
        name = "is_grads_batched=True and vectorize=True"
    if name is not None:
        raise NotImplementedError(
            f"{op}: the backward does not support {name}; the backward of backend='reference' does"
        )


def no_second_derivative(op: str) -> Callable:
    """Return the backward of a backward, which raises NotImplementedError."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"{op}: a second derivative (backward through a gradient made with create_graph=True) is not supported by "
            "compiled and chunked backends; backend='reference' supports it, also through torch.func.grad and hessian"
        )

    return backward


def one_by_one(op: Callable) -> Callable:
    """Return a torch.vmap rule for an op that returns tensors: it calls the op for each entry of the batch in turn."""

    def rule(info, in_dims, *arguments):
        results = [
            op(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = [torch.stack(parts) for parts in zip(*results, strict=True)]
        kind = list if results and isinstance(results[0], list) else tuple
        return kind(outputs), kind([0] * len(outputs))

    return rule
