"""Training examples: accepted formats, tokenization, refusals; and batches of examples."""

import json
import random

import pytest
import torch
from models import MODELS, close, every_family, tokenizer
from surroundings import ROOT, python

from s0kernels import S0States, swap_modules
from s0kernels.tuning.batches import PackedBatch, PaddedBatch, make_batches
from s0kernels.tuning.data import Example, read_examples

DATASETS = ROOT / ".deps" / "eval"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ hint | default('') }}{% endif %}"
)
TURNS = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


def read(data, tok=None, max_length=2048):
    return read_examples(data, tok or tokenizer(), max_length)


def chatting():
    tok = tokenizer()
    tok.chat_template = TEMPLATE
    return tok


def test_the_same_example_in_every_form(tmp_path):
    tok = tokenizer()
    expected = [Example(tok("Q: 1\nA: 2")["input_ids"], 6)]
    record = {"prompt": "Q: 1\nA", "completion": ": 2", "further": [1, 2]}
    lines = tmp_path / "data.jsonl"
    for form in ([("Q: 1\nA: 2", 6)], (["Q: 1\nA: 2", 6],), [{"text": "Q: 1\nA: 2", "prompt_length": 6}], [record]):
        assert read(form) == expected
        assert read(entry for entry in form) == expected
        lines.write_text("\ufeff\n" + "\n".join(map(json.dumps, form)) + "\n\n")
        assert read(lines) == read(str(lines)) == expected


def merging():
    """A tokenizer that writes "ab" as one token."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(BPE({"x": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_no_token_reaches_from_the_prompt_into_the_completion():
    assert merging()("xabx")["input_ids"] == [0, 3, 0]
    assert read([{"prompt": "xa", "completion": "bx"}], merging()) == [Example([0, 1, 2, 0], 2)]
    assert read([{"prompt": "xab", "completion": "x"}], merging()) == [Example([0, 3, 0], 2)]


def test_longer_examples_are_cut_on_the_right_whatever_the_tokenizer_does():
    tok = tokenizer()
    tok.truncation_side = "left"
    assert read([("abcdef", 2)], tok, max_length=4) == [Example(tok("abcd")["input_ids"], 2)]


def test_conversations():
    tok = chatting()
    whole, prompt = "<user>1+1?\n<assistant>2\n", "<user>1+1?\n<assistant>"
    expected = [Example(tok(whole)["input_ids"], len(prompt))]
    for form in (
        {"messages": TURNS},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"messages": tuple(TURNS), "chat_template_kwargs": None},
    ):
        assert read([form], tok) == expected
    longer = [TURNS[0], TURNS[1], {"role": "user", "content": "and?"}, {"role": "assistant", "content": "so"}]
    (example,) = read([{"messages": longer}], tok)
    assert tok.decode(example.ids[example.prompt_length :]) == "so\n"
    with pytest.raises(ValueError, match=r"data\[0\]: the chat template does not write the prompt in the same way"):
        read([{"messages": TURNS, "chat_template_kwargs": {"hint": "think"}}], tok)
    with pytest.raises(ValueError, match=r"data\[0\]: the tokenizer cannot write the messages as a conversation"):
        read([{"messages": TURNS}])


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ({"prompt": "a"}, ValueError, r"data\[1\] must have prompt and completion.*it has \['prompt'\]"),
        ({1: 2}, ValueError, r"data\[1\] must have prompt and completion"),
        ({"prompt": "a", "completion": 3}, TypeError, r"data\[1\]: prompt and completion must both be.*str and int"),
        ({"prompt": "a", "completion": ""}, ValueError, r"data\[1\] has nothing to predict"),
        ({"text": "ab", "prompt_length": 5}, ValueError, r"data\[1\] has nothing to predict"),
        ({"text": "ab", "prompt_length": "1"}, TypeError, r"data\[1\] must be a pair"),
        ({"messages": "hello"}, TypeError, r"data\[1\]: messages must be a list"),
        ({"messages": []}, TypeError, r"data\[1\]: messages must be a list"),
        ({"messages": TURNS[:1]}, ValueError, r"data\[1\]: the last message must be the assistant's"),
        ({"messages": TURNS[1:]}, ValueError, r"data\[1\]: the last message must be the assistant's, after"),
        ({"messages": [{"role": "user"}, 3]}, TypeError, r"data\[1\]: messages must be a list of mappings"),
        ({"messages": [{}, {"role": "assistant"}]}, ValueError, r"data\[1\]: the tokenizer cannot write the messages"),
        (
            {"prompt": "\ud800", "completion": "b"},
            ValueError,
            r"data\[1\] has a text that the tokenizer does not accept",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}, TURNS[1]]}, ValueError, r"data\[1\] has a text that"),
        (3, TypeError, r"data\[1\] must be a pair .* or a mapping, got int"),
        (("ab", 1, 2), TypeError, r"data\[1\] must be a pair .* or a mapping, got tuple of 3"),
        (
            {"messages": TURNS, "chat_template_kwargs": "abc"},
            TypeError,
            "chat_template_kwargs must be a mapping, got str",
        ),
    ],
)
def test_bad_records_are_named(bad, kind, message):
    tok = chatting()
    tok.chat_template = "{{ messages[0]['role'][0] }}" + TEMPLATE
    with pytest.raises(kind, match=message):
        read([("ab", 1), bad], tok)


def test_text_of_any_alphabet():
    """The text may be split into any tokens, and may be escaped in a file or not."""
    tok = tokenizer()
    for prompt, completion in (("日本", "語です"), ("e\u0301", "\u2028x"), ("😀", "👩‍👩‍👧"), ("\0", "\x7f\n")):
        (example,) = read([{"prompt": prompt, "completion": completion}], tok)
        assert example.ids == tok(prompt + completion)["input_ids"]
        assert example.prompt_length == len(tok(prompt)["input_ids"])


def test_bad_data_and_files_are_named(tmp_path):
    for bad, kind, message in (
        (3, TypeError, "data must be examples or the path of a file, got int"),
        ([], ValueError, "data is empty"),
        (tmp_path / "nothing.jsonl", FileNotFoundError, "nothing.jsonl"),
    ):
        with pytest.raises(kind, match=message):
            read(bad)
    file = tmp_path / "data.jsonl"
    for content, message in (
        (b"\n\n", "data.jsonl is empty"),
        (
            b'["ab", 1]\n{"prompt": x\n',
            r"data\.jsonl:2, column 12: not JSON: Expecting value; the file must be JSON lines[^:]*$",
        ),
        (b'["ab", 1]\n{"prompt":\n', r"data\.jsonl:2, column \d+: a JSON object over several lines; the file must be"),
        (
            b'[\n{"prompt": "a"}\n]',
            r"data\.jsonl:1, column \d: a JSON array over several lines; the file must be JSON lines",
        ),
        (
            b'[{"prompt": "a", "completion": "b"}, {}]',
            r"data\.jsonl:1: a JSON array of 2 examples; the file must be JSON lines",
        ),
        (b'{"text": "a", "prompt_length": 1' + b"0" * 5000 + b"}", r"data\.jsonl:1: not JSON that can be read: "),
        (b'["ab", 1]\n\n["ab", 9]', "data.jsonl:3 has nothing to predict"),
        (b"\xff\xfe", "data.jsonl is not UTF-8"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "data.jsonl:1 has a text that the tokenizer does not accept"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read(file)


@pytest.mark.slow
@pytest.mark.skipif(not DATASETS.is_dir(), reason="datasets is not in .deps/eval; `make test` puts it there")
def test_datasets(tmp_path):
    """With either kind of columns, at once and streamed."""
    code = """
