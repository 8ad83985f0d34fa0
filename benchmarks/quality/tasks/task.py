"""The interface of a task: problems in two parts, and a check of completions."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Item:
    """One problem. `data` is for scoring; the model does not see it."""

    name: str  # unique within the task
    prompt: str  # the text that the model continues, or the message of a user
    reference: str  # a right completion, or "" if none is known
    data: Mapping[str, Any]


class Task(ABC):
    """A task. Subclasses are dataclasses; their fields are the options of the task, which are strings from the command
    line."""

    name: ClassVar[str]
    max_new_tokens: int = 512
    stop: Sequence[str] = ()  # a completion is cut before the first of these
    chat: bool = False  # prompts are messages of a user, and go through the tokenizer's chat template
    samples: ClassVar[int] = 16  # per tuning problem
    solutions: ClassVar[int] = 48  # to learn from, at most one per problem
    normalize: ClassVar[bool] = False  # S0 is divided by each layer's norm before it is scaled

    @abstractmethod
    def load(self) -> tuple[list[Item], list[Item]]:
        """Return (problems for tuning, held-out problems), always in the same order."""

    @abstractmethod
    def right(self, item: Item, completion: str) -> bool:
        """Whether a completion of the item is right. Two threads may call it at the same time."""


@dataclass
class Styled(Task):
    """A task for large models: `style` is "chat" for models with a chat template, or "complete" for plain text."""

    style: str = "chat"

    def __post_init__(self) -> None:
        if self.style not in ("chat", "complete"):
            raise ValueError(f"style must be chat or complete, got {self.style!r}")
        self.chat = self.style == "chat"
        self.stop = () if self.chat else self.ends

    ends: ClassVar[Sequence[str]] = ()  # the texts that end a plain-text completion
