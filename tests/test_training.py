"""Training runs: several tasks at once, callbacks, interruptions, more than one process."""

import math
import os
import signal
import subprocess
import sys
import time

import numpy
import pytest
import torch
from cases import error
from models import MODELS, checkpoint_layers, close, every_family, tokenizer
from test_surroundings import environment, python

from s0kernels import S0Config, S0States, S0Trainer
from s0kernels.batches import make_batches
from s0kernels.data import Example

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
    with pytest.raises(ValueError, match=r"none is called 'poems'; they are \['questions', 'stories'\]"):
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
    assert tuned.evaluate(data) == losses
    with pytest.raises(ValueError, match="data must be a mapping from names"):
        tuned.evaluate(PAIRS)  # sorted by length, rows would not be the examples in their order
    tuned.deactivate()
    assert tuned.evaluate(data) == zero
    assert tuned.generate(prompts, task=["stories", "questions"], **call) == apart

    tuned.save(tmp_path / "both")
    assert sorted(os.listdir(tmp_path / "both")) == ["questions", "stories", "tasks.json"]
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
        ({"a\0b": PAIRS}, ValueError, "must serve as that of a directory"),
        ({"a" * 300: PAIRS}, ValueError, "must serve as that of a directory"),
        ({"states.safetensors": PAIRS}, ValueError, "must serve as that of a directory"),
        ({"prompt": "a", "completion": "b"}, TypeError, "data is a single example; put it into a list"),
        (type("DatasetDict", (dict,), {})(train=PAIRS), TypeError, r"one split of the data set, of \['train'\]"),
    ):
        with pytest.raises(kind, match=message):
            tuned.train(data)
    with pytest.raises(RuntimeError, match="no states"):
        tuned.generate("a", task="b")
    tuned.train({"a": PAIRS, "b": PAIRS}, progress=False)
    tuned.save(tmp_path)
    tuned.states.save(tmp_path / "c", config=S0Config(alpha=0.5))
    with pytest.raises(ValueError, match=r"task 'a' is to be used with alpha None.*task 'c' with 0.5"):
        trainer().load({"a": tmp_path / "a", "c": tmp_path / "c"})
    for bad, kind, message in (
        (3, TypeError, "task must be a name or a list of names, got 3"),
        (["a", -1], TypeError, "task must be a name or a list of names"),
        ([], TypeError, "task must be a name or a list of names"),
        (["a", "x"], ValueError, "none is called 'x'"),
    ):
        for call in (tuned.activate, lambda task: tuned.generate(["a", "b"], task=task)):
            with pytest.raises(kind, match=message):
                call(bad)
    with pytest.raises(ValueError, match="task names 1 tasks for 2 prompts"):
        tuned.generate(["a", "b"], task=["a"])
    with pytest.raises(TypeError, match="path must be a path or a mapping"):
        tuned.load(None)
    with pytest.raises(FileNotFoundError, match=r"no states.safetensors in .*nothing"):
        trainer().load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="path is empty"):
        trainer().load({})
    alone = trainer(n_steps=0)
    alone.train(PAIRS, progress=False)
    with pytest.raises(ValueError, match="none is called 'a'; the one there is has no name"):
        alone.activate("a")