import json
from datasets import load_dataset
from test_data import TURNS, chatting, read
for records in ([{"prompt": "Q: 1", "completion": "A", "id": 3}] * 2, [{"messages": TURNS}] * 2):
    name = f"{len(records[0])}.jsonl"
    open(name, "w").write("\\n".join(map(json.dumps, records)))
    for streaming in (False, True):
        data = load_dataset("json", data_files=name, split="train", streaming=streaming, cache_dir="cache")
        assert read(data, chatting()) == read(records, chatting())
print("read")
"""
    done = python("-c", code, path=DATASETS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "read" in done.stdout


# Batches


def examples(lengths, tasks=1) -> list[Example]:
    numbers = random.Random(0)
    return [
        Example([numbers.randrange(2, 97) for _ in range(n)], numbers.randrange(n), task=i % tasks)
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_batches_keep_to_the_budget(packed):
    model, given = MODELS["qwen"](), examples([5, 30, 2, 9, 9, 50, 3, 21])
    for budget in (1, 20, 47, 64, 4096):
        batches = make_batches(given, budget, packed, model, 0, torch.device("cpu"))
        sizes = []
        for batch in batches:
            assert isinstance(batch, PackedBatch if packed else PaddedBatch)
            rows = [len(example.ids) for example in batch.examples]
            sizes.append(sum(rows) if packed else len(rows) * max(rows))
            assert sizes[-1] <= budget or len(rows) == 1
        assert sorted(tuple(e.ids) for batch in batches for e in batch.examples) == sorted(tuple(e.ids) for e in given)
        if packed and budget == 4096:
            assert sizes == [sum(len(e.ids) for e in given)]


@every_family
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("budget", [4096, 60])
def test_losses_and_gradients_are_those_of_one_example_at_a_time(name, packed, budget):
    """They do not depend on the batches, with any task of each example."""
    model = swap_modules(MODELS[name]()).requires_grad_(False)
    given = examples([5, 30, 2, 9, 13, 50], tasks=2)

    def run(batches):
        states = S0States.for_model(model, 2)
        generator = torch.Generator().manual_seed(3)
        for layer in states:
            states[layer].data.normal_(generator=generator)
        total = torch.zeros(2)
        for batch in batches:
            with states.attached(model, tasks=batch.tasks):
                losses = batch.losses(model, 2)
                (losses * torch.tensor([1.0, 2.0])).sum().backward()
            total += losses.detach()
        return total, [state.grad for state in states.parameters()]

    single, truth = run([b for e in given for b in make_batches([e], 1, False, model, 0, torch.device("cpu"))])
    found, grads = run(make_batches(given, budget, packed, model, 0, torch.device("cpu")))
    assert close(found, single)
    for a, b in zip(grads, truth, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_packed_where_attention_allows_it(monkeypatch):
    """Examples are packed by default if attention works on each sequence separately, and on request if a mask separates
    them."""
    model, given = MODELS["qwen"](), examples([5, 9])

    def kind(attention, packed):
        monkeypatch.setattr(model.config, "_attn_implementation", attention)
        return {type(batch) for batch in make_batches(given, 99, packed, model, 0, torch.device("cpu"))}

    for attention in ("eager", "sdpa"):
        assert kind(attention, None) == {PaddedBatch}
        assert kind(attention, True) == {PackedBatch}
    for attention in ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn3"):
        assert kind(attention, None) == {PackedBatch}
        assert kind(attention, False) == {PaddedBatch}
    with pytest.raises(TypeError, match="packed must be True, False or None, got 'no'"):
        kind("sdpa", "no")
    with pytest.raises(ValueError, match=r"packed examples need attention that separates them.*'paged\|other'"):
        kind("paged|other", True)
