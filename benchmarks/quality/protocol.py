"""The protocol that every method goes through, and the statistics of its results.

Sample from the frozen base, run what it wrote, keep at most one verified solution per tuning problem, tune on those,
and answer the held-out problems greedily, for each of several seeds. Seeds, split, sampling and test are those of the
method's paper (arXiv 2604.01168); a seed decides what is sampled, and with it everything that follows.
"""

import hashlib
import json
import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev

import torch
from tasks import Item, Task
from torch import nn
from tqdm import tqdm

from s0kernels import S0States, S0Trainer
from s0kernels.bench.measure import write_json

SEEDS = (42, 7, 123, 1337, 999, 314, 256, 777, 555, 2024)
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0}


@dataclass
class Base:
    """A model, whose weights get no gradient, and the problems it is tuned and tested on."""

    name: str
    trainer: S0Trainer
    task: Task
    tune: Sequence[Item]
    heldout: Sequence[Item]
    rows: int = 256  # sequences generated at a time

    @property
    def arch(self) -> str:
        return S0States.for_model(self.model).arch

    @property
    def pad(self) -> int:
        return self.trainer.pad_token_id

    @property
    def model(self) -> nn.Module:
        return self.trainer.model

    @property
    def tokenizer(self):
        return self.trainer.tokenizer


