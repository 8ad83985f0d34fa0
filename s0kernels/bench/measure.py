"""Functions to measure time, memory and work, for `python -m s0kernels bench` and for `benchmarks/`.

Cases that are compared take turns in one process, in a new order each round, so that other load on the machine affects
all of them alike. A ratio is the median over rounds of the ratio within a round, with a bootstrap interval. As a
control, a case can be listed twice. Quantities without noise are counted: operators, launches, bytes allocated and
bytes copied.
"""

import contextlib
import ctypes
import datetime
import gc
import hashlib
import importlib.metadata
import json
import multiprocessing
import platform
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from s0kernels import __version__
from s0kernels.calls import Call
from s0kernels.files import replace_file
from s0kernels.ops import registry

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}  # process_time counts all threads together
PACKAGES = ("torch", "numpy", "transformers", "triton", "flash-linear-attention", "fla-core", "flash-qla", "tilelang")
PACKAGES += ("mamba-ssm", "causal-conv1d")
_PACKAGE = Path(__file__).resolve().parents[1]
_INSTRUCTIONS = {512: "avx512", 256: "avx2", 128: "portable"}
Case = Callable[[], object]
_CUDA = torch.autograd.DeviceType.CUDA  # pyright: ignore[reportPrivateImportUsage]

# The machine


def machine(device: str = "cpu", clock: str = "wall") -> dict:
    """Return the description of the machine for a file of results, as a dict for JSON. On a CUDA device the clock is
    that of the device."""
    found = {
        "device": device,
        "cpu": _cpu_model(),
        "instructions": instructions(),
        "threads": torch.get_num_threads(),
        "clock": "CUDA events" if torch.device(device).type == "cuda" else clock,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"s0kernels": __version__, "python": platform.python_version(), **_versions()},
        "commit": commit(),
        "kernels": kernel_hashes(),
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def machine_name(found: dict) -> str:
    """Return the machine's name for file names: `cpu-avx2`, `nvidia-h200`."""
    return found["gpu"].lower().replace(" ", "-") if "gpu" in found else f"cpu-{found['instructions']}"


