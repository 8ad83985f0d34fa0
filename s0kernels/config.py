"""The settings of S0 training, as in the `s0-tuning` package."""

import json
import math
import numbers
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from s0kernels.files import replace_file


@dataclass
class S0Config:
    """The settings of S0 training, with the seven fields and the defaults of `s0-tuning` 0.1.2.

    Args:
        n_steps: number of optimization steps; each uses all examples.
        lr: learning rate of Adam.
        l2_lambda: weight of the sum of squares of all states in the loss.
        alpha: factor that multiplies trained states in use; None means the default of the architecture (0.07 for the
            gated delta rule, 0.65 for Mamba-2). Training itself uses factor 1.
        normalize: divide each state by its norm before scaling.
        grad_clip: the gradient of all states together is scaled down to at most this norm.
        max_length: maximum length of an example in tokens; longer examples are cut.
    """

    n_steps: int = 20
    lr: float = 1e-3
    l2_lambda: float = 5e-4
    alpha: float | None = None
    normalize: bool = False
    grad_clip: float = 1.0
    max_length: int = 2048

    def __post_init__(self):
        for name, low in (("n_steps", 0), ("max_length", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"S0Config: {name} must be an int, got {value!r}")
            if value < low:
                raise ValueError(f"S0Config: {name} must be at least {low}, got {value}")
        for name in ("lr", "l2_lambda", "alpha", "grad_clip"):
            value = getattr(self, name)
            if value is None and name == "alpha":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"S0Config: {name} must be a number, got {value!r}")
            if not math.isfinite(value) or (value < 0 and name != "alpha"):
                raise ValueError(f"S0Config: {name} must be finite and not negative, got {value}")
        if self.grad_clip == 0:
            raise ValueError("S0Config: grad_clip must be positive, got 0: the gradient would be scaled to zero")
        if not isinstance(self.normalize, bool):
            raise TypeError(f"S0Config: normalize must be True or False, got {self.normalize!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "S0Config":
        """Make a config from a dict of its fields. Raise ValueError if a key is not a field."""
        if not isinstance(values, dict):
            raise TypeError(f"S0Config.from_dict: values must be a dict, got {type(values).__name__}")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known), key=str)
        if unknown:
            raise ValueError(f"S0Config: unknown keys {unknown}; the fields are {known}")
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        replace_file(Path(path), json.dumps(self.to_dict(), indent=2).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "S0Config":
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def check_number(value: float, name: str) -> float:
    """Return `value` if it is a finite number; otherwise raise TypeError or ValueError with `name` in the message."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
