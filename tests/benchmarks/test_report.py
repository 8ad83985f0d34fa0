"""The tables of the documents match the files of results, and say if the kernels have changed since."""

import sys

import pytest
from surroundings import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import report

from s0kernels.bench import measure


@pytest.fixture
def results():
    """Return invented results: two lengths of one scan, the longer one with memory, for the current kernels."""
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


@pytest.mark.parametrize("document", report.DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_what_the_results_give(document):
    text = document.read_text()
    assert "<!-- bench: " in text or "<!-- hardware -->" in text
    assert report.filled(text) == text, "python benchmarks/report.py makes it so"


def test_other_tables():
    machine = {"cpu": "A", "instructions": "avx2", "threads": 1, "clock": "wall", "date": "2026-01-01", "commit": "c"}
    machine |= {"kernels": measure.kernel_hashes(), "versions": {"torch": "2", "transformers": "5"}}
    work = {"zero": {"kernels": 3}, "S0": {"kernels": 3}, "copied": {"kernels": 4}}
    line = {"what": "prefill", "ms": {"zero": 1.0, "S0": 2.0, "copied": 3.0}, "control": [1.0, 0.9, 1.1], "work": work}
    line |= {
        "ratio": {"S0": [2.0, 1.9, 2.1], "copied": [3.0, 2.9, 3.1]},
        "verdict": {"S0": "slower", "copied": "slower"},
    }
    text = report.overhead({"machine": machine, "mixer": [line]})
    assert "| prefill | S0 / zero | 2 | 2.000 (1.900-2.100) | 1.000 (0.900-1.100) | slower | equal |" in text
    assert "| prefill | copied / zero | 3 | 3.000 (2.900-3.100) | 1.000 (0.900-1.100) | slower | not equal |" in text

    run = {"model": "m", "way": "batched", "processor_seconds": 2.0, "peak_mib": 10.4, "losses": [3.0, 0.5]}
    runs = [run, {**run, "way": "one by one", "processor_seconds": 5.0}, {"model": "m", "way": "x", "missing": "why"}]
    settings = {"examples": 4, "steps": 2}
    text = report.training({"machine": machine, "settings": settings, "runs": runs})
    assert "| m | one by one | 5.0 | 2.5x | 10 | 0.5000000 |" in text
    assert "| m | x | why |" in text

    parts = {"whole": {"states_bytes": 2**20, "parameters": 3e9, "recurrent_layers": 4}, "use": {"lines": [line]}}
    text = report.headline({"machine": machine, "parts": parts})
    assert "| whole | 3.00 G parameters; S0 1.000 MiB in 4 layers |" in text
    assert "S0 / zero 2.000 (1.900-2.100)" in text


def test_table(results):
    head, _, row, *_ = report.table(results).splitlines()
    assert head.split(" | ")[2:4] == ["T = 64, ms", "T = 256, ms"]
    cells = row.strip("| ").split(" | ")
    assert cells[:4] == ["SSD, forward", "fp32", "2 (else 1.5x)", "8 (else 0.5x)"]
    assert cells[4:7] == ["50 %", "10 (else 20)", "1.00 (0.90-1.10)"]


def test_scaling(results, tmp_path):
    """The longest point is measured for this library alone, at half the roofline."""
    points = []
    for T, names in ((256, ("s0kernels", "else")), (512, ("s0kernels",))):
        point = {"model": "falcon-h1-7b", "length": T}
        row = {"axis": "length", "point": point, "pass": "training", "gflop": 0.05, "gb": 0.001}
        points.append(row | {"ms": dict.fromkeys(names, T / 256), "peak_mib": dict.fromkeys(names, 30.0)})
    found = {"machine": results["machine"], "roofline": results["roofline"], "points": points}
    row = "| falcon-h1-7b | length 256 to 512 | forward + backward | 1 | 2 | 50 % | 30 | 30 |"
    assert row in report.scaling(found).splitlines()
    report.plot_scaling(found, tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_text()
    for text in (
        "s0kernels, forward + backward",
        "else, forward + backward",
        "roofline, forward + backward",
        "peak MiB",
    ):
        assert text in drawn


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


def test_tables_of_a_gpu(results, monkeypatch):
    """Each table says whether its kernels have changed since."""
    row = {"op": "ssd", "case": "1x8", "variant": "token-major", "gpu_ms": {}, "refused": {}}
    row["ms"] = {"s0kernels, forward": 2.0, "fla, forward": 3.0, "s0kernels, forward, zero": 2.0}
    row["ms"] |= {"s0kernels, forward, S0 again": 1.0, "s0kernels, state": 4.0}
    row["host_ms"] = {"s0kernels, forward": 0.1}
    found = {"machine": results["machine"], "not timed": {}, "rows": [row], "left out": ["1x9: no time was left"]}
    monkeypatch.setattr(report, "load", {"nvidia-x-scans": found}.get)
    text = report.filled("<!-- bench: nvidia-x-scans -->\n<!-- end -->")
    assert "| ssd | 1x8 | token-major | 2.000 (fla 1.50x) |  |  | 4.000 | 1.000 | 2.000 | 0.100 |" in text
    assert "1x9: no time was left" in text
    assert "have changed" not in text
    found["machine"]["kernels"]["triton"] = "another"
    assert "have changed" in report.filled("<!-- bench: nvidia-x-scans -->\n<!-- end -->")
