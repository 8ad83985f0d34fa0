"""Where S0 enters: padding, caches, turns, generation."""

import copy

import pytest
import torch
from models import (
    EOS,
    MODELS,
    PAD,
    bamba,
    cached,
    close,
    every_family,
    every_model,
    falcon,
    numbered,
    padded,
    ragged,
    random_states,
    seeded_cache,
    tokenizer,
    tokens,
)
from transformers import DynamicCache, LogitsProcessor, StaticCache

from s0kernels import swap_modules


@every_model
@torch.no_grad()
def test_s0_is_the_state_before_the_first_token(name):
    """Compare with the original model, whose cache holds S0 and an empty convolution window."""
    model, ids = MODELS[name](), tokens(2, 30)
    original = copy.deepcopy(model)
    swap_modules(model)
    states = random_states(model)
    states.attach(model)
    cache = seeded_cache(original, {layer: states[layer].detach() for layer in states}, rows=2)
    assert close(model(ids).logits, original(ids, **cached(original, cache)).logits)


@every_model
@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@torch.no_grad()
def test_padding(name, swapped, side):
    """Pads neither decay nor write: the logits at real tokens and at the next token are those without padding."""
    model, _ = swapped
    rows = ragged()
    ids, mask = padded(rows, side)
    cache = DynamicCache(config=model.config.get_text_config())
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, **cached(model, cache), position_ids=positions).logits
    following = tokens(len(rows), 5, seed=5)
    grown = torch.cat([mask, torch.ones_like(following)], 1)
    positions = grown.cumsum(1)[:, -5:] - 1
    after = model(following, attention_mask=grown, **cached(model, cache), position_ids=positions).logits
    for i, row in enumerate(rows):
        alone = model(torch.cat([row, following[i]])[None]).logits[0]
        assert close(logits[i, mask[i].bool()], alone[: len(row)])
        assert close(after[i], alone[len(row) :])
        state = DynamicCache(config=model.config.get_text_config())
        model(row[None], **cached(model, state))
        truth, found = state.layers[0], DynamicCache(config=model.config.get_text_config())
        model(ids, attention_mask=mask, **cached(model, found))
        assert close(found.layers[0].recurrent_states[0][i], truth.recurrent_states[0][0])
        assert close(found.layers[0].conv_states[0][i], truth.conv_states[0][0])


@every_model
@pytest.mark.parametrize("cuts", [[17, 30], [1, 2, 30], list(range(1, 31))], ids=["halves", "starts", "tokens"])
@torch.no_grad()
def test_a_live_cache_wins(name, swapped, cuts):
    """In chunked prefill and token by token, S0 enters once, then the cache is used."""
    model, _ = swapped
    ids = tokens(2, 30)
    cache = DynamicCache(config=model.config.get_text_config())
    pieces = []
    for a, b in zip([0, *cuts], cuts, strict=False):
        pieces.append(model(ids[:, a:b], **cached(model, cache), **numbered(name, a, b)).logits)
    assert close(torch.cat(pieces, 1), model(ids).logits)


@every_family
@torch.no_grad()
def test_chunked_prefill_of_a_left_padded_batch(name, swapped):
    """The first chunk has no token of some rows. These rows start from S0 in a later chunk."""
    model, _ = swapped
    rows = ragged()
    ids, mask = padded(rows, "left")
    whole = model(ids, attention_mask=mask).logits
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions).logits
    pieces = []
    for start in range(0, ids.shape[1], 9):
        stop = min(start + 9, ids.shape[1])
        part = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        pieces.append(model(ids[:, start:stop], **cached(model, cache), **part).logits)
    assert close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()])


@every_model
@torch.no_grad()
def test_padded_batch_token_by_token(name, swapped):
    """transformers passes no mask to mixers for a single token, but a single pad must not write either."""
    model, _ = swapped
    rows = ragged()
    for side in ("left", "mixed"):
        ids, mask = padded(rows, side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config.get_text_config())
        pieces = []
        for t in range(ids.shape[1]):
            part = {"attention_mask": mask[:, : t + 1], "position_ids": positions[:, t : t + 1]}
            pieces.append(model(ids[:, t : t + 1], **cached(model, cache), **part).logits)
        logits = torch.cat(pieces, 1)
        for i, row in enumerate(rows):
            assert close(logits[i, mask[i].bool()], model(row[None]).logits[0])


@every_family
@torch.no_grad()
def test_second_turn_and_reset(name, swapped):
    model, _ = swapped
    first, second = ragged(), [tokens(1, n, seed=50 + n)[0] for n in (4, 9, 1, 6)]
    cache = DynamicCache(config=model.config)
    ids, mask = padded(first, "left")
    model(ids, attention_mask=mask, **cached(model, cache), position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    more, more_mask = padded(second, "left")  # pads between the turns
    both = torch.cat([mask, more_mask], 1)
    positions = (both.cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] :]
    found = model(more, attention_mask=both, **cached(model, cache), position_ids=positions).logits
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        alone = model(torch.cat([a, b])[None]).logits[0, len(a) :]
        assert close(found[i, more_mask[i].bool()], alone)
    fresh, ids = DynamicCache(config=model.config), tokens(4, 10)
    expected = model(ids, **cached(model, fresh)).logits
    for layer in cache.layers:
        assert not hasattr(layer, "has_previous_state") or layer.has_previous_state[0]
    cache.reset()
    assert close(model(ids, **cached(model, _with_new_attention(cache, model))).logits, expected)


