"""The problems of the tiny models, which are made by a script; answers run in the sandbox."""

from collections.abc import Sequence

from problems import SPLITS, Problem, make_problems
from sandbox import Job, verify

from .task import Item, Task


class Tiny(Task):
    name = "tiny"
    max_new_tokens = 40

    def load(self) -> tuple[list[Item], list[Item]]:
        tune, heldout = ([item(problem) for problem in make_problems(split)] for split in SPLITS)
        return tune, heldout

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[bool]:
        jobs = []
        for one, text in zip(items, completions, strict=True):
            problem = one.data["problem"]
            jobs.append(Job(one.prompt + text + "\n", problem.name, list(problem.inputs), list(problem.expected)))
        return [verdict.passed for verdict in verify(jobs)]


def item(problem: Problem) -> Item:
    return Item(problem.key, problem.prompt, problem.solution, {"problem": problem})
