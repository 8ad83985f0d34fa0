"""Checkpoints of training runs: interrupted, killed and extended runs; files that are refused."""

import json
import math
import random
import signal
import subprocess
import sys
import time

import numpy
import pytest
import torch
from models import MODELS, every_family
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from surroundings import environment, python
from trainers import PAIRS, same_states, trainer

from s0kernels import S0States


def interrupted(tuned, file, after, **options):
    """Train until `after` steps are done, then fail."""

    def fail(entry, states):
        if entry["step"] == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned.train(PAIRS, checkpoint=file, progress=False, callbacks=[fail], **options)


@every_family
def test_an_interrupted_run_goes_on_with_the_same_bits(name, tmp_path):
    whole = trainer(name, n_steps=7)
    result = whole.train(PAIRS, progress=False)
    for every, after, kept in ((1, 3, 3), (2, 3, 2), (3, 1, 0)):
        file = tmp_path / f"{every}" / "run.safetensors"
        model = MODELS[name]()
        interrupted(trainer(model=model, n_steps=7), file, after, checkpoint_every=every)
        steps = []
        again = trainer(model=model, n_steps=7)
        found = again.train(
            PAIRS,
            checkpoint=file,
            checkpoint_every=every,
            progress=False,
            callbacks=[lambda entry, _, steps=steps: steps.append(entry["step"])],
        )
        assert steps == list(range(kept, 7))
        assert found == result
        assert again.history == whole.history
        assert same_states(again.states, whole.states)


def test_a_finished_run_is_not_trained_again_and_can_be_prolonged(tmp_path):
    file = tmp_path / "run"
    whole, short = trainer(n_steps=5), trainer(n_steps=3)
    whole.train(PAIRS, progress=False)
    result = short.train(PAIRS, progress=False, checkpoint=file)
    again = trainer(n_steps=3, alpha=0.3)
    assert again.train(PAIRS, progress=False, checkpoint=file) == result
    assert same_states(again.states, short.states)
    longer = trainer(n_steps=5)
    longer.train(PAIRS, progress=False, checkpoint=file, tokens_per_batch=4095)
    assert same_states(longer.states, whole.states)
    assert longer.history == whole.history
    with pytest.raises(ValueError, match="the checkpoint holds 5 steps, and n_steps is 3"):
        again.train(PAIRS, progress=False, checkpoint=file)
    for _ in range(2):  # a run that a callback has ended stays ended
        stopped = trainer(n_steps=9)
        stopped.train(PAIRS, progress=False, checkpoint=tmp_path / "b", checkpoint_every=5, callbacks=[lambda *_: True])
        assert len(stopped.history) == 1


