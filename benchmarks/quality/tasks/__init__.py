"""The problems of the quality experiments, such as `get_task("tiny")`."""

import dataclasses
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from .task import Item, Task

__all__ = ["TASKS", "Item", "Task", "get_task"]

sys.path.append(str(Path(__file__).resolve().parents[3] / "examples" / "tiny"))  # the tiny models' problems

# the class of each task, imported on demand
TASKS = {
    "tiny": "tiny.Tiny",
    "boundary": "boundary.Boundary",
    "humaneval": "humaneval.HumanEval",
    "math500": "mathematics.Math500",
    "gsm8k": "mathematics.GSM8K",
    "spider": "spider.Spider",
}


def get_task(name: str, options: Mapping[str, str] | None = None) -> Task:
    """Return the task of that name. `options` are fields of its class."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    module, _, cls = TASKS[name].partition(".")
    task = getattr(import_module(f".{module}", __name__), cls)
    known = [field.name for field in dataclasses.fields(task)] if dataclasses.is_dataclass(task) else []
    for option in options or {}:
        if option not in known:
            raise ValueError(
                f"{name} has {'the options ' + ', '.join(known) if known else 'no options'}; got {option!r}"
            )
    return task(**(options or {}))
