"""Compile every Triton kernel ahead of time, for each chip and each tested Triton, with each optional argument absent
and present.

    python benchmarks/matrix.py                 # compile what the file of results lacks
    python benchmarks/matrix.py --behind        # print it, by kernel, and compile nothing
    python benchmarks/matrix.py --table         # print the file as a table

It writes benchmarks/results/kernels-aot.json: the hash of each kernel's source, and for each launch, chip and Triton
[registers, bytes of spills, bytes of shared memory, instructions on matrices], or the reason why it does not compile.
Versions of Triton that are not installed are taken from .deps/triton-VERSION (`make matrix-triton`).
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kernels-aot.json"
sys.path.insert(0, str(ROOT))

from s0kernels.bench.tables import markdown  # noqa: E402
from s0kernels.files import replace_file  # noqa: E402
from s0kernels.hardware import CHIPS  # noqa: E402
from s0kernels.versions import PINNED, TESTED  # noqa: E402

#: chips with little shared memory, for which smaller tiles are chosen
SMALL = ("sm_86", "sm_120", "gfx942")


def sampled(version: str) -> dict[str, list[str]]:
    """Return the cases to compile with a version of Triton, by chip: the flagships for all chips, the widest states for
    chips with little shared memory, and pairs of optional arguments for one chip. With the pinned Triton, also the
    heads of every family for that chip, and all sizes of states for chips with little shared memory."""
    from s0kernels.backends.triton.aot_cases import CASES, FLAGSHIPS, PAIRS, SIZES

    pinned = version == PINNED["triton"]
    found = {chip: list(FLAGSHIPS) for chip in CHIPS}
    found |= {chip: list(SIZES) if pinned else [*FLAGSHIPS, "delta rule 256/256"] for chip in SMALL}
    return found | {"sm_90": [*(CASES if pinned else FLAGSHIPS), *PAIRS]}


def jobs(cases: dict[str, list[str]]) -> Iterator[tuple[str, str, str, str, Callable]]:
    """Yield (kernel, key of the launch, chip, its case, function that compiles it), each once."""
    from s0kernels.backends.triton import aot
    from s0kernels.backends.triton.aot_cases import CASES, PAIRS
    from s0kernels.backends.triton.common.targets import known_target

    seen = set()
    for chip, names in cases.items():
        target = known_target(chip)
        for name in names:
            for call, run in (CASES | PAIRS)[name]().items():
                if 0 < target.capability < 80 and call != "step":
                    continue
                for launch in aot.launches_of(run, target):
                    kernel, key = launch.kernel.__name__.removesuffix("_kernel"), aot.specialise(launch).key(launch)
                    if (kernel, key, chip) not in seen:
                        seen.add((kernel, key, chip))
                        yield kernel, key, chip, f"{name}, {call}", lambda x=launch, t=target: aot.compile_launch(x, t)


def sources() -> dict[str, str]:
    """Return the hash of every kernel."""
    from s0kernels.backends.triton import aot

    return {name.removesuffix("_kernel"): aot.source_hash(kernel) for name, kernel in sorted(aot.kernels().items())}


def load() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"sources": {}, "launches": {}}


def missing(results: dict, version: str, cases: dict[str, list[str]]) -> list[tuple]:
    """Return the jobs that have no results for the current source, or failed."""
    current = sources()
    return [
        job
        for job in jobs(cases)
        if results["sources"].get(job[0]) != current[job[0]]
        or not isinstance(results["launches"][job[0]].get(job[1], {}).get(job[2], {}).get(version), list)
    ]


def behind(results: dict) -> dict[str, int]:
    """Return the number of launches of each kernel without results, over all chips and versions."""
    return collections.Counter(
        job[0] for version in TESTED["triton"] for job in missing(results, version, sampled(version))
    )


def work(share: int, shares: int, cases: dict[str, list[str]], known: dict) -> None:
    """Compile a share of the jobs that are not in `known`, and print a line of JSON for each."""
    import triton

    for job in missing(known, triton.__version__, cases)[share::shares]:
        kernel, key, chip, what, compile_it = job
        try:
            usage, wrong = compile_it()
            found = "; ".join(wrong) or list(usage)
        except Exception as error:  # the compiler may raise anything, and the other jobs go on
            found = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
        sys.stdout.write(json.dumps([kernel, key, chip, what, found]) + "\n")
        sys.stdout.flush()


def compiled(version: str, shares: int) -> Iterator[list]:
    """Yield the results of so many processes with one version of Triton."""
    path = [] if version == PINNED["triton"] else [str(ROOT / ".deps" / f"triton-{version}")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)]), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, __file__, "--share"]
    found, written = os.pipe()
    running = [
        subprocess.Popen([*command, f"{i}/{shares}"], stdout=written, text=True, env=environment) for i in range(shares)
    ]
    os.close(written)
    with os.fdopen(found) as lines:  # each line is written at once
        yield from map(json.loads, lines)
    failed = [process for process in running if process.wait()]
    if failed:
        raise RuntimeError(f"compiling with Triton {version} ended with an error")


def merge(results: dict, version: str, rows: Iterable[list]) -> None:
    """Add rows to the results."""
    for kernel, key, chip, what, found in rows:
        of_kernel = results["launches"][kernel]
        of_kernel.setdefault(key, {"what": what}).setdefault(chip, {})[version] = found


def prune(results: dict) -> None:
    """Remove results of old kernels, and of launches that no longer exist."""
    current, launches = sources(), {kernel: {} for kernel in sources()}
    for version in TESTED["triton"]:
        for kernel, key, chip, what, _ in jobs(sampled(version)):
            old = results["launches"].get(kernel, {}).get(key, {}).get(chip, {})
            if version in old and results["sources"].get(kernel) == current[kernel]:
                launches[kernel].setdefault(key, {"what": what}).setdefault(chip, {})[version] = old[version]
    results["sources"], results["launches"] = current, launches


def save(results: dict) -> None:
    """Write the results, one line for each launch."""
    lines = []
    for kernel, launches in results["launches"].items():
        rows = ",\n".join(
            f" {json.dumps(key)}:{json.dumps(row, separators=(',', ':'))}" for key, row in launches.items()
        )
        lines.append(f"{json.dumps(kernel)}:{{\n{rows}\n}}")
    text = ",\n".join(lines)
    replace_file(RESULTS, f'{{"sources":{json.dumps(results["sources"])},\n"launches":{{\n{text}\n}}}}\n'.encode())


def table(results: dict) -> str:
    """Return a table of versions by chips: launches compiled, launches that spill, failures."""
    found = collections.defaultdict(list)
    for launches in results["launches"].values():
        for row in launches.values():
            for chip in CHIPS.keys() & row.keys():
                for version, figures in row[chip].items():
                    found[version, chip].append(figures)
    lines = []
    for version in TESTED["triton"]:
        cells = []
        for chip in CHIPS:
            good = [x for x in found[version, chip] if isinstance(x, list)]
            failed = len(found[version, chip]) - len(good)
            cells.append(f"{len(good)} ({sum(x[1] > 0 for x in good)})" + (f", {failed} failed" if failed else ""))
        lines.append([version, *cells])
    return markdown(["Triton", *CHIPS], lines)


def figures(results: dict, case: str) -> str:
    """Return a table of kernels by chips: registers / bytes spilled / KiB of shared memory, with the pinned Triton."""
    rows = collections.defaultdict(dict)
    for kernel, launches in results["launches"].items():
        for row in launches.values():
            name, _, call = row["what"].rpartition(", ")
            if name == case:
                for chip in CHIPS.keys() & row.keys():
                    if isinstance(found := row[chip].get(PINNED["triton"]), list):
                        rows[f"`{kernel}`, {call}"][chip] = f"{found[0]} / {found[1]} / {found[2] / 1024:.0f}"
    return markdown([case, *CHIPS], ([name, *(row.get(chip, "") for chip in CHIPS)] for name, row in rows.items()))


def document(results: dict) -> str:
    """Return the text for docs/triton-kernels.md."""
    lines = ["Launches compiled, and how many of them spill registers to memory:", "", table(results), ""]
    lines += [f"Registers / bytes spilled / KiB of shared memory, with Triton {PINNED['triton']}:", ""]
    for case in ("delta rule 128/128", "Falcon-H1-7B"):
        lines += [figures(results, case), ""]
    if any(results["sources"].get(kernel) != found for kernel, found in sources().items()):
        lines += ["**The kernels have changed since these were compiled.**", ""]
    return "\n".join(lines[:-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--behind", action="store_true", help="print what the file lacks, and compile nothing")
    parser.add_argument("--table", action="store_true", help="print the file as a table")
    parser.add_argument("--share", help="I/N: with the installed Triton, print every N-th row that the file lacks")
    parser.add_argument("--fresh", action="store_true", help="with --share: ignore the file")
    parser.add_argument("--chip", choices=CHIPS, help="with --share: this chip only")
    parser.add_argument("--case", action="append", help="with --share: this case only")
    options = parser.parse_args()
    results = load()
    if options.table:
        print(document(results))
    elif options.behind:
        print("\n".join(f"{kernel}: {count}" for kernel, count in behind(results).items()))
    elif options.share:
        cases = sampled(_installed())
        for chip in cases:
            wanted = options.case or cases[chip] if options.chip in (None, chip) else ()
            cases[chip] = [case for case in cases[chip] if case in wanted]
        work(*map(int, options.share.split("/")), cases, {"sources": {}} if options.fresh else results)
    else:
        return fill(results)
    return 0


def _installed() -> str:
    import triton

    return triton.__version__


def fill(results: dict) -> int:
    prune(results)
    save(results)
    failures, start = 0, time.monotonic()
    for version in sorted(TESTED["triton"], key=lambda x: x != PINNED["triton"]):
        rows = []
        for row in compiled(version, os.cpu_count() or 1):
            rows.append(row)
            if isinstance(row[4], str):
                failures += 1
                print(f"Triton {version}, {row[2]}, {row[0]} ({row[3]}): {row[4]}", flush=True)
            if len(rows) % 50 == 0:
                merge(results, version, rows)
                save(results)
        merge(results, version, rows)
        save(results)
        print(f"Triton {version}: {len(rows)} compiled, {time.monotonic() - start:.0f} s", flush=True)
    prune(results)  # also puts rows into the order of the jobs
    save(results)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
