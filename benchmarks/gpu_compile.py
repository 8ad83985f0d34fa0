"""A share of what gpu_scans.py and gpu_tiles.py will run is run once, so that its kernels lie in Triton's cache.

    python benchmarks/gpu_compile.py NUMBER PROCESSES [--baselines] [--dry-run]    or    --slow [--dry-run]

Of a library that tries many configurations, each process compiles its share of them and takes the others for useless;
which one is best is found when it is timed, on an idle chip, so nobody may write down what was best here. `--slow`:
libraries that compile in one process for minutes, which are waited for last.
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
    """Makes Triton's autotuner look at every `processes`-th configuration alone."""
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
        except Exception as error:  # the others still have to be compiled
            print(f"did not run: {label}: {brief(error)}", flush=True)
            gpu_scans.check_device()


if __name__ == "__main__":
    main()
