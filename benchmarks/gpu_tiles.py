"""Find the best tiles on this GPU: time every stage of every scan with each candidate. `make gpu` runs this.

    python benchmarks/gpu_tiles.py   (from the source tree, nothing installed)
    TRITON_INTERPRET=1 python benchmarks/gpu_tiles.py --dry-run

One call uses the same candidate for all stages, and the profiler times each kernel separately. So a sweep takes one
call per candidate. The schedule of the forward is the current one. If results differ from those with the current tiles,
the script ends with an error. Writes <gpu>-tiles.json after each candidate: microseconds of each kernel by tiles.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import gpu_scans  # noqa: E402

from s0kernels.backends.triton.common import launch  # noqa: E402
from s0kernels.backends.triton.common.targets import target_of  # noqa: E402
from s0kernels.backends.triton.common.tiles import Tiles  # noqa: E402
from s0kernels.backends.triton.gated_delta_rule import call as gated_delta_rule  # noqa: E402
from s0kernels.backends.triton.ssd import call as ssd  # noqa: E402
from s0kernels.bench import measure  # noqa: E402
from s0kernels.bench.inputs import Values  # noqa: E402
from s0kernels.bench.passes import SCANS, Op, brief, case  # noqa: E402
from s0kernels.bench.tables import markdown  # noqa: E402

TABLES: dict[str, dict] = {"gated_delta_rule": gated_delta_rule.TILES, "ssd": ssd.TILES}
#: four warps were best nearly everywhere, two for small tiles; eight are for chunks of 128 tokens and wide states
CANDIDATES = [
    Tiles(tile, warps, stages)
    for warps, tiles in ((4, (32, 64, 128)), (2, (32, 64)), (8, (32, 64, 128, 256)))
    for tile in tiles
    for stages in (2, 1, 3)
]
TINY_CANDIDATES = [Tiles(16, 4, 1), Tiles(32, 4, 2)]
AGAIN = "today, again"
PASSES = ("forward", "backward", "state")
#: by dtype: allowed difference due to another order of sums, relative to the largest number
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2}


@contextlib.contextmanager
def changed(op: Op, table: dict, schedule: str | None = None) -> Iterator[None]:
    """Use these tables of tiles and this schedule instead of the current ones."""
    today, before = dict(TABLES[op.name]), os.environ.get(launch.SCHEDULE)
    TABLES[op.name].update(table)
    if schedule is not None:
        os.environ[launch.SCHEDULE] = schedule
    try:
        yield
    finally:
        TABLES[op.name].update(today)
        os.environ.pop(launch.SCHEDULE, None)
        if before is not None:
            os.environ[launch.SCHEDULE] = before


def keys(op: Op, values: Values) -> list[tuple[str, int]]:
    """Return the keys of the tables of tiles that these inputs use."""
    return [key for key in TABLES[op.name] if key[1] == values[op.output].element_size()]


def recorded(op: Op, values: Values, what: str) -> list[launch.Launch]:
    """Return the launches of a pass, without the forward of a backward."""
    run = case(op, op.by(gpu_scans.BACKEND), values, what)
    with launch.recording(target_of(values["initial_state"].device)) as found:
        run()
    return found


def schedule_of(op: Op, values: Values) -> str:
    """Return the current schedule of the forward."""
    split = any(one.kernel.__name__.endswith("_output_fwd_kernel") for one in recorded(op, values, "forward"))
    return "split" if split else "fused"


def stages(op: Op, values: Values, what: str) -> dict[str, str]:
    """Return the stage of each kernel that a pass launches, by the name of the kernel."""
    marks = {Tiles(2**place, 1, 1): key for place, key in enumerate(keys(op, values))}  # all different
    with changed(op, {key: {0: (mark,)} for mark, key in marks.items()}, schedule_of(op, values)):
        found = recorded(op, values, what)
    return {one.kernel.__name__: marks[one.tiles][0] for one in found if one.tiles in marks}


def using(op: Op, values: Values, candidate: Tiles, schedule: str):
    """Use this candidate for every stage."""
    return changed(op, {key: {0: (candidate,)} for key in keys(op, values)}, schedule)


def cases(dry_run: bool) -> Iterator[tuple[Op, str, Callable[[], Values]]]:
    """Yield the two most important cases, token-major."""
    first = list(gpu_scans.settings(dry_run)[2])[:2]
    for op, name, variant, make in gpu_scans.shapes(dry_run, first):
        if variant == "token-major":
            yield op, name, make


def calls(dry_run: bool) -> Iterator[tuple[str, Callable]]:
    """Yield calls with all candidates, once, for gpu_compile.py."""
    for candidate in TINY_CANDIDATES if dry_run else CANDIDATES:
        for op, name, make in cases(dry_run):

            def call(op=op, make=make, candidate=candidate):
                values, problems = make(), []
                runs, schedule = passes(op, values), schedule_of(op, values)
                for run in runs.values():
                    try:
                        with using(op, values, candidate, schedule):
                            run()
                    except Exception as error:  # a candidate too large for one stage may fit others
                        problems.append(error)
                if problems:
                    raise problems[0]

            yield f"{op.name}, {name}, {candidate[:3]}", call


def passes(op: Op, values: Values) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Return the passes. A backward follows a forward with the current tiles."""
    return {what: case(op, op.by(gpu_scans.BACKEND), values, what) for what in PASSES}


