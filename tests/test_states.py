"""S0States: shapes, attaching, and files that are read and written in the layout of `s0-tuning`."""

import contextlib
import copy
import json
import os
import pickle

import pytest
import torch
from models import MODELS, falcon, qwen, random_states, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from s0kernels import S0Config, S0States, swap_modules
from s0kernels.modules.swap import find_site
from s0kernels.states import read_directory

SHAPES = {
    "qwen": ([0, 1, 3], (4, 8, 12)),
    "qwen_multimodal": ([0, 1, 3], (4, 8, 12)),
    "falcon": ([0, 1, 2], (6, 8, 12)),
}


@pytest.mark.parametrize("name", list(SHAPES))
def test_for_model(name):
    model = swap_modules(MODELS[name]())
    layers, shape = SHAPES[name]
    states = S0States.for_model(model, tasks=3)
    assert (states.layers, list(states), len(states), states.tasks) == (layers, layers, 3, 3)
    for layer, parameter in zip(layers, states.parameters(), strict=True):
        assert states[layer] is parameter
        assert parameter.shape == (3, *shape)
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
        assert not parameter.any()
    with pytest.raises(KeyError, match=r"layer [27] has no initial state"):
        states[2 if 2 not in layers else 7]
    for bad in (0, -1, 1.0, True):
        with pytest.raises(ValueError, match="tasks"):
            S0States.for_model(model, tasks=bad)
    assert not [key for key in model.state_dict() if "s0" in key.lower()]


def test_bad_arguments_of_attach():
    model = swap_modules(qwen())
    states = random_states(model, tasks=2)
    for options, kind, message in (
        ({"scale": "1"}, TypeError, "scale"),
        ({"scale": float("nan")}, ValueError, "scale"),
        ({"tasks": ["a"]}, TypeError, "tasks"),
        ({"tasks": 2}, ValueError, r"\[-1, 1\]"),
        ({"tasks": -2}, ValueError, r"\[-1, 1\]"),
        ({"tasks": [0, 5]}, ValueError, r"\[-1, 1\]"),
        ({"tasks": [[0], [1]]}, ValueError, "one per row"),
        ({"tasks": [0.5]}, TypeError, "integers"),
        ({"tasks": True}, TypeError, "tasks"),
        ({"tasks": {}}, TypeError, "tasks"),
    ):
        with pytest.raises(kind, match=message):
            states.attach(model, **options)
        with pytest.raises(kind, match=message), states.attached(model, **options):
            pass


@torch.no_grad()
def test_scale_is_applied_once_and_again_only_when_the_states_change():
    model, ids = swap_modules(qwen()), tokens(1, 9)
    states = random_states(model)
    states.attach(model, scale=0.5)
    product = find_site(model).attachment.state(0)
    half = model(ids).logits
    assert find_site(model).attachment.state(0) is product
    for state in states.parameters():
        state.mul_(0.5)
    quarter = model(ids).logits
    states.attach(model, scale=0.5)
    assert torch.equal(model(ids).logits, quarter)
    states.attach(model)
    assert torch.equal(model(ids).logits, half)
    for state in states.parameters():
        state.zero_()
    followed = model(ids).logits
    states.detach()
    assert torch.equal(model(ids).logits, followed)


def test_gradients_accumulate_at_any_scale():
    model, ids = swap_modules(qwen()).requires_grad_(False), tokens(2, 9)
    states = random_states(model)
    with states.attached(model, scale=0.5):
        model(ids).logits.square().sum().backward()
        together = [state.grad.clone() for state in states.parameters()]
        states.zero_grad()
        for row in ids:
            model(row[None]).logits.square().sum().backward()
        copy.deepcopy(model)
    for state, grad in zip(states.parameters(), together, strict=True):
        assert torch.allclose(state.grad, grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))


def test_the_gradient_goes_through_the_scale():
    """Training at scale alpha, as the paper's algorithm does, attached even under no_grad."""
    model, ids = swap_modules(falcon()).requires_grad_(False), tokens(1, 9)
    states = random_states(model)
    grads = []
    for scale in (1.0, 0.5):
        with torch.no_grad():
            for state in states.parameters():
                state.copy_(torch.randn(state.shape, generator=torch.Generator().manual_seed(1)) / scale)
            states.attach(model, scale=scale)
        states.zero_grad()
        model(ids).logits.square().sum().backward()
        grads.append([state.grad.clone() for state in states.parameters()])
    for whole, half in zip(*grads, strict=True):
        assert torch.allclose(whole * 0.5, half, rtol=1e-3, atol=1e-6)


def test_copies_are_not_attached():
    model, ids = swap_modules(qwen()), tokens(1, 9)
    states = random_states(model)
    states.attach(model)
    for copied in (copy.deepcopy(states), pickle.loads(pickle.dumps(states))):
        assert all(torch.equal(copied[layer], states[layer]) for layer in states)
        before = model(ids).logits
        copied.detach()
        assert torch.equal(model(ids).logits, before)


# Files


