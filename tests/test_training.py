"""Training runs: several tasks at once, callbacks, interruptions, more than one process."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from cases import error
from models import MODELS, checkpoint_layers, close, every_family, tokenizer
from test_surroundings import ROOT, python

from s0kernels import S0Config, S0States, S0Trainer

PAIRS = [("Q: 2+2?\nA: 4", 10), ("Q: 10-3?\nA: 7, and no more", 11), ("def f(x):\n    return x + 1", 11), ("abc", 1)]
OTHERS = [("once upon a time", 5), ("there was a rule", 3), ("of gated deltas", 9)]


def trainer(name="qwen", model=None, **config) -> S0Trainer:
    return S0Trainer(model or MODELS[name](), tokenizer(), S0Config(**{"n_steps": 4, "lr": 1e-2, **config}))


def same_states(a: S0States, b: S0States) -> bool:
    return all(torch.equal(a[layer], b[layer]) for layer in a)


# Several tasks


@every_family
@pytest.mark.parametrize("packed", [False, True])
def test_tasks_trained_together_are_as_if_trained_alone(name, packed):
    """Also where the gradient of one is clipped and that of the other is not, and with unequal numbers of examples."""
    data = {"questions": PAIRS, "stories": OTHERS}
    limits = []
    for its_data in data.values():
        probe = trainer(name, n_steps=1)
        probe.train(its_data, progress=False)
        limits.append(probe.history[0]["grad_norm"])
    settings = {"grad_clip": math.sqrt(limits[0] * limits[1]), "l2_lambda": 0.1}
    together = trainer(name, **settings)
    result = together.train(data, progress=False, packed=packed, tokens_per_batch=50)
    assert together.tasks == ["questions", "stories"]
    for task, its_data in data.items():
        alone = trainer(name, **settings)
        alone.train(its_data, progress=False)
        for mine, theirs in zip(together.history, alone.history, strict=True):
            assert abs(mine["losses"][task] - theirs["loss"]) < 1e-4
            assert abs(mine["grad_norms"][task] - theirs["grad_norm"]) < 1e-2 * theirs["grad_norm"]
        for layer in alone.states:  # as norms: Adam makes full steps of entries whose gradient is rounding
            assert error(together.states.task(task)[layer], alone.states[layer]) < 1e-2
    last = together.history[-1]
    assert result["final_loss"] == last["loss"] == pytest.approx(sum(last["losses"].values()) / 2)


@every_family
def test_using_several_tasks(name, tmp_path):
    data = {"questions": PAIRS, "stories": OTHERS}
    tuned = trainer(name, lr=0.1, alpha=1.0)
    zero = tuned.evaluate(data)
    tuned.train(data, progress=False)
    with pytest.raises(ValueError, match=r"task must name one of \['questions', 'stories'\]"):
        tuned.activate()
    with pytest.raises(ValueError, match="none of them is called 'poems'"):
        tuned.activate("poems")
    tuned.activate("stories")
    losses = tuned.evaluate(data)
    assert losses["questions"] < zero["questions"]
    assert losses["stories"] < zero["stories"]
    assert tuned.evaluate(OTHERS) == losses["stories"]
    assert tuned.evaluate(PAIRS) != losses["questions"]
    tuned.activate("questions")
    assert tuned.evaluate(PAIRS) == losses["questions"]

    prompts, call = ["Q: 2+2?", "once upon"], {"max_new_tokens": 6, "do_sample": False}
    apart = [tuned.generate(p, task=t, **call) for p, t in zip(prompts, ["stories", "questions"], strict=True)]
    assert tuned.generate(prompts, task=["stories", "questions"], **call) == apart
    assert tuned.generate(prompts[0], **call) == tuned.generate(prompts[0], task="questions", **call)
    tuned.activate(["stories", "questions"])
    assert tuned.generate(prompts, **call) == apart
    tuned.deactivate()
    assert tuned.evaluate(data) == zero
    assert tuned.generate(prompts, task=["stories", "questions"], **call) == apart

    tuned.save(tmp_path / "both")
    assert sorted(os.listdir(tmp_path / "both")) == ["questions", "stories"]
    again = trainer(name)
    again.load(tmp_path / "both")
    assert again.tasks == ["questions", "stories"]
    assert same_states(again.states, tuned.states)
    assert again.config == tuned.config
    assert again.generate(prompts, task=["stories", "questions"], **call) == apart
    again.load({"a": tmp_path / "both" / "stories", "b": tmp_path / "both" / "questions"})
    assert again.generate(prompts, task=["a", "b"], **call) == apart
    again.activate("a")
    again.load(tmp_path / "both" / "stories")  # one without a name: there is no "a" any more
    assert again.tasks is None
    assert not again.active
    again.activate()
    assert again.evaluate(OTHERS) == losses["stories"]


def test_refusals_about_tasks(tmp_path):
    tuned = trainer(n_steps=0)
    for data, kind, message in (
        ({}, ValueError, "data is empty"),
        ({"a": []}, ValueError, r"data\['a'\] is empty"),
        ({"a": [("ab", 1), 3]}, TypeError, r"data\['a'\]\[1\] must be a pair"),
        ({1: PAIRS}, TypeError, "name of a task must be a string"),
        ({"../a": PAIRS}, ValueError, "must serve as that of a directory"),
        ({"": PAIRS}, ValueError, "must serve as that of a directory"),
    ):
        with pytest.raises(kind, match=message):
            tuned.train(data)
    with pytest.raises(RuntimeError, match="no states"):
        tuned.generate("a", task="b")
    tuned.train({"a": PAIRS, "b": PAIRS}, progress=False)
    tuned.save(tmp_path)
    tuned.states.save(tmp_path / "c", config=S0Config(alpha=0.5))
    with pytest.raises(ValueError, match=r"task 'a' is to be used with alpha None.*task 'c' with 0.5"):
        trainer().load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no states.safetensors in .*nothing"):
        trainer().load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="path is empty"):
        trainer().load({})
    alone = trainer(n_steps=0)
    alone.train(PAIRS, progress=False)
    with pytest.raises(ValueError, match="they have no names"):
        alone.activate("a")


# Callbacks


def test_callbacks():
    tuned, seen = trainer(n_steps=6), []

    def watch(entry, states):
        assert states.requires_grad_
        seen.append((entry["step"], tuned.evaluate(PAIRS)))
        entry["seen"] = len(seen)

    tuned.train(PAIRS, progress=False, callbacks=[watch, lambda entry, states: entry["step"] == 3])
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert [entry["seen"] for entry in tuned.history] == [1, 2, 3, 4]
    for (_, after), entry in zip(seen, tuned.history[1:], strict=False):
        assert abs(after - entry["loss"]) < 1e-5, "a callback sees the states that its step has made"
    assert tuned.evaluate(PAIRS) != seen[-1][1]

    names = trainer(n_steps=1)
    losses = []
    data = {"a": PAIRS, "b": OTHERS}
    names.train(data, progress=False, callbacks=[lambda *_: losses.append(names.evaluate(data))])
    names.config = S0Config(alpha=1.0)
    names.activate("a")
    assert losses == [names.evaluate(data)]


# Checkpoints


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
    stopped = trainer(n_steps=9)
    stopped.train(PAIRS, progress=False, checkpoint=tmp_path / "b", checkpoint_every=5, callbacks=[lambda *_: True])
    assert (tmp_path / "b").exists()


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


RUN = """
import sys, torch
torch.set_num_threads(1)
from test_training import PAIRS, trainer
tuned = trainer("falcon", n_steps=30)
report = lambda entry, _: print(entry["step"], flush=True)
tuned.train(PAIRS, progress=False, checkpoint=sys.argv[1], callbacks=[report])
tuned.save(sys.argv[2])
"""


def test_a_killed_process_is_resumed_with_the_same_bits(tmp_path):
    """SIGKILL in the middle of things, then to the end."""
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", RUN, str(tmp_path / "run"), str(tmp_path / "resumed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if int(line) >= 9:
                time.sleep(0.01)
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    done = python(*command[1:])
    assert done.returncode == 0, done.stderr
    assert 9 <= int(done.stdout.splitlines()[0]) < 30
    whole = trainer("falcon", n_steps=30)
    whole.train(PAIRS, progress=False)
    assert same_states(S0States.load(tmp_path / "resumed"), whole.states)


# Several processes

TWO = """
import json, sys, torch
torch.set_num_threads(1)
from torch.nn.parallel import DistributedDataParallel
from accelerate import PartialState
from models import MODELS, gradients, random_states, tokens
from s0kernels import swap_modules
from test_training import OTHERS, PAIRS, trainer
place = PartialState(cpu=True)
for name in ("qwen", "falcon"):
    tuned, calls = trainer(name), []
    tuned.model.register_forward_hook(lambda *_: calls.append(1))
    tuned.train(PAIRS, progress=False)
    assert len(calls) > 2, "two forwards check that S0 has an effect, the others are this process's share"
    tuned.train(PAIRS, tokens_per_batch=30)
    tuned.save(f"{sys.argv[1]}/{name}")
    tasks = trainer(name)
    stop = lambda entry, _: place.is_main_process and entry["step"] == 2  # one process alone wants to stop
    options = {"tokens_per_batch": 30, "progress": False, "callbacks": [stop]}
    tasks.train({"a": PAIRS, "b": OTHERS}, checkpoint=f"{sys.argv[1]}/{name}.run", **options)
    assert len(tasks.history) == 3
    tasks.save(f"{sys.argv[1]}/{name}-tasks")

    class Both(torch.nn.Module):
        def __init__(self, model, states):
            super().__init__()
            self.model, self.states = model, states

        def forward(self, ids):
            with self.states.attached(self.model):
                return self.model(ids, use_cache=False).logits

    model = swap_modules(MODELS[name]()).requires_grad_(False)
    states, ids = random_states(model), tokens(4, 12)
    truth = gradients(model, states, ids)
    states.zero_grad()
    both, share = Both(model, states), ids
    if place.num_processes > 1:
        both, share = DistributedDataParallel(both), ids.chunk(place.num_processes)[place.process_index]
    (place.num_processes * both(share).log_softmax(-1)[..., 7].sum()).backward()
    for layer, grad in zip(states, truth, strict=True):
        assert (states[layer].grad - grad).abs().max() <= 1e-5 * grad.abs().max()
