"""The command line of tuning: options, settings files, checks before training, the report."""

import json
import re
import socket
import time

import pytest
import torch
from models import MODELS, tokenizer
from surroundings import python
from transformers.utils import logging

import s0kernels
from s0kernels import S0Config, S0States, S0Trainer
from s0kernels.cli import main

LINES = [{"prompt": "Q: 1+1\nA:", "completion": " 2"}, {"prompt": "Q: 2+2\nA:", "completion": " 4, and so on"}]


@pytest.fixture
def place(tmp_path):
    MODELS["qwen"]().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    return tmp_path


def tune(place, *options, data="data.jsonl", model="model") -> int:
    return main(["tune", str(place / model), str(place / data), str(place / "out"), *options])


def test_every_setting_can_be_given(place, capsys):
    given = {
        "n_steps": 2, "lr": 0.01, "l2_lambda": 0.1, "alpha": 0.5, "normalize": True, "grad_clip": 0.3, "max_length": 30,
    }  # fmt: skip
    options = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in given.items()]
    assert tune(place, *options, "--scale", "alpha", "--layers", "0,3", "--max-memory", "1GiB", "--no-packed") == 0
    assert S0Config.load(place / "out" / "config.json") == S0Config(**given)
    states = S0States.load(place / "out")
    assert [layer for layer in states if states[layer].any()] == [0, 3]
    assert "multiplied by 0.5 in training" in capsys.readouterr().out


def test_a_file_of_settings(place, capsys):
    file = place / "config.yaml"
    file.write_text("n_steps: 3\nlr: 1e-2\nlayers: [1]\nscale: 0.5\ntokens_per_batch: 1\n")
    assert tune(place, "--config", str(file), "--n-steps", "2") == 0
    assert S0Config.load(place / "out" / "config.json") == S0Config(n_steps=2, lr=0.01)
    assert "multiplied by 0.5 in training" in capsys.readouterr().out
    for text, message in (
        ("steps: 3", "there is no option 'steps'; the options are n_steps, lr,"),
        ("n_steps: [", "config.yaml is not YAML"),
        ("- 3", "must be a mapping of options to values, got list"),
        ("lr: fast", "lr must be a number, got 'fast'"),
        ("n_steps: 2.5", "n_steps must be an int, got 2.5"),
        ("layers: some", "--layers must be indices of layers, such as 0,1,2, got 'some'"),
        ("max_memory: 8 apples", "--max-memory must be a number of bytes or a size such as 8GiB, got '8 apples'"),
        ("scale: full", "--scale must be a number or alpha, got 'full'"),
    ):
        file.write_text(text)
        assert tune(place, "--config", str(file)) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 2**33), ("8 GB", 8 * 10**9), ("1.5g", 1.5 * 2**30), ("500MiB", 500 * 2**20), (99, 99)]
)
def test_sizes_of_memory(text, size):
    from s0kernels.tuning.command import _bytes

    assert _bytes(text) == size


def test_the_losses_that_are_reported_are_those_of_use(place, capsys):
    assert tune(place, "--steps", "4", "--lr", "0.05") == 0
    out = capsys.readouterr().out
    before, after = map(float, re.match(r"loss ([\d.]+) -> ([\d.]+) with the states at alpha\n", out).groups())
    trainer = S0Trainer.from_pretrained(str(place / "model"))
    assert before == pytest.approx(trainer.evaluate(place / "data.jsonl"), abs=1e-4)
    trainer.load(place / "out")
    trainer.activate()
    assert after == pytest.approx(trainer.evaluate(place / "data.jsonl"), abs=1e-4)
    assert "S0 is multiplied by 1 in training (last step: " in out
    assert "and by 0.07 (alpha) in use" in out