def test_the_layout_is_that_of_s0_tuning(tmp_path):
    model = swap_modules(qwen())
    states = random_states(model, tasks=2)
    states.save(tmp_path / "deep" / "a", task=1, config=S0Config(alpha=0.2))
    folder = tmp_path / "deep" / "a"
    assert sorted(os.listdir(folder)) == ["config.json", "meta.json", "states.safetensors"]
    tensors = load_file(folder / "states.safetensors")
    assert sorted(tensors) == ["0", "1", "3"]
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, states[int(key)][1])
    config = json.loads((folder / "config.json").read_text())
    assert config == S0Config(alpha=0.2).to_dict()
    assert len(config) == 7
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["arch"] == "gated_delta_net"
    assert meta["recurrent_layers"] == [0, 1, 3]
    assert meta["state_shape"] == [4, 8, 12]
    with safe_open(folder / "states.safetensors", "pt") as reader:
        header = json.loads(reader.metadata()["s0"])
    assert header == {"meta": meta, "config": config}

    for target in (None, model):
        loaded = S0States.load(folder, target)
        assert loaded.tasks == 1
        assert all(torch.equal(loaded[layer][0], states[layer][1]) for layer in states)
    (folder / "meta.json").unlink()
    (folder / "config.json").unlink()
    assert read_directory(folder)[1:] == (meta, config), "the tensors' file is enough"


def test_reads_what_s0_tuning_writes(tmp_path):
    """Files as that package writes them: no header of ours."""
    model = swap_modules(falcon())
    tensors = {str(i): torch.randn(6, 8, 12) for i in range(3)}
    save_file(tensors, tmp_path / "states.safetensors")
    meta = {"arch": "mamba2", "recurrent_layers": [0, 1, 2], "state_shape": [6, 8, 12]}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "config.json").write_text(json.dumps(S0Config().to_dict()))
    states = S0States.load(tmp_path, model)
    assert all(torch.equal(states[i][0], tensors[str(i)]) for i in range(3))
    (tmp_path / "meta.json").unlink()  # which that package does without
    assert S0States.load(tmp_path, model).arch == "mamba2"
    with pytest.raises(ValueError, match="names no arch"):
        S0States.load(tmp_path)


def test_what_does_not_fit_the_model_is_refused_with_both_sides(tmp_path):
    models = {
        "qwen": qwen(),
        "falcon": falcon(),
        "wider": qwen(linear_value_head_dim=16),
        "fewer": qwen(layer_types=["linear_attention", "full_attention"], num_hidden_layers=2),
    }
    for name, model in models.items():
        random_states(swap_modules(model)).save(tmp_path / name)
    for name, message in (
        ("falcon", "'mamba2'.*'gated_delta_net'"),
        ("wider", r"\[4, 8, 16\].*\[4, 8, 12\]"),
        ("fewer", r"\[0\].*\[0, 1, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            S0States.load(tmp_path / name, models["qwen"])
        with pytest.raises(ValueError, match=message):
            S0States.load(tmp_path / name).attach(models["qwen"])


def test_damaged_files_are_refused(tmp_path):
    model = swap_modules(qwen())
    with pytest.raises(FileNotFoundError, match=r"states.safetensors"):
        S0States.load(tmp_path / "nothing", model)
    good = {str(i): torch.zeros(4, 8, 12) for i in (0, 1, 3)}
    meta = {"arch": "gated_delta_net", "recurrent_layers": [0, 1, 3], "state_shape": [4, 8, 12]}

    whole = json.dumps(meta)

    def write(tensors=good, meta=whole, cut=None):
        save_file(tensors, tmp_path / "states.safetensors")
        if cut is not None:
            content = (tmp_path / "states.safetensors").read_bytes()
            (tmp_path / "states.safetensors").write_bytes(content[:cut])
        (tmp_path / "meta.json").write_text(meta)

    write()
    S0States.load(tmp_path, model)
    for options, message in (
        ({"cut": 100}, "not a readable safetensors file"),
        ({"cut": 0}, "not a readable safetensors file"),
        ({"meta": "{"}, "not valid JSON"),
        ({"meta": "[]"}, "JSON object"),
        ({"meta": '{"arch": 3}'}, "names no arch"),
        ({"tensors": {"zero": torch.zeros(2)}}, "layer index"),
        ({"tensors": {**good, "3": torch.full((4, 8, 12), float("nan"))}}, "layer 3.*finite"),
        ({"tensors": {**good, "3": torch.zeros(4, 12, 8)}}, r"layer 3 has shape \[4, 12, 8\].*\[4, 8, 12\]"),
        ({"tensors": {"0": torch.zeros(4, 8, 12)}}, r"layers \[0\].*\[0, 1, 3\]"),
    ):
        write(**options)
        with pytest.raises(ValueError, match=message):
            S0States.load(tmp_path, model)


@pytest.mark.parametrize("failing", ["config.json", "meta.json", "states.safetensors"])
def test_a_save_that_fails_leaves_the_old_states(tmp_path, monkeypatch, failing):
    model = swap_modules(qwen())
    old, new = random_states(model, seed=1), random_states(model, seed=2)
    old.save(tmp_path)
    replace = os.replace

    def fail(source, target):
        if os.path.basename(target) == failing:
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        new.save(tmp_path, config=S0Config(alpha=0.9))
    with pytest.warns(match="differs from the header") if failing != "config.json" else contextlib.nullcontext():
        tensors, _, config = read_directory(tmp_path)
    assert all(torch.equal(tensors[layer], old[layer][0]) for layer in old)
    assert config["alpha"] is None
    assert sorted(os.listdir(tmp_path)) == ["config.json", "meta.json", "states.safetensors"]
