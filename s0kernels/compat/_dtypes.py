"""Helpers for the signatures of other libraries: tensors of several dtypes, and errors with the caller's names."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor


def widest(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype that can hold the values of all tensors: fp32 for bf16 and fp16."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors if x is not None))


def as_scalar(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to `dtype`, or keep fp32, which the ops accept together with it."""
    return x if x.dtype in (dtype, torch.float32) else x.to(torch.promote_types(dtype, torch.float32))


@contextlib.contextmanager
def under_the_name(function: str, op: str, **names: str) -> Iterator[None]:
    """Rename errors of `op`: they name `function` instead, and its arguments by `names`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        text = str(error)
        if not text.startswith(f"{op}: "):
            raise
        argument, _, rest = text.removeprefix(f"{op}: ").partition(" ")
        raise type(error)(f"{function}: {names.get(argument, argument)} {rest}") from error
