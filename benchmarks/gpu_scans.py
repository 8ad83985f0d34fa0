"""Time both scans and those of installed libraries on a GPU, in one process. `make gpu` runs this.

    python benchmarks/gpu_scans.py [--cases 1x8192 8x1024]    (from the source tree, nothing installed)
    TRITON_INTERPRET=1 python benchmarks/gpu_scans.py --dry-run

It adds to `python -m s0kernels bench`: packed sequences, both layouts of the inputs, frozen weights, and separate times
of GPU and host. It uses bf16 and the heads of Qwen3.5-4B and Falcon-H1-7B. `ms` is the median time of a call, with all
cases in turns; `gpu_ms` the time of the kernels alone, by the profiler; `host_ms` the time until a call returns. A
library is timed only if its errors are within the budget; one that is missing, wrong or not ready is listed with the
reason. If our results are wrong, the script ends with an error. Writes <gpu>-scans.json after each case.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from s0kernels.bench import measure  # noqa: E402
from s0kernels.bench.baselines import Scan  # noqa: E402
from s0kernels.bench.check import gradients  # noqa: E402
from s0kernels.bench.inputs import TINY, WEIGHTS, Values, channel_first, scan_inputs  # noqa: E402
from s0kernels.bench.passes import OURS, SCANS, Op, brief, case  # noqa: E402
from s0kernels.bench.tables import markdown  # noqa: E402
from s0kernels.heads import FLAGSHIPS, MODELS  # noqa: E402

RAGGED = [300 + (37 * i) % 160 - 80 for i in range(48)]
#: cases, the most important first; `alone`: too large for the memory that other libraries need
CASES = {
    "1x8192": (1, 8192),
    "8x1024": (8, 1024),
    "48 ragged": RAGGED,
    "8x512": (8, 512),
    "1x2048": (1, 2048),
    "1x32768": (1, 32768),
}
ALONE = ("1x32768",)
TINY_CASES = {"2x20": (2, 20), "3 ragged": [9, 0, 7]}
VARIANTS = ("token-major", "channel-first", "with z, D, dt_bias")
#: our backend that is measured, and libraries that take minutes to compile
BACKEND, SLOW = "triton", ("flash-qla",)


def settings(dry_run: bool) -> tuple[str, torch.dtype, dict, dict]:
    """Return (device, dtype, cases, heads by op)."""
    if dry_run:
        return "cpu", torch.float16, TINY_CASES, TINY
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device (--dry-run tries the script without one)")
    return "cuda", torch.bfloat16, CASES, {op: MODELS[model][1] for op, model in FLAGSHIPS.items()}


def shapes(dry_run: bool, cases: list[str] | None = None) -> Iterator[tuple[Op, str, str, Callable[[], Values]]]:
    """Yield (op, case, variant, function that makes the inputs): all cases token-major, then the first cases in other
    variants."""
    device, dtype, known, heads = settings(dry_run)
    first = list(known)[: 1 if dry_run else 2]
    for variant, name in [("token-major", n) for n in known] + [(v, n) for v in VARIANTS[1:] for n in first]:
        for op in SCANS.values():
            if (cases is None or name in cases) and not ("z" in variant and op.name != "ssd"):
                options = {"device": device, "dtype": dtype, "extras": "z" in variant}
                make = partial(scan_inputs, op.name, heads[op.name], known[name], **options)
                yield op, name, variant, partial(lay_out, make) if variant == "channel-first" else make


def lay_out(make: Callable[[], Values]) -> Values:
    return channel_first(make())


def our_calls(dry_run: bool) -> Iterator[tuple[str, Callable]]:
    """Yield every call of our kernels in this script, once."""
    for op in SCANS.values():
        run = partial(op.by(OURS, BACKEND), state=True)
        yield f"{OURS}, {op.name}, judged", partial(gradients, run, judged(op, dry_run))
    for op, name, variant, make in shapes(dry_run):
        if name in ALONE:
            continue

        def call(op=op, make=make):
            values, run = make(), op.by(OURS, BACKEND)
            for what in ("forward", *backwards_of(values), "state"):
                case(op, run, values, what)()
            case(op, run, values, "forward", state=False)()

        yield f"{OURS}, {op.name}, {name}, {variant}", call


def baseline_calls(dry_run: bool, names: tuple[str, ...] | None = None) -> Iterator[tuple[str, Callable]]:
    """Yield the calls of other libraries that compile kernels: those in `names`, or all that are not slow."""
    device = settings(dry_run)[0]
    for op, name, variant, make in shapes(dry_run):
        for library, baseline in op.baselines.items():
            wanted = library not in SLOW if names is None else library in names
            if name not in ALONE and wanted and not baseline.on_cpu and baseline.unusable(device) is None:

                def call(op=op, make=make, library=library):
                    case(op, op.by(library), make(), "backward")()

                yield f"{library}, {op.name}, {name}, {variant}", call


def judged(op: Op, dry_run: bool) -> Values:
    """Return inputs for the comparison of an implementation with fp64."""
    device, dtype, _, heads = settings(dry_run)
    return scan_inputs(op.name, heads[op.name], (2, 20 if dry_run else 200), device=device, dtype=dtype)


def usable(op: Op, dry_run: bool, baselines: bool, not_ready: list[str]) -> tuple[dict[str, Scan], dict[str, str]]:
    """Return (implementations that may be timed, reasons why the others may not). Raise RuntimeError if ours may
    not."""
    judge = op.judge(judged(op, dry_run))
    if reason := op.why_not(OURS, judge, BACKEND):
        raise RuntimeError(f"{op.name}: our own results are wrong: {reason}")
    missing = {name: "was still compiling" for name in op.baselines if name in not_ready}
    runs = {OURS: op.by(OURS, BACKEND)}
    for name in op.baselines if baselines else ():
        if name not in missing:
            if reason := op.why_not(name, judge):
                missing[name] = reason
            else:
                runs[name] = op.by(name)
    forget_configurations()
    return runs, missing


def forget_configurations() -> None:
    """Make Triton's autotuner forget the configurations that it chose for the few tokens of the check."""
    if autotuner := sys.modules.get("triton.runtime.autotuner"):
        for found in gc.get_objects():
            if isinstance(found, autotuner.Autotuner):
                found.cache.clear()


