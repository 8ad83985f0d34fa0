"""Every benchmark runs once, with small heads."""

import re

import pytest
from surroundings import ROOT, python

pytest.importorskip("pytest_benchmark")
BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.slow
@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are in the source tree alone")
def test_suite_runs_once():
    options = ("--benchmark-disable", "-p", "no:cacheprovider", "-p", "no:xdist")
    done = python("-m", "pytest", "-q", str(BENCHMARKS), *options, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100