def _with_new_attention(cache, model):
    """Combine the recurrent layers of a reset cache with new attention layers: after a reset, keys and values are
    zeros."""
    fresh = DynamicCache(config=model.config)
    for old, new in zip(cache.layers, fresh.layers, strict=True):
        for name in ("conv_states", "recurrent_states", "has_previous_state", "conv_kernel_size"):
            if hasattr(old, name):
                setattr(new, name, getattr(old, name))
        for name in ("is_conv_states_initialized", "is_recurrent_states_initialized"):
            if hasattr(old, name):
                setattr(new, name, getattr(old, name))
    return fresh


@every_model
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generate_batched_equals_one_by_one(name, swapped, options):
    model, _ = swapped
    rows = ragged()
    ids, mask = padded(rows, "left")
    call = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, **options}
    together = model.generate(ids, attention_mask=mask, **call)[:, ids.shape[1] :]
    each = options.get("num_return_sequences", 1)
    for i, row in enumerate(rows):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row), dtype=torch.long), **call)
        for j in range(each):
            found, truth = together[i * each + j], alone[j, len(row) :]
            assert torch.equal(found[: len(truth)], truth)
            assert all(token in (PAD, EOS) for token in found[len(truth) :].tolist())


@every_family
def test_generate_ends_at_a_text(name, swapped):
    """For which it is handed a tokenizer, and hands that on to the decoder."""
    model, _ = swapped
    ids, tok = tokens(1, 12), tokenizer()
    call = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    whole = model.generate(ids, **call)[0, 12:]
    stop = tok.decode(whole[4])
    assert stop
    place = next(i for i, token in enumerate(whole) if tok.decode(token) == stop)
    found = model.generate(ids, **call, stop_strings=[stop], tokenizer=tok)[0, 12:]
    assert torch.equal(found, whole[: place + 1])


@every_family
@torch.no_grad()
def test_sampling_follows_the_rows(name, swapped):
    """With fixed noise for each row, rows sampled together equal rows sampled one by one. Several rows per prompt start
    equally."""
    model, _ = swapped
    rows = ragged()
    ids, mask = padded(rows, "left")

    class Noise(LogitsProcessor):
        """Gumbel noise for each step: a greedy choice with it is sampling."""

        def __init__(self):
            self.random = torch.Generator().manual_seed(0)

        def __call__(self, input_ids, scores):
            uniform = torch.rand(scores.shape[1], generator=self.random)
            return scores - torch.log(-torch.log(uniform))

    call = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD}
    together = model.generate(ids, attention_mask=mask, logits_processor=[Noise()], **call)[:, ids.shape[1] :]
    for i, row in enumerate(rows):
        alone = model.generate(row[None], logits_processor=[Noise()], **call)[0, len(row) :]
        assert torch.equal(together[i, : len(alone)], alone)
    torch.manual_seed(0)
    several = model.generate(
        ids,
        attention_mask=mask,
        **{**call, "do_sample": True},
        num_return_sequences=3,
        output_scores=True,
        return_dict_in_generate=True,
        top_k=0,
    )
    first = several.scores[0].view(len(rows), 3, -1)
    assert close(first, first[:, :1].expand_as(first))
    assert len({tuple(row.tolist()) for row in several.sequences[:3]}) > 1


@every_model
@torch.no_grad()
def test_static_cache(name, swapped):
    """The tokens are those with a dynamic cache, also after a reset."""
    model, states = swapped
    rows = ragged()
    ids, mask = padded(rows, "left")
    call = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    with states.attached(model, scale=0.0):
        zero = model.generate(ids, attention_mask=mask, **call)
    truth = model.generate(ids, attention_mask=mask, **call)
    assert not torch.equal(truth, zero)
    cache = StaticCache(config=model.config, max_cache_len=64)
    for _ in range(2):
        found = model.generate(ids, attention_mask=mask, **cached(model, cache), disable_compile=True, **call)
        assert torch.equal(found, truth)
        cache.reset()


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_generate_with_a_compiled_model(name, static):
    """The tokens are the same, in full graphs: swapped mixers do not read the values of tensors."""
    model = swap_modules(MODELS[name]())
    ids, mask = padded(ragged()[:2], "left")
    random_states(model, tasks=2).attach(model, tasks=[1, 0])
    call = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    truth = model.generate(ids, **call)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.forward = torch.compile(model.forward, backend="aot_eager")
    kind = {"cache_implementation": "static", "disable_compile": True} if static else {}
    assert torch.equal(model.generate(ids, **kind, **call), truth)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [falcon, bamba])
@torch.no_grad()
def test_pads_take_no_step_where_the_step_size_has_a_floor(make):
    """dt is computed, clamped, then zeroed: a floor of the clamp must not decay S0 at pads."""
    model = swap_modules(make(time_step_limit=(0.4, 0.8)))
    random_states(model).attach(model)
    rows, call = ragged(), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    for side in ("left", "mixed", "right"):
        ids, mask = padded(rows, side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        together = model.generate(ids, attention_mask=mask, **call) if side == "left" else None
        for i, row in enumerate(rows):
            assert close(logits[i, mask[i].bool()], model(row[None]).logits[0])
            if together is not None:
                alone = model.generate(row[None], **call)[0, len(row) :]
                assert torch.equal(together[i, ids.shape[1] :][: len(alone)], alone)