def differs(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    for a, b in zip(found, expected, strict=True):
        apart = float((a.double() - b.double()).abs().max() / b.double().abs().max())
        limit = TOLERANCE.get(b.dtype, max(TOLERANCE.values()))
        if not apart <= limit:
            return f"by {apart:.1e} of the largest number, {limit:.0e} allowed"
    return None


def swept(
    op: Op, values: Values, candidates: list[Tiles], times: Callable[[Callable], dict[str, float]]
) -> Iterator[dict]:
    """Yield, before the first candidate and after each one: microseconds by pass, kernel and tiles; candidates that
    cannot run, with the reason; and wrong results. The current tiles are measured twice, and the difference is
    noise."""
    runs, schedule = passes(op, values), schedule_of(op, values)
    expected = {what: run() for what, run in runs.items()}
    row: dict = {"schedule": schedule, "us": {}, "stage": {}, "refused": {}, "wrong": {}}

    def note(what: str, label: str) -> None:
        for name, ms in times(runs[what]).items():
            row["us"].setdefault(what, {}).setdefault(name, {})[label] = 1e3 * ms

    for what in runs:
        row["stage"] |= stages(op, values, what)
        note(what, "today")
        note(what, AGAIN)
    yield row
    for candidate in candidates:
        label = str(tuple(candidate[:3]))
        for what, run in runs.items():
            try:
                with using(op, values, candidate, schedule):
                    if reason := differs(run(), expected[what]):
                        row["wrong"][f"{what}, {label}"] = reason
                    else:
                        note(what, label)
            except Exception as error:  # for example, too large for this GPU
                row["refused"][f"{what}, {label}"] = brief(error)
        yield row
        if row["refused"]:
            gpu_scans.check_device()


def counted(run: Callable) -> dict[str, float]:
    """Return the number of programs of each kernel, in place of times, if there is no GPU."""
    with launch.recording(target_of(torch.device("cpu"))) as launches:
        run()
    return {one.kernel.__name__: float(one.programs) for one in launches}


def main() -> None:
    parser = gpu_scans.parser_of(__doc__, "tiles")
    options = parser.parse_args()
    results = gpu_scans.Results(options, "tiles")
    results.found["rows"] = []
    wrong = []
    for op, name, make in cases(options.dry_run):
        candidates = TINY_CANDIDATES if options.dry_run else CANDIDATES
        times = counted if options.dry_run else measure.kernel_times
        results.found["rows"].append(row := {"op": op.name, "case": name})
        for place, found in enumerate(swept(op, make(), candidates, times)):
            row |= found
            results.write()
            if place < len(candidates) and results.late(f"{op.name}, {name}, from candidate {place + 1}"):
                break
        wrong += [f"{op.name}, {name}, {tiles}: {why}" for tiles, why in row["wrong"].items()]
    results.write()
    print(table(results.found))
    if wrong:
        sys.exit("\n".join(["other results than with today's tiles:", *wrong]))


def table(results: dict) -> str:
    """Return a table with the current time of each kernel, the best candidate and its gain."""
    lines = []
    for row in results["rows"]:
        for what, kernels in row["us"].items():
            for kernel, us in kernels.items():
                stage = row["stage"].get(kernel)
                if stage is None or "today" not in us:  # a kernel of torch, or of another schedule
                    continue
                best = min(us, key=lambda tiles: us[tiles])
                gain = f"{us['today'] / us[best]:.2f}x"
                lines.append(
                    [row["op"], row["case"], what, stage, kernel, f"{us['today']:.0f}", best, f"{us[best]:.0f}", gain]
                )
    head = ["", "case", "pass", "stage", "kernel", "us today", "best (tile, warps, stages)", "us", "gain"]
    refused = {f"refused: {row['op']}: {n}: {why}" for row in results["rows"] for n, why in row["refused"].items()}
    return "\n".join([markdown(head, lines), "", *sorted(refused), *results["left out"]])


assert set(TABLES) == set(SCANS)

if __name__ == "__main__":
    main()
