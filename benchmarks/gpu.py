"""Everything that needs a GPU, in one command: test the kernels, time them, and find the best tiles.

    make gpu [OUT=folder] [OPTIONS="..."]    or    python benchmarks/gpu.py [--out folder] [--minutes 8]
    python benchmarks/gpu.py --dry-run       tiny inputs, without a GPU, to test the script

It runs from the source tree with the machine's own Python; nothing is installed.

1. Everything that will run is compiled into one cache, with one process per core. Other libraries warm up meanwhile.
   The compiled steps are built if there is an nvcc.
2. `tests`: `pytest -m gpu`, in parallel.
3. `scans`, `decode`, `tiles`: gpu_scans.py, gpu_decode.py and gpu_tiles.py, one at a time on the GPU.

Each part has a share of the remaining time, and reports the steps that it skips for lack of time. A part writes
<gpu>-<part>.json after every step; tables come last. If a library still compiles when the first timed part could begin,
the script waits for a while, then ends it and lists it. The exit status is 1 if a test failed, a result was wrong or a
part did not end. A library that was not ready is reported and is not an error.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import gpu_decode  # noqa: E402
import gpu_scans  # noqa: E402
import gpu_tiles  # noqa: E402

from s0kernels.bench import measure  # noqa: E402

#: relative shares of the time, in the order of the parts
SHARES = {"compile": 110, "tests": 130, "scans": 100, "decode": 50, "tiles": 70}
PARTS = ("tests", "scans", "decode", "tiles")
SCRIPTS = {"scans": gpu_scans, "decode": gpu_decode, "tiles": gpu_tiles}
TEST = re.compile(
    r"\] (PASSED|FAILED|ERROR|SKIPPED) (tests/\S+::.*?)\s*$|^(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\s+\["
)
#: seconds in which a process may still write its results after its time has ended
ENDING = 15.0


class Run:
    """The common data of all parts: options, the environment of their processes, and the time."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.began = options, time.monotonic()
        self.machine = measure.machine("cpu" if options.dry_run else "cuda")
        self.name = measure.machine_name(self.machine)
        self.out = options.out
        self.logs = ROOT / "build" / "gpu"
        for folder in (self.out, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        #: flash-linear-attention must not call FlashQLA by itself, nor keep tuning results from a busy GPU
        self.environment = {
            "TRITON_CACHE_DIR": str(ROOT / "build" / "triton-cache"),
            **os.environ,
            "FLA_FLASH_QLA": "0",
            "FLA_CACHE_RESULTS": "0",
        }
        if options.dry_run:
            self.environment["TRITON_INTERPRET"] = "1"
        self.children: list[subprocess.Popen] = []

    def file(self, part: str) -> Path:
        return self.out / f"{self.name}-{part}.json"

    @property
    def left(self) -> float:
        """Return the remaining seconds."""
        return max(0.0, 60 * self.options.minutes - (time.monotonic() - self.began))

    def share(self, part: str, waiting: list[str]) -> float:
        """Return the seconds for a part, given the parts that wait after it."""
        return self.left * SHARES[part] / sum(SHARES[name] for name in (part, *waiting))

    def start(self, name: str, *command: str, **variables: str) -> subprocess.Popen:
        """Start a process that writes to its own log, in a process group with its children. Tests do not see the
        baselines."""
        seen = [str(self.options.baselines)] if self.options.baselines and name != "tests" else []
        path = os.pathsep.join([str(ROOT), *seen, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**self.environment, "PYTHONPATH": path, **variables}
        options = {"cwd": ROOT, "env": environment, "start_new_session": True}
        with (self.logs / f"{name}.log").open("w") as log:
            child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **options)
        self.children.append(child)
        return child

    def log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def stop(self, child: subprocess.Popen) -> None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()

    def wait(self, child: subprocess.Popen, seconds: float) -> int | None:
        """Wait for a process, and return its exit status. If it takes longer, stop it and return None."""
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            self.stop(child)
            return None


def script(run: Run, name: str, *arguments: str) -> list[str]:
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
    return command + (["--dry-run"] if run.options.dry_run else [])


def compile_all(run: Run) -> tuple[list[str], list[str], subprocess.Popen | None]:
    """Compile everything. Return (failures, what was not ready, the process that warms up slow libraries)."""
    options, slow, build = run.options, None, None
    seconds = run.share("compile", options.parts)
    print(f"compiling in {options.processes} processes, at most {seconds:.0f} s", flush=True)
    if nvcc() and not options.dry_run:
        command = ("-W", "ignore", "setup.py", "--quiet", "build_ext", "--build-lib", ".", "--build-temp", "build/temp")
        build = run.start("build", sys.executable, *command, S0KERNELS_BUILD="cuda")
    baselines = [] if options.no_baselines else ["--baselines"]
    if baselines:
        slow = run.start("compile-slow", *script(run, "gpu_compile", "--slow"))
    count = options.processes
    workers = {
        f"compile-{i}": run.start(f"compile-{i}", *script(run, "gpu_compile", str(i), str(count), *baselines))
        for i in range(count)
    }
    end, problems, late = time.monotonic() + seconds, [], []
    for name, child in workers.items():
        status = run.wait(child, max(0.0, end - time.monotonic()))
        problems += [line for line in run.log(name).splitlines() if line.startswith(f"did not run: {gpu_scans.OURS}")]
        if status is None:
            late.append(f"{name}: not ready after {seconds:.0f} s")
        elif status != 0:
            problems.append(f"{name}: exit status {status}: {tail(run.log(name), 1)}")
    if build is not None and run.wait(build, max(1.0, end - time.monotonic())) != 0:
        problems.append(f"the compiled steps were not built: {tail(run.log('build'), 1)}")
    return problems, late, slow


def nvcc() -> str | None:
    """Return the path of nvcc, found as in setup.py."""
    folders = (os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    return os.environ.get("NVCC") or shutil.which("nvcc", path=os.pathsep.join(folders))


def tail(text: str, lines: int) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def tests(run: Run, waiting: list[str]) -> list[str]:
    """Run the tests, and return what failed."""
    seconds = run.share("tests", waiting)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-W", "default", "-p", "no:cacheprovider"]
    command += ["--numprocesses", str(run.options.processes), "tests/backends"]
    status = run.wait(run.start("tests", *command), seconds)
    log, results, problems = run.log("tests"), {}, []
    for line in log.splitlines():
        for before, test, other, after in TEST.findall(line):
            if results.get(test or other) not in ("FAILED", "ERROR"):
                results[test or other] = before or after
    failed = sorted(test for test, found in results.items() if found in ("FAILED", "ERROR"))
    passed, skipped = (sum(found == kind for found in results.values()) for kind in ("PASSED", "SKIPPED"))
    if status is None:
        problems.append(f"the tests did not end in {seconds:.0f} s")
    elif status not in (0, 1) or (status == 1 and not failed) or not (passed or run.options.dry_run):
        problems.append(f"pytest ended with {status}: {tail(log, 3)}")
    found = {"machine": run.machine, "passed": passed, "skipped": skipped, "failed": failed}
    messages = re.findall(r"^(?:FAILED|ERROR) (tests/.*)$", log, re.MULTILINE)
    measure.write_json(run.file("tests"), found | {"messages": messages, "problems": problems})
    print(f"tests: {passed} passed, {skipped} skipped, {len(failed)} failed", flush=True)
    return problems + [f"failed: {test}" for test in failed]


def timed(run: Run, part: str, waiting: list[str], *arguments: str) -> list[str]:
    """Run one of the scripts that need the GPU for themselves."""
    seconds = run.share(part, waiting)
    ending = min(ENDING, seconds / 4)
    where = ("--until", str(time.time() + seconds - ending), "--out", str(run.file(part)))
    print(f"{part}: at most {seconds:.0f} s", flush=True)
    run.file(part).unlink(missing_ok=True)
    status = run.wait(run.start(part, *script(run, f"gpu_{part}", *where, *arguments)), seconds)
    if status == 0:
        return []
    problem = f"{part}: {'did not end' if status is None else tail(run.log(part), 1)}"
    if part == "scans" and "--no-baselines" not in arguments and not has_rows(run.file(part)) and run.left > 20:
        return [problem, *timed(run, part, waiting, "--no-baselines")]  # another library may have caused it
    return [problem]


def has_rows(file: Path) -> bool:
    return file.is_file() and bool(json.loads(file.read_text())["rows"])


def not_ready(run: Run, slow: subprocess.Popen | None) -> list[str]:
    """Wait for libraries that still compile, or end them, because timed parts need the GPU for themselves. Return the
    arguments about baselines."""
    if run.options.no_baselines:
        return ["--no-baselines"]
    if slow is None or run.wait(slow, 0.2 * run.left) is not None:
        return []
    return ["--not-ready", *gpu_scans.SLOW]


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results", help="default: benchmarks/results")
    parser.add_argument("--minutes", type=float, default=8.0, help="total time in minutes (default: 8)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1), help="default: one per core")
    parser.add_argument("--baselines", type=Path, help="a folder with libraries to compare with, put on the path")
    parser.add_argument("--no-baselines", action="store_true", help="measure ours alone")
    parser.add_argument("--dry-run", action="store_true", help="tiny inputs on a CPU, in Triton's interpreter")
    options = parser.parse_args(arguments)
    if options.minutes <= 0 or options.processes < 1:
        parser.error("--minutes and --processes must be positive")
    if options.baselines is not None:
        if not options.baselines.is_dir():
            parser.error(f"--baselines must be a folder, got {options.baselines}")
        if found := [name for name in ("torch", "triton") if (options.baselines / name).is_dir()]:
            parser.error(f"--baselines must not hold packages that this machine has: {', '.join(found)}")
        options.baselines = options.baselines.resolve()
    options.out = options.out.resolve()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device (--dry-run tries the script without one)")
    return options


def main(arguments: list[str] | None = None) -> int:
    run, late, about_baselines = Run(options_of(arguments)), [], None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    problems: dict[str, list[str]] = {}
    try:
        problems["compile"], late, slow = compile_all(run)
        waiting = [part for part in PARTS if part in run.options.parts]
        while waiting:
            part = waiting.pop(0)
            if part == "tests":
                problems[part] = tests(run, waiting)
                continue
            if about_baselines is None:
                about_baselines = not_ready(run, slow)
            problems[part] = timed(run, part, waiting, *about_baselines)
    finally:
        for child in run.children:
            if child.poll() is None:
                run.stop(child)
    for part, module in SCRIPTS.items():
        if part in run.options.parts and run.file(part).is_file():
            print(f"\n{module.table(json.loads(run.file(part).read_text()))}", flush=True)
    found = [problem for part in problems.values() for problem in part]
    print(f"\n{time.monotonic() - run.began:.0f} s; results are in {run.out}, logs in {run.logs}")
    print("\n".join([*late, *(found or ["no problems"])]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
