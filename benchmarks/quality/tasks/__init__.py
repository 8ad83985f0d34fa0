"""Problems for the quality experiments: `get_task("humaneval")` and its like."""

from importlib import import_module

from .task import Item, Task

__all__ = ["TASKS", "Item", "Task", "get_task"]

# The class of each task, imported when it is asked for: their evaluators are optional.
TASKS = {
    "tiny": "tiny.Tiny",
    "boundary": "boundary.Boundary",
    "humaneval": "humaneval.HumanEval",
    "math500": "math.Math500",
    "gsm8k": "math.GSM8K",
    "spider": "spider.Spider",
}


def get_task(name: str, **options) -> Task:
    """The task of that name; `options` are those of its class."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    module, cls = TASKS[name].split(".")
    return getattr(import_module(f".{module}", __name__), cls)(**options)
