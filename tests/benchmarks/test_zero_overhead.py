"""S0 has no countable cost: the kernels, bytes allocated and bytes copied are the same as without it. Also tests the
scripts that measure it, at sizes too small for meaningful results."""

import json
import sys
from functools import partial

import pytest
import torch
from models import MODELS as TINY
from models import every_family, every_model, fails_upstream, random_states, tokens
from surroundings import ROOT

from s0kernels import swap_modules

sys.path.append(str(ROOT / "benchmarks"))
import headline
import hybrids
import training
import zero_overhead
from cases import CHUNKED, MAKERS
from compare import counts, kernels, timing, verdict

# Counts


@pytest.mark.parametrize("op", list(MAKERS))
@pytest.mark.parametrize("backend", CHUNKED)
def test_a_scan_from_s0_does_what_one_from_zero_does(op, backend):
    zero, shared, each = (MAKERS[op](130, state=kind).to(torch.float32) for kind in (None, "shared", "each"))
    found = counts(
        {"zero": partial(zero.run, backend), "S0": partial(shared.run, backend), "each": partial(each.run, backend)}
    )
    if backend == "torch":  # copies the state into memory where it would otherwise write zeros
        found["S0"]["copied"] -= each.tensors["initial_state"].nbytes
        found["each"]["copied"] -= each.tensors["initial_state"].nbytes
    assert found["zero"] == found["S0"] == found["each"]
    assert found["zero"]["kernels"] > 0


@pytest.mark.parametrize("op", list(MAKERS))
@pytest.mark.parametrize("backend", CHUNKED)
def test_a_bank_costs_the_same_whatever_its_size(op, backend):
    """With the compiled kernels a bank costs no more than no state. The copy that other libraries make shows."""
    problem = MAKERS[op](70, B=3, state="bank").to(torch.float32)
    bank = problem.tensors.pop("initial_state")
    problem.options["state_indices"] = torch.tensor([2, -1, 1])
    run = partial(problem.run, backend)
    found = counts({size: partial(run, initial_state=bank.repeat(size, 1, 1, 1)) for size in (1, 16)})
    assert found[1] == found[16]
    found = counts({"zero": partial(run, state_indices=None), "bank": partial(run, initial_state=bank)})
    copied = counts(
        {"copied": lambda: run(initial_state=bank[:1].expand(3, -1, -1, -1).contiguous(), state_indices=None)}
    )
    if backend == "cpu":
        assert found["bank"] == found["zero"]
        assert copied["copied"]["copied"] - found["zero"]["copied"] == 3 * bank[0].nbytes
        assert copied["copied"]["allocated"] - found["zero"]["allocated"] == 3 * bank[0].nbytes
    else:
        small = 200  # bytes of indices and masks
        assert 0 <= found["bank"]["allocated"] - found["zero"]["allocated"] <= small


@every_model
@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"tasks": [1, -1]}], ids=["S0", "scaled", "task per row"])
def test_a_swapped_model_does_the_same_work_with_s0(name, options):
    if reason := fails_upstream(name):
        pytest.skip(reason)
    model = swap_modules(TINY[name]())
    ids = tokens(2, 40)
    states = random_states(model, 2).requires_grad_(False)
    cases = {
        "prefill": lambda: model(ids, use_cache=True),
        "generate": lambda: model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False),
    }
    with torch.no_grad():
        zero = counts(cases)
        states.attach(model, **options)
        assert counts(cases) == zero
    states.detach()


@every_family
def test_training_around_frozen_s0_does_the_same_work(name):
    model = swap_modules(TINY[name]())
    states = random_states(model).requires_grad_(False)
    case = {"step": lambda: model(tokens(2, 40), use_cache=False).logits.sum().backward()}
    zero = counts(case)
    states.attach(model)
    assert counts(case) == zero


def test_work_that_differs_is_found():
    x = torch.ones(1000)
    found = counts({"view": lambda: x[None], "one": lambda: x + x, "copy": lambda: x.clone()})
    assert found["view"] == {"kernels": 0, "allocated": 0, "copied": 0}
    assert found["one"] == {"kernels": 1, "allocated": 4000, "copied": 0}
    assert found["copy"] == {"kernels": 1, "allocated": 4000, "copied": 4000}
    row = {"what": "a scan", "work": {"zero": found["one"], "S0": found["copy"]}}
    with pytest.raises(AssertionError, match="do not do the same work"):
        zero_overhead.check_equal(row, "cpu", 0)


def test_verdicts():
    control = (1.0, 0.98, 1.02)
    for low, high, expected in (
        (0.99, 1.01, "inside"),
        (1.0, 1.03, "overlaps"),
        (1.03, 1.05, "slower"),
        (0.90, 0.95, "faster"),
    ):
        assert verdict((1.0, low, high), control) == expected
    samples = {"zero": [1.0, 2.0, 4.0], "again": [1.0, 2.0, 4.0], "S0": [1.1, 2.2, 4.4]}
    found = timing(samples, "zero")
    assert found["control"] == [1, 1, 1]
    assert found["ratio"]["S0"] == pytest.approx([1.1] * 3)
    assert (found["ms"], found["verdict"]) == ({"zero": 2000, "S0": 2200}, {"S0": "slower"})


