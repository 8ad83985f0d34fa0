"""The swapped mixers: their results without S0, and models that cannot be swapped."""

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from models import (
    MODELS,
    cached,
    close,
    every_family,
    every_model,
    fails_upstream,
    falcon,
    padded,
    qwen,
    ragged,
    random_states,
    tokens,
)
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from s0kernels import S0States, restore_modules, swap_modules
from s0kernels.modules.families import UNSUPPORTED
from s0kernels.modules.swap import find_site
from s0kernels.versions import PINNED


@every_model
@torch.no_grad()
def test_without_states_the_logits_are_the_originals(name):
    model, ids = MODELS[name](), tokens(3, 37)
    lefts, mask = padded(ragged(), "left")
    calls = [(0, 20), (20, 35), (35, 36), (36, 37)]

    def run(calls):
        cache = DynamicCache(config=model.config)
        pieces = [model(ids[:, a:b], **cached(model, cache)).logits for a, b in calls]
        logits = [model(ids).logits, torch.cat(pieces, 1)]
        if name != "falcon_norm":  # the original lets the bias of its projection enter the convolution at pads
            logits.append(model(lefts, attention_mask=mask).logits[mask.bool()])
        return logits

    fails = fails_upstream(name)  # then the original's norm mixes the rows of single tokens
    before = run(calls[:2] if fails else calls)
    swap_modules(model)
    after = run(calls)
    if fails:
        assert close(after[1], after[0])
    for ours, theirs in zip(after, before, strict=True):
        assert close(ours[:, : theirs.shape[1]], theirs)


@every_model
@torch.no_grad()
def test_swap_keeps_parameters_and_restore_gives_back_the_bits(name):
    model, ids = MODELS[name](), tokens(2, 21)
    before, keys = model(ids).logits, list(model.state_dict())
    objects = {key: id(value) for key, value in model.state_dict(keep_vars=True).items()}
    parameters = [id(p) for p in model.parameters()]
    mixers = {n: type(m).__name__ for n, m in model.named_modules()}

    assert swap_modules(model) is model
    assert any(type(m).__name__.startswith("S0") for m in model.modules())
    for _ in range(2):  # swapping twice is swapping once
        swap_modules(model)
        assert list(model.state_dict()) == keys
        assert {key: id(value) for key, value in model.state_dict(keep_vars=True).items()} == objects
        assert [id(p) for p in model.parameters()] == parameters
    random_states(model).attach(model)

    assert restore_modules(model) is model
    assert {n: type(m).__name__ for n, m in model.named_modules()} == mixers
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(restore_modules(model)(ids).logits, before)


@every_family
def test_what_happens_to_a_swapped_model_happens_to_the_original(name):
    model = MODELS[name]()
    ids = tokens(2, 9)
    reference = copy.deepcopy(model).double().train()
    swap_modules(model).double().train()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.1)
        for parameter in model.parameters():
            parameter.mul_(1.1)
    restored = restore_modules(model)
    assert all(module.training for module in restored.modules())
    assert torch.equal(restored.eval()(ids).logits, reference.eval()(ids).logits)


@every_family
@torch.no_grad()
def test_bf16_models_keep_an_fp32_state(name):
    model = swap_modules(MODELS[name]()).bfloat16()
    states, ids = random_states(model), tokens(2, 16)
    assert all(state.dtype == torch.float32 for state in states.parameters())
    cache = DynamicCache(config=model.config)
    with states.attached(model):
        model(ids, **cached(model, cache))
        out = model(ids[:, :1], **cached(model, cache))
    assert out.logits.dtype == torch.bfloat16
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32


@every_family
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("disk", [False, True], ids=["cpu", "disk"])
@torch.no_grad()
def test_offloaded_weights(name, where, disk, tmp_path):
    """Weights that accelerate loads when a module is called, offloaded before the swap or after it."""
    from accelerate import cpu_offload, disk_offload

    model, ids = MODELS[name](), tokens(2, 9)
    reference = swap_modules(copy.deepcopy(model))
    states = random_states(reference)

    def offload():
        cpu = torch.device("cpu")
        if disk:
            disk_offload(model, str(tmp_path), execution_device=cpu)
        else:
            cpu_offload(model, execution_device=cpu)

    if where == "before":
        offload()
    swap_modules(model)
    if where == "after":
        offload()
    mine = S0States({layer: states[layer] for layer in states}, states.arch)
    with states.attached(reference), mine.attached(model):
        assert close(model(ids).logits, reference(ids).logits)
    assert all(state.device.type == "cpu" for state in S0States.for_model(model).parameters())
    restore_modules(model), restore_modules(reference)
    assert close(model(ids).logits, reference(ids).logits)


