"""One token in the blocks that a GPU would run, thread by thread on the host.

`csrc/emulated/library.cpp` is built when a test first asks for it, and again where it, the kernels, the compiler or
flags have changed.
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
#: by which operators a test runs: those of the `cpu` backend, or blocks whose warps run first to last or last to first
WAYS = {"whole heads": "s0kernels_cpu", "warps up": "s0kernels_warps_up", "warps down": "s0kernels_warps_down"}
_installed = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the tests run on an installed package")
every_way = pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[_installed] if "warps" in way else []) for way in WAYS]
)


def operators(way: str):
    """What stands in WAYS for it, as `s0kernels.backends.tokens` takes it."""
    if "warps" in way:
        _load()
    return getattr(torch.ops, WAYS[way])


@functools.cache
def _load() -> None:
    torch.ops.load_library(str(build(ROOT / "build" / "emulated")))


def build(folder: Path) -> Path:
    """The library; several processes may ask for it at once."""
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
        fcntl.flock(lock, fcntl.LOCK_EX)  # or all processes of a run would compile
        if not library.is_file():
            unfinished = library.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, "-o", str(unfinished)], cwd=ROOT, check=True)
            unfinished.replace(library)
    return library
