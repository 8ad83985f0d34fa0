"""Run one-token kernels in the blocks of a GPU, thread by thread on the host. `csrc/emulated/library.cpp` is built on
first use, and again if it, the kernels, the compiler or the flags have changed.
"""

import fcntl
import functools
import hashlib
import os
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "csrc" / "emulated"
#: the operators that a test uses: those of the `cpu` backend, or blocks whose warps run first to last or last to first
WAYS = {"whole heads": "s0kernels_cpu", "warps up": "s0kernels_warps_up", "warps down": "s0kernels_warps_down"}
_installed = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the tests run on an installed package")
every_way = pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[_installed] if "warps" in way else []) for way in WAYS]
)


def operators(way: str):
    """Return the operators of an entry of WAYS, for `s0kernels.backends.tokens`."""
    if "warps" in way:
        _load()
    return getattr(torch.ops, WAYS[way])


@functools.cache
def _load() -> None:
    torch.ops.load_library(str(build(ROOT / "build" / "emulated")))


def build(folder: Path) -> Path:
    """Build the library, and return its path. Several processes may call it at once."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    compiler = setup["compiler"]()
    command = [*compiler, *setup["host_flags"](compiler), f"-I{HERE}", str(HERE / "library.cpp"), "-shared"]
    command += [*shlex.split(os.environ.get("LDFLAGS", "")), f"-L{setup['torch_folder']() / 'lib'}", "-ltorch_cpu"]
    content = hashlib.sha256(repr((command, setup["says"](compiler), torch.__version__)).encode())
    for file in sorted([*HERE.iterdir(), *(ROOT / "csrc").rglob("*.h")]):
        content.update(file.name.encode() + b"\0" + file.read_bytes())
    library = folder / f"{content.hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # otherwise all processes of a run would compile
        if not library.is_file():
            unfinished = library.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, "-o", str(unfinished)], cwd=ROOT, check=True)
            unfinished.replace(library)
    return library
