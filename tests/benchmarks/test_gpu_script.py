"""`make gpu`: the whole script without a GPU, and the failures of its parts."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from surroundings import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import gpu
import gpu_compile
import gpu_scans
import gpu_tiles

from s0kernels.backends.triton.common.targets import assuming, known_target
from s0kernels.bench.inputs import scan_inputs
from s0kernels.bench.passes import SCANS, Op
from s0kernels.heads import FLAGSHIPS, MODELS


def make_gpu(out, *options):
    command = [
        "make",
        "--no-print-directory",  # printed by a nested make
        "gpu",
        f"PYTHON={sys.executable}",
        f"OUT={out}",
        f"OPTIONS=--dry-run --processes 2 {' '.join(options)}",
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_dry_run(tmp_path):
    done = make_gpu(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("no problems\n")
    found = {part: json.loads(next(tmp_path.glob(f"*-{part}.json")).read_text()) for part in gpu.PARTS}
    assert len(list(tmp_path.glob("*.json"))) == len(gpu.PARTS)
    assert all(part["machine"]["kernels"] for part in found.values())
    assert found["tests"]["skipped"] > 300
    assert not any(found[part]["left out"] for part in ("scans", "decode", "tiles"))
    for part, module in gpu.SCRIPTS.items():
        assert module.table(found[part]) in done.stdout
    passes = {(row["op"], name.rpartition(", ")[2]) for row in found["scans"]["rows"] for name in row["ms"]}
    assert passes >= {(op, what) for op in SCANS for what in ("forward", "zero", "S0 again", "backward", "state")}
    assert ("ssd", "frozen") in passes
    for row in found["tiles"]["rows"]:
        assert not row["wrong"]
        assert not row["refused"]
        for kernels in row["us"].values():
            assert all(len(us) == 2 + len(gpu_tiles.TINY_CANDIDATES) for us in kernels.values())
    assert {row["kind"] for row in found["decode"]["rows"]} == {"steps", "mixers", "models"}


def test_what_has_no_time_left_is_said(tmp_path):
    done = make_gpu(tmp_path, "--minutes", "0.02")
    assert done.returncode != 0
    for problem in (
        "compile-0: not ready after",
        "the tests did not end in",
        "scans: did not end",
        "tiles: did not end",
    ):
        assert problem in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], "--minutes and --processes must be positive"),
        (["--baselines", "nowhere", "--dry-run"], "--baselines must be a folder, got nowhere"),
    ],
)
def test_errors_name_the_argument(options, message, capsys):
    with pytest.raises(SystemExit):
        gpu.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no CUDA device" in capsys.readouterr().err


def test_results_of_tests_are_read_from_both_kinds_of_log():
    log = """[gw1] [ 33%] PASSED tests/backends/test_gpu.py::test_a[x, y-{'z': 1}]
tests/backends/test_gpu.py::test_b[a b] FAILED                  [ 66%]
[gw0] [ 99%] SKIPPED tests/backends/test_gpu.py::test_c
FAILED tests/backends/test_gpu.py::test_b - AssertionError"""
    found = [match for line in log.splitlines() for match in gpu.TEST.findall(line)]
    names = [(match[1] or match[2]).partition("::")[2] for match in found]
    assert names == ["test_a[x, y-{'z': 1}]", "test_b[a b]", "test_c"]
    assert [match[0] or match[3] for match in found] == ["PASSED", "FAILED", "SKIPPED"]


def test_what_waits_gets_its_share():
    """Shares do not depend on the order, and together they use all the time."""
    run = SimpleNamespace(left=100.0)
    share = gpu.Run.share
    assert share(run, "tiles", []) == 100.0
    assert share(run, "scans", ["decode", "tiles"]) == pytest.approx(100 * 100 / 220)
    assert share(run, "tiles", ["scans"]) == pytest.approx(100 * 70 / 170)


@pytest.mark.parametrize("op", SCANS)
def test_the_sweep_keeps_the_schedule(op):
    """With one long sequence, the forward of SSD is split on an H100 for all tiles."""
    op = SCANS[op]
    values = scan_inputs(op.name, MODELS[FLAGSHIPS[op.name]][1], (1, 8192), dtype=torch.bfloat16)
    with assuming(known_target("sm_90")):
        assert gpu_tiles.schedule_of(op, values) == ("fused" if op.name == "gated_delta_rule" else "split")
        today = [one.kernel.__name__ for one in gpu_tiles.recorded(op, values, "forward")]
        with gpu_tiles.using(op, values, gpu_tiles.CANDIDATES[0], gpu_tiles.schedule_of(op, values)):
            found = gpu_tiles.recorded(op, values, "forward")
        assert [one.kernel.__name__ for one in found] == today
        assert all(one.tiles == gpu_tiles.CANDIDATES[0] for one in found)
        assert set(gpu_tiles.stages(op, values, "forward")) == set(today)


def test_a_candidate_that_changes_results_is_found(monkeypatch):
    op, _, make = next(gpu_tiles.cases(True))
    results = [torch.ones(3), torch.ones(3) + 0.001, torch.full((3,), float("nan"))]

    def passes(op, values):
        count = iter(results)
        return {"forward": lambda: (next(count),)}

    monkeypatch.setattr(gpu_tiles, "passes", passes)
    monkeypatch.setattr(gpu_tiles, "stages", lambda *_: {})
    before = {name: dict(table) for name, table in gpu_tiles.TABLES.items()}
    *_, row = gpu_tiles.swept(op, make(), gpu_tiles.TINY_CANDIDATES, lambda run: {})
    assert list(row["wrong"]) == ["forward, (32, 4, 2)"]
    assert before == gpu_tiles.TABLES


def test_a_candidate_that_cannot_run_is_refused_for_that_pass_alone(monkeypatch):
    op, _, make = next(gpu_tiles.cases(True))
    values = make()
    real = gpu_tiles.passes(op, values)

    def too_large():
        if gpu_tiles.TABLES[op.name]["scan", 2] != before["scan", 2]:
            raise RuntimeError("out of resource: shared memory")
        return real["forward"]()

    before = dict(gpu_tiles.TABLES[op.name])
    monkeypatch.setattr(gpu_tiles, "passes", lambda *_: {"forward": too_large, "state": real["state"]})
    *_, row = gpu_tiles.swept(op, values, gpu_tiles.TINY_CANDIDATES[:1], lambda run: {"kernel": 1.0})
    assert list(row["refused"]) == ["forward, (16, 4, 1)"]
    assert set(row["us"]["state"]["kernel"]) == {"today", gpu_tiles.AGAIN, "(16, 4, 1)"}


def test_wrong_results_of_ours_end_the_script(monkeypatch):
    scan = Op.scan

    def half(op, values, state, backend):
        found = scan(op, values, state, "torch" if backend == gpu_scans.BACKEND else backend)
        return found if backend == "reference" else tuple(x / 2 for x in found)

    monkeypatch.setattr(Op, "scan", half)
    with pytest.raises(RuntimeError, match="our own results are wrong: error of output"):
        gpu_scans.usable(SCANS["ssd"], True, False, [])


def test_configurations_are_shared(monkeypatch):
    """Each configuration is compiled by exactly one process."""
    from triton.runtime.autotuner import Autotuner

    looked = []
    for number in range(3):
        monkeypatch.setattr(Autotuner, "_bench", lambda self, *arguments, config, **options: looked.append(config))
        gpu_compile.share_configurations(number, 3)
        found = [Autotuner._bench(SimpleNamespace(), config=config) for config in range(10)]
        assert found.count([float("inf")] * 3) == 10 - len(range(number, 10, 3))
    assert sorted(looked) == list(range(10))
