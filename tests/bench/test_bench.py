"""The command `bench`: its comparisons, its table and its JSON."""

import importlib.metadata
import json

import pytest
import torch

from s0kernels.bench import measure
from s0kernels.bench.baselines import BASELINES, Baseline
from s0kernels.bench.passes import PASSES, Op, Shape, operations, traffic
from s0kernels.cli import main
from s0kernels.heads import MODELS

pytestmark = pytest.mark.slow  # tests of the benchmarks


SMALL = ("bench", "--rounds", "3", "--seconds", "0")


@pytest.fixture
def small_models(monkeypatch):
    """Replace the heads of models by small ones with the same names."""
    monkeypatch.setitem(MODELS, "qwen3.5-4b", ("gated_delta_rule", {"H": 1, "HV": 2, "K": 16, "V": 24}))
    monkeypatch.setitem(MODELS, "falcon-h1-7b", ("ssd", {"H": 8, "P": 16, "G": 1, "N": 24}))
    found = {"copy_gbs": 10.0, "matmul_gflops": {"float32": 50.0, "bfloat16": 40.0}}
    monkeypatch.setattr(measure, "roofline", lambda *_: found)


def test_json_of_both_scans(small_models, tmp_path, capfd):
    out = tmp_path / "x.json"
    assert main([*SMALL, "--no-memory", "--device", "cpu", "--json", str(out)]) == 0
    assert capfd.readouterr().out == ""
    found = json.loads(out.read_text())
    assert found["machine"]["kernels"] == measure.kernel_hashes()
    assert [(row["op"], row["pass"]) for row in found["rows"]] == [
        (op, what) for op in ("gated_delta_rule", "ssd") for what in PASSES
    ]
    for row in found["rows"]:
        assert row["ms"]["s0kernels"] > 0
        assert row["rounds"] == 3
        assert row["ratio"]["transformers"][1] <= row["ratio"]["transformers"][0] <= row["ratio"]["transformers"][2]
        assert ("s0_over_zero" in row) == (row["pass"] in ("forward", "training"))
        assert row["of_roofline"] > 0
    missing = {name for reasons in found["not timed"].values() for name in reasons}
    assert missing == {"fla", "flash-qla", "mamba-ssm-128", "mamba-ssm-256", "fla-simple-gla"}
    assert all("needs a GPU" in reason for reasons in found["not timed"].values() for reason in reasons.values())


def test_table_of_one_pass(small_models, capsys):
    assert main([*SMALL, "--shape", "falcon-h1-7b:2x70", "--pass", "forward", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    head, _, row = out.splitlines()[:3]
    assert head.split()[:4] == ["shape", "dtype", "pass", "ms"]
    assert "transformers / ours" in head
    assert row.startswith("falcon-h1-7b:2x70")
    assert "mamba-ssm-128: needs a GPU" in out
    assert "causal-conv1d: a convolution" in out


def test_json_to_standard_output(small_models, capsys):
    options = ["--op", "ssd", "--pass", "step", "--against", "none", "--json", "-", "--device", "cpu"]
    options += ["--dtype", "float32", "--dtype", "bfloat16"]
    assert main([*SMALL, *options]) == 0
    row, other = json.loads(capsys.readouterr().out)["rows"]
    assert (row["dtype"], other["dtype"]) == ("float32", "bfloat16")
    assert row["op"] == "ssd"
    assert row["ratio"] == {}
    assert row["gflops"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shape", "llama"), "--shape must be MODEL"),
        (("--shape", "qwen3.5-4b:8"), "--shape must be MODEL"),
        (("--shape", "qwen3.5-4b:0x8"), "--shape must be MODEL"),
        (("--shape", "qwen3.5-4b", "--op", "ssd"), "--op ssd"),
        (("--against", "llama"), "--against must be none or among transformers"),
        (("--rounds", "2"), "--rounds must be at least 3, got 2"),
        (("--threads", "0"), "--threads must be at least 1"),
        (("--device", "nowhere"), "--device cannot be used"),
    ],
)
def test_errors_name_the_argument(options, message, capsys):
    assert main(["bench", *options]) == 1
    assert message in capsys.readouterr().err


def test_wrong_results_have_no_speed(small_models, monkeypatch, capsys):
    """Another library with wrong results is listed with its error. If ours are wrong, nothing is reported."""

    def half(run):
        return lambda values, state: tuple(x / 2 for x in run(values, state))

    right = BASELINES["ssd"]["transformers"]
    wrong = Baseline("torch", lambda: half(right.scan()), on_cpu=True)
    monkeypatch.setitem(BASELINES["ssd"], "transformers", wrong)
    options = ["--op", "ssd", "--pass", "forward", "--no-memory", "--device", "cpu"]
    assert main([*SMALL, *options, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][0]["ratio"] == {}
    assert found["not timed"]["ssd"]["transformers"].startswith("error of output: 5.0e-01")
    monkeypatch.setattr(Op, "by", lambda op, name, backend=None: half(lambda v, s: op.scan(v, s, backend)))
    assert main([*SMALL, *options]) == 1
    assert "our own results are wrong" in capsys.readouterr().err


def test_libraries_are_not_imported_to_find_out():
    """flash-linear-attention, for example, fails at import on a CPU."""
    needs_gpu = Baseline("torch", lambda: pytest.fail("loaded"))
    assert needs_gpu.unusable("cpu") == f"needs a GPU (torch {importlib.metadata.version('torch')} is installed)"
    assert needs_gpu.unusable("cuda") is None
    assert Baseline("no-such", lambda: None).unusable("cuda") == "no-such is not installed"


def test_operations_and_traffic():
    """The shape is one token of one head, for which they can be counted by hand."""
    step = operations(Shape("falcon-h1-7b", 1, 1), "step")
    assert step == 24 * 4 * 128 * 256
    shape = Shape("falcon-h1-7b", 2, 1)
    values, state = shape.values("cpu", torch.float32), 24 * 128 * 256 * 4
    tokens = 4 * (2 * 24 * 128 + 2 * 24 + 24 + 2 * 2 * 256)
    assert traffic(shape.op, values, "step", 2) == tokens + 4 * 2 * 24 * 128 + 4 * state
    assert traffic(shape.op, values, "forward", 2) == tokens + 4 * 2 * 24 * 128 + 3 * state
    assert operations(shape, "training") > 3 * operations(shape, "forward")