@every_family
@torch.no_grad()
def test_hooks_and_compiled_mixers(name):
    """Hooks on a mixer survive swap and restore. A mixer that was compiled before does not run instead of its
    replacement."""
    model, ids, calls = MODELS[name](), tokens(1, 9), []
    path = next(n for n, m in model.named_modules() if hasattr(m, "A_log"))
    model.get_submodule(path).register_forward_hook(lambda *_: calls.append("before"))
    model.get_submodule(path).compile(backend="eager")
    swap_modules(model)
    model.get_submodule(path).register_forward_hook(lambda *_: calls.append("while"))
    zero = model(ids).logits
    with random_states(model).attached(model):
        assert (model(ids).logits - zero).abs().max() > 0.1
    restore_modules(model)(ids)
    assert calls == ["before", "while"] * 3


@every_family
def test_half_swapped_models_and_strange_mixers_are_refused(name):
    model = MODELS[name]()
    path = next(n for n, m in model.named_modules() if hasattr(m, "A_log"))
    decoder_layer = model.get_submodule(path.rpartition(".")[0])
    swap_modules(decoder_layer)
    with pytest.raises(ValueError, match="not swapped, but others are"):
        swap_modules(model)
    swap_modules(restore_modules(model))
    setattr(decoder_layer, path.rpartition(".")[2], model.get_submodule(path).original)
    with pytest.raises(ValueError, match=r"layers \[0\] are no longer swapped"):
        S0States.for_model(model)
    fresh = MODELS[name]()
    mixer = fresh.get_submodule(path)
    mixer.__class__ = type("Own", (type(mixer),), {"forward": lambda self, *args, **kwargs: None})
    with pytest.raises(ValueError, match="Own whose forward was overridden"):
        swap_modules(fresh)


@pytest.mark.parametrize("function", [swap_modules, restore_modules, S0States.for_model])
def test_what_is_not_a_module_is_refused(function):
    with pytest.raises(TypeError, match="model must be a torch"):
        function("Qwen/Qwen3.5-4B")


def test_an_unsupported_model_is_refused_with_the_supported_families():
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    for model in (LlamaForCausalLM(config), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"no recurrent mixer.*Qwen3.5.*Falcon-H1"):
            swap_modules(model)


@pytest.mark.parametrize("mixer", UNSUPPORTED)
def test_a_mixer_that_cannot_be_replaced_is_named_with_what_is_missing(mixer):
    """The test uses a class with the name of one in the installed transformers."""
    folders = Path(transformers.__file__).parent.joinpath("models").glob("*/modeling_*.py")
    known = any(f"\nclass {mixer}(" in path.read_text() for path in folders)
    assert known or transformers.__version__ != PINNED["transformers"], "renamed or gone"
    model = nn.ModuleDict({"mixer": type(f"My{mixer}", (type(mixer, (nn.Module,), {}),), {})()})
    with pytest.raises(ValueError, match=re.escape(f"its My{mixer} cannot be replaced: {UNSUPPORTED[mixer]}")):
        swap_modules(model)


@pytest.mark.parametrize(
    ("name", "settings", "what"),
    [
        ("KimiLinear", {"num_hidden_layers": 4}, "KimiLinearDeltaAttention.*KDA"),
        ("Lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "Lfm2ShortConv.*window"),
        ("Mamba", {"num_hidden_layers": 2}, "MambaMixer.*Mamba-1"),
    ],
)
def test_a_model_that_cannot_be_swapped_is_told_why(name, settings, what):
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    with pytest.raises(ValueError, match=f"{name}ForCausalLM has no recurrent mixer of a supported.*{what}"):
        swap_modules(model)


def test_an_unknown_recurrent_mixer_is_named():
    mixer = nn.Conv1d(1, 1, 1)
    mixer.A_log, mixer.layer_idx = nn.Parameter(torch.zeros(2)), 0
    with pytest.raises(ValueError, match=r"s0kernels does not know its Conv1d: docs/adding-a-family.md"):
        swap_modules(nn.Sequential(mixer))


@pytest.mark.parametrize("make", [qwen, falcon])
def test_states_need_a_swapped_model(make):
    model = make()
    with pytest.raises(ValueError, match="swap_modules"):
        S0States.for_model(model)
    states = random_states(swap_modules(model))
    restore_modules(model)
    assert find_site(model) is None
    with pytest.raises(ValueError, match="swap_modules"):
        states.attach(model)
    with pytest.raises(ValueError, match="swap_modules"), states.attached(model):
        pass
