"""Build the compiled kernels with every compiler of `s0kernels/hardware.py`, run the tests of the `cpu` backend on each
instruction set (in an emulator for aarch64), and write benchmarks/results/compilers.json.

python tests/csrc/compilers.py
"""

import functools
import hashlib
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "csrc" / "aarch64")]

import emulate  # noqa: E402

from s0kernels.bench.measure import write_json  # noqa: E402
from s0kernels.hardware import PROCESSORS  # noqa: E402
from s0kernels.hardware import compilers as known  # noqa: E402, F401

RESULTS = ROOT / "benchmarks" / "results" / "compilers.json"
ZIG = ROOT / ".deps" / "ziglang" / "ziglang" / "zig"
TESTS = [f"tests/{name}.py" for name in ("ops/test_scans", "ops/test_steps", "backends/test_cpu", "csrc/test_tokens")]
#: g++ and clang for Linux on aarch64: programs, their arguments, and Debian's packages
FOR_AARCH64 = {
    "g++ 12": (["aarch64-linux-gnu-g++-12"], "g++-12-aarch64-linux-gnu"),
    "clang 16": (["clang++-16", "--target=aarch64-linux-gnu"], "clang-16 g++-12-aarch64-linux-gnu"),
}
#: targets of zig, by the value of `platform.machine()` on them
MACOS = {"aarch64-macos": "arm64", "x86_64-macos": "x86_64"}
#: the default compiler of the kernels
DEFAULT = os.environ.get("CXX") or "g++"
INSTRUCTIONS = {"AVX-512": "avx512", "AVX2": "avx2", "portable": "portable"}


@functools.cache
def setup() -> dict:
    return runpy.run_path(str(ROOT / "setup.py"))


def here(architecture: str = "x86-64") -> list[str]:
    """Return the compilers of the table for an architecture, in its order."""
    rows = [row for row in PROCESSORS if row.architecture == architecture]
    return list(dict.fromkeys(name for row in rows for name in row.compilers))


def version(command: list[str]) -> str | None:
    """Return the version of a compiler, or None if it is not installed."""
    return setup()["says"](command) if shutil.which(command[0]) else None


def command_of(name: str) -> list[str] | None:
    """Return the command of a compiler such as "g++ 12" for this machine, or None if it is not installed."""
    family, number = name.split()
    program = {"g++": "g++", "clang": "clang++"}[family]
    for command in ([f"{program}-{number}"], [program]):
        if re.search(rf"\b{number}\.\d+\.\d+", version(command) or ""):
            return command
    return None


def sources_hash() -> str:
    """Return a hash of the sources and their compiler flags."""
    content = hashlib.sha256()
    for file in sorted(filter(Path.is_file, (ROOT / "csrc").rglob("*.*"))):
        content.update(file.name.encode() + b"\0" + file.read_bytes())
    flags = [setup()[name] for name in ("SOURCES", "WITH_INSTRUCTIONS", "FLAGS", "GCC_FLAGS")]
    content.update(repr(flags).encode())
    return content.hexdigest()[:16]


def run(command: list, **variables: str) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def build(command: list[str], folder: Path) -> Path:
    """Build the library with `setup.py`, and return its path."""
    made = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "build_ext"]
    run([*made, "--build-lib", folder, "--build-temp", folder / "temp"], CXX=" ".join(command), S0KERNELS_BUILD="1")
    return folder / "s0kernels" / "_cpu.so"


def compiled(command: list[str], machine: str, folder: Path) -> str:
    """Compile all sources for another machine, without linking."""
    folder.mkdir(parents=True, exist_ok=True)
    for output, compilation in setup()["compilations"](command, machine, folder).items():
        run([*compilation, "-Werror", "-o", output])
    return "compiled"


