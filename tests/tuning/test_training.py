"""Training runs: several tasks at once, callbacks, small and odd data."""

import math
import os

import numpy
import pytest
import torch
from cases import error
from models import CANNOT_PACK, MODELS, checkpoint_layers, close, every_family, every_model
from trainers import OTHERS, PAIRS, same_states, trainer

from s0kernels import S0Config, S0States, S0Trainer
from s0kernels.tuning.batches import PaddedBatch, make_batches
from s0kernels.tuning.data import Example

# Several tasks


@every_family
@pytest.mark.parametrize("packed", [False, True])
def test_tasks_trained_together_are_as_if_trained_alone(name, packed):
    """This includes tasks of which only one has its gradient clipped, and unequal numbers of examples."""
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
        for layer in alone.states:  # compare norms: Adam makes full steps for entries whose gradient is only rounding
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
    # other batches, whose matrix products round differently
    assert tuned.evaluate(OTHERS) == pytest.approx(losses["stories"], rel=1e-6)
    assert tuned.evaluate(PAIRS) != pytest.approx(losses["questions"], rel=1e-3)
    tuned.activate("questions")
    assert tuned.evaluate(PAIRS) == pytest.approx(losses["questions"], rel=1e-6)

    prompts, call = ["Q: 2+2?", "once upon"], {"max_new_tokens": 6, "do_sample": False}
    apart = [tuned.generate(p, task=t, **call) for p, t in zip(prompts, ["stories", "questions"], strict=True)]
    assert tuned.generate(prompts, task=["stories", "questions"], **call) == apart
    assert tuned.generate(prompts[0], **call) == tuned.generate(prompts[0], task="questions", **call)
    tuned.activate(["stories", "questions"])
    assert tuned.generate(prompts, **call) == apart
    assert tuned.evaluate(data) == losses
    with pytest.raises(ValueError, match="data must be a mapping from names"):
        tuned.evaluate(PAIRS)  # batches are sorted by length, so rows are not in the order of the examples
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
    again.load(tmp_path / "both" / "stories")  # a task without a name: "a" no longer exists
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
        ({"../a": PAIRS}, ValueError, "must also be valid as the name of a directory"),
        ({"": PAIRS}, ValueError, "must also be valid as the name of a directory"),
        ({"a\0b": PAIRS}, ValueError, "must also be valid as the name of a directory"),
        ({"a" * 300: PAIRS}, ValueError, "must also be valid as the name of a directory"),
        ({"😀" * 80: PAIRS}, ValueError, "must also be valid as the name of a directory"),
        ({"\ud800": PAIRS}, ValueError, "must also be valid as the name of a directory"),
        ({"states.safetensors": PAIRS}, ValueError, "must also be valid as the name of a directory"),
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
    """A directory holds exactly the last save, complete and in order."""
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
    (tmp_path / "tasks.json").unlink()  # directories assembled by hand
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
    """Methods that use the states use those in training. Methods that would change them are refused."""
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

    for _ in range(2):  # with earlier states too
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


# Failures during training


