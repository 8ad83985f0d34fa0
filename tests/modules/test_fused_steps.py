"""Swapped mixers compute a cached token in one kernel if possible, and part by part otherwise."""

import contextlib
import copy
from functools import partial

import pytest
import torch
from cases import NO_CPU_KERNELS, error
from emulated_blocks import every_way, operators
from models import (
    MODELS,
    cached,
    close,
    every_family,
    every_model,
    fails_upstream,
    mixers,
    numbered,
    random_states,
    tokens,
)
from transformers import DynamicCache

import s0kernels
from s0kernels.backends import cpu
from s0kernels.backends import tokens as kernels
from s0kernels.modules.mixer import S0Mixer

pytestmark = pytest.mark.skipif(NO_CPU_KERNELS is not None, reason=f"backend cpu {NO_CPU_KERNELS}")
#: without the self-check, whose steps would be counted
swap_modules = partial(s0kernels.swap_modules, check=False)
STEPS = ("gated_delta_mixer_step", "ssd_mixer_step")


@pytest.fixture
def calls(monkeypatch):
    """Replace the kernels of steps by those of "way", and count them in "steps"."""
    found = {"steps": 0, "way": "whole heads"}

    def counted(step, *records):
        found["steps"] += 1
        return step(operators(found["way"]), *records)

    for name in STEPS:
        monkeypatch.setattr(cpu, name, partial(counted, getattr(kernels, name)))
    return found


@contextlib.contextmanager
def part_by_part():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S0Mixer, "fused_backend", lambda *arguments: None)
        yield


def decode(model, name, ids, steps=3):
    """Return the logits of the last tokens, computed one by one, and the cache."""
    cache = DynamicCache(config=model.config.get_text_config())
    start = ids.shape[1] - steps
    model(ids[:, :start], **cached(model, cache))
    found = [
        model(ids[:, t : t + 1], **cached(model, cache), **numbered(name, t, t + 1)).logits
        for t in range(start, ids.shape[1])
    ]
    return torch.cat(found, 1), cache


_NORMS_OF_BAMBA = ("BambaRMSNormGated", "GraniteMoeHybridRMSNormGated", "MambaRMSNormGated")


def steps_of(name, tokens=3):
    """Return the number of fused steps of a mixer for so many tokens. It is zero if the mixer has groups and its norm
    in transformers has none, which the fused step does not support."""
    norms = [m for m in MODELS[name]().modules() if type(m).__name__ in _NORMS_OF_BAMBA]
    return tokens if all(hasattr(norm, "group_size") for norm in norms) else 0


@every_model
@every_way
@torch.no_grad()
def test_a_token_is_the_untouched_mixers(name, way, calls):
    """Compare every mixer with its original: output, window and state."""
    if reason := fails_upstream(name):
        pytest.skip(reason)
    calls["way"] = way
    model = MODELS[name]()
    originals, replacements = mixers(copy.deepcopy(model)), mixers(swap_modules(model))
    for original, ours in zip(originals, replacements, strict=True):
        width = ours.out_proj.out_features
        prompt, following = torch.randn(2, 7, width), torch.randn(3, 2, 1, width)
        caches = [DynamicCache(config=model.config.get_text_config()) for _ in range(2)]
        for every, cache in zip((originals, replacements), caches, strict=True):
            for mixer in every:  # some originals read from the last layer's cache whether theirs holds a state
                mixer(prompt, cache)
        before = calls["steps"]
        for x in following:
            truth, found = (m(x, c) for m, c in zip((original, ours), caches, strict=True))
            assert close(found, truth)
        assert calls["steps"] == before + steps_of(name)
        theirs, mine = (cache.layers[original.layer_idx] for cache in caches)
        assert close(mine.recurrent_states[0], theirs.recurrent_states[0])
        assert torch.equal(mine.conv_states[0], theirs.conv_states[0])


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_is_no_worse_than_part_by_part(name, dtype, calls):
    model, ids = swap_modules(MODELS[name]()), tokens(3, 12)
    model.set_experts_implementation("eager")  # the default of mixtures of experts does not take fp64
    half = copy.deepcopy(model).to(dtype)
    exact = copy.deepcopy(half).double()
    truth, cache = decode(exact, name, ids)
    assert calls["steps"] == 0
    found, mine = decode(half, name, ids)
    assert calls["steps"] == steps_of(name) * len(mixers(model))
    with part_by_part():
        plain, theirs = decode(half, name, ids)
    rounding = torch.finfo(dtype).eps
    assert error(found, truth) <= 1.5 * error(plain, truth) + rounding
    for layer in (m.layer_idx for m in mixers(model)):
        states = [c.layers[layer].recurrent_states[0] for c in (cache, mine, theirs)]
        assert error(states[1], states[0]) <= 1.5 * error(states[2], states[0]) + rounding


