"""The functions that measure, on known distributions, known work and known memory."""

import importlib.metadata
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from s0kernels.bench import measure
from s0kernels.ops import gated_delta_rule, ssd


def test_interval_of_a_ratio_covers_the_truth():
    """The 95 % intervals must hold about 95 % of 200 known ratios, with noise that pairs share. The median must be
    close."""
    random, held = np.random.default_rng(0), 0
    for _ in range(200):
        noise = random.lognormal(0, 1.0, 25)  # other load on the machine in a round, far larger than the difference
        over, under = (random.lognormal(mean, 0.05, 25) * noise for mean in (np.log(1.1), 0.0))
        found = measure.ratio(over, under, resamples=1000)
        assert found.low <= found.median <= found.high
        assert abs(found.median - 1.1) < 0.1
        held += found.low <= 1.1 <= found.high
    assert 180 <= held <= 199


def test_ratio_of_a_case_with_itself_is_one():
    samples = list(np.random.default_rng(0).lognormal(0, 1, 9))
    assert measure.ratio(samples, samples) == (1, 1, 1)
    assert measure.ratio([2 * x for x in samples], samples) == (2, 2, 2)


def test_cases_take_turns_and_are_told_apart():
    calls = []

    def case(name: str, seconds: float):
        return lambda: (calls.append(name), time.sleep(seconds))

    cases = {"slow": case("slow", 0.02), "fast": case("fast", 0.005), "slow again": case("slow again", 0.02)}
    times = measure.interleaved(cases, rounds=6, least=0)
    assert [len(samples) for samples in times.values()] == [6, 6, 6]
    rounds = [calls[i : i + 3] for i in range(6, len(calls), 3)]  # after two calls of each
    assert all(sorted(turn) == sorted(cases) for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1, "the order changes"
    assert 2 < measure.ratio(times["slow"], times["fast"]).median < 5
    assert all(samples >= 0.019 for samples in times["slow"])


def test_processor_time_is_not_that_of_sleeping():
    times = measure.interleaved({"sleep": lambda: time.sleep(0.02)}, rounds=3, clock="processor")
    assert max(times["sleep"]) < 0.01


def test_a_budget_leaves_three_rounds():
    times = measure.interleaved({"sleep": lambda: time.sleep(0.002)}, rounds=50, budget=0.0)
    assert len(times["sleep"]) == 3


def test_work_is_counted():
    x = torch.randn(1000)
    found = measure.work(lambda: x.clone() + x.to(torch.float64))
    assert found.operators["aten::add"] == 1
    assert found.operators["aten::clone"] == 1
    assert found.copied == 4000 + 8000 + 8000  # add converts its first operand
    assert found.allocated == 4000 + 8000 + 8000 + 8000
    assert found.launches == 0
    assert measure.work(x.neg_).allocated == 0


@pytest.mark.parametrize("op", ["gated_delta_rule", "ssd"])
def test_work_shows_a_copied_state(op):
    """S0 and zero run the same operators. A state copied for each sequence would show."""
    x, gate, weight = torch.randn(3, 20, 2, 8), -torch.rand(3, 20, 2), torch.rand(3, 20, 2)
    state = torch.randn(2, 8, 8)

    def run(state):
        if op == "gated_delta_rule":
            return lambda: gated_delta_rule(x, x, x, gate, weight, initial_state=state() if state else None)
        return lambda: ssd(x, weight, gate[0, 0], x, x, initial_state=state() if state else None)

    zero, shared, copied = (
        measure.work(run(s)) for s in (None, lambda: state, lambda: state.expand(3, -1, -1, -1).clone())
    )
    assert shared == zero
    assert copied.copied == zero.copied + 3 * state.numel() * 4
    assert copied.allocated == zero.allocated + 3 * state.numel() * 4


def allocating(megabytes: int):
    return lambda: torch.ones(megabytes * 2**18).add(1)


@pytest.mark.slow
def test_peak_memory():
    found = measure.peak_memory(allocating, 40, warm_up=(1,))
    assert 79 * 2**20 < found < 88 * 2**20  # the operand and the sum
    with measure.memory_process() as process:
        for megabytes in (20, 40, 20, 40):  # freed memory does not lower later results
            found = measure.peak_memory(allocating, megabytes, warm_up=(1,), process=process)
            assert 2 * megabytes - 1 < found / 2**20 < 2 * megabytes + 8


def failing(_):
    raise ValueError("megabytes")


def test_peak_memory_passes_errors_on():
    with pytest.raises(ValueError, match="megabytes"):
        measure.peak_memory(failing, 1)


def test_roofline_is_positive_for_every_dtype():
    found = measure.roofline(dtypes=(torch.float32, torch.bfloat16))
    assert set(found["matmul_gflops"]) == {"float32", "bfloat16"}
    assert all(0 < x < 1e6 for x in (found["copy_gbs"], *found["matmul_gflops"].values()))


def test_machine_as_json(tmp_path):
    found = measure.machine(clock="processor")
    measure.write_json(tmp_path / "new" / "x.json", found)
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == found
    assert found["clock"] == "processor"
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert measure.machine_name(found) == f"cpu-{found['instructions']}"
    assert measure.machine_name({"gpu": "NVIDIA H200"}) == "nvidia-h200"


def test_kernel_hashes_follow_the_sources(tmp_path, monkeypatch):
    """A hash depends only on its backend, from its sources or from the library built from them."""
    backends, csrc = tmp_path / "package" / "backends", tmp_path / "csrc"
    for file in (backends / "cpu.py", backends / "torch_chunked.py", backends / "triton" / "ssd" / "forward.py"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    monkeypatch.setattr(measure, "_PACKAGE", backends.parent)
    seen = [measure.kernel_hashes()]

    def changed(file, text: str) -> set[str]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        seen.append(measure.kernel_hashes())
        return {name for name in seen[-1] if seen[-1][name] != seen[-2][name]}

    assert changed(backends / "cpu.py", "new") == {"cpu"}
    assert changed(backends / "triton" / "aot.py", "new") == {"triton"}
    assert changed(backends / "triton" / "ssd" / "forward.py", "new") == {"triton"}
    assert changed(backends.parent / "_cpu.so", "library") == {"cpu"}
    assert changed(csrc / "cpu" / "scan.h", "source") == {"cpu"}
    assert changed(backends.parent / "_cpu.so", "built again") == set()
    assert changed(backends / "shared.py", "shared") == set(seen[0])
    assert changed(csrc / "cuda" / "kernels.cu", "source") == {"cuda"}
    assert changed(csrc / "token" / "ssd.h", "token") == {"cpu", "cuda"}
    assert changed(csrc / "kind.h", "shared") == {"cpu", "cuda"}


def test_nothing_of_it_comes_with_the_ops():
    code = "import sys, s0kernels.ops; sys.exit('s0kernels.bench.measure' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