def outcome(library: Path, instructions: str | None, *more: str) -> str:
    """Run the tests of the `cpu` backend, and return the last line of pytest, such as "359 passed"."""
    selection = "(cpu or test_tokens) and not compile and not instruction_sets and not warps"
    command = [sys.executable, "-m", "pytest", "-q", "--numprocesses=auto", "--maxprocesses=8", *more, *TESTS]
    variables = {"S0KERNELS_CPU_LIBRARY": str(library)} | ({"S0KERNELS_CPU": instructions} if instructions else {})
    said = run([*command, "-k", selection], **variables)
    return re.search(r"(\d+ passed.*) in ", said)[1]


def no_aarch64(name: str) -> str | None:
    """Return the reason why a compiler of FOR_AARCH64 cannot build and run the driver here, or None."""
    program, package = FOR_AARCH64[name][0][0], FOR_AARCH64[name][1]
    missing = [tool for tool in (program, "aarch64-linux-gnu-g++-12", "qemu-aarch64") if shutil.which(tool) is None]
    return f"no {' nor '.join(missing)} here: apt-get install {package} qemu-user" if missing else None


def emulated(command: list[str], folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    driver = emulate.build(folder, ["qemu-aarch64"], command)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests" / "csrc" / "aarch64"), before]))
    return outcome(driver, None, "-p", "emulate")


def cases() -> list[tuple[str, str, str, object, str]]:
    """Yield (compiler, architecture, instructions, work or None if it cannot be done here, Debian's packages)."""
    found, folder = [], ROOT / "build" / "compilers"
    for name in here():
        command, home = command_of(name), folder / name.replace(" ", "-")
        package = name.replace("clang ", "clang-").replace("g++ ", "g++-")
        built = functools.cache(functools.partial(build, command, home))
        for instructions in [row.instructions for row in PROCESSORS if row.architecture == "x86-64"]:
            work = functools.partial(lambda made, which: outcome(made(), which), built, INSTRUCTIONS[instructions])
            found.append((name, "x86-64", instructions, work if command else None, package))
    for name in here("aarch64"):
        command, package = FOR_AARCH64[name]
        home = folder / f"aarch64-{name.replace(' ', '-')}"
        found.append((name, "aarch64", "", functools.partial(compiled, command, "aarch64", home), package))
        work = None if no_aarch64(name) else functools.partial(emulated, command, home)
        if shutil.which(command[0]) is None:
            found[-1] = (*found[-1][:3], None, package)
        found.append((name, "aarch64", "portable, qemu", work, f"{package} qemu-user"))
    for target, machine in MACOS.items():
        work = functools.partial(compiled, [str(ZIG), "c++", "-target", target], machine, folder / target)
        found.append(("clang 22 of ziglang", target, "", work if ZIG.is_file() else None, ""))
    return found


def main() -> None:
    results, packages, failed = [], set(), []
    print(f"{'compiler':20} {'architecture':14} {'instructions':15} {'result':20} seconds")
    for name, architecture, instructions, work, package in cases():
        began, said = time.monotonic(), "not here"
        if work is None:
            packages.update(package.split())
        else:
            try:
                said = work()
            except (RuntimeError, subprocess.CalledProcessError) as error:
                said = "failed"
                failed.append(f"{name}, {architecture} {instructions}: {error}")
        seconds = round(time.monotonic() - began, 1)
        print(f"{name:20} {architecture:14} {instructions:15} {said:20} {seconds}", flush=True)
        row = {"compiler": name, "architecture": architecture, "instructions": instructions}
        results.append(row | {"result": said, "seconds": seconds})
    versions = {name: version(command_of(name) or [name]) for name in here()}
    versions |= {f"{name} for aarch64": version(FOR_AARCH64[name][0]) for name in here("aarch64")}
    versions |= {"ziglang": version([str(ZIG), "c++"]), "qemu-aarch64": version(["qemu-aarch64"])}
    missing = [row for row in results if row["result"] == "not here"]
    record = {"sources": sources_hash(), "machine": platform.machine(), "versions": versions, "results": results}
    write_json(RESULTS, record)
    if missing:
        print(f"not here: {len(missing)} of {len(results)}; on Debian: apt-get install {' '.join(sorted(packages))}")
    if failed or missing:
        sys.exit("\n\n".join(failed) or 1)


if __name__ == "__main__":
    main()
