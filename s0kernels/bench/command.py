"""`python -m s0kernels bench`: time the scans with the heads of real models, and compare them with installed libraries.

A row is one shape, dtype and pass. Its cases take turns (`measure`). Another library is timed only if its results on
the first tokens of the same inputs are within the error budget.
"""

import argparse
import contextlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from s0kernels.bench import measure, tables
from s0kernels.bench.baselines import BASELINES
from s0kernels.bench.check import Judge
from s0kernels.bench.inputs import Values, cut
from s0kernels.bench.passes import DTYPES, OURS, PASSES, SCANS, Shape, brief, case, operations, step_case, traffic
from s0kernels.calls import Call
from s0kernels.heads import FLAGSHIPS, MODELS
from s0kernels.ops import registry
from s0kernels.progress import Progress

#: installed libraries that are not compared: name to reason
NOT_SCANS = {"causal-conv1d": "a convolution, which the swapped mixers call themselves on a GPU where it is installed"}
_CHECKED = 100  # number of tokens of the first row that are compared with the recurrence in fp64


@dataclass
class Bench:
    """The settings that all rows share. `missing` collects the baselines that were not timed, with the reasons."""

    device: str
    backend: str | None
    against: list[str] | None  # None: every baseline
    clock: str
    rounds: int
    budget: float  # seconds to time a row
    roofline: dict = field(default_factory=dict)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)

    def rate(self, dtype: torch.dtype) -> float:
        """Return the GFLOP/s of a matrix product in `dtype`; on a CPU at least that of fp32, in which kernels may
        compute."""
        rates = self.roofline["matmul_gflops"]
        kind = str(dtype).removeprefix("torch.")
        return max(rates[kind], rates["float32"]) if torch.device(self.device).type == "cpu" else rates[kind]

    def baselines(self, shape: Shape, judge: Judge) -> list[str]:
        """Return the baselines that can be timed, and add the others to `missing`."""
        op, usable = shape.op, []
        known = [*op.baselines, "torch"]
        names = list(op.baselines) if self.against is None else [n for n in self.against if n in known]
        missing = self.missing.setdefault(op.name, {})
        for name in names:
            reason = op.why_not(name, judge)
            if reason is None:
                usable.append(name)
            else:
                missing[name] = reason
        return usable

    def rows(self, shape: Shape, dtype: torch.dtype, passes: list[str], memory: bool) -> Iterator[dict]:
        values = shape.values(self.device, dtype)
        judge = shape.op.judge(cut(values, 1, _CHECKED))
        if reason := shape.op.why_not(OURS, judge, self.backend):
            raise RuntimeError(f"{shape}: our own results are wrong, so no speed is reported: {reason}")
        names = [OURS, *self.baselines(shape, judge)]
        with contextlib.ExitStack() as stack:
            process = None
            if memory and torch.device(self.device).type == "cpu":
                process = stack.enter_context(measure.memory_process())
            for what in passes:
                row = self.timed(shape, dtype, what, values, names)
                if memory and what != "step":
                    row["peak_mib"] = self.peaks(shape, dtype, what, list(row["ms"]), process)
                yield row

    def case(self, shape: Shape, name: str, what: str, values: Values) -> measure.Case:
        op = shape.op
        if what != "step":
            return case(op, op.by(name, self.backend), values, what)
        if reason := op.why_not(name, op.judge(values, step=True), self.backend, step=True):
            raise ValueError(reason)
        return step_case(op, op.step_by(name, self.backend), values)

    def timed(self, shape: Shape, dtype: torch.dtype, what: str, values: Values, names: list[str]) -> dict:
        op = shape.op
        if what == "step":
            values = cut(values, shape.batch, 1)
        cases = {}
        for name in names:
            try:
                cases[name] = self.case(shape, name, what, values)
                cases[name]()
            except Exception as error:  # a library may not support the case
                if name == OURS:
                    raise
                cases.pop(name, None)
                self.missing[op.name][f"{name}, {PASSES[what]}"] = brief(error)
        if what in ("forward", "training"):
            ours = op.by(OURS, self.backend)
            cases |= {"again": case(op, ours, values, what), "zero": case(op, ours, values, what, state=False)}
        options = {"rounds": self.rounds, "clock": self.clock, "device": self.device, "budget": self.budget}
        times = measure.interleaved(cases, **options)
        row: dict[str, Any] = {"shape": str(shape), "op": op.name, "dtype": str(dtype)[6:], "pass": what}
        row["rounds"] = len(times[OURS])
        row["ms"] = {name: 1e3 * statistics.median(times[name]) for name in names if name in times}
        row["ratio"] = {name: measure.ratio(times[name], times[OURS]) for name in row["ms"] if name != OURS}
        if "zero" in times:
            row |= {"s0_over_zero": measure.ratio(times[OURS], times["zero"])}
            row |= {"s0_over_s0": measure.ratio(times[OURS], times["again"])}
        return row | self.speed(shape, dtype, what, values, row["ms"][OURS])

    def speed(self, shape: Shape, dtype: torch.dtype, what: str, values: Values, ms: float) -> dict:
        gflop, gb = operations(shape, what), traffic(shape.op, values, what, shape.batch) / 1e9
        least = gb / self.roofline["copy_gbs"]
        if gflop is not None:
            gflop /= 1e9
            least = max(least, gflop / self.rate(dtype))
        found = {"gflops": gflop and gflop / ms * 1e3, "gbs": gb / ms * 1e3}
        return found | {"roofline_ms": 1e3 * least, "of_roofline": 1e3 * least / ms}

    def peaks(self, shape: Shape, dtype: torch.dtype, what: str, names: list[str], process) -> dict[str, float]:
        found = {}
        for name in names:
            rest = (name, self.backend, dtype, what, self.device)
            small = (Shape(shape.model, shape.batch, min(64, shape.length)), *rest)
            options = {"warm_up": small, "device": self.device, "process": process}
            found[name] = measure.peak_memory(memory_case, shape, *rest, **options) / 2**20
        return found