@every_family
def test_small_and_long_data(name):
    """One example; an example that is cut, which trains like its remaining part; no effect of pads; no steps."""
    (text, length), one = PAIRS[1], trainer(name)
    one.train([(text[:15], length)], progress=False)
    assert one.history[-1]["loss"] < one.history[0]["loss"]
    cut = trainer(name, max_length=15)
    cut.train([(text, length)], progress=False)
    assert same_states(cut.states, one.states)
    padded, bare, none = trainer(name), trainer(name), trainer(name, n_steps=0)
    bare.tokenizer.pad_token = bare.tokenizer.eos_token = None
    for tuned in (padded, bare, none):
        tuned.train(PAIRS, progress=False)
        tuned.activate()
    assert same_states(padded.states, bare.states)
    prompts, call = ["Q: 2+2?", "a"], {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert bare.generate(prompts, **call) == padded.generate(prompts, **call)
    assert not any(state.any() for state in none.states.parameters())


def test_a_trainer_without_a_tokenizer_says_so(tmp_path):
    tuned = trainer()
    tuned.train(PAIRS, progress=False)
    tuned.save(tmp_path)
    without = S0Trainer(tuned.model, None)
    without.load(tmp_path)  # it needs no names
    for call in (lambda: without.train(PAIRS), lambda: without.evaluate(PAIRS), lambda: without.generate("a")):
        with pytest.raises(TypeError, match="tokenizer must be the model's tokenizer, got None"):
            call()
    with pytest.raises(ValueError, match="prompt has a text that the tokenizer does not accept"):
        tuned.generate("\ud800")


@every_model
def test_training_in_every_family(name):
    """Padded and packed training agree, if packed sequences can go through the model."""
    padded, packed = trainer(name), trainer(name)
    padded.train(PAIRS, progress=False)
    assert padded.history[-1]["loss"] < padded.history[0]["loss"] - 0.1
    if name in CANNOT_PACK:
        with pytest.raises(ValueError, match=f"packed examples cannot go through {CANNOT_PACK[name]}"):
            packed.train(PAIRS, progress=False, packed=True)
        packed.model.config._attn_implementation = "flash_attention_2"  # packing is the default with it
        made = make_batches([Example([5, 6, 7], 1)], 9, None, packed.model, 0, torch.device("cpu"))
        assert isinstance(made[0], PaddedBatch)
        return
    packed.train(PAIRS, progress=False, packed=True)
    for a, b in zip(packed.history, padded.history, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-3


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
    """With weights or autocast in another dtype, losses and states are fp32, and training is about the same."""
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


# At a scale, and some of the layers


@every_family
def test_training_at_a_scale_sees_what_use_will_see(name):
    scaled, raw = trainer(name), trainer(name)
    scale = scaled.alpha
    scaled.train(PAIRS, progress=False, scale=scale, callbacks=[lambda e, _: e.update(now=scaled.evaluate(PAIRS))])
    raw.train(PAIRS, progress=False)
    first, theirs = scaled.history[0], raw.history[0]
    assert first["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(scale * theirs["grad_norm"], rel=1e-3)
    scaled.activate()
    assert scaled.evaluate(PAIRS) == pytest.approx(scaled.history[-1]["now"], rel=1e-5)
    for before, after in zip(scaled.history, scaled.history[1:], strict=False):
        assert before["now"] == pytest.approx(after["loss"], rel=1e-5)


@every_family
def test_some_layers_learn_and_the_others_stay_zero(name, tmp_path):
    tuned = trainer(name)
    layers = list(S0States.for_model(tuned.model))
    result = tuned.train(PAIRS, progress=False, layers=layers[-1:])
    norms = {layer: float(norm) for layer, norm in tuned.states.norms().items()}
    assert [layer for layer in layers if norms[layer] > 0] == layers[-1:]
    assert result["avg_state_norm"] == pytest.approx(norms[layers[-1]])
    assert all(state.requires_grad for state in tuned.states.parameters())
    tuned.save(tmp_path)
    again = trainer(name)
    again.load(tmp_path)
    assert same_states(again.states, tuned.states)
    everything = trainer(name)
    everything.train(PAIRS, progress=False, layers=layers)
    whole = trainer(name)
    whole.train(PAIRS, progress=False)
    assert same_states(everything.states, whole.states)


def test_refusals_about_scale_and_layers():
    tuned = trainer()
    for scale in (0, math.inf, "1", True):
        with pytest.raises(ValueError, match="scale must be a finite number other than 0"):
            tuned.train(PAIRS, scale=scale)
    with pytest.raises(ValueError, match="layers: 99 has no state; the layers with a state are"):
        tuned.train(PAIRS, layers=[99])
    for layers in ([], "0", 3):
        with pytest.raises(TypeError, match="layers must be a list of layer numbers"):
            tuned.train(PAIRS, layers=layers)
    assert tuned.states is None
