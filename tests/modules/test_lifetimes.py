"""Copies, conversions and files of swapped models."""

import copy
import io
import itertools
import os
import pickle

import pytest
import torch
from models import MODELS, close, every_family, every_model, qwen, random_states, tokens

from s0kernels import S0States, restore_modules, swap_modules
from s0kernels.modules.swap import find_site


def reload(model):
    """Save and load a whole module by torch.save and torch.load."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": reload}


@every_model
@pytest.mark.parametrize("way", list(COPIES))
@torch.no_grad()
def test_a_copy_of_a_model_starts_from_a_copy_of_its_states(name, way):
    model, ids = swap_modules(MODELS[name]()), tokens(2, 12)
    zero = model(ids).logits
    states = random_states(model, tasks=2)
    states.attach(model, scale=0.5, tasks=[1, 0])
    before = model(ids).logits
    copied = COPIES[way](model)
    assert len(list(copied.parameters())) == len(list(model.parameters()))
    assert torch.equal(copied(ids).logits, before)

    own = S0States.attached_to(copied)
    assert own is not states
    assert S0States.attached_to(model) is states
    for state in own.parameters():
        state.zero_()
    assert close(copied(ids).logits, zero)
    own.detach()
    assert S0States.attached_to(copied) is None
    assert torch.equal(copied(ids).logits, zero)
    for parameter in copied.parameters():
        parameter.mul_(1.1)
    swapped = copied(ids).logits
    assert not close(swapped, zero)
    assert close(restore_modules(copied)(ids).logits, swapped), "original and replacement share the copied parameters"
    assert torch.equal(model(ids).logits, before), "and none of it touches the model"


def test_copies_learn_on_their_own():
    """A copy keeps its own scaled products, independent of the version counters of the original."""
    model, ids = swap_modules(qwen()).requires_grad_(False), tokens(2, 12)
    states = S0States.for_model(model)
    states.attach(model, 0.5)

    def learn(states):
        optimizer = torch.optim.Adam(states.parameters(), lr=0.1)
        for _ in range(5):
            for state in states.parameters():
                state.grad = torch.ones_like(state)
            optimizer.step()

    learn(states)
    with torch.no_grad():
        model(ids)
        copied = copy.deepcopy(model)
        own = S0States.attached_to(copied)
        learn(own)
        found = copied(ids).logits
        with own.attached(copied, 0.5):
            assert torch.equal(copied(ids).logits, found)
    states.model = model  # as if both are put into one module
    again = copy.deepcopy(states)
    assert S0States.attached_to(again.model) is again
    again.detach()
    assert S0States.attached_to(again.model) is None
    assert S0States.attached_to(model) is states


def test_copies_of_states_are_not_attached():
    model, ids = swap_modules(qwen()), tokens(1, 9)
    states = random_states(model)
    states.attach(model)
    for copied in (copy.deepcopy(states), pickle.loads(pickle.dumps(states))):
        assert all(torch.equal(copied[layer], states[layer]) for layer in states)
        before = model(ids).logits
        copied.detach()
        assert torch.equal(model(ids).logits, before)


@every_model
@torch.no_grad()
def test_conversions(name):
    """`.to` has the same effect on a swapped model as on the original, and attached states stay fp32."""
    model, ids = MODELS[name](), tokens(2, 9)
    model.set_experts_implementation("eager")  # the default of mixtures of experts does not take fp64
    double = copy.deepcopy(model).double()
    swap_modules(model)
    states = random_states(model)
    states.attach(model)
    single = model(ids).logits
    model.to(torch.float64)
    assert model(ids).logits.dtype == double(ids).logits.dtype
    assert close(model(ids).logits.float(), single)
    states.detach()
    assert close(model(ids).logits, double(ids).logits)  # the original scans in fp32 whatever its weights
    model.to("cpu", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    states.attach(model)
    assert model(ids).logits.isfinite().all()
    assert all(state.dtype == torch.float32 for state in states.parameters())
    model.to("meta")
    assert {p.device.type for p in restore_modules(model).parameters()} == {"meta"}


@every_model
def test_save_pretrained_writes_what_the_original_writes(name, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "original")
    swap_modules(model)
    random_states(model).attach(model)
    model.save_pretrained(tmp_path / "swapped")
    files = sorted(os.listdir(tmp_path / "original"))
    assert sorted(os.listdir(tmp_path / "swapped")) == files
    assert "model.safetensors" in files
    for file in files:
        assert (tmp_path / "swapped" / file).read_bytes() == (tmp_path / "original" / file).read_bytes()
    again = swap_modules(type(model).from_pretrained(tmp_path / "swapped"))
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


@pytest.mark.slow
@every_family
@torch.no_grad()
def test_attach_detach_swap_and_restore_in_any_order(name):
    """In every sequence of four of these operations, the logits are those for the last one."""
    model, ids = MODELS[name](), tokens(1, 7)
    swap_modules(model)
    sets = [random_states(model, seed=seed) for seed in (1, 2)]
    expected = {None: model(ids).logits}
    for states in sets:
        with states.attached(model):
            expected[states] = model(ids).logits
    steps = ["attach 0", "attach 1", "detach 0", "detach 1", "restore"]
    for order in itertools.product(steps, repeat=4):
        swap_modules(restore_modules(model))
        now = None
        for step in order:
            if step == "restore":
                swap_modules(restore_modules(model))
                now = None
                continue
            word, number = step.split()
            states = sets[int(number)]
            if word == "attach":
                states.attach(model)
                now = states
            else:
                states.detach()
                now = None if now is states else now
        assert (find_site(model).attachment is None) == (now is None), order
        assert S0States.attached_to(model) is now, order
    for states in sets:
        states.attach(model)
        assert torch.equal(model(ids).logits, expected[states])
        states.detach()
        assert torch.equal(model(ids).logits, expected[None])
