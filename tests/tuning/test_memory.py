"""The memory of training: choice, prediction, limits; and recovery if it runs out."""

import json
import os
import re
import time
import warnings

import pytest
import torch
from models import MODELS, every_family
from surroundings import python
from test_processes import TWO_PROCESSES, on_cpu_cores
from trainers import OTHERS, PAIRS, same_states, trainer

from s0kernels import S0States
from s0kernels.tuning import memory
from s0kernels.tuning.batches import make_batches
from s0kernels.tuning.data import Example
from s0kernels.tuning.forwards import Forwards, Layers
from s0kernels.tuning.memory import Needs, Sizes, choose, halved, most_tokens
from s0kernels.tuning.processes import Processes

MIB = 2**20


def close_states(a: S0States, b: S0States) -> bool:
    return all((a[layer] - b[layer]).norm() <= 1e-3 * b[layer].norm() for layer in a)


class Full:
    """Simulates a device on which forwards of more than so many tokens run out of memory, by a hook on a layer."""

    def __init__(self, model, tokens: int, error=torch.OutOfMemoryError, checkpointed: bool = False):
        self.tokens, self.error, self.checkpointed, self.failed = tokens, error, checkpointed, 0
        self.layer = model.get_decoder().layers[1]
        self.handle = self.layer.register_forward_pre_hook(self)

    def __call__(self, module, args):
        fits = args[0].shape[0] * args[0].shape[1] <= self.tokens
        if not fits and torch.is_grad_enabled() and not (self.checkpointed and module.gradient_checkpointing):
            self.failed += 1
            raise self.error("CUDA out of memory, or DefaultCPUAllocator: can't allocate memory")


def train(tuned, data=PAIRS, **options):
    tuned.train(data, progress=False, **options)
    return tuned


# Running out


@every_family
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_a_forward_that_runs_out_is_done_again_with_half(name, error):
    whole, halves = train(trainer(name)), trainer(name)
    longest = max(len(halves.tokenizer(text)["input_ids"]) for text, _ in PAIRS)
    full = Full(halves.model, longest, error)
    with pytest.warns(UserWarning, match="ran out of memory; it is repeated with up to") as said:
        train(halves)
    assert full.failed == 2, "a batch of all four, then one of two"
    assert len([w for w in said if "ran out of memory" in str(w.message)]) == 1
    later = [entry for entry in halves.history if "tokens_per_batch" in entry]
    assert [entry["step"] for entry in later] == [0], "the first step found it, and the others kept to it"
    assert later[0]["tokens_per_batch"] < whole.history[0]["tokens_per_batch"]
    assert close_states(halves.states, whole.states)
    for a, b in zip(halves.history, whole.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_memory_that_runs_out_in_the_middle_of_a_backward():
    """The gradients of the failed forward are discarded."""
    whole, again = train(trainer()), trainer()
    fail = [True]

    def hook(module, grad_input, grad_output):
        if fail and grad_output[0].shape[0] > 1:
            fail.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = again.model.get_decoder().layers[0].mlp.register_full_backward_hook(hook)
    with pytest.warns(UserWarning, match="ran out of memory"):
        train(again, tokens_per_batch=4096)
    handle.remove()
    assert close_states(again.states, whole.states)


def test_an_error_that_is_not_about_memory_goes_on():
    tuned = trainer()
    tuned.model.get_decoder().layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tuned)
    assert tuned.states is None


@pytest.mark.parametrize("name", ["qwen", "zamba2"])  # Zamba2 has layers inside layers
def test_one_example_that_does_not_fit_has_its_layers_checkpointed(name):
    whole, tight = train(trainer(name)), trainer(name)
    Full(tight.model, 5, checkpointed=True)
    train(tight)
    assert tight.history[0]["layers_checkpointed"]
    assert not any(getattr(module, "gradient_checkpointing", False) for module in tight.model.modules())
    assert close_states(tight.states, whole.states)
    late = trainer(name)
    Full(late.model, 5, checkpointed=True)
    with pytest.warns(UserWarning, match="repeated with layers checkpointed"):
        train(late, tokens_per_batch=1)
    assert late.history[0]["layers_checkpointed"]
    assert close_states(late.states, whole.states)


def test_one_example_that_cannot_fit_says_so():
    tuned = trainer()
    Full(tuned.model, 5)
    with pytest.raises(torch.OutOfMemoryError) as found:
        train(tuned)
    assert "lower max_length" in found.value.__notes__[0]
    assert tuned.states is None
    assert not any(getattr(module, "gradient_checkpointing", False) for module in tuned.model.modules())


def test_evaluation_is_done_again_with_half_as_well():
    tuned = train(trainer())
    tuned.activate()
    whole, handle = tuned.evaluate(PAIRS), []

    def full(module, args):
        if args[0].shape[0] > 1:
            handle.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")

    tuned.model.get_decoder().layers[1].register_forward_pre_hook(full)
    assert tuned.evaluate(PAIRS) == pytest.approx(whole, rel=1e-5)
    assert handle


