"""Sample solutions from the frozen model, and keep those that a checker verifies."""

import contextlib
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from s0kernels.files import replace_file
from s0kernels.progress import Progress
from s0kernels.tuning.checks import closing
from s0kernels.tuning.deciding import Chunks, Entries, Source, Work, decide, open_journal, verdict
from s0kernels.tuning.problems import Problem, prompt_format
from s0kernels.tuning.processes import Processes
from s0kernels.tuning.server import Server
from s0kernels.tuning.verify.checkers import Checker

#: number of answers shown in an error, and the length at which each is cut
_SHOWN, _LONGEST = 3, 400


def state_file(out: str | os.PathLike[str]) -> Path:
    """Return the path of the file that records the result of each problem: `solutions.state.jsonl` beside
    `solutions.jsonl`."""
    return Path(out).with_suffix(".state.jsonl")


class Solutions:
    """The solutions found so far: at most one per problem, of the first `wanted` solved problems, in order."""

    def __init__(self, work: Work, wanted: int, main: bool):
        self._problems, self._wanted = work.problems, wanted
        self._out = None if work.out is None or not main else Path(work.out)
        options = work.sampling.chat_template_kwargs
        self._extra = {} if options is None else {"chat_template_kwargs": dict(options)}
        shown = work.progress and main
        self._bar = Progress("collecting", len(work.problems), "problem", shown=shown)

    def of(self, entries: Entries) -> list[dict[str, Any]]:
        solved = ((p, entries[p.key]) for p in self._problems if _is_solved(entries.get(p.key)))
        found = [
            {"id": p.id, **p.asked(), "completion": entry["completion"], "ended": entry["ended"], **self._extra}
            for p, entry in solved
        ]
        return found[: self._wanted]

    def enough(self, entries: Entries) -> bool:
        """Whether the first `wanted` solved problems are known."""
        count = 0
        for problem in self._problems:
            if problem.key not in entries:
                return False
            count += _is_solved(entries[problem.key])
            if count == self._wanted:
                return True
        return True

    def tell(self, entries: Entries) -> None:
        """Write the solutions to the file, and update the progress bar."""
        found = self.of(entries)
        if self._out is not None:
            content = "".join(f"{json.dumps(record)}\n" for record in found).encode()
            if not self._out.exists() or self._out.read_bytes() != content:
                replace_file(self._out, content)
        solved = sum(map(_is_solved, entries.values()))
        share = f", solved {100 * solved / len(entries):.0f} %" if entries else ""
        self._bar.reach(len(entries), f"{len(found)}/{self._wanted} solutions{share}")

    def close(self) -> None:
        self._bar.close()


def _is_solved(entry: Mapping[str, Any] | None) -> bool:
    return entry is not None and entry["solved"] is not None


def collect(work: Work, source: Source, wanted: int) -> list[dict[str, Any]]:
    """See `S0Trainer.collect`."""
    processes, file = Processes(), None
    if work.out is not None:
        out, file = Path(work.out), state_file(work.out)
        processes.together(lambda: _refuse_foreign(out, file), range(1))
    journal = open_journal(file, {"what": "collect", **work.sampling.settings(), **work.settings})
    found = Solutions(work, wanted, processes.is_main)
    try:
        entries = decide(work.problems, source, journal, work.plan("collect", _first_right, found.enough, found.tell))
    finally:
        found.close()
    solutions = found.of(entries)
    if not solutions:
        raise RuntimeError(_none(work, entries))
    return solutions


def _refuse_foreign(out: Path, state: Path) -> None:
    """Raise ValueError if `out` exists and does not belong to this run."""
    if out.is_dir():
        raise ValueError(f"S0Trainer: out must name a file, and {out} is a directory")
    if out.exists() and out.read_bytes().strip() and not state.exists():
        raise ValueError(
            f"{out} exists, but not {state.name} beside it, which resuming needs; name another file or remove it"
        )


def collect_from(server: str, model: str | None, tokenizer: Any, work: Work, wanted: int) -> list[dict[str, Any]]:
    """Collect solutions from a server. The name of its model is one of the settings that the state file must agree
    with."""
    with contextlib.closing(Server(server, model, work.sampling, tokenizer)) as source, closing(work.check):
        settings = {"served_model": source.model, "prompt_format": prompt_format(work.problems, tokenizer)}
        return collect(replace(work, settings=settings), source, wanted)


def _first_right(check: Checker, problem: Problem, chunks: Chunks) -> dict[str, Any]:
    first, wrong = "", set()
    for number, completion in enumerate(itertools.chain.from_iterable(chunks)):
        first = completion.text if number == 0 else first
        if completion.text not in wrong and verdict(check, problem, completion.text):
            return {"solved": number, "completion": completion.text, "ended": completion.ended}
        wrong.add(completion.text)
    return {"solved": None, "answer": first[:_LONGEST]}


def _none(work: Work, entries: Entries) -> str:
    """Return the message that no sample is correct, with some of the answers."""
    samples = work.sampling.samples
    lines = [f"of {samples} samples for each of {len(work.problems)} problems none is correct; the first answers:"]
    for problem in work.problems[:_SHOWN]:
        lines.append(f"problem {problem.id!r}: {entries[problem.key]['answer']!r}")
    return "\n".join(lines)
