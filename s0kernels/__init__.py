"""Kernels and tools that let hybrid recurrent-attention language models start from a learned initial state S0.

Importing this package registers its torch operators, which `torch.export.load` needs, and requires torch alone. The
names here are loaded when first used, because most of them need transformers.
"""

import importlib
from typing import TYPE_CHECKING

import s0kernels.ops  # noqa: F401

if TYPE_CHECKING:
    from s0kernels.config import S0Config
    from s0kernels.modules import restore_modules, swap_modules, swap_report
    from s0kernels.states import S0States
    from s0kernels.tuning.trainer import S0Trainer

__version__ = "0.1.0"

_HOMES = {
    "S0Config": "s0kernels.config",
    "S0States": "s0kernels.states",
    "S0Trainer": "s0kernels.tuning.trainer",
    "restore_modules": "s0kernels.modules",
    "swap_modules": "s0kernels.modules",
    "swap_report": "s0kernels.modules",
}
__all__ = ["S0Config", "S0States", "S0Trainer", "restore_modules", "swap_modules", "swap_report"]


def __getattr__(name: str):
    if name in _HOMES:
        try:
            home = importlib.import_module(_HOMES[name])
        except ModuleNotFoundError as error:
            from s0kernels.messages import advice

            raise ImportError(f"s0kernels.{name}: {advice(error)}", name=error.name) from error
        return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