def instructions() -> str:
    """Return the instruction set that the compiled kernels use here; if they are missing, that of torch's own
    kernels."""
    if registry.unusable("cpu", Call("ssd", torch.device("cpu"), torch.float32)):
        return torch.backends.cpu.get_cpu_capability().lower()
    return _INSTRUCTIONS[torch.ops.s0kernels_cpu.instructions()]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def _versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def commit() -> str | None:
    """Return the commit of the source tree that contains the package, with a + if files have changed; None in an
    installation."""
    if not (_PACKAGE.parent / "csrc").is_dir():
        return None
    ask = ["git", "-C", str(_PACKAGE.parent), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def kernel_hashes() -> dict[str, str]:
    """Return a hash of the sources of each backend. An installation has no C++ sources, so the library is hashed
    instead."""
    backends, csrc = _PACKAGE / "backends", _PACKAGE.parent / "csrc"
    homes = {name: backends / module.rpartition(".")[2] for name, module in registry.MODULES.items()}
    shared = set(backends.glob("*.py")) - {home.with_suffix(".py") for home in homes.values()}
    hashes = {}
    for name, home in homes.items():
        files = [*home.rglob("*.py"), home.with_suffix(".py"), *shared]
        shared_by_libraries = [*csrc.glob("*.*"), *(csrc / "token").glob("*.*")]
        compiled = [*shared_by_libraries, *(csrc / name).rglob("*.*")] if (csrc / name).is_dir() else []
        files += compiled or [_PACKAGE / f"_{name}.so"]
        content = hashlib.sha256()
        for file in sorted(filter(Path.is_file, files)):
            content.update(file.name.encode() + b"\0" + file.read_bytes())
        hashes[name] = content.hexdigest()[:16]
    return hashes


def write_json(file: Path, results: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, (json.dumps(results, indent=1) + "\n").encode())


# Time


def interleaved(
    cases: dict[str, Case],
    *,
    rounds: int = 15,
    clock: str = "wall",
    device: str | torch.device = "cpu",
    least: float = 0.005,
    budget: float = float("inf"),
) -> dict[str, list[float]]:
    """Time cases that take turns. Return the seconds per call, one sample per round.

    A sample is as many calls as take `least` seconds. After `budget` seconds no new round begins, but at least three
    rounds run. On a CUDA device a call is timed by events after a flush of the L2 cache, which also hides the launch
    time.
    """
    sample = _cuda_sample(torch.device(device)) if torch.device(device).type == "cuda" else _cpu_sample(CLOCKS[clock])
    repeats = {}
    for name, case in cases.items():
        case()  # compiles, imports, fills pools
        repeats[name] = max(1, min(1000, round(least / max(sample(case, 1), 1e-6))))
    order, shuffle = list(cases), random.Random(0).shuffle
    samples, end = {name: [] for name in cases}, time.perf_counter() + budget
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= 3 and time.perf_counter() > end:
                break
            shuffle(order)
            gc.collect()
            for name in order:
                samples[name].append(sample(cases[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return samples


def _cpu_sample(now: Callable[[], float]) -> Callable[[Case, int], float]:
    def sample(case: Case, repeats: int) -> float:
        begin = now()
        for _ in range(repeats):
            case()
        return (now() - begin) / repeats

    return sample


def _cuda_sample(device: torch.device) -> Callable[[Case, int], float]:
    cache = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    def sample(case: Case, repeats: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, stop in events:
            cache.zero_()
            start.record()
            case()
            stop.record()
        torch.cuda.synchronize(device)
        return sum(start.elapsed_time(stop) for start, stop in events) / 1e3 / repeats

    return sample


def medians(cases: dict[str, Case], *, rounds: int = 15, device: str | torch.device = "cpu") -> dict[str, float]:
    """Return the median milliseconds of cases that take turns."""
    times = interleaved(cases, rounds=rounds, device=device)
    return {name: 1e3 * float(np.median(samples)) for name, samples in times.items()}


def kernel_times(case: Case, calls: int = 3) -> dict[str, float]:
    """Return the milliseconds that a GPU spends in each kernel of a call, by name, without the time between kernels.
    The first call is not counted. The kernels must be compiled already."""
    case()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(calls):
            case()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in _events(profile):
        if event.device_type() == _CUDA:
            found[event.name()] = found.get(event.name(), 0.0) + event.duration_ns() / 1e6 / calls
    return found


def _events(profile: torch.profiler.profile) -> Any:
    """Return the events of torch's profiler, through its private methods."""
    found: Any = profile.profiler
    return found.kineto_results.events()


def host_time(case: Case, calls: int = 30) -> float:
    """Return the median milliseconds in which a call enqueues its work on an idle GPU and returns."""
    case()
    took = []
    for _ in range(calls):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        case()
        took.append(1e3 * (time.perf_counter() - began))
    return float(np.median(took))


class Ratio(NamedTuple):
    median: float
    low: float
    high: float


def ratio(over: list[float], under: list[float], *, confidence: float = 0.95, resamples: int = 4000) -> Ratio:
    """Return the median over rounds of over / under, with a bootstrap interval. The bootstrap resamples rounds and
    keeps pairs together."""
    pairs = np.asarray(over) / np.asarray(under)
    drawn = np.random.default_rng(0).integers(len(pairs), size=(resamples, len(pairs)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.median(pairs[drawn], axis=1), [tail, 1 - tail])
    return Ratio(float(np.median(pairs)), float(low), float(high))


# The roofline


def roofline(device: str = "cpu", dtypes: tuple[torch.dtype, ...] = (torch.float32,), clock: str = "wall") -> dict:
    """Measure the machine: GB/s of a copy (read plus written) larger than all caches, and GFLOP/s of matrix
    products."""
    cuda = torch.device(device).type == "cuda"
    megabytes = 1024 if cuda else 128
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    cases: dict[str, Case] = {"copy": lambda: target.copy_(source)}
    sizes = {}
    for dtype in dtypes:
        size = 8192 if cuda else 1024 if dtype == torch.float32 else 256  # half precision may be a slow loop on a CPU
        a = torch.ones(size, size, device=device, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        cases[name], sizes[name] = lambda a=a: a @ a, size
    with torch.no_grad():
        times = interleaved(cases, rounds=7, clock=clock, device=device, budget=5.0)
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    bandwidth = 2 * 4 * source.numel() / seconds.pop("copy") / 1e9
    return {"copy_gbs": bandwidth, "matmul_gflops": {name: 2e-9 * sizes[name] ** 3 / seconds[name] for name in seconds}}


# Memory and work


def memory_process() -> ProcessPoolExecutor:
    """Return a process for several calls of `peak_memory`, so that it imports everything only once."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=_give_back_memory, initargs=(torch.get_num_threads(),))


def peak_memory(
    make: Callable[..., Case],
    *arguments,
    warm_up: tuple = (),
    device: str = "cpu",
    process: ProcessPoolExecutor | None = None,
) -> int:
    """Return the peak memory in bytes of calling the result of `make(*arguments)`, beyond the memory held before the
    call.

    On a CPU this is the resident memory of another process (a new one, or `process`). So `make` and its arguments must
    pickle. If `warm_up` is given, the small case `make(*warm_up)` is called first, for imports and pools. On a CUDA
    device it is the count of torch's allocator.
    """
    if torch.device(device).type == "cuda":
        case = make(*arguments)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        case()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.nullcontext(process) if process else memory_process() as pool:
        return pool.submit(_resident_peak, make, arguments, warm_up).result()


def _give_back_memory(threads: int) -> None:
    """Make malloc return large freed blocks to the system, so that the next case must allocate them again."""
    torch.set_num_threads(threads)
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        M_MMAP_THRESHOLD = -3
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)


def _resident_peak(make: Callable[..., Case], arguments: tuple, warm_up: tuple) -> int:
    if warm_up:
        make(*warm_up)()
    case = make(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory_status("VmHWM")
    case()
    return memory_status("VmHWM") - before


def memory_status(field: str) -> int:
    """Return a memory field of this process in bytes, such as `VmRSS` or `VmHWM`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


class Work(NamedTuple):
    """The work of one call: the number of calls of each operator (nested ones included), kernels launched on a GPU,
    bytes newly allocated by torch, and bytes written by `copy_`, which every copy and conversion calls."""

    operators: Counter[str]
    launches: int
    allocated: int
    copied: int


_SIZES = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "short int": 2}


def work(case: Case) -> Work:
    """Count the work of a call with torch's profiler. A first call, which may compile, is not counted."""
    case()
    activities = torch.profiler.supported_activities() & {
        torch.profiler.ProfilerActivity.CPU,
        torch.profiler.ProfilerActivity.CUDA,
    }
    with torch.profiler.profile(
        activities=activities, profile_memory=True, record_shapes=True, acc_events=True
    ) as profile:
        case()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    operators, launches, allocated, copied = Counter(), 0, 0, 0
    for event in _events(profile):
        name = event.name()
        if name == "[memory]":
            allocated += max(event.nbytes(), 0)
        elif event.device_type() == _CUDA:
            launches += 1
        elif "::" in name:
            operators[name] += 1
        if name == "aten::copy_":
            copied += int(np.prod(event.shapes()[0])) * _SIZES.get(event.dtypes()[0], 1)
    return Work(operators, launches, allocated, copied)
