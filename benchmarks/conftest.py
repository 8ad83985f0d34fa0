"""Fixtures of `pytest benchmarks`. With --benchmark-disable everything runs once, with small heads."""

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("tests", "")]

from s0kernels.bench import inputs, measure  # noqa: E402
from s0kernels.heads import MODELS  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_benchmark_update_machine_info(machine_info):
    machine_info.update(measure.machine(DEVICE))


@pytest.fixture(autouse=True)
def heads(benchmark, monkeypatch):
    if benchmark.disabled:
        for name, (op, _) in MODELS.items():
            monkeypatch.setitem(MODELS, name, (op, inputs.TINY[op]))


@pytest.fixture
def timed(benchmark):
    """Return a function that times a case: a fixed number of rounds after one that is not counted. On a GPU each call
    waits for the device."""

    def run(case: measure.Case, rounds: int = 3) -> None:
        def waiting():
            case()
            torch.cuda.synchronize()

        benchmark.pedantic(waiting if DEVICE == "cuda" else case, rounds=rounds, warmup_rounds=1)

    return run