def test_what_callbacks_put_into_the_history_is_kept(tmp_path):
    def add(entry, states):
        entry |= {"a": numpy.float32(0.5), "b": torch.tensor(2.0), "c": "text"}

    for _ in range(2):
        tuned = trainer(n_steps=1)
        tuned.train(PAIRS, progress=False, checkpoint=tmp_path / "run", callbacks=[add])
        assert [tuned.history[0][key] for key in "abc"] == [0.5, 2.0, "text"]
    with pytest.raises(TypeError, match="a callback put a Tensor into the history"):
        trainer(n_steps=2).train(
            PAIRS, progress=False, checkpoint=tmp_path / "run", callbacks=[lambda e, _: e.update(d=torch.ones(3))]
        )


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path):
    file = tmp_path / "run"
    trainer().train(PAIRS, progress=False, checkpoint=file)
    other = MODELS["qwen"]()
    other.get_submodule("model.layers.0.linear_attn").A_log.data += 1
    for tuned, data, message in (
        (trainer(lr=0.5), PAIRS, "config: .*'lr': 0.01.* there, .*'lr': 0.5.* here"),
        (trainer(), PAIRS[:3], "examples: 4, sha256 .* there, 3, sha256 .* here"),
        (trainer(), {"a": PAIRS}, r"tasks: None there, \['a'\] here"),
        (trainer("falcon"), PAIRS, "states: "),
        (trainer(model=other), PAIRS, "weights: "),
    ):
        with pytest.raises(ValueError, match=rf"run is the checkpoint of another run \(.*{message}"):
            tuned.train(data, progress=False, checkpoint=file)
        assert tuned.states is None
    with pytest.raises(ValueError, match="is a directory"):
        trainer().train(PAIRS, checkpoint=tmp_path)
    with pytest.raises(TypeError, match="checkpoint must be a path, got int"):
        trainer().train(PAIRS, checkpoint=3)
    with pytest.raises(OSError, match="run"):
        trainer().train(PAIRS, checkpoint=file / "below a file")
    with pytest.raises(ValueError, match="checkpoint_every must be a positive int"):
        trainer().train(PAIRS, checkpoint=file, checkpoint_every=0)
    whole = file.read_bytes()
    for content, message in ((whole[:200], "not a readable safetensors file"), (b"", "not a readable safetensors")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            trainer().train(PAIRS, progress=False, checkpoint=file)
    tuned = trainer()
    tuned.train(PAIRS, progress=False)
    tuned.save(tmp_path / "states")
    with pytest.raises(ValueError, match="is not a checkpoint of a training run"):
        trainer().train(PAIRS, progress=False, checkpoint=tmp_path / "states" / "states.safetensors")


def test_a_checkpoint_that_holds_nonsense_is_refused(tmp_path):
    file = tmp_path / "run"
    trainer().train(PAIRS, progress=False, checkpoint=file)
    with safe_open(file, "pt") as reader:
        content = json.loads(reader.metadata()["s0_run"])
    tensors = load_file(file)
    for history in ({}, [1], [{}], [{"step": 1, "loss": 1.0}], [{"step": 0, "loss": None}]):
        save_file(tensors, file, {"s0_run": json.dumps({**content, "history": history})})
        with pytest.raises(ValueError, match="is not a checkpoint of a training run"):
            trainer().train(PAIRS, progress=False, checkpoint=file)
    for name in ("1.state", "3.exp_avg_sq"):
        broken = {**tensors, name: torch.full_like(tensors[name], math.nan)}
        save_file(broken, file, {"s0_run": json.dumps(content)})
        with pytest.raises(ValueError, match=f"does not hold what layer {name[0]} needs"):
            trainer().train(PAIRS, progress=False, checkpoint=file)


def test_checkpoints_changed_at_random_are_continued_or_refused(tmp_path):
    """The only error is ValueError, and the states are always finite."""
    file, numbers, tuned = tmp_path / "run", random.Random(0), trainer(n_steps=2)
    tuned.train(PAIRS, progress=False, checkpoint=file)
    whole, refused = file.read_bytes(), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(numbers.randint(1, 3)):
            place = numbers.randrange(header if numbers.random() < 0.8 else len(content))
            change = numbers.choice(
                [numbers.randbytes(1), b"", numbers.randbytes(3), numbers.choice(b'019"{}[],:').to_bytes()]
            )
            content[place : place + 1] = change
        file.write_bytes(content)
        try:
            tuned.train(PAIRS, progress=False, checkpoint=file)
        except ValueError:
            refused += 1
        assert all(state.isfinite().all() for state in tuned.states.parameters())
    assert 100 < refused < 200


RUN = """
import sys, torch
torch.set_num_threads(1)
from trainers import PAIRS, trainer
tuned = trainer(sys.argv[3], n_steps=30)
report = lambda entry, _: print(entry["step"], flush=True)
tuned.train(PAIRS, progress=False, checkpoint=sys.argv[1], callbacks=[report])
tuned.save(sys.argv[2])
"""


@pytest.mark.slow
@every_family
def test_a_killed_process_is_resumed_with_the_same_bits(name, tmp_path):
    """Kill a run by SIGKILL at any point, then run it to the end."""
    command = [sys.executable, "-c", RUN, str(tmp_path / "run"), str(tmp_path / "resumed"), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        for line in process.stdout:
            if int(line) >= 9:
                time.sleep(0.01)
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    done = python(*command[1:])
    assert done.returncode == 0, done.stderr
    assert 9 <= int(done.stdout.splitlines()[0]) < 30
    whole = trainer(name, n_steps=30)
    whole.train(PAIRS, progress=False)
    assert same_states(S0States.load(tmp_path / "resumed"), whole.states)


def test_a_run_at_a_scale_and_of_some_layers_goes_on_and_is_no_other(tmp_path):
    file, model = tmp_path / "run", MODELS["qwen"]()
    layers = list(S0States.for_model(trainer(model=model).model))
    options = {"scale": 0.5, "layers": layers[:1]}
    whole = trainer(n_steps=5)
    whole.train(PAIRS, progress=False, **options)
    interrupted(trainer(n_steps=5), file, 2, **options)
    again = trainer(n_steps=5)
    again.train(PAIRS, checkpoint=file, progress=False, **options)
    assert again.history == whole.history
    assert same_states(again.states, whole.states)
    for other, text in (
        ({"layers": layers[:1]}, r"scale: 0.5 there, None here"),
        ({"scale": 0.5}, rf"layers: \[{layers[0]}\] there, None here"),
        ({"scale": 0.5, "layers": layers[1:]}, rf"layers: \[{layers[0]}\] there"),
    ):
        with pytest.raises(ValueError, match=text):
            trainer(n_steps=5).train(PAIRS, checkpoint=file, progress=False, **other)
