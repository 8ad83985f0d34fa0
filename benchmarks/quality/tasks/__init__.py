"""Problems for the quality experiments: `get_task("tiny")` and its like."""

import sys
from importlib import import_module
from pathlib import Path

from .task import Item, Task

__all__ = ["TASKS", "Item", "Task", "get_task"]

sys.path.append(str(Path(__file__).resolve().parents[3] / "examples" / "tiny"))  # the tiny models' problems

# the class of each task, imported when it is asked for
TASKS = {"tiny": "tiny.Tiny", "boundary": "boundary.Boundary"}


def get_task(name: str) -> Task:
    """The task of that name."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    module, cls = TASKS[name].split(".")
    return getattr(import_module(f".{module}", __name__), cls)()
