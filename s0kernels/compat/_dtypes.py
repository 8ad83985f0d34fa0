"""What the signatures of other libraries share: tensors of several dtypes, errors under the name that was called."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor


def widest(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that holds those of all tensors: fp32 for bf16 beside fp16."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors if x is not None))


def as_scalar(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype` or fp32, which the ops take beside it."""
    return x if x.dtype in (dtype, torch.float32) else x.to(torch.promote_types(dtype, torch.float32))


@contextlib.contextmanager
def under_the_name(function: str, op: str, **names: str) -> Iterator[None]:
    """Errors of `op` name `function`, and its arguments by the names that they have there."""
    try:
        yield
    except (TypeError, ValueError) as error:
        text = str(error)
        if not text.startswith(f"{op}: "):
            raise
        argument, _, rest = text.removeprefix(f"{op}: ").partition(" ")
        raise type(error)(f"{function}: {names.get(argument, argument)} {rest}") from error
