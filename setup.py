"""Builds the compiled kernels into `s0kernels/_cpu.so` and `s0kernels/_cuda.so` where that is possible, and says why
where it is not.

Everything else about the package stands in pyproject.toml. S0KERNELS_BUILD=0 leaves the kernels out; with 1 it is an
error if those for a CPU cannot be built, with `cuda` also if those for GPUs cannot. They need a C++20 compiler (CXX,
else g++) and torch 2.10 or newer in the environment that builds, so an isolated build leaves them out: use
`pip install --no-build-isolation .` Those for GPUs also need nvcc (NVCC, else on the path or in CUDA_HOME or
/usr/local/cuda) and a torch for CUDA.
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
NVCC = os.environ.get("NVCC") or shutil.which(
    "nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"])
)
SOURCES = [
    "csrc/library.cpp",
    "csrc/cpu/avx512.cpp",
    "csrc/cpu/avx2.cpp",
    "csrc/cpu/portable.cpp",
    "csrc/cuda/emulated.cpp",
]
CUDA_SOURCES = ["csrc/cuda/library.cpp", "csrc/cuda/kernels.cu"]
#: machine code for those of these that nvcc knows, and PTX of the last for what is newer
CAPABILITIES = (80, 90, 100)
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


def why_not_cuda() -> str | None:
    if NVCC is None or shutil.which(NVCC) is None:
        return f"there is no compiler {NVCC or 'nvcc'!r}"
    if not (torch_folder() / "lib" / "libtorch_cuda.so").is_file():
        return "torch is not one for CUDA"
    return None


def torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0])


def nvcc_flags() -> list[str]:
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    chosen = [c for c in CAPABILITIES if f"sm_{c}" in known] or [CAPABILITIES[0]]
    code = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in chosen]
    code.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
    return ["-O3", "-std=c++20", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", *code]


class Build(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no module of Python's, so of no version of it either

    def build_extension(self, extension: Extension) -> None:
        torch = torch_folder()
        target = Path(self.get_ext_fullpath(extension.name))
        objects = Path(self.build_temp) / extension.name
        target.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)
        flags = [*FLAGS, f"-I{torch / 'include'}", *os.environ.get("CXXFLAGS", "").split()]
        outputs = [objects / (Path(source).stem + ".o") for source in extension.sources]
        compilers = {".cpp": [COMPILER, *flags]}
        link = [COMPILER, *os.environ.get("LDFLAGS", "").split()]
        libraries = ["-ltorch_cpu"]
        if extension.sources == CUDA_SOURCES:
            link, libraries = [NVCC, "-ccbin", COMPILER], ["-ltorch_cpu", "-ltorch_cuda"]
            compilers[".cu"] = [*link, *nvcc_flags()]
        commands = [
            [*compilers[Path(source).suffix], "-c", source, "-o", str(output)]
            for source, output in zip(extension.sources, outputs, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))
        run([*link, "-shared", *map(str, outputs), f"-L{torch / 'lib'}", *libraries, "-o", str(target)])


def run(command: list[str]) -> None:
    if subprocess.run(command).returncode != 0:
        raise CompileError(f"{' '.join(command)} failed")


extensions = []
reason = why_not()
if reason is not None:
    message = f"s0kernels: the compiled kernels are left out: {reason}"
    if WANTED in ("1", "cuda"):
        sys.exit(message)
    print(message, file=sys.stderr)
else:
    extensions.append(Extension("s0kernels._cpu", SOURCES, optional=WANTED not in ("1", "cuda")))
    cuda_reason = why_not_cuda()
    if cuda_reason is None:
        extensions.append(Extension("s0kernels._cuda", CUDA_SOURCES, optional=WANTED != "cuda"))
    else:
        message = f"s0kernels: the kernels for GPUs are left out: {cuda_reason}"
        if WANTED == "cuda":
            sys.exit(message)
        print(message, file=sys.stderr)
setup(ext_modules=extensions, cmdclass={"build_ext": Build})
