"""Kernels and tools that let hybrid recurrent-attention language models start from a learned initial state S0.

Importing it registers the operators, which an exported program needs to be loaded, and needs torch alone. The names
here are loaded when first used, since most of them need transformers.
"""

import importlib

import s0kernels.ops  # noqa: F401

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
