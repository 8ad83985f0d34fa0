"""The problems of the tiny models, which a script generates. Answers run in the sandbox."""

from problems import SPLITS, Problem, make_problems

from s0kernels.tuning.verify.sandbox import Job, Sandbox

from .task import Item, Task

SANDBOX = Sandbox()


class Tiny(Task):
    name = "tiny"
    max_new_tokens = 40

    def load(self) -> tuple[list[Item], list[Item]]:
        tune, heldout = ([item(problem) for problem in make_problems(split)] for split in SPLITS)
        return tune, heldout

    def right(self, item: Item, completion: str) -> bool:
        problem = item.data["problem"]
        job = Job(item.prompt + completion + "\n", problem.name, list(problem.inputs), list(problem.expected))
        return SANDBOX.run(job).passed


def item(problem: Problem) -> Item:
    return Item(problem.key, problem.prompt, problem.solution, {"problem": problem})
