"""The protocol for all methods, and the statistics of the results.

For each of several seeds: sample from the frozen base, run its answers, keep at most one verified solution per tuning
problem, tune on these, and answer the held-out problems greedily. Seeds, split, sampling and test are those of the
method's paper (arXiv 2604.01168). A seed decides the samples, and thereby all that follows.
"""

import hashlib
import json
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev

from tasks import Item, Task
from torch import nn

from s0kernels import S0States, S0Trainer
from s0kernels.bench.measure import write_json
from s0kernels.tuning.chat import end_token
from s0kernels.tuning.deciding import Work
from s0kernels.tuning.evaluation import evaluate as evaluate_runs
from s0kernels.tuning.problems import Problem, chats, read_problems
from s0kernels.tuning.sampling import Sampler, end_tokens
from s0kernels.tuning.settings import Sampling

SEEDS = (42, 7, 123, 1337, 999, 314, 256, 777, 555, 2024)
MOST = 50  # solutions that an experiment may ask for, if the task uses fewer


@dataclass
class Base:
    """A model, whose weights get no gradient, and the problems for tuning and testing."""

    name: str
    trainer: S0Trainer
    task: Task
    tune: Sequence[Item]
    heldout: Sequence[Item]
    rows: int = 256  # number of sequences in a batch

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

    def problem(self, item: Item) -> dict:
        """Return the item as a problem for the trainer."""
        asked = {"messages": [{"role": "user", "content": item.prompt}]} if self.task.chat else {"prompt": item.prompt}
        return {"id": item.name, **asked}

    def read(self, items: Sequence[Item]) -> list[Problem]:
        """Return the items as problems, with the prompts that the model reads."""
        return read_problems([self.problem(item) for item in items], self.tokenizer)

    def check(self, problem: Mapping, answer: str) -> bool:
        return self.task.right(self._items[problem["id"]], answer)

    @cached_property
    def _items(self) -> dict[str, Item]:
        return {item.name: item for item in (*self.tune, *self.heldout)}


def solutions(base: Base, seed: int) -> list[dict]:
    """Return verified solutions of the tuning problems, at most one each, for training. The seed decides their order,
    and a run uses the first ones."""
    items = random.Random(seed).sample(list(base.tune), len(base.tune))
    return base.trainer.collect(
        [base.problem(item) for item in items],
        base.check,
        samples=base.task.samples,
        solutions=max(base.task.solutions, MOST),
        max_new_tokens=base.task.max_new_tokens,
        stop=base.task.stop,
        seed=seed,
        rows=base.rows,
    )


def answers(base: Base, model: nn.Module, items: Sequence[Item], label: str, padded: bool, **options) -> list[dict]:
    """Return for each item its "answers", and which of them are "right". `model` may wrap the base's model, and starts
    from the attached states. Without options of sampling it answers greedily.

    `padded=False` puts only prompts of one length into a batch, for models that cannot have pads.
    """
    given = {"samples": 1, "greedy": True, **options}
    sampling = Sampling(max_new_tokens=base.task.max_new_tokens, stop=base.task.stop, **given)
    problems = base.read(items)
    ends = [end_token(messages, None, base.name, base.tokenizer) for messages in chats(problems)[:1]]
    source = Sampler(model, base.tokenizer, sampling, end_tokens(base.model, base.tokenizer, ends), base.pad, padded)
    work = Work(problems, base.check, sampling, {}, base.rows, base.trainer.device, None, True)
    found = evaluate_runs(work, source, {label: nullcontext})[label]
    return [found[problem.key] for problem in problems]


def evaluate(base: Base, model: nn.Module, items: Sequence[Item], label: str, padded: bool = True) -> dict:
    """Return greedy completions of the problems, and which of them are right."""
    found = answers(base, model, items, label, padded)
    passed = [entry["right"][0] for entry in found]
    return {
        "pass@1": sum(passed) / len(passed),
        "passed": "".join("01"[ok] for ok in passed),
        "completions": [entry["answers"][0] for entry in found],
    }


@dataclass(frozen=True)
class Comparison:
    """Means and standard deviations over seeds, in the unit of the values, and a two-sided Welch's t-test."""

    mean: float
    deviation: float
    delta: float
    p: float | None  # None if neither side varies, so that there is no test


def compare(values: Sequence[float], others: Sequence[float]) -> Comparison:
    """Compare `values` with `others`. Each holds the results of independent runs."""
    from scipy import stats

    mean, other = fmean(values), fmean(others)
    spread = [deviation(side) for side in (values, others)]
    p = None
    if len(values) > 1 and len(others) > 1 and max(spread) > 0:
        with warnings.catch_warnings():  # one side may be the base, which has the same greedy answers for every seed
            warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
            p = float(stats.ttest_ind(values, others, equal_var=False).pvalue)
    return Comparison(mean, spread[0], mean - other, p)


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


class Results:
    """A JSON file of the cells of an experiment. It is replaced as a whole after each cell, so that an interrupted run
    resumes.

    The cells depend on `settings`; a file made with other settings is refused.
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
        """Add to the total time of the cells, over all runs."""
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
