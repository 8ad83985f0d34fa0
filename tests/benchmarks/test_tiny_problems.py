"""The tiny problems, and the two checkpoints made from them."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import runpy
import sys
from pathlib import Path

import pytest

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
sys.path.insert(0, str(TINY))

tiny = importlib.import_module("problems")

ARCHITECTURES = ("qwen3_5", "falcon_h1")
CORPUS = 60_000  # the default size and seed of train.py


@pytest.fixture
def passes(tmp_path):
    """Whether a body made by the generator (never by a model) passes its problem's tests."""
    file = tmp_path / "attempt.py"

    def run(problem, body: str) -> bool:
        file.write_text(problem.prompt + body + "\n")
        function = runpy.run_path(str(file))[problem.name]
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                return all(
                    function(*arguments) == expected
                    for arguments, expected in zip(problem.inputs, problem.expected, strict=True)
                )
            except (TypeError, ValueError, IndexError):
                return False

    return run


@pytest.mark.parametrize("seed", [tiny.DEFAULT_SEED, 1, 2, 3])
@pytest.mark.parametrize("split", tiny.SPLITS)
def test_only_the_right_habit_passes(split, seed, passes):
    for problem in tiny.make_problems(split, seed):
        assert set(problem.bodies) == set(tiny.HABITS)
        for habit, body in problem.bodies.items():
            assert passes(problem, body) == (habit == "right"), (habit, problem)


def test_problems_repeat_with_their_seed():
    for split in tiny.SPLITS:
        assert tiny.make_problems(split, 5) == tiny.make_problems(split, 5)
        assert tiny.make_problems(split, 5) != tiny.make_problems(split, 6)
    assert list(tiny.corpus(50, 5)) == list(tiny.corpus(50, 5))
    assert list(tiny.corpus(50, 5)) != list(tiny.corpus(50, 6))
    with pytest.raises(ValueError, match="split"):
        tiny.make_problems("test")


def test_splits_are_balanced_and_disjoint():
    tune, heldout = (tiny.make_problems(split) for split in tiny.SPLITS)
    assert len(tune) == len(heldout) == tiny.PER_FAMILY * len(tiny.FAMILIES) == 84
    keys = [problem.key for problem in tune + heldout]
    assert len(set(keys)) == len(keys)
    first = {problem.family for problem in tune[: len(tiny.FAMILIES)]}
    assert first == {family.name for family in tiny.FAMILIES}


def test_corpus_contains_no_problem():
    problems = [problem for split in tiny.SPLITS for problem in tiny.make_problems(split)]
    pairs = list(tiny.corpus(CORPUS))
    assert len(pairs) == CORPUS
    assert not {prompt for prompt, _ in pairs} & {problem.prompt for problem in problems}
    # The docstring alone, under any function name and opening verb, would reveal a problem.
    wordings = {prompt.split('"""')[1].split(" ", 1)[1] for prompt, _ in pairs}
    assert not wordings & {problem.prompt.split('"""')[1].split(" ", 1)[1] for problem in problems}
    solutions = {body for problem in problems for habit, body in problem.bodies.items() if habit != "mistake"}
    assert not solutions & {body for _, body in pairs}


def test_habits_compete_in_the_corpus():
    weights = [tiny.habit_weights(family.name, verb) for family in tiny.FAMILIES for verb in tiny.OPENERS]
    favourites = {max(share, key=share.get) for share in weights}
    assert favourites == {"right", "print", "assign", "mistake"}
    for share in weights:
        assert sum(share.values()) == pytest.approx(1)
        assert share["right"] > 0.15


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request):
    pytest.importorskip("transformers")
    return TINY / request.param


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


def test_checkpoint_is_small(checkpoint):
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) <= 3_000_000


def test_tokenizer_returns_any_text(tokenizer):
    texts = [prompt + body for prompt, body in tiny.corpus(500, seed=9)]
    texts += ["def f(a):\n\treturn  {a: 'é'}\n\n", "   three blanks\r\n     five ", "x_1=10**9;日本語 <pad", ""]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_prompt_ends_on_a_token_boundary(tokenizer):
    for split in tiny.SPLITS:
        for problem in tiny.make_problems(split):
            prompt = tokenizer(problem.prompt)["input_ids"]
            for body in problem.bodies.values():
                full = tokenizer(problem.prompt + body + tokenizer.eos_token)["input_ids"]
                assert full == prompt + tokenizer(body)["input_ids"] + [tokenizer.eos_token_id]


def test_tokenizer_and_configs_agree(checkpoint, tokenizer):
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id is not None
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    for name in ("config.json", "generation_config.json"):
        config = json.loads((checkpoint / name).read_text())
        assert config["eos_token_id"] == tokenizer.eos_token_id
        assert config["pad_token_id"] == tokenizer.pad_token_id


def test_checkpoint_loads(checkpoint, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.vocab_size == len(tokenizer)
    assert next(model.parameters()).isfinite().all()
    prompts = [problem.prompt for problem in tiny.make_problems("heldout")[:4]]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def test_initial_states_survive_the_prompt(checkpoint):
    """S0 has an effect only if some heads still remember it after a prompt of about 40 tokens."""
    from safetensors.torch import load_file
    from torch.nn.functional import softplus

    weights = load_file(checkpoint / "model.safetensors")
    names = [name for name in weights if name.endswith("A_log")]
    assert names
    for name in names:
        rate = weights[name].float().exp() * softplus(weights[name.replace("A_log", "dt_bias")].float())
        assert (-40 * rate).exp().max() > 0.2