def check_device() -> None:
    """Raise an error if an earlier error has made the GPU unusable for this process."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def backwards_of(values: Values) -> list[str]:
    return ["backward", *(["frozen"] if any(name in values for name in WEIGHTS) else [])]


def measured(op: Op, runs: dict[str, Scan], values: Values, rounds: int) -> dict:
    device, ours = str(values["initial_state"].device), runs[OURS]
    groups: dict[str, dict] = {"forward": {}, "backward": {}}
    refused = {}
    for name, run in runs.items():
        try:
            found = {f"{name}, forward": case(op, run, values, "forward")}
            backwards = {f"{name}, {what}": case(op, run, values, what) for what in backwards_of(values)}
            for timed in (found | backwards).values():
                timed()
        except Exception as error:  # a library may not support the case
            if name == OURS:
                raise
            refused[name] = brief(error)
            continue
        groups["forward"] |= found
        groups["backward"] |= backwards
    groups["forward"] |= {
        f"{OURS}, forward, zero": case(op, ours, values, "forward", state=False),
        f"{OURS}, forward, S0 again": case(op, ours, values, "forward"),
    }
    groups["backward"][f"{OURS}, state"] = case(op, ours, values, "state")
    row: dict = {"ms": {}, "gpu_ms": {}, "host_ms": {}, "refused": refused}
    for cases in groups.values():
        row["ms"] |= measure.medians(cases, rounds=rounds, device=device)
        for name, timed in cases.items():
            row["host_ms"][name] = measure.host_time(timed, 1 if device == "cpu" else 20)
            if device != "cpu":
                row["gpu_ms"][name] = sum(measure.kernel_times(timed).values())
    if device != "cpu":
        cases = {name: case(op, run, values, "training") for name, run in runs.items() if name not in refused}
        peaks = {name: measure.peak_memory(lambda timed=timed: timed, device=device) for name, timed in cases.items()}
        row["peak_mib"] = {name: peak / 2**20 for name, peak in peaks.items()}
    return row


def parser_of(text: str, machine_part: str) -> argparse.ArgumentParser:
    """Return a parser with the options that the scripts of `make gpu` share."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--until", type=float, default=float("inf"), help="Unix time after which no case begins")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-baselines", action="store_true", help="ours alone")
    parser.add_argument("--not-ready", nargs="+", default=[], metavar="NAME", help="baselines to leave out")
    parser.add_argument("--dry-run", action="store_true", help="tiny inputs on a CPU, in Triton's interpreter")
    parser.add_argument("--out", type=Path, help=f"default: benchmarks/results/<gpu>-{machine_part}.json")
    return parser


