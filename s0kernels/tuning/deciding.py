"""Divide problems among processes, answer them in batches, and judge one batch while the next is being sampled."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from s0kernels.tuning.journal import Journal
from s0kernels.tuning.problems import Problem
from s0kernels.tuning.processes import Processes
from s0kernels.tuning.sampling import Completion, Row
from s0kernels.tuning.settings import Sampling
from s0kernels.tuning.verify.checkers import Checker

#: entries of a journal, by the key of the problem
Entries = dict[str, dict[str, Any]]
Chunks = Iterable[Sequence[Completion]]


class Source(Protocol):
    """A model or server that makes completions."""

    def rows(self, longest: int, asked: int | None, device: torch.device) -> int:
        """Return the number of samples in a batch, for prompts of at most `longest` tokens."""
        ...

    def sample(self, rows: Sequence[Row]) -> list[Completion]: ...


class Plan(NamedTuple):
    #: name of the run in the journal
    run: str
    #: number of samples of each problem
    samples: int
    #: number of sequences in a batch; None: the source chooses
    rows: int | None
    device: torch.device
    #: returns the entry of a problem from its samples; it may stop before it has read all of them
    judge: Callable[[Problem, Chunks], dict[str, Any]]
    #: number of threads that judge
    workers: int
    #: says whether no more problems have to be decided
    enough: Callable[[Entries], bool]
    #: called with the entries so far, at the start and whenever one is added
    tell: Callable[[Entries], None]


@dataclass(frozen=True)
class Work:
    """Problems with the settings of sampling, the checker, and the file for the results."""

    problems: Sequence[Problem]
    check: Checker
    sampling: Sampling
    #: settings that an earlier journal must agree with, in addition to those of sampling
    settings: Mapping[str, Any]
    rows: int | None
    device: torch.device
    out: str | os.PathLike[str] | None
    progress: bool

    def plan(
        self,
        run: str,
        judge: Callable[[Checker, Problem, Chunks], dict[str, Any]],
        enough: Callable[[Entries], bool],
        tell: Callable[[Entries], None],
    ) -> Plan:
        workers = getattr(self.check, "workers", 1)
        judging = functools.partial(judge, self.check)
        return Plan(run, self.sampling.samples, self.rows, self.device, judging, workers, enough, tell)


def open_journal(file: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> Journal:
    """Open the journal. The first process uses the file; other processes use a journal in memory."""
    processes = Processes()
    if not processes.alike(settings):
        raise ValueError("S0Trainer: the processes were not given the same settings")
    found: list[Journal] = []
    processes.together(lambda: found.append(Journal(file if processes.is_main else None, settings)))
    return found[0]


def decide(problems: Sequence[Problem], source: Source, journal: Journal, plan: Plan) -> Entries:
    """Decide problems in their order, until `plan.enough`, and return all entries in every process. The first process
    writes the file of `journal`."""
    processes, first = Processes(), range(1)
    if not processes.alike([(problem.key, problem.digest) for problem in problems]):
        raise ValueError("S0Trainer: the processes were not given the same problems")
    found: Entries = processes.together(lambda: journal.decided(plan.run, problems), first)[0]
    waiting = [problem for problem in problems if problem.key not in found]
    processes.together(lambda: plan.tell(found), first)
    if not waiting or plan.enough(found):
        return found
    longest = max(len(problem.ids) for problem in waiting)
    (rows,) = processes.least([source.rows(longest, plan.rows, plan.device)])
    each = max(rows // plan.samples, 1)
    step = each * processes.count
    judged: list[Future] = []
    with ThreadPoolExecutor(plan.workers) as pool, contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for start in range(0, len(waiting) + step, step):  # the last round only judges the last batch
            mine = waiting[start : start + step][processes.index :: processes.count]

            def work(mine: list[Problem] = mine) -> list[dict[str, Any]]:
                before = judged.copy()
                judged[:] = _begin(mine, source, plan, rows, pool)
                if plan.samples > rows:  # `_begin` has judged it already
                    before, judged[:] = before + judged, []
                return [future.result() for future in before]

            entries = [entry for part in processes.together(work) for entry in part]
            found.update({entry["id"]: entry for entry in entries})

            def keep(entries: list[dict[str, Any]] = entries) -> None:
                journal.add(entries)
                plan.tell(found)

            processes.together(keep, first)
            if plan.enough(found):
                break
    return found


def _begin(
    problems: Sequence[Problem], source: Source, plan: Plan, rows: int, pool: ThreadPoolExecutor
) -> list[Future]:
    """Sample answers to the problems, and start judging them. If the samples of one problem need several batches, each
    batch is judged before the next is sampled, and sampling stops as soon as the result is known."""
    wanted = [[Row(p.key, i, p.prompt, p.ids) for i in range(plan.samples)] for p in problems]
    if plan.samples > rows:
        return [
            _done(_entry(plan, problem, (source.sample(row[i : i + rows]) for i in range(0, plan.samples, rows))))
            for problem, row in zip(problems, wanted, strict=True)
        ]
    made = source.sample([row for each in wanted for row in each]) if wanted else []
    chunks = [[made[i : i + plan.samples]] for i in range(0, len(made), plan.samples)]
    return [pool.submit(_entry, plan, problem, chunk) for problem, chunk in zip(problems, chunks, strict=True)]


def _done(result: Any) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future


def _entry(plan: Plan, problem: Problem, chunks: Chunks) -> dict[str, Any]:
    return {"run": plan.run, "id": problem.key, "prompt": problem.digest, **plan.judge(problem, chunks)}


def verdict(check: Checker, problem: Problem, answer: str) -> bool:
    """Return the checker's verdict. An exception in it becomes a RuntimeError that names the problem."""
    try:
        found = check(problem.record, answer)
    except Exception as error:
        message = f"S0Trainer: the checker failed on problem {problem.id!r}: {type(error).__name__}: {error}"
        raise RuntimeError(message) from error
    if not isinstance(found, bool) and type(found).__name__ not in ("bool", "bool_"):
        raise TypeError(f"S0Trainer: the checker must return True or False, got {found!r} for problem {problem.id!r}")
    return bool(found)
