"""What a task is: problems in two parts, and a way to tell which completions are right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Item:
    """One problem. `data` is what scoring needs; no model sees it."""

    name: str  # unique within the task
    prompt: str  # what the model continues
    reference: str  # a right completion, or "" where none is known
    data: Mapping[str, Any]


class Task(Protocol):
    name: str
    max_new_tokens: int
    stop: Sequence[str]  # a completion is cut off before the first of these

    def load(self) -> tuple[list[Item], list[Item]]:
        """(problems to tune on, problems held out), always in the same order."""

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[bool]:
        """Which completions are right, one for each item; an item may come several times."""