class Results:
    """A file of results that is written after every step, and the time limit of the steps."""

    def __init__(self, options: argparse.Namespace, part: str):
        device = settings(options.dry_run)[0]
        self._until = options.until
        self.found = {"machine": measure.machine(device), "left out": []}
        self._file = options.out or HERE / "results" / f"{measure.machine_name(self.found['machine'])}-{part}.json"

    def late(self, what: str) -> bool:
        """Whether it is too late for another case. If so, record that it was left out."""
        if time.time() < self._until:
            return False
        self.found["left out"].append(f"left out: {what}: no time was left")
        return True

    def write(self) -> None:
        measure.write_json(self._file, self.found)


def main() -> None:
    parser = parser_of(__doc__, "scans")
    parser.add_argument("--cases", nargs="+", choices=CASES)
    options = parser.parse_args()
    options.rounds = 1 if options.dry_run else options.rounds
    results, runs = Results(options, "scans"), {}
    results.found |= {"not timed": {}, "rows": []}
    for op in SCANS.values():
        runs[op.name], missing = usable(op, options.dry_run, not options.no_baselines, options.not_ready)
        results.found["not timed"][op.name] = missing
    results.write()
    for op, name, variant, make in shapes(options.dry_run, options.cases):
        row = {"op": op.name, "case": name, "variant": variant}
        if not results.late(" ".join(row.values())):
            these = {n: run for n, run in runs[op.name].items() if n == OURS or name not in ALONE}
            results.found["rows"].append(row | measured(op, these, make(), options.rounds))
            results.write()
            if not options.dry_run:
                torch.cuda.empty_cache()
    results.write()
    print(table(results.found))


def table(results: dict) -> str:
    """Return a table of milliseconds per call and, after a slash, on the GPU alone. In brackets is how much longer the
    fastest other library takes, in both."""

    def cell(row: dict, what: str) -> str:
        parts = []
        for kind in ("ms", "gpu_ms"):
            ms = row[kind]
            if mine := ms.get(f"{OURS}, {what}"):
                others = {n.removesuffix(f", {what}"): x / mine for n, x in ms.items() if n.endswith(f", {what}")}
                others.pop(OURS)
                best = min(others, key=lambda name: others[name], default=None)
                parts.append(f"{mine:.3f}" + (f" ({best} {others[best]:.2f}x)" if best else ""))
        return " / ".join(parts)

    head = ["", "case", "variant", "forward", "backward", "frozen", "S0 alone", "S0 / zero", "S0 / S0", "host, forward"]
    lines = []
    for row in results["rows"]:
        ms = row["ms"]
        mine = ms[f"{OURS}, forward"]
        ratios = [f"{mine / ms[f'{OURS}, forward, {other}']:.3f}" for other in ("zero", "S0 again")]
        cells = [cell(row, what) for what in ("forward", "backward", "frozen", "state")]
        host = f"{row['host_ms'][f'{OURS}, forward']:.3f}"
        lines.append([row["op"], row["case"], row["variant"], *cells, *ratios, host])
    notes = [f"not timed, {op}: {n}: {why}" for op, found in results["not timed"].items() for n, why in found.items()]
    refused = {f"refused: {n}: {why}" for row in results["rows"] for n, why in row["refused"].items()}
    return "\n".join([markdown(head, lines), "", *notes, *sorted(refused), *results["left out"]])


if __name__ == "__main__":
    main()
