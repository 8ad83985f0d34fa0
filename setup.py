"""Build the compiled kernels into `s0kernels/_cpu.so` and `s0kernels/_cuda.so` if possible, and print the reason if
not.

All other metadata of the package is in pyproject.toml. S0KERNELS_BUILD=0 leaves the kernels out. With 1 it is an error
if the CPU kernels cannot be built; with `cuda` it is an error if either the CPU or the GPU kernels cannot be built. The
kernels need torch 2.10 or newer in the build environment, so an isolated build leaves them out: use `pip install
--no-build-isolation .` They also need a C++20 compiler: CXX, which may be a command with arguments, else g++, else
clang++; s0kernels/hardware.py lists those that were tried. GPU kernels also need a torch for CUDA, and nvcc: NVCC, else
on the path or in CUDA_HOME or /usr/local/cuda.
"""

import importlib.metadata
import importlib.util
import itertools
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

WANTED = os.environ.get("S0KERNELS_BUILD")
COMPILERS = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
NVCC = os.environ.get("NVCC") or shutil.which(
    "nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"])
)
SOURCES = ["csrc/cpu/library.cpp", "csrc/cpu/portable.cpp"]
#: further sources for x86-64, each with the instruction set that only it uses
WITH_INSTRUCTIONS = {
    "csrc/cpu/avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
}
CUDA_SOURCES = ["csrc/cuda/library.cpp", "csrc/cuda/kernels.cu"]
#: compute capabilities to compile for, if nvcc supports them; PTX of the last one covers newer GPUs
CAPABILITIES = (75, 80, 90, 100)
#: -O2, because at -O3 g++ 12 vectorises the loops around the explicit vectors, which makes them three times slower
FLAGS = [
    "-O2",
    "-ffp-contract=fast",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Icsrc",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
#: the first two are the defaults of g++ 12 and later at -O2; without the last, the alignment of a loop may make a token
#: take 1.2 times as long
GCC_FLAGS = ["-ftree-vectorize", "-fvect-cost-model=very-cheap", "-falign-loops=32"]


def compiler() -> list[str]:
    """Return the command of the compiler: the first of COMPILERS that is installed, or else the first."""
    return shlex.split(next((name for name in COMPILERS if shutil.which(shlex.split(name)[0])), COMPILERS[0]))


def says(command: list[str]) -> str:
    """Return the first line of a compiler's version. zig with a target would write a file here, so the target is left
    out."""
    program = itertools.takewhile(lambda part: not part.startswith("-"), command)
    done = subprocess.run([*program, "--version"], capture_output=True, text=True)
    return done.stdout.partition("\n")[0]


def host_flags(command: list[str]) -> list[str]:
    flags = [*FLAGS, f"-I{torch_folder() / 'include'}", *([] if "clang" in says(command) else GCC_FLAGS)]
    return flags + shlex.split(os.environ.get("CXXFLAGS", ""))


def compilations(command: list[str], machine: str, folder: Path) -> dict[str, list[str]]:
    """Return the command for each object file of the CPU kernels in `folder`, with a compiler for `machine`."""
    flags = host_flags(command)
    sources = dict.fromkeys(SOURCES, ()) | (WITH_INSTRUCTIONS if machine.lower() in ("x86_64", "amd64") else {})
    return {
        str(folder / f"{Path(source).stem}.o"): [*command, *flags, *extra, "-c", source]
        for source, extra in sources.items()
    }


def known_compilers() -> str:
    return runpy.run_path(str(Path(__file__).with_name("s0kernels") / "hardware.py"))["compilers"]()


def why_not() -> str | None:
    if WANTED == "0":
        return "S0KERNELS_BUILD is 0"
    if shutil.which(compiler()[0]) is None:
        return f"there is no compiler {' or '.join(map(repr, COMPILERS))}; these were tried: {known_compilers()}"
    if importlib.util.find_spec("torch") is None:
        return "torch is not in the build environment"
    version = importlib.metadata.version("torch")
    if [int(part) for part in version.split(".")[:2]] < [2, 10]:
        return f"torch {version} is older than 2.10"
    return None


def why_not_cuda() -> str | None:
    if NVCC is None or shutil.which(NVCC) is None:
        return f"there is no compiler {NVCC or 'nvcc'!r}"
    if not (torch_folder() / "lib" / "libtorch_cuda.so").is_file():
        return "torch is not built for CUDA"
    return None


def torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0])


def nvcc_flags() -> list[str]:
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    chosen = [c for c in CAPABILITIES if f"sm_{c}" in known] or [80]
    code = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in chosen]
    code.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
    return ["-O3", "-std=c++20", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", *code]


class Build(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # not a Python module, so its name needs no Python version

    def build_extension(self, extension: Extension) -> None:
        torch, command = torch_folder(), compiler()
        target = Path(self.get_ext_fullpath(extension.name))
        objects = Path(self.build_temp) / extension.name
        target.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)
        print(f"s0kernels: {extension.name} is compiled by {says(command) or command[0]}", file=sys.stderr)
        commands = compilations(command, platform.machine(), objects)
        link, libraries = [*command, *shlex.split(os.environ.get("LDFLAGS", ""))], ["-ltorch_cpu"]
        if extension.sources == CUDA_SOURCES:
            link, libraries = [NVCC, "-ccbin", command[0]], ["-ltorch_cpu", "-ltorch_cuda"]
            commands = {
                str(objects / "library.o"): [*command, *host_flags(command), "-c", "csrc/cuda/library.cpp"],
                str(objects / "kernels.o"): [*link, *nvcc_flags(), "-c", "csrc/cuda/kernels.cu"],
            }
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, ([*command, "-o", output] for output, command in commands.items())))
        run([*link, "-shared", *commands, f"-L{torch / 'lib'}", *libraries, "-o", str(target)])


def run(command: list[str]) -> None:
    if subprocess.run(command).returncode != 0:
        raise CompileError(f"{' '.join(command)} failed. The compilers that build s0kernels: {known_compilers()}")


def left_out(what: str, reason: str, needed: bool) -> None:
    message = f"s0kernels: the {what} are left out: {reason}"
    if needed:
        sys.exit(message)
    print(message, file=sys.stderr)


def extensions() -> list[Extension]:
    reason, found = why_not(), []
    if reason is not None:
        left_out("compiled kernels", reason, WANTED in ("1", "cuda"))
        return found
    found.append(Extension("s0kernels._cpu", SOURCES, optional=WANTED not in ("1", "cuda")))
    reason = why_not_cuda()
    if reason is None:
        found.append(Extension("s0kernels._cuda", CUDA_SOURCES, optional=WANTED != "cuda"))
    else:
        left_out("kernels for GPUs", reason, WANTED == "cuda")
    return found


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
