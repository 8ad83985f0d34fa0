"""Checks of the trainer's arguments."""

import contextlib
import math
import numbers
import operator
from collections.abc import Iterator, Sequence
from typing import Any

from s0kernels.states import S0States
from s0kernels.tuning.loop import Callback


def positive(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"S0Trainer: {name} must be a positive int, got {value!r}")
    return number


def size(name: str, value: int | None) -> int | None:
    return None if value is None else positive(name, value)


def scale(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale) or scale == 0:
        raise ValueError(f"S0Trainer: scale must be a finite number other than 0, got {scale!r}")
    return float(scale)


def layers(layers: Sequence[int] | None, states: S0States) -> list[int]:
    if layers is None:
        return list(states)
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence) or not layers:
        raise TypeError(f"S0Trainer: layers must be a list of layer numbers, or None for all, got {layers!r}")
    unknown = [layer for layer in layers if isinstance(layer, bool) or layer not in list(states)]
    if unknown:
        raise ValueError(f"S0Trainer: layers: {unknown[0]!r} has no state; the layers with a state are {list(states)}")
    return sorted(set(layers))


def callbacks(callbacks: Sequence[Callback]) -> list[Callback]:
    if not isinstance(callbacks, (list, tuple)) or not all(callable(callback) for callback in callbacks):
        raise TypeError(f"S0Trainer: callbacks must be a list of functions, got {callbacks!r}")
    return list(callbacks)


def alphas(given: float | Sequence[float] | None, default: float) -> list[float]:
    """Return the list of scales to evaluate at."""
    values = [default] if given is None else [given] if isinstance(given, numbers.Real) else given
    if not isinstance(values, (list, tuple)) or not values:
        raise TypeError(f"S0Trainer: alpha must be a number or a list of numbers, got {given!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"S0Trainer: alpha must be a finite number, got {value!r}")
    return list(dict.fromkeys(map(float, values)))


@contextlib.contextmanager
def closing(check: Any) -> Iterator[None]:
    """Close the checker after the body of a with statement, if it has `close`."""
    try:
        yield
    finally:
        getattr(check, "close", lambda: None)()