try:
    trainer("qwen").train(PAIRS[: 2 + place.process_index], progress=False)
    assert place.num_processes == 1
except ValueError as error:
    assert "not given the same data" in str(error)
print(f"processes: {place.num_processes}\\n", end="", flush=True)  # in one write
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on CPU cores; there is a GPU for them to take")
def test_two_processes_end_with_the_states_of_one(tmp_path):
    """The same bits in the same files, written once; a stop in all when one wants it; errors in every process; and the
    same gradient under DistributedDataParallel."""
    (tmp_path / "run.py").write_text(TWO)
    ways = {"one": [], "two": ["-m", "torch.distributed.run", "--nproc-per-node=2"]}
    for way, launcher in ways.items():
        done = python(*launcher, str(tmp_path / "run.py"), str(tmp_path / way))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count(f"processes: {1 if way == 'one' else 2}") == (1 if way == "one" else 2)
        assert done.stderr.count("0/4 [") == 2, "one progress bar a run"
    files = sorted(str(file.relative_to(tmp_path / "one")) for file in (tmp_path / "one").rglob("*") if file.is_file())
    assert len(files) == 2 * (3 + 2 * 3 + 1)
    for file in files:
        a, b = tmp_path / "one" / file, tmp_path / "two" / file
        assert a.read_bytes() == b.read_bytes(), file


# Gradient checkpointing


@every_family
def test_gradient_checkpointing_does_not_switch_dropout_on(name):
    plain = trainer(model=MODELS[name](attention_dropout=0.5))
    checkpointed = trainer(model=MODELS[name](attention_dropout=0.5))
    checkpoint_layers(checkpointed.model, use_reentrant=False)
    for tuned in (plain, checkpointed):
        tuned.train(PAIRS, progress=False)
        assert not tuned.model.training
    for layer in plain.states:
        assert close(checkpointed.states[layer], plain.states[layer], 1e-4)
