"""`python -m s0kernels bench`: the scans at the heads of real models, beside the libraries that are installed.

A row is one shape, dtype and pass. Its cases take turns (`measure`); another library is timed only after its
results on the first tokens of the same inputs were within the error budget.
"""

import argparse
import contextlib
import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from s0kernels.bench import measure
from s0kernels.bench.baselines import MODELS, OPS, OUR_BUDGET, Op, Scan, Values, state_for_each
from s0kernels.ops import _dispatch

OURS = "s0kernels"
PASSES = {"forward": "forward", "training": "forward + backward", "state": "backward of S0 alone", "step": "one token"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: compared by nothing here, with the reason
NOT_SCANS = {"causal-conv1d": "a convolution, which the swapped mixers call themselves on a GPU where it is installed"}
_CHECKED = 100  # tokens of the first row that are held against the recurrence in fp64


class Shape(NamedTuple):
    model: str
    batch: int
    length: int

    @classmethod
    def parse(cls, text: str, default: str = "") -> "Shape":
        model, _, sizes = text.lower().partition(":")
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", sizes or default)
        if model not in MODELS or not found:
            names = ", ".join(MODELS)
            raise ValueError(f"--shape must be MODEL or MODEL:BATCHxLENGTH, MODEL among {names}; got {text!r}")
        return cls(model, int(found[1]), int(found[2]))

    @property
    def op(self) -> Op:
        return OPS[MODELS[self.model][0]]

    def values(self, device: str, dtype: torch.dtype) -> Values:
        return self.op.make((self.batch, self.length), MODELS[self.model][1], device, dtype)

    def __str__(self) -> str:
        return f"{self.model}:{self.batch}x{self.length}"


def cut(values: Values, rows: int, length: int) -> Values:
    """The first tokens of the first rows."""
    return {n: x if n in ("A", "s0") or x is None else x[:rows, :length] for n, x in values.items()}


def scan(op: Op, name: str, backend: str | None) -> Scan:
    """That of `name`: OURS on `backend`, a backend of ours, or another library."""
    if name in (OURS, *_dispatch.ORDER):
        return partial(op.scan, backend=backend if name == OURS else name)
    return op.baselines[name].scan()


def case(op: Op, run: Scan, values: Values, what: str, state: bool = True) -> measure.Case:
    """A pass over a scan, with or without S0; "backward" is one without its forward, which "training" has."""
    weight = torch.ones_like(values[op.output])

    def forward():
        with torch.no_grad():
            return run(values, state)

    def training():
        output, _ = run(leaves, state)
        return torch.autograd.grad(output, inputs, weight)

    if what == "forward":
        return forward
    wanted = ("s0",) if what == "state" else (*op.inputs, "s0") if state else op.inputs
    leaves = op.leaves(values, wanted)
    inputs = [leaves[n] for n in wanted]
    if what == "training":
        return training
    output, _ = run(leaves, True)
    return lambda: torch.autograd.grad(output, inputs, weight, retain_graph=True)


def step_case(shape: Shape, name: str, backend: str | None, values: Values) -> measure.Case:
    op, pool = shape.op, state_for_each(values, shape.batch).clone()
    if name in (OURS, *_dispatch.ORDER):
        return op.step(values, pool, backend=backend if name == OURS else name)
    step = op.baselines[name].step
    if step is None:
        raise ValueError("has no function for one token")
    if reason := op.step_out_of_budget(step(), values):
        raise ValueError(reason)
    run = step()(values, pool)

    def without_grad():
        with torch.no_grad():
            return run()

    return without_grad


def memory_case(shape: Shape, name: str, backend: str | None, dtype: torch.dtype, what: str, device: str):
    return case(shape.op, scan(shape.op, name, backend), shape.values(device, dtype), what)


def traffic(op: Op, values: Values, what: str, rows: int) -> int:
    """Bytes that a pass has to move: inputs and what it is given read once, results written once."""

    def size(*names: str) -> int:
        return sum(values[n].nbytes for n in names)

    tokens, output, states = size(*op.inputs), size(op.output), rows * size("s0")
    if what == "step":
        return tokens + output + 2 * states
    if what == "state":
        return size(*op.for_state) + output + size("s0")
    forward = tokens + output + size("s0") + states
    return forward + (what == "training") * (2 * tokens + output + 2 * size("s0"))


def operations(shape: Shape, what: str) -> float | None:
    """Floating-point operations of a pass, the same count for every implementation."""
    op, heads = shape.op, MODELS[shape.model][1]
    if what == "state":
        return None
    if what == "step":
        return shape.batch * op.step_work(heads)
    return shape.batch * shape.length * op.work(heads, what == "training")


@dataclass
class Bench:
    """What all rows share. `missing` fills with what was not timed, and why."""

    device: str
    backend: str | None
    against: list[str] | None  # None: every baseline
    clock: str
    rounds: int
    budget: float  # seconds for the timing of a row
    roofline: dict = field(default_factory=dict)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)

    def rate(self, dtype: torch.dtype) -> float:
        """GFLOP/s of a matrix product in `dtype`; on a CPU at least that in fp32, which kernels may compute in."""
        rates = self.roofline["matmul_gflops"]
        kind = str(dtype).removeprefix("torch.")
        return max(rates[kind], rates["float32"]) if torch.device(self.device).type == "cpu" else rates[kind]

    def baselines(self, shape: Shape, values: Values) -> list[str]:
        """Those that can be timed; the others go to `missing`."""
        op, usable = shape.op, []
        names = (
            list(op.baselines) if self.against is None else [n for n in self.against if n in (*op.baselines, "torch")]
        )
        missing = self.missing.setdefault(MODELS[shape.model][0], {})
        for name in names:
            try:
                reason = None if name == "torch" else op.baselines[name].unusable(self.device)
                reason = reason or op.out_of_budget(scan(op, name, self.backend), cut(values, 1, _CHECKED))
            except Exception as error:  # whatever a library does here must not end the others' measurement
                reason = brief(error)
            if reason is None:
                usable.append(name)
            else:
                missing[name] = reason
        return usable

    def rows(self, shape: Shape, dtype: torch.dtype, passes: list[str], memory: bool) -> Iterator[dict]:
        values = shape.values(self.device, dtype)
        ours = scan(shape.op, OURS, self.backend)
        if reason := shape.op.out_of_budget(ours, cut(values, 1, _CHECKED), OUR_BUDGET):
            raise RuntimeError(f"{shape}: our own results are wrong, so there is no speed to report: {reason}")
        names = [OURS, *self.baselines(shape, values)]
        with contextlib.ExitStack() as stack:
            process = None
            if memory and torch.device(self.device).type == "cpu":
                process = stack.enter_context(measure.memory_process())
            for what in passes:
                row = self.timed(shape, dtype, what, values, names)
                if memory and what != "step":
                    row["peak_mib"] = self.peaks(shape, dtype, what, list(row["ms"]), process)
                yield row

    def timed(self, shape: Shape, dtype: torch.dtype, what: str, values: Values, names: list[str]) -> dict:
        op = shape.op
        if what == "step":
            values = cut(values, shape.batch, 1)
        cases = {}
        for name in names:
            try:
                if what == "step":
                    cases[name] = step_case(shape, name, self.backend, values)
                else:
                    cases[name] = case(op, scan(op, name, self.backend), values, what)
                cases[name]()
            except Exception as error:  # a case that a library does not know
                if name == OURS:
                    raise
                cases.pop(name, None)
                self.missing[MODELS[shape.model][0]][f"{name}, {PASSES[what]}"] = brief(error)
        if what in ("forward", "training"):
            ours = scan(op, OURS, self.backend)
            cases |= {"again": case(op, ours, values, what), "zero": case(op, ours, values, what, state=False)}
        options = {"rounds": self.rounds, "clock": self.clock, "device": self.device, "budget": self.budget}
        times = measure.interleaved(cases, **options)
        row = {"shape": str(shape), "op": MODELS[shape.model][0], "dtype": str(dtype)[6:], "pass": what}
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
            small = (shape._replace(length=min(64, shape.length)), *rest)
            options = {"warm_up": small, "device": self.device, "process": process}
            found[name] = measure.peak_memory(memory_case, shape, *rest, **options) / 2**20
        return found


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shape = f"MODEL or MODEL:BATCHxLENGTH, MODEL among {', '.join(MODELS)}"
    parser.add_argument("--op", choices=tuple(OPS), help="one scan only")
    parser.add_argument("--shape", action="append", metavar="SHAPE", help=f"{shape} (default: one model for each scan)")
    parser.add_argument("--pass", dest="passes", action="append", choices=tuple(PASSES), help="default: all of them")
    dtype = {"action": "append", "choices": tuple(DTYPES), "metavar": "DTYPE"}
    parser.add_argument("--dtype", **dtype, help=f"{', '.join(DTYPES)} (default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--backend", choices=_dispatch.ORDER[:-1], help="ours to measure (default: the default one)")
    parser.add_argument("--against", action="append", metavar="NAME", help="a baseline, or none (default: all)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, help="of a CPU (default: torch's)")
    parser.add_argument("--processor-time", action="store_true", help="of all threads together, not wall time")
    parser.add_argument("--rounds", type=int, default=15, help="at most; three at least (default: 15)")
    parser.add_argument("--seconds", type=float, default=6.0, help="for the timing of a row (default: 6)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results there, and no table; - prints them")


def run(options: argparse.Namespace) -> None:
    shapes = _settle(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = "processor" if options.processor_time else "wall"
    dtypes = [DTYPES[name] for name in options.dtype]
    bench = Bench(options.device, options.backend, options.against, clock, options.rounds, options.seconds)
    rows, passes = [], options.passes or list(PASSES)
    machine = measure.machine(options.device, clock)  # before the work, during which sources may be changed
    with _progress(len(shapes) * len(dtypes) * len(passes)) as advance:
        bench.roofline = measure.roofline(options.device, tuple(dict.fromkeys([torch.float32, *dtypes])), clock)
        for shape, dtype in product(shapes, dtypes):
            for row in bench.rows(shape, dtype, passes, memory=not options.no_memory):
                rows.append(row)
                advance()
    results = {"machine": machine, "roofline": bench.roofline, "rows": rows, "not timed": bench.missing}
    if options.json is None:
        print(report(results))
    elif str(options.json) == "-":
        print(json.dumps(results, indent=1))
    else:
        measure.write_json(options.json, results)


def _settle(options: argparse.Namespace) -> list[Shape]:
    """Defaults that depend on the machine, and the errors of arguments that depend on each other."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device cannot be used: {brief(error)}") from error
    cuda = torch.device(options.device).type == "cuda"
    options.dtype = options.dtype or ["bfloat16" if cuda else "float32"]
    default = "1x8192" if cuda else "1x1024"
    shapes = [Shape.parse(text, default) for text in options.shape or ("qwen3.5-4b", "falcon-h1-7b")]
    shapes = [shape for shape in shapes if options.op in (None, MODELS[shape.model][0])]
    if not shapes:
        raise ValueError(f"--shape names no model whose scan is --op {options.op}: {', '.join(options.shape)}")
    known = {name: None for op in OPS.values() for name in (*op.baselines, "torch")}
    if options.against is not None:
        options.against = [name for name in options.against if name != "none"]
    if unknown := [name for name in options.against or () if name not in known]:
        raise ValueError(f"--against must be none or among {', '.join(known)}; got {unknown[0]!r}")
    for name, least in (("rounds", 3), ("seconds", 0), ("threads", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    for shape, dtype in product(shapes, options.dtype):
        chosen = (MODELS[shape.model][0], options.backend, torch.device(options.device), DTYPES[dtype])
        _dispatch.choose(*chosen)  # or an error that says why not
    return shapes


@contextlib.contextmanager
def _progress(total: int) -> Iterator:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        print(f"measuring {total} rows", file=sys.stderr)
        yield lambda: None
        return
    with tqdm(total=total, desc="measuring", unit="row") as bar:
        yield bar.update


def interval(ratio: list[float] | measure.Ratio) -> str:
    median, low, high = ratio
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def report(results: dict) -> str:
    """The table that a person reads; a ratio is the time it takes over ours, with its 95 % interval."""
    rows, roofline, machine = results["rows"], results["roofline"], results["machine"]
    baselines = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    head = ["shape", "dtype", "pass", "ms", "GFLOP/s", "GB/s", "of roofline", "peak MiB", "S0 / zero", "S0 / S0"]
    lines = [[*head, *(f"{name} / ours" for name in baselines)]]
    for row in rows:
        peak = row.get("peak_mib", {}).get(OURS)
        cells = [row["shape"], row["dtype"], PASSES[row["pass"]], f"{row['ms'][OURS]:.3g}"]
        cells += ["-" if row["gflops"] is None else f"{row['gflops']:.0f}", f"{row['gbs']:.1f}"]
        cells += [f"{100 * row['of_roofline']:.0f} %", "-" if peak is None else f"{peak:.0f}"]
        cells += [interval(row[name]) if name in row else "-" for name in ("s0_over_zero", "s0_over_s0")]
        lines.append(cells + [interval(row["ratio"][name]) if name in row["ratio"] else "-" for name in baselines])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = ["  ".join(x.ljust(width) for x, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    name = machine.get("gpu") or f"{machine['cpu']} ({machine['instructions']}), {machine['threads']} threads"
    rates = ", ".join(f"{kind} {rate:.0f} GFLOP/s" for kind, rate in roofline["matmul_gflops"].items())
    notes = [f"{name}; {machine['clock']} time"]
    notes += [f"roofline, measured: copy {roofline['copy_gbs']:.1f} GB/s, matrix product {rates}"]
    notes += [
        f"not timed, {op}: {name}: {why}" for op, found in results["not timed"].items() for name, why in found.items()
    ]
    notes += [f"not timed: {name}: {why}" for name, why in NOT_SCANS.items()]
    return "\n".join([*lines, "", *notes])
