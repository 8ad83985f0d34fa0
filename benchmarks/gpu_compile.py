"""Run once a share of the work of gpu_scans.py and gpu_tiles.py, so that its kernels are in Triton's cache.

    python benchmarks/gpu_compile.py NUMBER PROCESSES [--baselines] [--dry-run]    or    --slow [--dry-run]

If a library tries many configurations, each process compiles its share of them and treats the others as unusable. The
best one is found later, when the library is timed on an idle GPU, so the choice made here must not be saved. `--slow`
runs libraries that compile in one process for minutes; they are waited for last.
"""

import argparse
import itertools
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import gpu_scans  # noqa: E402
import gpu_tiles  # noqa: E402

from s0kernels.bench.passes import brief  # noqa: E402


def share_configurations(number: int, processes: int) -> None:
    """Make Triton's autotuner try only every `processes`-th configuration."""
    from triton.runtime.autotuner import Autotuner

    look, place = Autotuner._bench, itertools.count()

    def mine(self, *arguments, config, **options):
        if next(place) % processes != number:
            return [float("inf")] * 3
        return look(self, *arguments, config=config, **options)

    Autotuner._bench = mine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("share", nargs="*", type=int, metavar="NUMBER PROCESSES")
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.slow:
        work = gpu_scans.baseline_calls(options.dry_run, gpu_scans.SLOW)
    else:
        number, processes = options.share
        ours = itertools.chain(gpu_scans.our_calls(options.dry_run), gpu_tiles.calls(options.dry_run))
        work = itertools.islice(ours, number, None, processes)
        if options.baselines:
            share_configurations(number, processes)
            work = itertools.chain(work, gpu_scans.baseline_calls(options.dry_run))
    for label, call in work:
        try:
            call()
        except Exception as error:  # the others must still be compiled
            print(f"did not run: {label}: {brief(error)}", flush=True)
            gpu_scans.check_device()


if __name__ == "__main__":
    main()