def test_a_table_of_several_tasks(place, capsys):
    (place / "data").mkdir()
    for name, line in zip(("code", "math"), LINES, strict=True):
        (place / "data" / f"{name}.jsonl").write_text(json.dumps(line))
    assert tune(place, "--steps", "3", data="data") == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("task "))
    assert lines[head].split() == ["task", "before", "in", "use", "at", "scale", "1"]
    trainer = S0Trainer.from_pretrained(str(place / "model"))
    trainer.load(place / "out")
    for name, line, row in zip(("code", "math"), LINES, lines[head + 2 :], strict=False):
        trainer.deactivate()
        before = trainer.evaluate([line])
        trainer.activate(name)
        assert row.split()[0] == name
        assert [float(cell) for cell in row.split()[1:3]] == pytest.approx([before, trainer.evaluate([line])], abs=1e-4)


# Checks before training


def test_data_is_checked_before_the_model_is_loaded(place, capsys, monkeypatch):
    (place / "bad.jsonl").write_text('{"prompt": "a"}')
    loaded = []
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: loaded.append(1))
    assert tune(place, data="bad.jsonl") == 1
    assert "bad.jsonl:1 must have prompt and completion" in capsys.readouterr().err
    assert not loaded
    assert not (place / "out").exists()


def test_wrong_names_are_refused_in_a_line(place, capsys, monkeypatch):
    def nobody(*_, **__):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", nobody)
    monkeypatch.setenv("HF_HUB_CACHE", str(place / "cache"))
    (place / "empty").mkdir()
    data, out = str(place / "data.jsonl"), str(place / "out")
    for name, message in (
        ("./nowhere", "there is no model in ./nowhere: no such directory"),
        (str(place / "nothing"), "no such directory"),
        (str(place / "empty"), "is not a model: it is a directory without config.json"),
        ("Somebody/Something-1B", "it has not been downloaded before, and the hub cannot be reached"),
    ):
        for command in (["tune", name, data, out], ["generate", name, "a"]):
            began = time.monotonic()
            assert main(command) == 1
            assert message in capsys.readouterr().err.splitlines()[-1]
            assert time.monotonic() - began < 10


def test_models_of_other_families_are_refused_before_their_weights_are_loaded(place, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=97)).save_pretrained(place / "gpt")
    tokenizer().save_pretrained(place / "gpt")
    (place / "gpt" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is a GPT2LMHeadModel, which has no recurrent mixer of"):
        S0Trainer.from_pretrained(str(place / "gpt"))


def test_a_log_has_lines_and_a_quiet_run_none(place, capfd):
    """The bars of transformers included, which are shown again afterwards where they were before."""
    assert logging.is_progress_bar_enabled()
    for options in ((), ("--quiet",)):
        assert tune(place, "--n-steps", "1", *options) == 0
        said = capfd.readouterr()
        assert "states in" in said.out
        assert "\r" not in said.err
        assert bool(said.err) == (not options)
        if not options:
            assert said.err.startswith(f"loading {place / 'model'}\n")
            assert "S0 tuning: 1 of 1 steps, loss " in said.err
    assert logging.is_progress_bar_enabled()


def test_version():
    assert python("-m", "s0kernels", "--version").stdout.strip() == s0kernels.__version__


# Many tasks


def test_messages_about_many_tasks_stay_short(tmp_path):
    from trainers import PAIRS, trainer

    names = [f"task {i:03}" for i in range(200)]
    tuned = trainer(n_steps=1)
    run = {"checkpoint": tmp_path / "run", "progress": False}
    tuned.train(dict.fromkeys(names, PAIRS[:1]), **run)
    assert len(repr(tuned.states).splitlines()[1]) < 300
    tuned.save(tmp_path / "out")
    again = trainer()
    again.load(tmp_path / "out")
    assert again.tasks == names
    assert all(torch.equal(a, b) for a, b in zip(again.states.parameters(), tuned.states.parameters(), strict=True))
    for call in (
        lambda: tuned.activate("none"),
        lambda: tuned.activate(),
        lambda: tuned.states.attach(tuned.model, tasks="none"),
        lambda: tuned.states.attach(tuned.model, tasks=[500] * 999),
        lambda: S0States.for_model(tuned.model, [*names, names[0]]),
        lambda: trainer(n_steps=1).train(dict.fromkeys(names[1:], PAIRS[:1]), **run),
    ):
        with pytest.raises(ValueError, match=r"S0|run") as found:
            call()
        assert len(str(found.value)) < 1000
