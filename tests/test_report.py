"""README's tables are what the files of results give, and say when the kernels are no longer those."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import report

from s0kernels import measure

README = report.ROOT / "README.md"


@pytest.fixture
def results():
    """Of made-up rows: two lengths of one scan, the longer with memory; the kernels are those of now."""
    row = {"op": "ssd", "dtype": "float32", "pass": "forward", "rounds": 5, "of_roofline": 0.5}
    row |= {"s0_over_zero": [1.0, 0.9, 1.1]}
    short = row | {"shape": "falcon-h1-7b:1x64", "ms": {"s0kernels": 2.0, "else": 3.0}}
    long = row | {"shape": "falcon-h1-7b:1x256", "ms": {"s0kernels": 8.0, "else": 4.0}}
    short["ratio"], long["ratio"] = {"else": [1.5, 1.4, 1.6]}, {"else": [0.5, 0.4, 0.6]}
    long["peak_mib"] = {"s0kernels": 10.0, "else": 20.0}
    machine = {"cpu": "A", "instructions": "avx2", "threads": 1, "clock": "wall", "date": "2026-01-01", "commit": "c"}
    machine |= {"kernels": measure.kernel_hashes(), "versions": {"torch": "2", "transformers": "5"}}
    roofline = {"copy_gbs": 10.0, "matmul_gflops": {"float32": 50.0}}
    return {"machine": machine, "roofline": roofline, "rows": [long, short]}


def test_readme_is_what_the_results_give():
    text = README.read_text()
    assert "<!-- bench: " in text
    assert report.filled(text) == text, "python benchmarks/report.py makes it so"


def test_table(results):
    head, _, row, *_ = report.table(results).splitlines()
    assert head.split(" | ")[2:4] == ["T = 64, ms", "T = 256, ms"]
    cells = row.strip("| ").split(" | ")
    assert cells[:4] == ["SSD, forward", "fp32", "2 (else 1.5x)", "8 (else 0.5x)"]
    assert cells[4:7] == ["50 %", "10 (else 20)", "1.00 (0.90-1.10)"]


def test_a_table_says_when_kernels_changed(results):
    assert "changed since" not in report.table(results)
    results["machine"]["kernels"]["cpu"] = "0" * 16
    assert "changed since" in report.table(results)


def test_plot_shows_every_implementation_on_any_background(results, tmp_path):
    report.plot(results, tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_text()
    for text in ("s0kernels, forward", "else, forward", "SSD, falcon-h1-7b, fp32"):
        assert text in drawn
    assert "#ffffff" not in drawn
    assert "#000000" not in drawn
    report.plot(results, tmp_path / "y.svg")
    assert (tmp_path / "y.svg").read_text() == drawn
