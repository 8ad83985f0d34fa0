"""The gradient of S0 through swapped models."""

import copy

import pytest
import torch
from models import (
    MODELS,
    cached,
    checkpoint_layers,
    close,
    every_family,
    every_model,
    gradients,
    padded,
    ragged,
    random_states,
    seeded_cache,
    tokens,
)
from transformers import DynamicCache

from s0kernels import swap_modules
from s0kernels.modules.mixer import S0Mixer


@every_model
def test_gradient_of_s0_equals_the_originals(name):
    """Compare with autograd through the original model, whose cache holds S0."""
    model, ids = MODELS[name]().requires_grad_(False), tokens(2, 30)
    original = copy.deepcopy(model)
    states = random_states(swap_modules(model))
    found = gradients(model, states, ids)
    leaves = {layer: states[layer].detach().clone().requires_grad_() for layer in states}
    cache = seeded_cache(original, leaves, rows=2)
    cache.update_recurrent_state = lambda *_, **__: None  # it works in place, which autograd would refuse
    original(ids, **cached(original, cache)).logits.log_softmax(-1)[..., 7].sum().backward()
    for leaf, grad in zip(leaves.values(), found, strict=True):
        assert close(grad, leaf.grad, 1e-4)


@every_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    """Recomputed layers start from the states bound in the forward, even if others are attached by then."""
    model = swap_modules(MODELS[name]()).requires_grad_(False)
    states, others, ids = random_states(model, tasks=2), random_states(model, tasks=2, seed=9), tokens(3, 20)
    truth = gradients(model, states, ids, tasks=[0, 1, -1])
    checkpoint_layers(model, use_reentrant=reentrant)
    if reentrant:  # a reentrant checkpoint has a gradient only where an input has one
        model.enable_input_require_grads()
    model.train()
    states.zero_grad()
    forwards = []
    mixers = [module for module in model.modules() if isinstance(module, S0Mixer)]
    for mixer in mixers:
        mixer.register_forward_pre_hook(lambda module, _: forwards.append(module))
    with states.attached(model, tasks=[0, 1, -1]):
        logits = model(ids, use_cache=False).logits
    others.attach(model)
    logits.log_softmax(-1)[..., 7].sum().backward()
    assert min(map(forwards.count, mixers)) >= 2, "every layer is computed again"  # Zamba2 has layers within layers
    for layer, grad in zip(states, truth, strict=True):
        assert close(states[layer].grad, grad), layer


@every_family
def test_gradient_under_autocast(name):
    """The gradient in bf16 equals that in fp32 up to rounding to bf16, and is fp32."""
    model = swap_modules(MODELS[name]()).requires_grad_(False)
    states, ids = random_states(model, size=0.1), tokens(4, 20)
    truth = gradients(model, states, ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, states, ids)
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        assert cosine > 0.99


@every_model
@torch.no_grad()
def test_logits_under_autocast(name):
    """Their error against fp32 is at most twice that of the original model under autocast."""
    model, ids = MODELS[name](), tokens(4, 20)
    original = copy.deepcopy(model)
    states = random_states(swap_modules(model))

    def starting(dtype):
        seeds = {layer: states[layer].detach() for layer in states}
        cache = seeded_cache(original, seeds, rows=4)
        for layer in seeds:
            cache.layers[layer].conv_states[0] = cache.layers[layer].conv_states[0].to(dtype)
        return cache

    truth = original(ids, **cached(original, starting(torch.float32))).logits
    with torch.autocast("cpu", torch.bfloat16), states.attached(model):
        ours = model(ids).logits
        theirs = original(ids, **cached(original, starting(torch.bfloat16))).logits
    error, allowed = ((x - truth).float().norm() for x in (ours, theirs))
    assert 0 < error <= 2 * allowed


@every_model
def test_padding_does_not_change_the_gradient(name):
    model = swap_modules(MODELS[name]()).requires_grad_(False)
    states, rows = random_states(model), ragged()
    alone = [gradients(model, states, row[None]) for row in rows]
    ids, mask = padded(rows, "left")
    states.zero_grad()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with states.attached(model):
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    logits[mask.bool()].log_softmax(-1)[..., 7].sum().backward()
    for i, layer in enumerate(states):
        assert close(states[layer].grad, sum(grads[i] for grads in alone)), layer


@every_family
def test_gradient_through_a_cache(name, swapped):
    """The gradient through two forwards with one cache, as in training on turns, equals that of one forward."""
    model, states = swapped
    model.requires_grad_(False)
    ids = tokens(2, 20)
    truth = gradients(model, states, ids)
    states.zero_grad()
    cache = DynamicCache(config=model.config)
    pieces = [model(ids[:, a:b], **cached(model, cache)).logits for a, b in ((0, 12), (12, 19), (19, 20))]
    torch.cat(pieces, 1).log_softmax(-1)[..., 7].sum().backward()
    for layer, grad in zip(states, truth, strict=True):
        assert close(states[layer].grad, grad), layer


@pytest.mark.slow
@every_family
def test_compiled_models_follow_what_is_attached(name):
    model = swap_modules(MODELS[name]()).requires_grad_(False)
    states, others, ids = random_states(model), random_states(model, seed=9), tokens(2, 20)
    truth = gradients(model, states, ids)
    states.zero_grad()
    states.attach(model)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    whole(ids, use_cache=False).logits.log_softmax(-1)[..., 7].sum().backward()
    for layer, grad in zip(states, truth, strict=True):
        assert close(states[layer].grad, grad), layer
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(ids, use_cache=False)
        with others.attached(model):
            assert close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        states.requires_grad_(False).attach(model, scale=0.5)
        for _ in range(2):  # changed in place, at a scale
            assert close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
            for state in states.parameters():
                state.mul_(-1)
        states.detach()
        assert close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
