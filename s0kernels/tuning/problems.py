"""Problems that answers are sampled for."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from s0kernels.tuning.chat import template_digest, write_prompt
from s0kernels.tuning.data import records
from s0kernels.tuning.tokens import encode


class Problem(NamedTuple):
    #: as given, or its place
    id: str | int
    #: as given, without what is None
    record: Mapping[str, Any]
    #: the text that the model goes on from, and its tokens
    prompt: str
    ids: list[int]

    @property
    def key(self) -> str:
        return str(self.id)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.prompt.encode(errors="surrogatepass")).hexdigest()[:16]

    def asked(self) -> dict[str, Any]:
        """What of it an example for training has."""
        return {name: self.record[name] for name in ("prompt", "messages") if name in self.record}


def read_problems(
    problems: Any, tokenizer: Any, options: Mapping[str, Any] | None = None, check: Any = None
) -> list[Problem]:
    """Problems from a list, a file of JSON lines or a `datasets.Dataset`, with their prompts as the model reads them.

    A problem is a mapping with `prompt`, a text, or `messages`, which go through the tokenizer's template with
    `options`; with `id`, a string or an int, or its place counts as that; and with whatever its checker needs.

    Raises:
        TypeError, ValueError: a problem is none, or lacks what `check.check_problem` asks for, or an id comes twice;
            the message has its place, of a file its line.
    """
    if isinstance(problems, Mapping):
        raise TypeError("S0Trainer: problems must be a list, a file or one split of a data set; put one into a list")
    found: list[Problem] = []
    places: dict[str, str] = {}
    for number, (where, record) in enumerate(records(problems, "problems")):
        if not isinstance(record, Mapping):
            raise TypeError(f"{where} must be a mapping with prompt or messages, got {type(record).__name__}")
        record = {name: value for name, value in record.items() if value is not None}
        problem = _read(record, record.get("id", number), where, tokenizer, options)
        if problem.key in places:
            raise ValueError(f"{where} has the id {problem.id!r}, and so has {places[problem.key]}")
        places[problem.key] = where
        _check(problem, where, check)
        found.append(problem)
    if not found:
        raise ValueError("S0Trainer: there are no problems")
    return found


def _read(record: Mapping[str, Any], name: Any, where: str, tokenizer: Any, options: Any) -> Problem:
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise TypeError(f"{where}: id must be a string or an int, got {name!r}")
    if ("prompt" in record) == ("messages" in record):
        raise ValueError(f"{where} must have prompt or messages, and not both; it has {sorted(map(str, record))}")
    if "messages" in record:
        prompt = write_prompt(record["messages"], options, where, tokenizer)
        ids = encode(prompt, where, tokenizer, add_special_tokens=False)
    else:
        prompt = record["prompt"]
        if not isinstance(prompt, str):
            raise TypeError(f"{where}: prompt must be a text, got {type(prompt).__name__}; a conversation is messages")
        ids = encode(prompt, where, tokenizer)
    if not ids:
        raise ValueError(f"{where}: the prompt has no tokens")
    return Problem(name, record, prompt, ids)


def _check(problem: Problem, where: str, check: Any) -> None:
    needs = getattr(check, "check_problem", None)
    try:
        if needs is not None:
            needs(problem.record)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}, id {problem.id!r}: {error}") from error


def prompt_format(problems: Iterable[Problem], tokenizer: Any) -> str:
    """For a file: how prompts are written, as texts or by which template."""
    return f"template {template_digest(tokenizer)}" if chats(problems) else "text"


def chats(problems: Iterable[Problem]) -> list[list[Mapping[str, Any]]]:
    """The messages of those that have some."""
    return [problem.record["messages"] for problem in problems if "messages" in problem.record]
