"""Every Triton kernel compiled ahead of time: for each chip, with each tested Triton, each optional argument absent and
present.

    python benchmarks/matrix.py                 # what the file of results is behind on
    python benchmarks/matrix.py --behind        # print it, by kernel, and compile nothing
    python benchmarks/matrix.py --table         # the file as a table

It writes benchmarks/results/kernels-aot.json: the hash of each kernel's source, and for each launch, chip and Triton
[registers, bytes of spills, bytes of shared memory, instructions on matrices], or why it does not compile.
Other versions of Triton than the installed one are looked for in .deps/triton-VERSION (`make matrix-triton`).
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

#: with so little shared memory that tiles are chosen for it
SMALL = ("sm_86", "sm_120", "gfx942")


def sampled(version: str) -> dict[str, list[str]]:
    """The cases that are compiled with a Triton, by chip: the flagships everywhere, the widest states where memory is
    small, the optional arguments in pairs for one chip; with the pinned Triton there the heads of every family, too,
    and all their sizes of states where memory is small."""
    from s0kernels.backends.triton.aot_cases import CASES, FLAGSHIPS, PAIRS, SIZES

    pinned = version == PINNED["triton"]
    found = {chip: list(FLAGSHIPS) for chip in CHIPS}
    found |= {chip: list(SIZES) if pinned else [*FLAGSHIPS, "delta rule 256/256"] for chip in SMALL}
    return found | {"sm_90": [*(CASES if pinned else FLAGSHIPS), *PAIRS]}


def jobs(cases: dict[str, list[str]]) -> Iterator[tuple[str, str, str, str, Callable]]:
    """(kernel, key of the launch, chip, what it belongs to, how to compile it), each once."""
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
    """The hash of every kernel."""
    from s0kernels.backends.triton import aot

    return {name.removesuffix("_kernel"): aot.source_hash(kernel) for name, kernel in sorted(aot.kernels().items())}


def load() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"sources": {}, "launches": {}}


def missing(results: dict, version: str, cases: dict[str, list[str]]) -> list[tuple]:
    """The jobs that have no figures of today's source, or failed."""
    current = sources()
    return [
        job
        for job in jobs(cases)
        if results["sources"].get(job[0]) != current[job[0]]
        or not isinstance(results["launches"][job[0]].get(job[1], {}).get(job[2], {}).get(version), list)
    ]


def behind(results: dict) -> dict[str, int]:
    """How many launches of each kernel have no figures, over all chips and versions."""
    return collections.Counter(
        job[0] for version in TESTED["triton"] for job in missing(results, version, sampled(version))
    )


def work(share: int, shares: int, cases: dict[str, list[str]], known: dict) -> None:
    """Compile every so many-th of the jobs that are not known, and print a line of JSON for each."""
    import triton

    for job in missing(known, triton.__version__, cases)[share::shares]:
        kernel, key, chip, what, compile_it = job
        try:
            usage, wrong = compile_it()
            found = "; ".join(wrong) or list(usage)
        except Exception as error:  # whatever the compiler raises, the others go on
            found = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
        sys.stdout.write(json.dumps([kernel, key, chip, what, found]) + "\n")
        sys.stdout.flush()


def compiled(version: str, shares: int) -> Iterator[list]:
    """What that many processes find with a Triton."""
    path = [] if version == PINNED["triton"] else [str(ROOT / ".deps" / f"triton-{version}")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)]), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, __file__, "--share"]
    found, written = os.pipe()
    running = [
        subprocess.Popen([*command, f"{i}/{shares}"], stdout=written, text=True, env=environment) for i in range(shares)
    ]
    os.close(written)
    with os.fdopen(found) as lines:  # each of which is written at once
        yield from map(json.loads, lines)
    failed = [process for process in running if process.wait()]
    if failed:
        raise RuntimeError(f"compiling with Triton {version} ended with an error")


def merge(results: dict, version: str, rows: Iterable[list]) -> None:
    """Take in what was found."""
    for kernel, key, chip, what, found in rows:
        of_kernel = results["launches"][kernel]
        of_kernel.setdefault(key, {"what": what}).setdefault(chip, {})[version] = found


def prune(results: dict) -> None:
    """What was found of other kernels than today's, or of launches that nothing makes any more, goes."""
    current, launches = sources(), {kernel: {} for kernel in sources()}
    for version in TESTED["triton"]:
        for kernel, key, chip, what, _ in jobs(sampled(version)):
            old = results["launches"].get(kernel, {}).get(key, {}).get(chip, {})
            if version in old and results["sources"].get(kernel) == current[kernel]:
                launches[kernel].setdefault(key, {"what": what}).setdefault(chip, {})[version] = old[version]
    results["sources"], results["launches"] = current, launches


def save(results: dict) -> None:
    """A line for each launch."""
    lines = []
    for kernel, launches in results["launches"].items():
        rows = ",\n".join(
            f" {json.dumps(key)}:{json.dumps(row, separators=(',', ':'))}" for key, row in launches.items()
        )
        lines.append(f"{json.dumps(kernel)}:{{\n{rows}\n}}")
    text = ",\n".join(lines)
    replace_file(RESULTS, f'{{"sources":{json.dumps(results["sources"])},\n"launches":{{\n{text}\n}}}}\n'.encode())


def table(results: dict) -> str:
    """Versions by chips: launches compiled, how many of them spill, failures."""
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
    """Kernels by chips: registers / bytes spilled / KiB of shared memory, with the pinned Triton."""
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
    """For docs/triton-kernels.md."""
    lines = ["Launches compiled, and how many of them spill registers to memory:", "", table(results), ""]
    lines += [f"Registers / bytes spilled / KiB of shared memory, with Triton {PINNED['triton']}:", ""]
    for case in ("delta rule 128/128", "Falcon-H1-7B"):
        lines += [figures(results, case), ""]
    if any(results["sources"].get(kernel) != found for kernel, found in sources().items()):
        lines += ["**The kernels have changed since these were compiled.**", ""]
    return "\n".join(lines[:-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--behind", action="store_true", help="print what the file is behind on, and compile nothing")
    parser.add_argument("--table", action="store_true", help="print the file as a table")
    parser.add_argument("--share", help="I/N: with the installed Triton, print every N-th row that the file lacks")
    parser.add_argument("--fresh", action="store_true", help="of --share: as if there were no file")
    parser.add_argument("--chip", choices=CHIPS, help="of --share: this one alone")
    parser.add_argument("--case", action="append", help="of --share: this one alone")
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
    prune(results)  # into the order of the jobs, whichever process was quicker
    save(results)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
