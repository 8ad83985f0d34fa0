"""Measure time and peak memory against length, batch, heads and tasks, and the roofline in the same run.

    python benchmarks/scaling.py [--processor-time --threads 1] [--longest 32768] [--axes length batch heads tasks]

It uses fp32 on a CPU, bf16 on a GPU, and the heads of Qwen3.5-4B and Falcon-H1-7B. One axis varies at a time, starting
from batch 1, length 1024 (256 with more than one sequence), all heads and one task. With several tasks, 8 sequences
pick theirs from a bank. transformers' PyTorch functions are measured too, up to --baselines-longest tokens. It writes
benchmarks/results/scaling-<machine>.json after every point. A second run measures the missing points, unless the
kernels or the machine have changed.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

from s0kernels.bench import measure, passes
from s0kernels.bench.inputs import Values, scan_inputs
from s0kernels.bench.passes import OURS, SCANS, traffic
from s0kernels.heads import FLAGSHIPS, MODELS

RESULTS = Path(__file__).resolve().parent / "results"
AXES = ("length", "batch", "heads", "tasks")
WHAT = ("forward", "training")
_ROWS = 8  # sequences that pick their task from a bank


def points(model: str, axis: str, longest: int) -> Iterator[dict]:
    """Yield the shapes along an axis: batch, length, share of the model's heads, tasks."""
    start = {"model": model, "batch": 1, "length": 1024, "heads": 1.0, "tasks": 0}
    if axis == "length":
        for exponent in range(8, longest.bit_length()):
            yield start | {"length": 2**exponent}
    elif axis == "batch":
        for batch in (1, 2, 4, 8, 16):
            yield start | {"batch": batch, "length": 256}
    elif axis == "heads":
        for share in (0.25, 0.5, 1.0, 2.0):
            yield start | {"heads": share}
    else:
        for tasks in (1, 16, 256, 1024):
            yield start | {"batch": _ROWS, "length": 256, "tasks": tasks}


def make(point: dict, device: str, dtype: torch.dtype) -> Values:
    op, heads = MODELS[point["model"]]
    scaled = {n: max(1, int(x * point["heads"])) if n in ("H", "HV") else x for n, x in heads.items()}
    values = scan_inputs(op, scaled, (point["batch"], point["length"]), device=device, dtype=dtype)
    if point["tasks"]:
        values["initial_state"] = values["initial_state"].repeat(point["tasks"], 1, 1, 1)
        values["state_indices"] = torch.arange(_ROWS, device=device) * 37 % point["tasks"]
    return values


def case(point: dict, name: str, what: str, device: str, dtype: torch.dtype) -> measure.Case:
    op = SCANS[MODELS[point["model"]][0]]
    return passes.case(op, op.by(name), make(point, device, dtype), what)


def measured(point: dict, what: str, names: list[str], settings: argparse.Namespace, process) -> dict:
    device, dtype = settings.device, settings.dtype
    cases = {name: case(point, name, what, device, dtype) for name in names}
    options = {"clock": settings.clock, "device": device, "rounds": settings.rounds, "budget": settings.seconds}
    times = measure.interleaved(cases, **options)
    found = {"pass": what, "rounds": len(times[OURS])}
    found["ms"] = {name: 1e3 * statistics.median(samples) for name, samples in times.items()}
    found["ratio"] = {name: measure.ratio(times[name], times[OURS]) for name in names if name != OURS}
    del cases
    small, memory = {**point, "length": min(64, point["length"])}, {"device": device, "process": process}
    found["peak_mib"] = {}
    for name in names:
        rest = (name, what, device, dtype)
        peak = measure.peak_memory(case, point, *rest, warm_up=(small, *rest), **memory)
        found["peak_mib"][name] = peak / 2**20
    op, heads = SCANS[MODELS[point["model"]][0]], MODELS[point["model"]][1]
    gflop = point["heads"] * point["batch"] * point["length"] * op.work(heads, what == "training") / 1e9
    moved = traffic(op, make(point, device, dtype), what, point["batch"]) / 1e9
    return found | {"gflop": gflop, "gb": moved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES)
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--baselines-longest", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--processor-time", action="store_true", help="measure the time of all threads together, not wall time"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=4.0, help="time limit for a point (default: 4)")
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    settings.clock = "processor" if settings.processor_time else "wall"
    settings.device = "cuda" if torch.cuda.is_available() else "cpu"
    settings.dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    machine = measure.machine(settings.device, settings.clock)
    out = settings.out or RESULTS / f"scaling-{measure.machine_name(machine)}.json"
    results = json.loads(out.read_text()) if out.is_file() else {}
    same = ("cpu", "gpu", "instructions", "threads", "clock", "kernels")
    if any(results.get("machine", {}).get(n) != machine.get(n) for n in same):
        results = {"machine": machine, "dtype": str(settings.dtype)[6:], "points": []}
        results["roofline"] = measure.roofline(settings.device, (settings.dtype,), settings.clock)
    done = {json.dumps([row["axis"], row["point"], row["pass"]]) for row in results["points"]}
    plan = [
        (axis, point, what)
        for model in FLAGSHIPS.values()
        for axis in settings.axes
        for point in points(model, axis, settings.longest)
        for what in WHAT
    ]
    with measure.memory_process() as process:
        for axis, point, what in tqdm(plan, unit="point"):
            if json.dumps([axis, point, what]) in done:
                continue
            alone = point["tasks"] or point["batch"] * point["length"] > settings.baselines_longest
            names = [OURS] if alone else [OURS, "transformers"]
            results["points"].append({"axis": axis, "point": point, **measured(point, what, names, settings, process)})
            measure.write_json(out, results)


if __name__ == "__main__":
    main()
