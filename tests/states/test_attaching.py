"""The states that a forward starts from: a task per row, threads, contexts, packed sequences."""

import asyncio
import inspect
import threading

import pytest
import torch
from models import (
    CANNOT_PACK,
    MODELS,
    PAD,
    VOCABULARY,
    cached,
    close,
    every_family,
    every_model,
    named,
    padded,
    qwen,
    ragged,
    random_states,
    tokens,
)
from transformers import DataCollatorWithFlattening, DynamicCache

from s0kernels import restore_modules, swap_modules, swap_report
from s0kernels.modules.injection import BindStates, RefusePacked
from s0kernels.modules.mixer import S0Mixer
from s0kernels.modules.swap import find_site


@every_model
def test_states_are_bound_by_the_decoder_whose_arguments_are_known(name):
    model = swap_modules(MODELS[name]())
    mixers = [module for module in model.modules() if isinstance(module, S0Mixer)]
    (decoder,) = (m for m in model.modules() if any(isinstance(h, BindStates) for h in m._forward_pre_hooks.values()))
    assert [m for m in decoder.layers.modules() if isinstance(m, S0Mixer)] == mixers
    arguments = find_site(model).arguments
    assert tuple(inspect.signature(decoder.forward).parameters)[: len(arguments.decoder)] == arguments.decoder
    assert {"input_ids", "inputs_embeds", arguments.cache} < set(arguments.decoder)


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
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_tasks_follow_beams(name, options):
    """The tokens of a padded batch are those of one prompt at a time."""
    model = swap_modules(MODELS[name]())
    states, rows, tasks = random_states(model, tasks=2), ragged(), [1, 0, -1, 1]
    ids, mask = padded(rows, "left")
    call = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, **options}
    with states.attached(model, tasks=tasks):
        together = model.generate(ids, attention_mask=mask, **call)[:, ids.shape[1] :].chunk(len(rows))
    for row, task, found in zip(rows, tasks, together, strict=True):
        with states.attached(model, tasks=task):
            alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **call)[:, len(row) :]
        assert torch.equal(found[:, : alone.shape[1]], alone)


