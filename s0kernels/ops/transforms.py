"""What compiled kernels cannot differentiate: forward-mode tangents, torch.func's transforms, second derivatives.

The references are plain PyTorch, which can. Nobody tells a kernel that it is being transformed: what it does not look
for is lost without an error.
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
    """`torch.compiler.assume_constant_result`, which would import the compiler: a second for who compiles nothing."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


@constant_in_graphs  # graphs are guarded by the levels that they were traced in
def _level() -> str | None:
    """The transform at work in this thread that a kernel would have to know of, whatever it is applied to."""
    stack = get_interpreter_stack()
    if stack is not None and any(level.key() in (TransformType.Grad, TransformType.Jvp) for level in stack):
        return "torch.func's grad, vjp, jvp, jacrev and jacfwd"
    return "forward-mode differentiation (dual numbers)" if forward_ad._current_level >= 0 else None


def find(*tensors: Tensor | None) -> str | None:
    """The transform that these tensors take part in and that a kernel would not see, by its name; else None. Not vmap,
    which calls the kernels."""
    name = _level()
    if name is None or torch.compiler.is_compiling():  # what takes part cannot be asked there
        return name
    return name if any(x is not None and _is_transformed(x) for x in tensors) else None


def _is_transformed(x: Tensor) -> bool:
    return is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None


def refuse(op: str, *tensors: Tensor | None) -> None:
    """For what no backend can do with transformed tensors."""
    name = find(*tensors)
    if name is not None:
        raise NotImplementedError(f"{op}: {name} is not supported; the scan with backend='reference' and T = 1 has it")


def check_gradients(op: str, *grads: Tensor | None) -> None:
    """Refuse what comes back to a kernel and would be lost there, or would fail in words of torch that say nothing."""
    name = find(*grads)
    if any(grad is not None and is_legacy_batchedtensor(grad) for grad in grads):
        name = "is_grads_batched=True and vectorize=True"
    if name is not None:
        raise NotImplementedError(f"{op}: the backward does not support {name}; that of backend='reference' does")


def no_second_derivative(op: str) -> Callable:
    """The backward of a backward."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"{op}: a second derivative (backward through a gradient made with create_graph=True) is not supported by "
            "compiled and chunked backends; backend='reference' has it, which torch.func.grad and hessian take"
        )

    return backward


def one_by_one(op: Callable) -> Callable:
    """A rule of torch.vmap for an op that returns tensors: it is called for each entry of the batch in turn."""

    def rule(info, in_dims, *arguments):
        results = [
            op(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = [torch.stack(parts) for parts in zip(*results, strict=True)]
        kind = list if results and isinstance(results[0], list) else tuple
        return kind(outputs), kind([0] * len(outputs))

    return rule
