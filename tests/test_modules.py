"""The swapped mixers: what they compute with no S0, and where S0 enters when there is one."""

import copy
import threading

import pytest
import torch
from models import EOS, MODELS, PAD, checkpoint_layers, fails_upstream, falcon, qwen, random_states, tokens
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessor, StaticCache

from s0kernels import S0States, restore_modules, swap_modules
from s0kernels.modules.swap import find_site

FAMILIES = ("qwen", "falcon")
every_model = pytest.mark.parametrize("name", list(MODELS))
every_family = pytest.mark.parametrize("name", FAMILIES)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of rows of different lengths; "mixed" pads on both sides."""
    width = max(map(len, rows)) + (3 if side == "mixed" else 0)
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        free = width - len(row)
        start = {"left": free, "right": 0, "mixed": (i + 1) % (free + 1)}[side]
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return ids, mask


def ragged() -> list[torch.Tensor]:
    return [tokens(1, n, seed=n)[0] for n in (29, 12, 21, 2)]


@pytest.fixture
def swapped(request):
    """A swapped model with states attached that matter at its last token."""
    if reason := fails_upstream(request.getfixturevalue("name")):
        pytest.skip(reason)
    model = swap_modules(MODELS[request.getfixturevalue("name")]())
    states = random_states(model)
    ids = tokens(2, 30)
    with torch.no_grad():
        before = model(ids).logits
        states.attach(model)
        difference = (model(ids).logits - before).abs().amax((0, 2))
    assert difference[0] > 0.1
    assert difference[-1] > 0.01, "S0 does not survive the prompt, so these tests would show nothing"
    return model, states


# With no S0


@every_model
@torch.no_grad()
def test_without_states_the_logits_are_the_originals(name):
    model, ids = MODELS[name](), tokens(3, 37)
    lefts, mask = padded(ragged(), "left")

    def run():
        cache = DynamicCache(config=model.config)
        pieces = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 20), (20, 35), (35, 36), (36, 37))]
        logits = [model(ids).logits, torch.cat(pieces, 1)]
        if name != "falcon_norm":  # the original lets the bias of its projection enter the convolution at pads
            logits.append(model(lefts, attention_mask=mask).logits[mask.bool()])
        return logits

    before = run()
    swap_modules(model)
    for ours, theirs in zip(run(), before, strict=True):
        assert close(ours, theirs)


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


# S0 at the start of every sequence


def seeded_cache(original, states, rows: int) -> DynamicCache:
    """A cache of the untouched model that holds `states` and empty convolution windows, and nothing else."""
    cache = DynamicCache(config=original.config.get_text_config())
    for module in original.modules():
        layer = getattr(module, "layer_idx", None)
        if layer in states and hasattr(module, "conv1d"):
            window = torch.zeros(rows, module.conv1d.weight.shape[0], module.conv_kernel_size)
            cache.update_conv_state(window, layer, conv_kernel_size=module.conv_kernel_size)
            cache.layers[layer].recurrent_states[0] = states[layer].expand(rows, -1, -1, -1).clone()
            cache.layers[layer].is_recurrent_states_initialized[0] = True
    return cache


@every_model
@torch.no_grad()
def test_s0_is_the_state_before_the_first_token(name):
    """Against the untouched model, its cache seeded with S0 and an empty convolution window."""
    model, ids = MODELS[name](), tokens(2, 30)
    original = copy.deepcopy(model)
    swap_modules(model)
    states = random_states(model)
    states.attach(model)
    cache = seeded_cache(original, {layer: states[layer].detach() for layer in states}, rows=2)
    assert close(model(ids).logits, original(ids, past_key_values=cache).logits)


@every_model
@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@torch.no_grad()
def test_padding(name, swapped, side):
    """Pads neither decay nor write: logits at real tokens, and the next token after them, as without padding."""
    model, _ = swapped
    rows = ragged()
    ids, mask = padded(rows, side)
    cache = DynamicCache(config=model.config.get_text_config())
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, past_key_values=cache, position_ids=positions).logits
    following = tokens(len(rows), 5, seed=5)
    grown = torch.cat([mask, torch.ones_like(following)], 1)
    positions = grown.cumsum(1)[:, -5:] - 1
    after = model(following, attention_mask=grown, past_key_values=cache, position_ids=positions).logits
    for i, row in enumerate(rows):
        alone = model(torch.cat([row, following[i]])[None]).logits[0]
        assert close(logits[i, mask[i].bool()], alone[: len(row)])
        assert close(after[i], alone[len(row) :])
        state = DynamicCache(config=model.config.get_text_config())
        model(row[None], past_key_values=state)
        truth, found = state.layers[0], DynamicCache(config=model.config.get_text_config())
        model(ids, attention_mask=mask, past_key_values=found)
        assert close(found.layers[0].recurrent_states[0][i], truth.recurrent_states[0][0])
        assert close(found.layers[0].conv_states[0][i], truth.conv_states[0][0])


@every_model
@pytest.mark.parametrize("cuts", [[17, 30], [1, 2, 30], list(range(1, 31))], ids=["halves", "starts", "tokens"])
@torch.no_grad()
def test_a_live_cache_wins(name, swapped, cuts):
    """Chunked prefill and token by token: S0 once, then the cache."""
    model, _ = swapped
    ids = tokens(2, 30)
    cache = DynamicCache(config=model.config.get_text_config())
    pieces = [model(ids[:, a:b], past_key_values=cache).logits for a, b in zip([0, *cuts], cuts, strict=False)]
    assert close(torch.cat(pieces, 1), model(ids).logits)


@every_family
@torch.no_grad()
def test_chunked_prefill_of_a_left_padded_batch(name, swapped):
    """The first chunk holds no token at all of some rows; they start from S0 in a later one."""
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
        pieces.append(model(ids[:, start:stop], past_key_values=cache, **part).logits)
    assert close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()])


@every_model
@torch.no_grad()
def test_padded_batch_token_by_token(name, swapped):
    """transformers gives mixers no mask for a single token; a pad on its own must not write all the same."""
    model, _ = swapped
    rows = ragged()
    for side in ("left", "mixed"):
        ids, mask = padded(rows, side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config.get_text_config())
        pieces = []
        for t in range(ids.shape[1]):
            part = {"attention_mask": mask[:, : t + 1], "position_ids": positions[:, t : t + 1]}
            pieces.append(model(ids[:, t : t + 1], past_key_values=cache, **part).logits)
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
    model(ids, attention_mask=mask, past_key_values=cache, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    more, more_mask = padded(second, "left")  # pads between the turns
    both = torch.cat([mask, more_mask], 1)
    positions = (both.cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] :]
    found = model(more, attention_mask=both, past_key_values=cache, position_ids=positions).logits
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        alone = model(torch.cat([a, b])[None]).logits[0, len(a) :]
        assert close(found[i, more_mask[i].bool()], alone)
    fresh, ids = DynamicCache(config=model.config), tokens(4, 10)
    expected = model(ids, past_key_values=fresh).logits
    for layer in cache.layers:
        assert not hasattr(layer, "has_previous_state") or layer.has_previous_state[0]
    cache.reset()
    assert close(model(ids, past_key_values=_with_new_attention(cache, model)).logits, expected)


def _with_new_attention(cache, model):
    """The recurrent layers of a reset cache beside attention that is new: keys and values survive a reset, zeroed."""
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
@torch.no_grad()
def test_sampling_follows_the_rows(name, swapped):
    """With the noise of each row fixed, sampled rows are what they are one by one; several per prompt start equal."""
    model, _ = swapped
    rows = ragged()
    ids, mask = padded(rows, "left")

    class Noise(LogitsProcessor):
        """Gumbel noise by step: greedy choice on it is sampling."""

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


@pytest.mark.parametrize("name", ["qwen"])  # transformers has none for Falcon-H1's layers
@torch.no_grad()
def test_static_cache(name, swapped):
    """Token for token as with a dynamic cache, and again after a reset."""
    model, _ = swapped
    rows = ragged()
    ids, mask = padded(rows, "left")
    call = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    truth = model.generate(ids, attention_mask=mask, **call)
    cache = StaticCache(config=model.config, max_cache_len=64)
    for _ in range(2):
        found = model.generate(ids, attention_mask=mask, past_key_values=cache, disable_compile=True, **call)
        assert torch.equal(found, truth)
        cache.reset()


@torch.no_grad()
def test_pads_take_no_step_where_the_step_size_has_a_floor():
    """dt is computed, clamped, then zeroed: a floor of the clamp must not decay S0 at pads."""
    model = swap_modules(falcon(time_step_limit=(0.4, 0.8)))
    random_states(model).attach(model)
    rows = ragged()
    for side in ("left", "mixed", "right"):
        ids, mask = padded(rows, side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for i, row in enumerate(rows):
            assert close(logits[i, mask[i].bool()], model(row[None]).logits[0])


# A task per row


@every_family
@torch.no_grad()
def test_a_task_per_row(name):
    model = swap_modules(MODELS[name]())
    states, ids = random_states(model, tasks=3), tokens(4, 15)
    tasks = [2, -1, 0, 2]
    zero = model(ids).logits
    with states.attached(model, tasks=tasks):
        found = model(ids).logits
    for i, task in enumerate(tasks):
        with states.attached(model, tasks=task):
            assert close(found[i], model(ids).logits[i])
    assert close(found[1], zero[1])
    with states.attached(model, tasks=torch.tensor(tasks, dtype=torch.int32), scale=0.0):
        assert close(model(ids).logits, zero)
    with states.attached(model), states.attached(model, tasks=1):
        inner = model(ids).logits
    with states.attached(model, tasks=1):
        assert torch.equal(inner, model(ids).logits)


@every_family
def test_tasks_follow_generate_and_other_mismatches_are_errors(name):
    model = swap_modules(MODELS[name]())
    states = random_states(model, tasks=2)
    ids = tokens(2, 9)
    call = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "pad_token_id": PAD}
    with states.attached(model, tasks=[1, 0]):
        together = model.generate(ids, **call)
        with pytest.raises(ValueError, match="tasks names 2 rows, but the batch has 4"):
            model(tokens(4, 9))
        with pytest.raises(ValueError, match="tasks names 2 rows, but the batch has 3"):
            model(tokens(3, 9))
        model(ids.repeat_interleave(2, 0))  # as generate multiplies
    for i, task in enumerate([1, 0]):
        with states.attached(model, tasks=task):
            alone = model.generate(ids[i : i + 1], **call)
        assert torch.equal(together[i, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("name", ["falcon", "qwen_multimodal"])
def test_a_mismatch_is_an_error_for_embeddings_too(name):
    """The decoder of the multimodal class never sees token ids."""
    model = swap_modules(MODELS[name]())
    states, ids = random_states(model, tasks=2), tokens(4, 9)
    embeddings = model.get_input_embeddings()
    with states.attached(model, tasks=[0, 1]), torch.no_grad():
        for rows in ({"input_ids": ids}, {"inputs_embeds": embeddings(ids)}):
            with pytest.raises(ValueError, match="tasks names 2 rows, but the batch has 4"):
                model(**rows)
        model(inputs_embeds=embeddings(ids[:2].repeat_interleave(2, 0)))


@every_family
@torch.no_grad()
def test_attaching_holds_for_every_thread_and_attached_for_its_own(name):
    model = swap_modules(MODELS[name]())
    first, second, ids = random_states(model, seed=1), random_states(model, seed=2), tokens(1, 12)

    def logits():
        with torch.no_grad():
            return model(ids).logits

    def in_a_thread(call):
        result = []
        thread = threading.Thread(target=lambda: result.append(call()))
        thread.start()
        thread.join()
        return result[0]

    zero = logits()
    with second.attached(model):
        other = logits()
        assert torch.equal(in_a_thread(logits), zero)
    first.attach(model)
    attached = in_a_thread(logits)
    assert torch.equal(attached, logits())
    with second.attached(model):
        assert torch.equal(logits(), other)
        assert torch.equal(in_a_thread(logits), attached)
    second.detach()  # not the attached ones: nothing to undo
    assert torch.equal(logits(), attached)
    first.detach()
    assert torch.equal(logits(), zero)


@torch.no_grad()
def test_attached_may_end_in_any_order():
    """As generators make it; the last to begin wins among those that are left."""
    model, ids = swap_modules(qwen()), tokens(1, 12)
    states = [random_states(model, seed=seed) for seed in range(3)]

    def attached(which):
        with which.attached(model):
            yield

    zero = model(ids).logits
    alone = []
    for which in states:
        with which.attached(model):
            alone.append(model(ids).logits)
    running = [attached(which) for which in states]
    for generator in running:
        next(generator)
    assert torch.equal(model(ids).logits, alone[2])
    running[0].close()
    assert torch.equal(model(ids).logits, alone[2])
    running[2].close()
    assert torch.equal(model(ids).logits, alone[1])
    running[1].close()
    assert torch.equal(model(ids).logits, zero)


# Gradients


def gradients(model, states, ids, mask=None, **options):
    states.zero_grad()
    with states.attached(model, **options):
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    if mask is not None:
        logits = logits[mask.bool()]
    logits.float().log_softmax(-1)[..., 7].sum().backward()
    return [states[layer].grad.clone() for layer in states]


@every_model
def test_gradient_of_s0_equals_the_originals(name):
    """Autograd through the untouched model, its cache seeded with S0."""
    model, ids = MODELS[name]().requires_grad_(False), tokens(2, 30)
    original = copy.deepcopy(model)
    states = random_states(swap_modules(model))
    found = gradients(model, states, ids)
    leaves = {layer: states[layer].detach().clone().requires_grad_() for layer in states}
    cache = seeded_cache(original, leaves, rows=2)
    cache.update_recurrent_state = lambda *_: None  # in place, which autograd would refuse
    original(ids, past_key_values=cache).logits.log_softmax(-1)[..., 7].sum().backward()
    for leaf, grad in zip(leaves.values(), found, strict=True):
        assert close(grad, leaf.grad, 1e-4)


@every_family
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    """Recomputed layers start from the states that the forward was bound to, whatever is attached by then."""
    model = swap_modules(MODELS[name]()).requires_grad_(False)
    states, others, ids = random_states(model, tasks=2), random_states(model, tasks=2, seed=9), tokens(3, 20)
    truth = gradients(model, states, ids, tasks=[0, 1, -1])
    checkpoint_layers(model, use_reentrant=reentrant)
    if reentrant:  # a reentrant checkpoint has a gradient only where an input has one
        model.enable_input_require_grads()
    model.train()
    states.zero_grad()
    with states.attached(model, tasks=[0, 1, -1]):
        logits = model(ids, use_cache=False).logits
    others.attach(model)
    logits.log_softmax(-1)[..., 7].sum().backward()
    for layer, grad in zip(states, truth, strict=True):
        assert close(states[layer].grad, grad), layer


@every_family
def test_gradient_under_autocast(name):
    """In bf16 the gradient is that of fp32 up to bf16's rounding, and comes in fp32."""
    model = swap_modules(MODELS[name]()).requires_grad_(False)
    states, ids = random_states(model, size=0.1), tokens(4, 20)
    truth = gradients(model, states, ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, states, ids)
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        assert cosine > 0.99


