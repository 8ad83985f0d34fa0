"""Count the problems that the model solves without S0 and with S0, by the same checker."""

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from s0kernels.progress import Progress
from s0kernels.states import S0States
from s0kernels.tuning.deciding import Chunks, Entries, Source, Work, decide, open_journal, verdict
from s0kernels.tuning.problems import Problem
from s0kernels.tuning.processes import Processes
from s0kernels.tuning.verify.checkers import Checker

#: from the name of a run to the context in which its states are attached
Runs = Mapping[str, Callable[[], AbstractContextManager]]
#: quantile of the standard normal distribution for 95 % intervals
_Z = 1.959964


@dataclass(frozen=True)
class Evaluation:
    """The result of `S0Trainer.evaluate` with a checker."""

    #: one dict per problem: its id, and the share of correct samples, from 0 to 1: {"id", "base", "s0"}
    rows: list[dict[str, Any]]
    #: one dict per problem: its id, and the answers: {"id", "base": texts, "s0": texts}
    answers: list[dict[str, Any]]
    #: number of answers per problem: one is greedy, several are sampled
    samples: int
    #: the factor that multiplied S0; None, like `s0`, if there were no states
    alpha: float | None

    @property
    def base(self) -> float:
        """The share of correct answers of the base, averaged over problems: pass@1."""
        return _mean([row["base"] for row in self.rows])

    @property
    def s0(self) -> float | None:
        return None if self.alpha is None else _mean([row["s0"] for row in self.rows])

    @property
    def pass_at_k(self) -> dict[int, dict[str, float | None]]:
        """For each k from 1 to the number of samples: the chance that one of k samples is correct, {"base", "s0"}."""
        ks = range(1, self.samples + 1)
        return {k: {side: self._pass_at(k, side) for side in ("base", "s0")} for k in ks}

    def _pass_at(self, k: int, side: str) -> float | None:
        if side == "s0" and self.alpha is None:
            return None
        return _mean([pass_at_k(self.samples, round(row[side] * self.samples), k) for row in self.rows])

    @property
    def changed(self) -> dict[str, list[Any]]:
        """The ids of the problems that S0 solves more often than the base ("solved"), and less often ("lost")."""
        pairs = [] if self.alpha is None else [(row["id"], row["s0"] - row["base"]) for row in self.rows]
        return {"solved": [x for x, change in pairs if change > 0], "lost": [x for x, change in pairs if change < 0]}

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as a dict for JSON."""
        found = {"problems": len(self.rows), "samples": self.samples, "alpha": self.alpha}
        found |= {"base": self.base, "s0": self.s0, "changed": self.changed, "pass_at_k": self.pass_at_k}
        return {**found, "rows": self.rows}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return a head and rows of cells: pass@1, and pass@k for k up to the number of samples, with 95 %
        intervals."""
        ks = [k for k in (1, 5, 10, 100) if k <= self.samples]
        sides = {"base": "base", **({} if self.alpha is None else {"s0": f"S0, alpha {self.alpha:g}"})}
        rows = [[label, *(self._cell(side, k) for k in ks)] for side, label in sides.items()]
        return [f"{len(self.rows)} problems", *(f"pass@{k}" for k in ks)], rows

    def __str__(self) -> str:
        head, rows = self.table()
        return f"pass@1 of {head[0]}: {', '.join(f'{label} {share}' for label, share, *_ in rows)}"

    def _cell(self, side: str, k: int) -> str:
        share = self._pass_at(k, side)
        assert share is not None
        low, high = interval(share, len(self.rows))
        return f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"

    def notes(self) -> list[str]:
        """Return the lines below the table: the problems that changed, and the p-value of a sign test."""
        if self.alpha is None:
            return []
        solved, lost = self.changed["solved"], self.changed["lost"]
        chance = sign_test(len(solved), len(lost))
        return [
            f"S0 solves {len(solved)} more: {', '.join(map(str, solved)) or 'none'}",
            f"S0 loses {len(lost)}: {', '.join(map(str, lost)) or 'none'}",
            f"the p-value of this difference is {chance:.2g} (two-sided sign test)",
        ]


def evaluate(work: Work, source: Source, runs: Runs) -> dict[str, Entries]:
    """Return the entries of each run, by its name. See `S0Trainer.evaluate`."""
    main = Processes().is_main
    journal = open_journal(work.out, {"what": "evaluate", **work.sampling.settings(), **work.settings})
    found: dict[str, Entries] = {}
    for name, attached in runs.items():
        shown = work.progress and main
        what = f"evaluating {name.partition(' (')[0]}"
        with Progress(what, len(work.problems), "problem", shown=shown) as bar:

            def tell(entries: Entries, bar: Progress = bar) -> None:
                share = _mean([_share(entry) for entry in entries.values()]) if entries else 0.0
                bar.reach(len(entries), f"{100 * share:.1f} % right")

            plan = work.plan(name, _all, lambda entries: len(entries) == len(work.problems), tell)
            with attached():
                found[name] = decide(work.problems, source, journal, plan)
    return found


def evaluation(
    problems: Sequence[Problem], samples: int, alpha: float | None, base: Entries, s0: Entries | None
) -> Evaluation:
    rows, answers = [], []
    for problem in problems:
        sides = {"base": base[problem.key], "s0": None if s0 is None else s0[problem.key]}
        rows.append({"id": problem.id, **{side: x if x is None else _share(x) for side, x in sides.items()}})
        answers.append({"id": problem.id, **{side: x if x is None else x["answers"] for side, x in sides.items()}})
    return Evaluation(rows, answers, samples, alpha)


def _all(check: Checker, problem: Problem, chunks: Chunks) -> dict[str, Any]:
    answers = [completion.text for completion in itertools.chain.from_iterable(chunks)]
    verdicts = {text: verdict(check, problem, text) for text in dict.fromkeys(answers)}
    return {"answers": answers, "right": [verdicts[text] for text in answers]}


def _share(entry: Mapping[str, Any]) -> float:
    return sum(entry["right"]) / len(entry["right"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the chance that at least one of k samples is correct, if `right` of all `samples` are correct.

    The unbiased estimator of Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374), eq. 1.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass_at_k: right and k must lie within the samples, got {right=}, {k=}, {samples=}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def interval(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of `count` problems."""
    spread = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    low, high = ((share + _Z**2 / (2 * count) + sign * spread) / (1 + _Z**2 / count) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def sign_test(more: int, less: int) -> float:
    """Return the two-sided p-value of a sign test: the chance of a split at least as uneven as `more` to `less`, if
    each change is equally likely to be either."""
    count, least = more + less, min(more, less)
    return min(1.0, 2 * sum(math.comb(count, i) for i in range(least + 1)) / 2**count)


def digest(states: S0States, task: str | None) -> str:
    """Return a hash of the states of a task, by which a file identifies them."""
    index = 0 if task is None else list(states.names or ()).index(task)
    found = hashlib.sha256()
    for layer in states:
        found.update(states[layer].detach()[index].cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