def test_a_resumed_run_keeps_to_the_sizes_that_it_had(tmp_path):
    """It keeps chosen sizes, and sizes reduced after memory ran out, with the bits of an uninterrupted run."""
    longest = max(len(trainer().tokenizer(text)["input_ids"]) for text, _ in PAIRS)

    def run(steps, full, **options):
        tuned = trainer(n_steps=steps)
        if full:
            Full(tuned.model, longest)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return train(tuned, **options)

    whole = run(6, True)
    run(3, True, checkpoint=tmp_path / "run")
    resumed = run(6, False, checkpoint=tmp_path / "run")  # more memory now changes nothing
    assert resumed.history == whole.history
    assert same_states(resumed.states, whole.states)
    assert not same_states(run(6, False).states, whole.states), "or this test shows nothing"
    file = tmp_path / "run"
    asked = run(7, False, checkpoint=file, tokens_per_batch=4096)  # a new request takes precedence
    assert asked.history[:6] == whole.history


# Choosing


class Pretended:
    """A batch without tensors."""

    def __init__(self, examples):
        self.examples, self.tokens = examples, len(examples) * 300
        self.targets = range(150 * len(examples))


def cut_into(count: int):
    def cut(tokens: int):
        rows = max(tokens // 300, 1)
        return [Pretended([0] * min(rows, count - i)) for i in range(0, count, rows)]

    return cut


def needs(kept: int) -> Needs:
    return Needs(300, kept, kept, 100, 150, 256, kept, 1.0)


def test_the_largest_forward_that_fits():
    for limit, tokens, fits in (
        (10**9, 4096, True),
        (7000, 2048, True),
        (2200, 512, True),
        (1100, 512, True),
        (1099, 1, False),
    ):
        found = choose(lambda again: None if again else needs(1000), cut_into(48), limit, 4096)
        assert (found.sizes, found.fits) == (Sizes(tokens), fits), limit
        assert not fits or found.peak <= limit
    assert choose(lambda again: None, cut_into(48), 10**9, 4096) is None
    assert choose(lambda again: needs(1000), cut_into(48), None, 4096).sizes == Sizes(4096)


def test_layers_are_checkpointed_where_nothing_fits_or_that_is_faster():
    def measured(again):
        return needs(60 if again else 1000)

    assert choose(measured, cut_into(48), 900, 4096).sizes == Sizes(2048, True)
    for seconds, sizes in ((0.5, Sizes(4096, True)), (0.95, Sizes(512)), (2.0, Sizes(512))):
        timed = {Sizes(512): 1.0, Sizes(4096, True): seconds}.get
        assert choose(measured, cut_into(48), 1100, 4096, timed).sizes == sizes
    assert choose(measured, cut_into(48), 1100, 4096).sizes == Sizes(512), "on a CPU it is never faster"


def test_halves(monkeypatch):
    model = MODELS["qwen"]()
    given = [Example(list(range(2, 12)), 3) for _ in range(4)]
    make = lambda examples, tokens: make_batches(examples, tokens, False, model, 0, torch.device("cpu"))  # noqa: E731
    (batch,) = make(given, 4096)
    assert halved(Sizes(4096), batch, make, True) == Sizes(32)
    (one,) = make(given[:1], 4096)
    assert halved(Sizes(32), one, make, True) == Sizes(32, True)
    assert halved(Sizes(32), one, make, False) is None
    assert halved(Sizes(32, True), one, make, True) is None


def test_large_models_get_small_forwards_on_a_cpu():
    model = MODELS["qwen"]()
    assert most_tokens(model, torch.device("cpu")) == 4096
    assert most_tokens(model, torch.device("cuda")) == 2**15
    with torch.device("meta"):
        large = torch.nn.Linear(2**15, 2**15)
    model.extra = large
    assert most_tokens(model, torch.device("cpu")) == 8


@every_family
def test_sizes_are_found_the_same_way_every_time(name):
    first = train(trainer(name))
    for _ in range(2):
        again = train(trainer(name))
        assert again.history == first.history
        assert same_states(again.states, first.states)


def test_what_is_asked_for_is_checked():
    for options in ({"tokens_per_batch": 0}, {"max_memory": 0}, {"max_memory": "8G"}, {"max_memory": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be a positive int"):
            trainer().train(PAIRS, **options)
    tuned = trainer()
    with pytest.raises(ValueError, match=r"max_memory is 0 MiB, and the longest example \(\d+ tokens\) needs"):
        tuned.train(PAIRS, max_memory=1000, progress=False)
    assert tuned.states is None
    assert not tuned.model.training
    assert all(parameter.requires_grad for parameter in tuned.model.parameters())


def test_a_limit_that_another_process_cannot_keep_to(monkeypatch):
    """The other process could not measure its own example."""
    monkeypatch.setattr(Forwards, "_measured", lambda self, checkpointed: None)
    monkeypatch.setattr(Processes, "any", lambda self, value: True)
    with pytest.raises(ValueError, match=r"max_memory is 1 MiB, and the longest example \(\d+ tokens\) needs more$"):
        train(trainer(), max_memory=2**20)


def test_tokens_that_are_asked_for_keep_to_the_memory_that_is_allowed():
    tuned = train(trainer())
    roomy = train(trainer(), tokens_per_batch=3000, max_memory=2**30)
    assert roomy.history[0]["tokens_per_batch"] == 3000
    assert same_states(roomy.states, tuned.states)
    with pytest.raises(ValueError, match="max_memory is 0 MiB"):
        train(trainer(), tokens_per_batch=3000, max_memory=1)


def test_what_is_to_be_expected_is_said_before_training(capfd):
    tuned = trainer()
    tokens = sum(len(tuned.tokenizer(text)["input_ids"]) for text, _ in PAIRS)
    for options in ({}, {"tokens_per_batch": 1}):
        tuned.train(PAIRS, **options)
        said = capfd.readouterr().err
        assert f"{len(PAIRS)} examples, {tokens} tokens, {len(PAIRS) if options else 1} forwards a step" in said
        assert "MiB beyond the model (allowed: " in said
        assert "seconds" in said
    tuned.train(PAIRS, progress=False)
    assert "examples" not in capfd.readouterr().err


def test_the_meter_is_not_part_of_the_expected_time(capfd, monkeypatch):
    count = memory._Counted.__torch_dispatch__

    def slowly(*arguments, **more):
        time.sleep(0.005)
        return count(*arguments, **more)

    monkeypatch.setattr(memory._Counted, "__torch_dispatch__", slowly)
    began = time.monotonic()
    trainer().train(PAIRS)
    took = time.monotonic() - began
    words = re.search(r"about ([\d.]+) (seconds|minutes)", capfd.readouterr().err)
    assert words is not None
    assert float(words[1]) * (60 if words[2] == "minutes" else 1) < took


def test_containers(tmp_path):
    """The limit of a container counts, and the files that it caches do not."""
    assert memory._control_group(tmp_path) == []
    for name, text in (("max", "1000"), ("current", "700"), ("stat", "anon 1\ninactive_file 200\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory._control_group(tmp_path) == [500]
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._control_group(tmp_path) == []
    assert memory.free(torch.device("cpu")) > MIB


def test_layers_that_the_user_checkpoints_stay_so():
    from models import checkpoint_layers

    model = MODELS["qwen"]()
    checkpoint_layers(model, use_reentrant=False)
    assert not Layers(model).can
    tuned = train(trainer(model=model))
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not tuned.history[0]["layers_checkpointed"]


# Measured in separate processes

MEASURED = """
import ctypes, json, random, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from models import MODELS
from s0kernels import S0Config, S0Trainer

class Numbers:
    pad_token_id = eos_token_id = 0
    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

options = json.loads(sys.argv[1])
model = MODELS["qwen"](vocab_size=40000, hidden_size=128, intermediate_size=512)
numbers = random.Random(0)
data = [(" ".join(str(numbers.randrange(2, 40000)) for _ in range(300)), 150) for _ in range(8)]
tuned = S0Trainer(model, Numbers(), S0Config(n_steps=1))
tuned.train([(" ".join(["5"] * 40), 10)], progress=False)
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
tuned.train(data, **options)
print(json.dumps([resident("VmHWM") - before, tuned.history[0].get("tokens_per_batch")]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak of resident memory is Linux's")
def test_resident_memory_stays_within_what_is_allowed():
    """It also agrees with the prediction within a third."""

    def run(**options):
        done = python("-c", MEASURED, json.dumps(options))
        assert done.returncode == 0, done.stderr[-3000:]
        words = done.stderr.split("expected: ")[1].split()
        return *json.loads(done.stdout), float(words[0]) * (MIB if words[1] == "MiB" else 1024 * MIB)

    one, _, said_one = run(tokens_per_batch=1)
    found, tokens, said = run(max_memory=150 * MIB)
    assert found <= 150 * MIB
    assert tokens < run()[1]
    large, _, said_large = run(tokens_per_batch=4096)
    assert large > 1.3 * one
    for measured, expected in ((one, said_one), (found, said), (large, said_large)):
        assert 0.66 * measured <= expected <= 1.5 * measured


TOGETHER = """
import sys, warnings, torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
from s0kernels.tuning.loop import processes
from test_memory import Full
from trainers import OTHERS, PAIRS, trainer
place, tuned = processes(), trainer()
if place.is_main_process:
    Full(tuned.model, 30)  # on one of them alone
tuned.train({"a": PAIRS, "b": OTHERS}, progress=False)
print([entry.get("tokens_per_batch") for entry in tuned.history], "\\n", end="", flush=True)
tuned.save(sys.argv[1])
"""


@on_cpu_cores
def test_processes_stay_in_step_when_one_runs_out(tmp_path):
    (tmp_path / "run.py").write_text(TOGETHER)
    done = python(*TWO_PROCESSES, str(tmp_path / "run.py"), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = re.findall(r"\[[^\]]+\]", done.stdout)  # the output of the processes may be interleaved
    assert len(sizes) == 2
    assert sizes[0] == sizes[1]
    whole = train(trainer(), {"a": PAIRS, "b": OTHERS})
    for name in ("a", "b"):
        assert close_states(S0States.load(tmp_path / "out" / name), whole.states.task(name))
