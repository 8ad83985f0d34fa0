"""Builds the compiled kernels into `s0kernels/_cpu.so` where that is possible, and says why where it is not.

Everything else about the package stands in pyproject.toml. S0KERNELS_BUILD=0 leaves the kernels out; with 1 it is an
error if they cannot be built. They need a C++20 compiler (CXX, else g++) and torch 2.10 or newer in the environment
that builds, so an isolated build leaves them out: use `pip install --no-build-isolation .`
"""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

WANTED = os.environ.get("S0KERNELS_BUILD")
COMPILER = os.environ.get("CXX", "g++")
SOURCES = ["csrc/library.cpp", "csrc/cpu/avx512.cpp", "csrc/cpu/avx2.cpp", "csrc/cpu/portable.cpp", "csrc/cuda/emulated.cpp"]
#: -O2: at -O3 gcc 12 vectorises the loops around the explicit vectors, which makes them three times slower
FLAGS = [
    "-O2",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Icsrc",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


def why_not() -> str | None:
    if WANTED == "0":
        return "S0KERNELS_BUILD is 0"
    if shutil.which(COMPILER) is None:
        return f"there is no compiler {COMPILER!r}"
    if importlib.util.find_spec("torch") is None:
        return "torch is not in the environment that builds"
    version = importlib.metadata.version("torch")
    if [int(part) for part in version.split(".")[:2]] < [2, 10]:
        return f"torch {version} is older than 2.10"
    return None


class Build(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no module of Python's, so of no version of it either

    def build_extension(self, extension: Extension) -> None:
        torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
        target, objects = Path(self.get_ext_fullpath(extension.name)), Path(self.build_temp)
        target.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)
        flags = [*FLAGS, f"-I{torch / 'include'}", *os.environ.get("CXXFLAGS", "").split()]
        outputs = [objects / (Path(source).stem + ".o") for source in extension.sources]
        commands = [
            [COMPILER, *flags, "-c", source, "-o", str(output)]
            for source, output in zip(extension.sources, outputs, strict=True)
        ]
        link = [
            "-shared",
            *map(str, outputs),
            f"-L{torch / 'lib'}",
            "-ltorch_cpu",
            *os.environ.get("LDFLAGS", "").split(),
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))
        run([COMPILER, *link, "-o", str(target)])


def run(command: list[str]) -> None:
    if subprocess.run(command).returncode != 0:
        raise CompileError(f"{' '.join(command)} failed")


reason = why_not()
if reason is not None:
    message = f"s0kernels: the compiled kernels are left out: {reason}"
    if WANTED == "1":
        sys.exit(message)
    print(message, file=sys.stderr)
setup(
    ext_modules=[] if reason else [Extension("s0kernels._cpu", SOURCES, optional=WANTED != "1")],
    cmdclass={"build_ext": Build},
)
