"""Helpers for the wording of messages."""

from collections.abc import Iterable
from pathlib import Path

_HF = ("transformers", "accelerate", "tqdm")
_EXTRAS = dict.fromkeys(_HF, "hf") | {"triton": "dev", "peft": "peft", "scipy": "quality", "matplotlib": "bench"}
_EXTRAS |= {"math_verify": "verify", "openai": "server"}


def advice(error: ImportError) -> str:
    """Name the missing package and the command that installs it, from the package index or from this source tree."""
    missing = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(missing, "hf")
    tree = Path(__file__).resolve().parents[1]
    source = (tree / "pyproject.toml").is_file()
    target = f"--no-build-isolation -e '{tree}[{extra}]'" if source else f"'s0kernels[{extra}]'"
    return f"{missing or error} is not installed; pip install {target}"


def some(names: Iterable) -> str:
    """Join names for a message, and shorten a long list."""
    names = list(names)
    return f"{names}" if len(names) <= 8 else f"{str(names[:8])[:-1]}, ...] ({len(names)})"