def memory_case(shape: Shape, name: str, backend: str | None, dtype: torch.dtype, what: str, device: str):
    return case(shape.op, shape.op.by(name, backend), shape.values(device, dtype), what)


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured")
    what.add_argument("--op", choices=tuple(SCANS), help="measure this scan alone (default: both)")
    what.add_argument(
        "--shape",
        action="append",
        metavar="SHAPE",
        help=f"measure MODEL or MODEL:BATCHxLENGTH, MODEL being one of {', '.join(MODELS)}; may be repeated "
        "(default: one model for each scan)",
    )
    what.add_argument(
        "--pass",
        dest="passes",
        action="append",
        choices=tuple(PASSES),
        help="measure this pass; may be repeated (default: all)",
    )
    what.add_argument(
        "--dtype",
        action="append",
        choices=tuple(DTYPES),
        metavar="DTYPE",
        help=f"measure in {', '.join(DTYPES)}; may be repeated (default: float32 on a CPU, bfloat16 on a GPU)",
    )
    what.add_argument(
        "--backend", choices=registry.ORDER[:-1], help="measure this backend (default: the one that a call gets)"
    )
    what.add_argument(
        "--against",
        action="append",
        metavar="NAME",
        help="measure this baseline, too, or none; may be repeated (default: all)",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--device", help="measure on this device (default: cuda where there is one, else cpu)")
    how.add_argument("--threads", type=int, metavar="N", help="use so many threads of a CPU (default: as torch does)")
    how.add_argument(
        "--processor-time", action="store_true", help="measure the time of all threads together instead of wall time"
    )
    how.add_argument(
        "--rounds", type=int, metavar="N", default=15, help="take at most so many rounds, three at least (default: 15)"
    )
    how.add_argument(
        "--seconds", type=float, metavar="X", default=6.0, help="time a row for so many seconds (default: 6)"
    )
    how.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results to FILE, and no table; - prints them")


def run(options: argparse.Namespace) -> None:
    shapes = _settle(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = "processor" if options.processor_time else "wall"
    dtypes = [DTYPES[name] for name in options.dtype]
    bench = Bench(options.device, options.backend, options.against, clock, options.rounds, options.seconds)
    rows, passes = [], options.passes or list(PASSES)
    machine = measure.machine(options.device, clock)  # read first, because sources may change during the work
    with Progress("measuring", len(shapes) * len(dtypes) * len(passes), "row") as bar:
        bench.roofline = measure.roofline(options.device, tuple(dict.fromkeys([torch.float32, *dtypes])), clock)
        for shape, dtype in product(shapes, dtypes):
            for row in bench.rows(shape, dtype, passes, memory=not options.no_memory):
                rows.append(row)
                bar.reach(len(rows))
    results = {"machine": machine, "roofline": bench.roofline, "rows": rows, "not timed": bench.missing}
    if options.json is None:
        print(report(results))
    elif str(options.json) == "-":
        print(json.dumps(results, indent=1))
    else:
        measure.write_json(options.json, results)


def _settle(options: argparse.Namespace) -> list[Shape]:
    """Fill in defaults that depend on the machine, and check arguments that depend on each other."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device cannot be used: {brief(error)}") from error
    cuda = torch.device(options.device).type == "cuda"
    options.dtype = options.dtype or ["bfloat16" if cuda else "float32"]
    default = "1x8192" if cuda else "1x1024"
    shapes = [Shape.parse(text, default) for text in options.shape or FLAGSHIPS.values()]
    shapes = [shape for shape in shapes if options.op in (None, shape.op.name)]
    if not shapes:
        raise ValueError(f"--shape names no model whose scan is --op {options.op}: {', '.join(options.shape)}")
    known = {name: None for names in BASELINES.values() for name in (*names, "torch")}
    if options.against is not None:
        options.against = [name for name in options.against if name != "none"]
    if unknown := [name for name in options.against or () if name not in known]:
        raise ValueError(f"--against must be none or among {', '.join(known)}; got {unknown[0]!r}")
    for name, least in (("rounds", 3), ("seconds", 0), ("threads", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    for shape, dtype in product(shapes, options.dtype):
        call = Call(shape.op.name, torch.device(options.device), DTYPES[dtype])
        registry.choose(options.backend, *call)  # raises an error with the reason
    return shapes


def report(results: dict) -> str:
    """Return the results as a table. A ratio is the time of a baseline divided by ours, with its 95 % interval."""
    rows, roofline, machine = results["rows"], results["roofline"], results["machine"]
    baselines = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    head = ["shape", "dtype", "pass", "ms", "GFLOP/s", "GB/s", "of roofline", "peak MiB", "S0 / zero", "S0 / S0"]
    head += [f"{name} / ours" for name in baselines]
    lines = []
    for row in rows:
        peak = row.get("peak_mib", {}).get(OURS)
        cells = [row["shape"], row["dtype"], PASSES[row["pass"]], f"{row['ms'][OURS]:.3g}"]
        cells += ["-" if row["gflops"] is None else f"{row['gflops']:.0f}", f"{row['gbs']:.1f}"]
        cells += [f"{100 * row['of_roofline']:.0f} %", "-" if peak is None else f"{peak:.0f}"]
        ratios = [row.get(name) for name in ("s0_over_zero", "s0_over_s0")]
        ratios += [row["ratio"].get(name) for name in baselines]
        lines.append(cells + ["-" if ratio is None else tables.interval(ratio, 2) for ratio in ratios])
    name = machine.get("gpu") or f"{machine['cpu']} ({machine['instructions']}), {machine['threads']} threads"
    rates = ", ".join(f"{kind} {rate:.0f} GFLOP/s" for kind, rate in roofline["matmul_gflops"].items())
    notes = [f"{name}; {machine['clock']} time"]
    notes += [f"roofline, measured: copy {roofline['copy_gbs']:.1f} GB/s, matrix product {rates}"]
    notes += [
        f"not timed, {op}: {name}: {why}" for op, found in results["not timed"].items() for name, why in found.items()
    ]
    notes += [f"not timed: {name}: {why}" for name, why in NOT_SCANS.items()]
    return "\n".join([tables.plain(head, lines), "", *notes])