@every_family
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
    """Two forwards over one cache, as in training on turns, differentiate like one."""
    model, states = swapped
    model.requires_grad_(False)
    ids = tokens(2, 20)
    truth = gradients(model, states, ids)
    states.zero_grad()
    cache = DynamicCache(config=model.config)
    pieces = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 12), (12, 19), (19, 20))]
    torch.cat(pieces, 1).log_softmax(-1)[..., 7].sum().backward()
    for layer, grad in zip(states, truth, strict=True):
        assert close(states[layer].grad, grad), layer


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
        states.detach()
        assert close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


# Types and errors


@every_family
@torch.no_grad()
def test_bf16_models_keep_an_fp32_state(name):
    model = swap_modules(MODELS[name]()).bfloat16()
    states, ids = random_states(model), tokens(2, 16)
    assert all(state.dtype == torch.float32 for state in states.parameters())
    cache = DynamicCache(config=model.config)
    with states.attached(model):
        model(ids, past_key_values=cache)
        out = model(ids[:, :1], past_key_values=cache)
    assert out.logits.dtype == torch.bfloat16
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32


@every_family
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("disk", [False, True], ids=["cpu", "disk"])
@torch.no_grad()
def test_offloaded_weights(name, where, disk, tmp_path):
    """Weights that accelerate brings when a module is called, offloaded before the swap or after it."""
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
    """Hooks on a mixer stay through swap and restore; a mixer compiled before is not run in its replacement's place."""
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
    with pytest.raises(ValueError, match=r"layers \[0\] are not swapped any more"):
        S0States.for_model(model)
    fresh = MODELS[name]()
    mixer = fresh.get_submodule(path)
    mixer.__class__ = type("Own", (type(mixer),), {"forward": lambda self, *args, **kwargs: None})
    with pytest.raises(ValueError, match="Own with a forward of its own"):
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


