"""Problems, for which answers are sampled."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from s0kernels.tuning.chat import template_digest, write_prompt
from s0kernels.tuning.data import records
from s0kernels.tuning.tokens import encode


class Problem(NamedTuple):
    #: the id given, or else the index
    id: str | int
    #: the mapping given, without values that are None
    record: Mapping[str, Any]
    #: the text that the model continues, and its tokens
    prompt: str
    ids: list[int]

    @property
    def key(self) -> str:
        return str(self.id)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.prompt.encode(errors="surrogatepass")).hexdigest()[:16]

    def asked(self) -> dict[str, Any]:
        """Return the keys of the problem that a training example keeps."""
        return {name: self.record[name] for name in ("prompt", "messages") if name in self.record}


def read_problems(
    problems: Any, tokenizer: Any, options: Mapping[str, Any] | None = None, check: Any = None
) -> list[Problem]:
    """Read problems from a list, a file of JSON lines or a `datasets.Dataset`, and make their prompts.

    A problem is a mapping. It has a `prompt` (text) or `messages`, which go through the tokenizer's chat template with
    `options`. It may have an `id`, a string or an int; the default is its index. It has the keys that its checker
    needs.

    Raises:
        TypeError, ValueError: a problem is invalid, lacks a key that `check.check_problem` requires, or repeats an id.
            The message has its index, or its line in a file.
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
            raise ValueError(f"{where} has the id {problem.id!r}, which {places[problem.key]} has too")
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
        raise ValueError(f"{where} must have either prompt or messages; it has {sorted(map(str, record))}")
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
    """Return, for a file, how prompts are written: as texts, or by which template."""
    return f"template {template_digest(tokenizer)}" if chats(problems) else "text"


def chats(problems: Iterable[Problem]) -> list[list[Mapping[str, Any]]]:
    """Return the messages of the problems that have messages."""
    return [problem.record["messages"] for problem in problems if "messages" in problem.record]
