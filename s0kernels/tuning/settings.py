"""The settings of sampling. This module imports nothing large, because the command line reads the defaults first."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """The settings of sampling; see `S0Trainer.collect`. `greedy` takes the most likely token."""

    samples: int = 16
    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    stop: Sequence[str] = ()
    chat_template_kwargs: Mapping[str, Any] | None = None
    seed: int = 42
    greedy: bool = False

    def __post_init__(self) -> None:
        for name, low in (("samples", 1), ("max_new_tokens", 1), ("top_k", 0), ("seed", None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(f"S0Trainer: {name} must be an int, got {value!r}")
            if low is not None and value < low:
                raise ValueError(f"S0Trainer: {name} must be at least {low}, got {value}")
        for name, most in (("temperature", math.inf), ("top_p", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"S0Trainer: {name} must be a number, got {value!r}")
            if not 0 < float(value) <= most or not math.isfinite(value):
                least = "positive" if most == math.inf else f"in (0, {most:g}]"
                raise ValueError(f"S0Trainer: {name} must be {least}, got {value}")
        if isinstance(self.stop, str) or not all(isinstance(mark, str) and mark for mark in self.stop):
            raise TypeError(f"S0Trainer: stop must be a list of texts, got {self.stop!r}")
        if self.chat_template_kwargs is not None and not isinstance(self.chat_template_kwargs, Mapping):
            raise TypeError(f"S0Trainer: chat_template_kwargs must be a mapping, got {self.chat_template_kwargs!r}")
        object.__setattr__(self, "stop", tuple(self.stop))

    def settings(self) -> dict[str, Any]:
        """Return, for a file, all settings that the samples depend on."""
        found = asdict(self)
        if self.greedy:  # these have no effect then
            found = {name: found[name] for name in ("max_new_tokens", "stop", "chat_template_kwargs", "greedy")}
        return found