def test_saving_over_what_was_there(tmp_path):
    """The last save is what a directory holds, whole and in order."""
    alone, several, others = (trainer(n_steps=1) for _ in range(3))
    alone.train(PAIRS, progress=False)
    several.train({"z": PAIRS, "a": OTHERS}, progress=False)
    others.train({"a": PAIRS, "c": OTHERS}, progress=False)
    again = trainer()
    for tuned in (alone, several, others, alone, several):
        tuned.save(tmp_path)
        again.load(tmp_path)
        assert again.tasks == tuned.tasks
        assert same_states(again.states, tuned.states)
    (tmp_path / "a" / "states.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no states.safetensors in .*a"):
        again.load(tmp_path)
    assert same_states(again.states, several.states)
    (tmp_path / "tasks.json").unlink()  # directories put together by hand
    again.load(tmp_path)
    assert again.tasks == ["c", "z"]
    for content, message in (
        ("{", "not valid JSON"),
        ('{"tasks": []}', "names no tasks"),
        ('{"tasks": ["../x"]}', "name"),
    ):
        (tmp_path / "tasks.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            again.load(tmp_path)


# Callbacks


def test_callbacks():
    tuned, seen = trainer(n_steps=6), []

    def watch(entry, states):
        assert states is tuned.states
        assert all(state.requires_grad for state in states.parameters())
        seen.append((entry["step"], tuned.evaluate(PAIRS)))
        entry["seen"] = len(seen)

    tuned.train(PAIRS, progress=False, callbacks=[watch, lambda entry, states: numpy.bool_(entry["step"] == 3)])
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


def test_the_trainer_in_callbacks(tmp_path):
    """What uses the states uses those that are learning; what would change them is refused."""
    tuned = trainer(n_steps=2, alpha=1.0)
    checkpoint_layers(tuned.model, use_reentrant=False)
    call, texts, refused = {"max_new_tokens": 6, "do_sample": False}, [], []

    def use(entry, states):
        tuned.save(tmp_path / str(entry["step"]))
        assert same_states(S0States.load(tmp_path / str(entry["step"])), states)
        texts.append(tuned.generate("Q: 2+2?", **call))
        for method in (tuned.activate, lambda: tuned.load(tmp_path / "0"), lambda: tuned.train(PAIRS)):
            with pytest.raises(RuntimeError, match="cannot be called while training"):
                method()
            refused.append(method)

    for _ in range(2):  # with states from before, too
        tuned.train(PAIRS, progress=False, callbacks=[use])
    assert len(refused) == 12
    tuned.activate()
    assert texts[-1] == tuned.generate("Q: 2+2?", **call)
    tuned.train(PAIRS, progress=False)
    assert tuned.active

    def two(entry, states):
        with pytest.raises(ValueError, match="data must be a mapping from names"):
            tuned.evaluate(PAIRS)

    tuned.train({"a": PAIRS, "b": OTHERS}, progress=False, callbacks=[two])
    assert not tuned.active, "there is no task without a name any more"


@pytest.mark.parametrize("bad", [None, print, [3], (lambda *_: True for _ in range(1))])
def test_callbacks_are_checked_before_anything_runs(bad):
    tuned = trainer()
    with pytest.raises(TypeError, match="callbacks must be a list of functions"):
        tuned.train(PAIRS, callbacks=bad)
    assert not tuned.history


# What may go wrong on the way


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    tuned = trainer()
    handle = tuned.model.model.norm.register_full_backward_hook(lambda module, grad, _: (grad[0] * math.inf,))
    with pytest.raises(RuntimeError, match="the gradient is not finite at step 0"):
        tuned.train(PAIRS, progress=False, checkpoint=tmp_path / "run")
    handle.remove()
    tuned.train(PAIRS, progress=False, checkpoint=tmp_path / "run")
    next(tuned.states.parameters()).data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layers \[0\] hold values that are not finite"):
        tuned.save(tmp_path / "states")


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_training_in_other_dtypes(name, dtype):
    """The weights' dtype, or autocast's: losses in fp32, states in fp32, and about the same training."""
    truth, cast, auto = trainer(name), trainer(model=MODELS[name]().to(dtype)), trainer(name)
    truth.train(PAIRS, progress=False)
    cast.train(PAIRS, progress=False)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        auto.train(PAIRS, progress=False)
        loss = make_batches([Example([5, 6, 7], 1)], 9, False, auto.model, 0, torch.device("cpu"))[0].losses(auto.model)
    assert loss.dtype == torch.float32
    for tuned in (cast, auto):
        first, theirs, last = tuned.history[0]["loss"], truth.history[0]["loss"], tuned.history[-1]["loss"]
        assert abs(first - theirs) < 0.01 * theirs
        assert last < first
        assert all(state.dtype == torch.float32 for state in tuned.states.parameters())


def test_training_inside_inference_mode():
    inside, outside = trainer(), trainer()
    with torch.inference_mode():
        inside.train(PAIRS, progress=False)
    outside.train(PAIRS, progress=False)
    assert same_states(inside.states, outside.states)


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
    with pytest.raises(ValueError, match="the checkpoint holds 5 steps, and n_steps is 3"):
        again.train(PAIRS, progress=False, checkpoint=file)
    for _ in range(2):  # a callback's word is final
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
    command = [sys.executable, "-c", RUN, str(tmp_path / "run"), str(tmp_path / "resumed")]
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
    whole = trainer("falcon", n_steps=30)
    whole.train(PAIRS, progress=False)
    assert same_states(S0States.load(tmp_path / "resumed"), whole.states)


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