# The scripts


def tiny_settings() -> dict:
    narrow = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    return {name: {**hybrids.SMALL[name], **narrow} for name in ("Qwen3.5", "Falcon-H1")}


@pytest.mark.slow
def test_levels(tmp_path, monkeypatch):
    heads = {"gated_delta_rule": {"H": 2, "HV": 4, "K": 8, "V": 8}, "ssd": {"H": 2, "G": 1, "P": 8, "N": 8}}
    op, bank = zero_overhead.op_level, zero_overhead.bank_level
    monkeypatch.setattr(zero_overhead, "op_level", partial(op, heads=heads, length=40))
    monkeypatch.setattr(zero_overhead, "bank_level", partial(bank, heads=heads, models=tiny_settings(), banks=(1, 16)))
    for level in ("mixer", "untouched"):
        run = getattr(zero_overhead, f"{level}_level")
        monkeypatch.setattr(zero_overhead, f"{level}_level", partial(run, models=tiny_settings(), length=40))
    models = {name: tiny_settings()[name] for name in ("Qwen3.5",)}
    monkeypatch.setattr(zero_overhead, "generate_level", partial(zero_overhead.generate_level, models=models, new=2))
    file = tmp_path / "found.json"
    arguments = ["--device", "cpu", "--threads", "1", "--rounds", "3", "--budget", "0", "--out", str(file)]
    zero_overhead.main(arguments)
    found = json.loads(file.read_text())
    assert found["machine"]["kernels"]
    assert found["settings"]["rounds"] == 3
    for level in zero_overhead.LEVELS:
        assert found[level], level
        for line in found[level]:
            assert line["rounds"] == 3
            assert set(line["ratio"]) == set(line["verdict"]) == set(line["work"]) - {"zero", "untouched"}


@pytest.mark.slow
def test_headline(tmp_path, monkeypatch, capsys):
    for family, model in (("Qwen3.5", "Qwen3.5-4B"), ("Falcon-H1", "Falcon-H1-7B")):
        monkeypatch.setitem(headline.STAND_INS, (model, "small"), tiny_settings()[family])
    file = tmp_path / "found.json"
    arguments = [
        "--device",
        "cpu",
        "--threads",
        "1",
        "--steps",
        "2",
        "--rounds",
        "3",
        "--budget",
        "0",
        "--out",
        str(file),
    ]
    arguments += ["--stand-ins", "small"]
    headline.main([*arguments, "--parts", "states", "train"])
    first = json.loads(file.read_text())["parts"]
    assert first["Qwen3.5-4B, whole, states"]["states_bytes"] == 48 * 2**20
    assert first["Qwen3.5-4B, whole, states"]["file_bytes"] - 48 * 2**20 < 8192
    assert first["Falcon-H1-7B, whole, states"]["states_bytes"] == 132 * 2**20
    assert len(first["Falcon-H1-7B, small, train"]["losses"]) == 2
    capsys.readouterr()
    headline.main(arguments)  # resumes
    second = json.loads(file.read_text())["parts"]
    assert capsys.readouterr().out.count("done before") == 4
    assert {key: second[key] for key in first} == first
    assert len(second["Qwen3.5-4B, small, use"]["lines"]) == 2
    headline.main([*arguments, "--parts", "train", "--steps", "1"])  # other settings: measured again
    third = json.loads(file.read_text())["parts"]
    assert len(third["Qwen3.5-4B, small, train"]["losses"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", training.MODELS)
def test_ways_of_training_agree(name, tmp_path):
    """The three ways that need only installed packages have the same losses, step by step."""
    file = tmp_path / "found.json"
    ways = ["--ways", *training.WAYS] if name == "falcon_h1" else ["--ways", *training.WAYS[:3]]
    training.main(["--models", name, *ways, "--steps", "3", "--examples", "3", "--rounds", "1", "--out", str(file)])
    runs = {run["way"]: run for run in json.loads(file.read_text())["runs"]}
    assert len(runs["batched"]["losses"]) == 3
    assert runs["batched"]["losses"][2] < runs["batched"]["losses"][0]
    for way in ("one by one", "copied"):  # Adam makes full steps for entries whose gradient is only rounding
        assert runs[way]["losses"] == pytest.approx(runs["batched"]["losses"], rel=1e-3)
    if name == "falcon_h1":
        assert "mamba_ssm" in runs["s0-tuning"]["missing"]


def test_kernels_are_told_from_views():
    from s0kernels.bench.measure import work

    x = torch.ones(4, 4)
    assert kernels(work(lambda: x.t().reshape(16)[3:].view(-1, 1))) == 1  # the copy that reshape makes