def watched(model):
    mixers(model)[0].norm.register_forward_hook(lambda *_: None)


def convolved_elsewhere(model):
    mixers(model)[0].conv1d.register_forward_pre_hook(lambda *_: None)


def another_norm(model):
    class Norm(type(mixers(model)[0].norm)):
        pass

    mixers(model)[0].norm.__class__ = Norm


@pytest.mark.parametrize("change", [watched, convolved_elsewhere, another_norm])
@torch.no_grad()
def test_what_is_hooked_or_replaced_is_called(change, calls):
    model, ids = swap_modules(MODELS["qwen"]()), tokens(2, 9)
    truth, _ = decode(model, "qwen", ids)
    before = calls["steps"]
    change(model)
    found, _ = decode(model, "qwen", ids)
    assert calls["steps"] == before + 3 * (len(mixers(model)) - 1)
    assert close(found, truth)


@every_family
def test_what_needs_a_gradient_goes_part_by_part(name, calls):
    model, ids = swap_modules(MODELS[name]()).requires_grad_(False), tokens(1, 9)
    with torch.no_grad():
        truth, _ = decode(model, name, ids)
    steps = calls["steps"]
    found, _ = decode(model, name, ids)  # nothing requires a gradient
    assert calls["steps"] == 2 * steps > 0
    assert close(found, truth)
    mixers(model)[0].dt_bias.requires_grad_()
    found, _ = decode(model, name, ids)
    assert calls["steps"] == 2 * steps
    assert found.requires_grad
    assert close(found, truth)


@every_family
@torch.no_grad()
def test_caches_of_another_kind_go_part_by_part(name, calls):
    """These are a cache that keeps its past, a cache with states in half precision, and three rows of fp32, which are
    faster this way on a CPU."""
    model = swap_modules(MODELS[name]())
    mixer = mixers(model)[0]
    width = mixer.out_proj.out_features
    x = torch.randn(3, 6, width)

    def run(rows, change):
        cache = DynamicCache(config=model.config.get_text_config())
        mixer(x[:rows, :5], cache)
        change(cache.layers[mixer.layer_idx])
        return mixer(x[:rows, 5:], cache)

    def record(layer):
        layer.record_past = True

    def halve(layer):
        layer.recurrent_states[0] = layer.recurrent_states[0].half()

    truth = run(2, lambda layer: None)
    assert calls["steps"] == 1
    assert close(run(2, record), truth)
    assert close(run(2, halve), truth, 1e-2)
    assert close(run(3, lambda layer: None)[:2], truth)
    assert calls["steps"] == 1


@every_family
@torch.no_grad()
def test_under_autocast(name, calls):
    model, ids = swap_modules(MODELS[name]()), tokens(2, 9)
    truth, _ = decode(copy.deepcopy(model).double(), name, ids)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = decode(model, name, ids)
        assert calls["steps"] == 3 * len(mixers(model))
        with part_by_part():
            plain, _ = decode(model, name, ids)
    assert error(found, truth) <= 1.5 * error(plain, truth) + 2**-8


@every_family
@torch.no_grad()
def test_s0_beams_and_reordered_caches(name, calls):
    model, ids = swap_modules(MODELS[name]()), tokens(1, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 2, "pad_token_id": 0, "eos_token_id": None}
    with random_states(model).attached(model):
        found = model.generate(ids, **options)
        assert calls["steps"] == 11 * len(mixers(model))
        with part_by_part():
            assert torch.equal(model.generate(ids, **options), found)


@every_family
def test_a_decode_compiles_in_one_graph(name, calls):
    model = swap_modules(MODELS[name]())
    mixer = mixers(model)[0]
    x = torch.randn(1, 8, mixer.out_proj.out_features)
    caches = [DynamicCache(config=model.config.get_text_config()) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            mixer(x, cache)
        step = torch.compile(lambda x, cache: mixer(x, cache), fullgraph=True, backend="aot_eager")
        truth = mixer(x[:, :1], caches[0])
        assert torch.equal(step(x[:, :1], caches[1]), truth)
    assert calls["steps"] == 2
    for cache in caches[1:]:
        layer, other = cache.layers[mixer.layer_idx], caches[0].layers[mixer.layer_idx]
        assert torch.equal(layer.recurrent_states[0], other.recurrent_states[0])
        assert torch.equal(layer.conv_states[0], other.conv_states[0])
