"""Paths, and environments for other processes."""

import os
import subprocess
import sys
from pathlib import Path

import s0kernels

ROOT = Path(s0kernels.__file__).resolve().parents[1]
TESTS = Path(__file__).resolve().parent
FLA = ROOT / ".deps" / "fla"


def environment(*first: Path) -> dict[str, str]:
    """Return the environment of a process with the imports of this one, with `first` at the front of the path, without
    Triton's interpreter."""
    folders = [*first, *filter(None, [os.environ.get("PYTHONPATH")]), ROOT, TESTS, TESTS / "tuning"]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, folders))}


def python(*arguments: str, path: Path | None = None, **options) -> subprocess.CompletedProcess:
    options["env"] = environment(path) if path else environment()
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
