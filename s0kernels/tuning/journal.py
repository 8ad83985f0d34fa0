"""A file of the results per problem, so that an interrupted run resumes and repeats nothing."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from s0kernels.files import append, check_output, replace_file
from s0kernels.tuning.problems import Problem


class Journal:
    """A file of JSON lines: first the settings, then one entry per problem and run, `{"run", "id", "prompt": digest,
    ...}`. Entries are appended and flushed. A crash may leave half a line, which is ignored. Without a file the journal
    is kept in memory.
    """

    def __init__(self, file: str | os.PathLike[str] | None, settings: Mapping[str, Any]):
        self._file = None if file is None else Path(file)
        self._settings = json.loads(json.dumps(settings))
        self._entries: dict[str, dict[str, dict[str, Any]]] = {}
        if self._file is not None:
            self._open(self._file)

    def _open(self, file: Path) -> None:
        if file.is_dir():
            raise ValueError(f"S0Trainer: out must name a file, and {file} is a directory")
        check_output(file.parent, 0)
        content = file.read_bytes() if file.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.split(b"\n") if line.strip()]
            there = lines[0]["settings"] if lines else self._settings
            for entry in lines[1:]:
                self._entries.setdefault(entry["run"], {})[entry["id"]] = entry
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not a file of results of problems: {error!r}") from error
        here = self._settings
        differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        if differing:
            text = "; ".join(f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in differing)
            raise ValueError(f"{file} was begun with other settings ({text}); name another file or remove it")
        if not lines:
            replace_file(file, f"{json.dumps({'settings': here})}\n".encode())
        elif whole != content:
            replace_file(file, whole)

    def decided(self, run: str, problems: Sequence[Problem]) -> dict[str, dict[str, Any]]:
        """Return the entries of `problems`, by key.

        Raises:
            ValueError: the prompt of a problem has changed since, or the file has an entry for a problem that is not
                among `problems`.
        """
        known, named = self._entries.get(run, {}), {problem.key: problem for problem in problems}
        other = next((key for key in known if key not in named), None)
        if other is not None:
            raise ValueError(
                f"{self._file} belongs to other problems: {other!r} is not among these; name another file or remove it"
            )
        for key, problem in named.items():
            if key in known and known[key]["prompt"] != problem.digest:
                raise ValueError(
                    f"{self._file}: the prompt of problem {problem.id!r} has changed since it was decided; "
                    "name another file, or give the changed problem another id"
                )
        return {key: known[key] for key in named if key in known}

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        lines = []
        for entry in entries:
            entry = json.loads(json.dumps(entry))
            self._entries.setdefault(entry["run"], {})[entry["id"]] = entry
            lines.append(f"{json.dumps(entry)}\n")
        if lines and self._file is not None:
            append(self._file, "".join(lines).encode())