@torch.no_grad()
def complete(base: Base, model: nn.Module, items: Sequence[Item], label: str, padded: bool = True, **options) -> list:
    """The completions of each item, as many as `num_return_sequences` asks for. `model` may wrap the base's own.

    `padded=False` puts only prompts of one length into a batch, for models that cannot have pads.
    """
    each = options.get("num_return_sequences", 1)
    size = max(1, base.rows // each)
    encoded = [base.tokenizer(item.prompt)["input_ids"] for item in items]
    order = sorted(range(len(items)), key=lambda i: len(encoded[i]))
    groups = [list(same) for _, same in groupby(order, lambda i: 0 if padded else len(encoded[i]))]
    batches = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
    found: list[list[str]] = [[] for _ in items]
    for batch in tqdm(batches, desc=label, unit="batch", leave=False):
        width = max(len(encoded[i]) for i in batch)
        ids = torch.tensor([[base.pad] * (width - len(encoded[i])) + encoded[i] for i in batch])
        mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in batch])
        made = model.generate(
            input_ids=ids.to(base.trainer.device),
            attention_mask=mask.to(base.trainer.device),
            max_new_tokens=base.task.max_new_tokens,
            pad_token_id=base.pad,
            **options,
        )
        texts = base.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        texts = [cut(text, base.task.stop) for text in texts]
        for place, i in enumerate(batch):
            found[i] = texts[place * each : (place + 1) * each]
    return found


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the stop strings."""
    ends = [place for place in (text.find(mark) for mark in stop) if place >= 0]
    return text[: min(ends)] if ends else text


def judge(base: Base, items: Sequence[Item], completions: Sequence[Sequence[str]]) -> list[list[bool]]:
    """Which completions are right; each distinct one is scored once."""
    pairs = list({(i, text): None for i, texts in enumerate(completions) for text in texts})
    verdicts = {(i, text): base.task.right(items[i], text) for i, text in pairs}
    return [[verdicts[i, text] for text in texts] for i, texts in enumerate(completions)]


def solutions(base: Base, seed: int, samples: int | None = None) -> list[tuple[str, str]]:
    """(prompt, completion) of at most one verified solution per tuning problem, the first of its samples that passed
    (as many as the task says, if None), in an order that the seed decides: what a run takes is the beginning."""
    torch.manual_seed(seed)
    each = base.task.samples if samples is None else samples
    texts = complete(base, base.model, base.tune, f"sample, seed {seed}", num_return_sequences=each, **SAMPLING)
    passed = judge(base, base.tune, texts)
    pairs = [
        (item.prompt, found[good.index(True)])
        for item, found, good in zip(base.tune, texts, passed, strict=True)
        if any(good)
    ]
    if not pairs:
        raise RuntimeError(f"{base.name}: of {each} samples for each of {len(base.tune)} problems none is right")
    random.Random(seed).shuffle(pairs)
    return pairs


def as_chat(tokenizer, items: Sequence[Item]) -> list[Item]:
    """With prompts as the tokenizer's template has a user say them, and no thinking where it can be turned off."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template; give the task style=complete")
    bos = tokenizer.bos_token or ""
    twice = bos and tokenizer(bos)["input_ids"].count(tokenizer.bos_token_id) > 1  # tokenizing puts one in front
    found = []
    for item in items:
        turn = [{"role": "user", "content": item.prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        found.append(replace(item, prompt=text.removeprefix(bos) if twice else text))
    return found


def examples(base: Base, pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """What the trainer takes. Apart, because a token of the whole text may reach across their border."""
    return [{"prompt": prompt, "completion": text + base.tokenizer.eos_token} for prompt, text in pairs]


def evaluate(base: Base, model: nn.Module, items: Sequence[Item], label: str, padded: bool = True) -> dict:
    """Greedy completions of the problems, and which of them are right."""
    texts = complete(base, model, items, label, padded, do_sample=False)
    passed = [row[0] for row in judge(base, items, texts)]
    return {
        "pass@1": sum(passed) / len(passed),
        "passed": "".join("01"[ok] for ok in passed),
        "completions": [row[0] for row in texts],
    }


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that at least one of k samples, drawn from `samples` of which `right` are right, is right.

    The unbiased estimator of Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374), eq. 1.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass_at_k: right and k must lie within the samples, got {right=}, {k=}, {samples=}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


@dataclass(frozen=True)
class Comparison:
    """Means and standard deviations over seeds, in the unit of the values, and a two-sided Welch's t-test."""

    mean: float
    deviation: float
    delta: float
    p: float | None  # None where neither side varies, and so no test says anything


def compare(values: Sequence[float], others: Sequence[float]) -> Comparison:
    """`values` against `others`, each the results of independent runs."""
    from scipy import stats

    mean, other = fmean(values), fmean(others)
    spread = [deviation(side) for side in (values, others)]
    p = None
    if len(values) > 1 and len(others) > 1 and max(spread) > 0:
        with warnings.catch_warnings():  # one side may be the base, whose greedy answers are the same for every seed
            warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
            p = float(stats.ttest_ind(values, others, equal_var=False).pvalue)
    return Comparison(mean, spread[0], mean - other, p)


def deviation(values: Sequence[float]) -> float:
    """Of a sample; 0 where it is a single value."""
    return stdev(values) if len(values) > 1 else 0.0


class Results:
    """A JSON file of an experiment's cells, replaced whole after each, so that an interrupted run goes on from there.

    `settings` is what the cells depend on; a file made with others is refused.
    """

    def __init__(self, file: Path, settings: Mapping, about: Mapping):
        self.file = file
        self.content = {"settings": json.loads(json.dumps(settings)), **about, "cells": {}}
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found.get("settings") != self.content["settings"]:
                raise ValueError(
                    f"{file} was made with {found.get('settings')}, not with {self.content['settings']}; "
                    "name another --output or remove it"
                )
            self.content = found

    @property
    def cells(self) -> dict[str, dict]:
        return self.content["cells"]

    def put(self, key: str, value: dict) -> None:
        self.cells[key] = value
        self.save()

    def spent(self, seconds: float) -> None:
        """Adds to the time that the cells took, over all starts."""
        self.content["seconds"] = self.content.get("seconds", 0.0) + seconds
        if self.cells:
            self.save()

    def save(self) -> None:
        write_json(self.file, self.content)

    def get(self, key: str, make: Callable[[], dict]) -> dict:
        if key not in self.cells:
            self.put(key, make())
        return self.cells[key]


def fingerprint(pairs: Sequence) -> str:
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]