# Packed sequences


def packs(lengths: list[int]) -> dict[str, dict]:
    """Every way to say where sequences begin in one row."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    numbers = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    return {
        "cu_seq_lens": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
        "seq_idx": {"seq_idx": numbers.int()},
        "position_ids": {"position_ids": positions},
        "collator": {"cu_seq_lens_q": ends, "seq_idx": numbers.int(), "position_ids": positions},
    }


@every_model
@pytest.mark.parametrize("way", ["cu_seq_lens", "seq_idx", "position_ids", "collator"])
def test_packed_sequences_start_anew(name, way):
    """Scan, convolution and attention: logits and the gradient of S0 are those of separate sequences."""
    model = swap_modules(MODELS[name]()).requires_grad_(False)
    states = random_states(model, tasks=2)
    rows, tasks = [tokens(1, n, seed=n)[0] for n in (9, 1, 30, 2)], [1, 0, -1, 1]
    separate = []
    for row, task in zip(rows, tasks, strict=True):
        with states.attached(model, tasks=task):
            separate.append(model(row[None]).logits[0])
    separate = torch.cat(separate)
    separate.log_softmax(-1)[..., 7].sum().backward()
    grads = [states[layer].grad.clone() for layer in states]
    states.zero_grad()
    with states.attached(model, tasks=tasks):
        found = model(torch.cat(rows)[None], **packs([9, 1, 30, 2])[way]).logits[0]
    assert close(found, separate)
    found.log_softmax(-1)[..., 7].sum().backward()
    for layer, grad in zip(states, grads, strict=True):
        assert close(states[layer].grad, grad), layer


@every_family
@torch.no_grad()
def test_two_rows_of_packed_sequences(name):
    model = swap_modules(MODELS[name]())
    random_states(model).attach(model)
    rows = [tokens(1, n, seed=n)[0] for n in (9, 11, 16, 4)]
    ids = torch.stack([torch.cat(rows[:2]), torch.cat(rows[2:])])
    positions = torch.cat(
        [packs([9, 11])["position_ids"]["position_ids"], packs([16, 4])["position_ids"]["position_ids"]]
    )
    found = model(ids, position_ids=positions).logits.flatten(0, 1)
    assert close(found, torch.cat([model(row[None]).logits[0] for row in rows]))


def test_packed_sequences_exclude_masks_and_caches():
    model, ids = swap_modules(qwen()), tokens(1, 9)
    pack = packs([4, 5])["collator"]
    for options in (
        {"attention_mask": torch.ones_like(ids)},
        {"past_key_values": DynamicCache(config=model.config)},
        {"use_cache": True},
    ):
        with pytest.raises(ValueError, match=f"cannot be used with {next(iter(options))}"):
            model(ids, **pack, **options)
    with pytest.raises(ValueError, match="batch must be 1, got 2"):
        model(ids.expand(2, -1), cu_seq_lens_q=pack["cu_seq_lens_q"])
    states = random_states(model, tasks=2)
    with states.attached(model, tasks=[0, 1, 0]), pytest.raises(ValueError, match="tasks names 3 rows"):
        model(ids, **pack)