@every_family
@torch.no_grad()
def test_tasks_follow_sampled_sequences(name):
    """The first tokens of several sequences per prompt are drawn from the distribution of the prompt's task."""
    model = swap_modules(MODELS[name]())
    states, (ids, mask) = random_states(model, tasks=2), padded(ragged()[:2], "left")
    call = {"max_new_tokens": 1, "do_sample": True, "top_k": 0, "num_return_sequences": 3, "pad_token_id": PAD}
    call |= {"attention_mask": mask, "output_scores": True, "return_dict_in_generate": True}

    def scores(tasks):
        with states.attached(model, tasks=tasks):
            return model.generate(ids, **call).scores[0].view(2, 3, -1)

    found, alone = scores([1, 0]), [scores(0), scores(1)]
    assert not close(alone[0], alone[1], 0.01)
    assert close(found[0], alone[1][0])
    assert close(found[1], alone[0][1])


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
        model(ids.repeat_interleave(2, 0))  # like generate does
    for i, task in enumerate([1, 0]):
        with states.attached(model, tasks=task):
            alone = model.generate(ids[i : i + 1], **call)
        assert torch.equal(together[i, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("name", ["falcon", "qwen_multimodal"])
def test_a_mismatch_is_an_error_for_embeddings_too(name):
    """The decoder of the multimodal class gets embeddings, not token ids."""
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
    second.detach()  # these are not attached, so there is nothing to undo
    assert torch.equal(logits(), attached)
    first.detach()
    assert torch.equal(logits(), zero)


@every_family
def test_two_threads_with_two_tasks_do_not_meet(name):
    """Two threads use one model at the same time. Each generates the tokens and gets the gradient of its own task."""
    model, ids = swap_modules(MODELS[name]()).requires_grad_(False), tokens(1, 12)
    call = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}

    def work(states):
        generated = model.generate(ids, **call)
        states.zero_grad()
        model(ids, use_cache=False).logits.log_softmax(-1)[..., 7].sum().backward()
        return [generated, *(state.grad for state in states.parameters())]

    tasks, truth = [random_states(model, seed=seed, size=1.0) for seed in (1, 2)], []
    for states in tasks:
        with states.attached(model):
            truth.append([tensor.clone() for tensor in work(states)])
    assert not torch.equal(truth[0][0], truth[1][0])
    barrier, found = threading.Barrier(2), [[], []]

    def run(number):
        with tasks[number].attached(model):
            for _ in range(8):
                barrier.wait(60)
                found[number].append([tensor.clone() for tensor in work(tasks[number])])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert len(found[number]) == 8
        assert all(torch.equal(a, b) for once in found[number] for a, b in zip(once, truth[number], strict=True))


@every_family
@torch.no_grad()
def test_tasks_of_an_event_loop_do_not_meet(name):
    model, ids = swap_modules(MODELS[name]()), tokens(1, 12)
    states = random_states(model, tasks=2)

    async def run(task):
        found = []
        with states.attached(model, tasks=task):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(model(ids).logits)
        return found

    async def both():
        return await asyncio.gather(run(0), run(1))

    for task, found in enumerate(asyncio.run(both())):
        with states.attached(model, tasks=task):
            assert all(torch.equal(logits, model(ids).logits) for logits in found)


@torch.no_grad()
def test_attached_may_end_in_any_order():
    """Generators may end in any order. Of the remaining ones, the one that began last takes precedence."""
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


def packs(lengths: list[int]) -> dict[str, dict]:
    """Return every way to give the boundaries of sequences in one row."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    numbers = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    return {
        "cu_seq_lens": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
        "seq_idx": {"seq_idx": numbers.int()},
        "position_ids": {"position_ids": positions},
        "collator": {"cu_seq_lens_q": ends, "seq_idx": numbers.int(), "position_ids": positions},
    }


every_way = pytest.mark.parametrize("way", ["cu_seq_lens", "seq_idx", "position_ids", "collator"])


@every_way
@named(sorted(set(MODELS) - set(CANNOT_PACK)))
def test_packed_sequences_start_anew(name, way):
    """Scan, convolution and attention restart: logits and the gradient of S0 are those of separate sequences."""
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


@every_way
@named(CANNOT_PACK)
@torch.no_grad()
def test_packed_sequences_are_refused(name, way):
    """They are refused if a module of the model mixes them, with the reason, also in the report, and only while it is
    there."""
    model, pack = swap_modules(MODELS[name]()), packs([9, 12])[way]
    ids, other = tokens(1, 21), tokens(1, 21, seed=1)
    other[:, 9:] = ids[:, 9:]
    with pytest.raises(ValueError, match=f"packed sequences .* cannot go through {CANNOT_PACK[name]}; pad them"):
        model(ids, **pack)
    assert CANNOT_PACK[name] in str(swap_report(model))
    assert model(ids, position_ids=torch.arange(21)[None]).logits.shape == (1, 21, VOCABULARY)
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, RefusePacked)]:
            del module._forward_pre_hooks[key]
    assert not close(model(ids, **pack).logits[:, 9:], model(other, **pack).logits[:, 9:])
    restored = restore_modules(swap_modules(MODELS[name]()))
    assert not any(m._forward_pre_hooks for m in restored.modules())


@every_family
@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}], ids=str)
def test_what_the_collator_of_transformers_packs(name, options):
    """Logits and loss, with the labels of the collator, are those of separate sequences."""
    model = swap_modules(MODELS[name]()).requires_grad_(False)
    rows = [tokens(1, n, seed=n)[0] for n in (9, 2, 30)]
    batch = DataCollatorWithFlattening(**options)([{"input_ids": row.tolist()} for row in rows])
    with random_states(model).attached(model):
        separate = [model(row[None], labels=row[None]) for row in rows]
        found = model(**batch, use_cache=False)
    assert close(found.logits[0], torch.cat([output.logits[0] for output in separate]))
    counts = torch.tensor([len(row) - 1.0 for row in rows])
    assert close(found.loss, (counts * torch.stack([output.loss for output in separate])).sum() / counts.sum())


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
        cached(model, DynamicCache(config=model.config)),
        {"use_cache": True},
    ):
        with pytest.raises(ValueError, match=f"cannot be used with {next(iter(options))}"):
            model(ids, **pack, **options)
    with pytest.raises(ValueError, match="batch must be 1, got 2"):
        model(ids.expand(2, -1), cu_seq_lens_q=pack["cu_seq_lens_q"])
    states = random_states(model, tasks=2)
    with states.attached(model, tasks=[0, 1, 0]), pytest.raises(ValueError, match="tasks names 3 rows"):
        model(ids, **pack)


def test_what_a_fused_optimizer_changes_is_seen():
    """It does not change the version of a parameter. Before and after training the states are frozen."""
    model, ids = swap_modules(MODELS["qwen"]()), tokens(2, 12)
    states = random_states(model).requires_grad_(False)
    states.attach(model, 0.5)
    with torch.no_grad():
        before = model(ids).logits
    optimizer = torch.optim.Adam(states.requires_grad_(True).parameters(), lr=0.5, fused=True)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(ids).logits
        states.requires_grad_(False)
        frozen = model(ids).logits
        states.attach(model, 0.5)
        assert torch.equal(model(ids).logits, after)
    assert torch.equal(frozen, after)
    assert not close(after, before, 1e-2)
