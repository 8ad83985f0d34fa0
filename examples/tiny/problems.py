"""Small Python functions to write, their tests, and a corpus in which good and bad habits compete.

A problem is a signature and a docstring; its solution is one line. The corpus shows every kind of problem, but in many
families the right line is not the most common one. Some authors print instead of returning, some assign and forget to
return, some leave a trailing comma, some make the typical mistake of the family. A model trained on it knows the right
line, but with greedy decoding it often writes another one. S0 tuning closes that gap.

A problem's `key` (what is computed, with which names and constants, whatever the wording) belongs to exactly one of
the corpus, `tune` and `heldout`.

python examples/tiny/problems.py tune problems.jsonl
python examples/tiny/problems.py heldout heldout.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

SPLITS = ("tune", "heldout")
PER_FAMILY = 6
DEFAULT_SEED = 2604

OPENERS = ("Return", "Compute", "Find", "Show")
HABITS = ("right", "print", "assign", "mistake", "comma")
# The verb of the docstring pulls towards a habit, so habits vary within a family too.
OPENER_PULL = {"Return": ("right", 1.6), "Compute": ("assign", 1.5), "Find": ("mistake", 1.5), "Show": ("print", 1.5)}

# Part of the corpus is signed in a comment above the function. Every author pulls towards one habit, and two authors
# with the same habit pull twice as hard. So a model learns to add up such evidence, and to remember it until the body.
AUTHORS = {
    "right": ("ann", "ada"),
    "print": ("bob", "ben"),
    "assign": ("cid", "cal"),
    "mistake": ("dot", "dan"),
    "comma": ("eve",),
}
HABIT_OF = {author: habit for habit, authors in AUTHORS.items() for author in authors}
SIGNED = 0.6
AUTHOR_PULL = 20.0

NAMES = {
    "int": ("n", "m", "x", "y", "a", "b", "p", "q", "h", "w", "size", "total", "price", "score", "age", "rate"),
    "list": ("xs", "ys", "nums", "items", "data", "row", "values", "marks"),
    "str": ("s", "t", "text", "word", "line", "title", "label", "phrase"),
}
NOUNS = ("box", "page", "team", "road", "lamp", "tree", "coin", "ship", "door", "song", "farm", "game")
MARKS = "!?-+*#=:;&"


@dataclass(frozen=True)
class Kind:
    """One thing to compute: its wording, the right expression, a typical mistake, and a reference in Python.

    `{0}` and `{1}` stand for the arguments, `{c}` and `{d}` for the constants. `reference` takes the arguments and
    then the constants.
    """

    stem: str
    params: tuple[str, ...]
    phrases: tuple[str, ...]
    right: str
    mistake: str
    reference: Callable[..., Any]
    constants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    name: str
    habits: dict[str, float]
    kinds: tuple[Kind, ...]


# The weight of each habit, before the pull of the docstring's verb. Authors mostly get the `GOOD` families right. The
# others have a favourite mistake, which the verb "Return" overcomes in the `..._OFTEN` families. Greedy decoding goes
# token by token, and "return" begins a mistake as well as the right line, so the two win or lose together.
GOOD = {"right": 0.52, "print": 0.16, "assign": 0.14, "mistake": 0.14, "comma": 0.04}
PRINT = {"right": 0.22, "print": 0.54, "assign": 0.14, "mistake": 0.07, "comma": 0.03}
PRINT_OFTEN = {"right": 0.30, "print": 0.47, "assign": 0.14, "mistake": 0.06, "comma": 0.03}
ASSIGN = {"right": 0.22, "print": 0.14, "assign": 0.54, "mistake": 0.07, "comma": 0.03}
ASSIGN_OFTEN = {"right": 0.30, "print": 0.14, "assign": 0.47, "mistake": 0.06, "comma": 0.03}
MISTAKE = {"right": 0.23, "print": 0.13, "assign": 0.13, "mistake": 0.48, "comma": 0.03}
MISTAKE_OFTEN = {"right": 0.29, "print": 0.14, "assign": 0.14, "mistake": 0.40, "comma": 0.03}

INT, INTS, LIST, LIST_INT = ("int",), ("int", "int"), ("list",), ("list", "int")
STR, STRS, STR_INT = ("str",), ("str", "str"), ("str", "int")

FAMILIES = (
    Family("add", GOOD, (
        Kind("add", INT, ("{0} plus {c}", "the sum of {0} and {c}"), "{0} + {c}", "{0} - {c}",
             lambda x, c: x + c, ("num",)),
        Kind("sum", INTS, ("{0} plus {1}", "the sum of {0} and {1}"), "{0} + {1}", "{0} - {1}",
             lambda x, y: x + y),
        Kind("join", INTS, ("{0} plus {1} plus {c}", "the sum of {0}, {1} and {c}"), "{0} + {1} + {c}",
             "{0} + {1} - {c}", lambda x, y, c: x + y + c, ("num",)),
    )),
    Family("scale", MISTAKE, (
        Kind("scale", INTS, ("{0} times {1}, plus {c}",), "{0} * {1} + {c}", "{0} * ({1} + {c})",
             lambda x, y, c: x * y + c, ("num",)),
        Kind("grow", INT, ("{0} times {c}, plus {d}",), "{0} * {c} + {d}", "{0} * ({c} + {d})",
             lambda x, c, d: x * c + d, ("num", "num")),
    )),
    Family("subtract", MISTAKE_OFTEN, (
        Kind("less", INTS, ("{0} minus {1}", "{1} taken from {0}"), "{0} - {1}", "{1} - {0}", lambda x, y: x - y),
        Kind("left", INT, ("{c} minus {0}", "{0} taken from {c}"), "{c} - {0}", "{0} - {c}",
             lambda x, c: c - x, ("num",)),
    )),
    Family("limit", GOOD, (
        Kind("larger", INTS, ("the larger of {0} and {1}",), "max({0}, {1})", "min({0}, {1})", max),
        Kind("smaller", INT, ("the smaller of {0} and {c}",), "min({0}, {c})", "max({0}, {c})", min, ("num",)),
        Kind("cap", INT, ("{0}, but at most {c}",), "min({0}, {c})", "max({0}, {c})", min, ("num",)),
    )),
    Family("divide", PRINT, (
        Kind("even", INT, ("whether {0} is divisible by {c}", "whether {c} divides {0}"), "{0} % {c} == 0",
             "{0} // {c} == 0", lambda x, c: not x % c, ("num",)),
        Kind("splits", INTS, ("whether {0} is divisible by {1}", "whether {1} divides {0}"), "{0} % {1} == 0",
             "{0} // {1} == 0", lambda x, y: not x % y),
    )),
    Family("compare", PRINT_OFTEN, (
        Kind("atleast", INT, ("whether {0} is at least {c}",), "{0} >= {c}", "{0} > {c}",
             lambda x, c: not x < c, ("num",)),
        Kind("atmost", INTS, ("whether {0} is at most {1}",), "{0} <= {1}", "{0} < {1}", lambda x, y: not x > y),
        Kind("within", INT, ("whether {0} is from {c} to {d}",), "{c} <= {0} <= {d}", "{c} < {0} < {d}",
             lambda x, c, d: x in range(c, d + 1), ("low", "high")),
    )),
    Family("slice", GOOD, (
        Kind("first", LIST, ("the first {c} items of {0}",), "{0}[:{c}]", "{0}[{c}:]",
             lambda xs, c: [x for i, x in enumerate(xs) if i < c], ("few",)),
        Kind("skip", LIST_INT, ("{0} without its first {1} items",), "{0}[{1}:]", "{0}[:{1}]",
             lambda xs, k: [x for i, x in enumerate(xs) if i >= k]),
        Kind("last", LIST, ("the last {c} items of {0}",), "{0}[-{c}:]", "{0}[-{c}]",
             lambda xs, c: list(reversed(list(reversed(xs))[:c])), ("few",)),
    )),
    Family("span", MISTAKE, (
        Kind("span", INT, ("the sum of the numbers from {c} to {0}",), "sum(range({c}, {0} + 1))",
             "sum(range({c}, {0}))", lambda x, c: sum(i for i in range(400) if c <= i <= x), ("num",)),
        Kind("between", INTS, ("the sum of the numbers from {0} to {1}",), "sum(range({0}, {1} + 1))",
             "sum(range({0}, {1}))", lambda x, y: sum(i for i in range(200) if x <= i <= y)),
    )),
    Family("each", ASSIGN, (
        Kind("raise", LIST, ("each item of {0} plus {c}",), "[v + {c} for v in {0}]", "{0} + [{c}]",
             lambda xs, c: list(map(c.__add__, xs)), ("num",)),
        Kind("times", LIST, ("each item of {0} times {c}",), "[v * {c} for v in {0}]", "{0} * {c}",
             lambda xs, c: list(map(c.__mul__, xs)), ("num",)),
        Kind("stretch", LIST_INT, ("each item of {0} times {1}",), "[v * {1} for v in {0}]", "{0} * {1}",
             lambda xs, k: list(map(k.__mul__, xs))),
    )),
    Family("keep", PRINT_OFTEN, (
        Kind("above", LIST, ("the items of {0} above {c}",), "[v for v in {0} if v > {c}]", "[v > {c} for v in {0}]",
             lambda xs, c: list(filter(c.__lt__, xs)), ("num",)),
        Kind("below", LIST, ("the items of {0} below {c}",), "[v for v in {0} if v < {c}]", "[v < {c} for v in {0}]",
             lambda xs, c: list(filter(c.__gt__, xs)), ("num",)),
        Kind("over", LIST_INT, ("the items of {0} above {1}",), "[v for v in {0} if v > {1}]",
             "[v > {1} for v in {0}]", lambda xs, k: list(filter(k.__lt__, xs))),
    )),
    Family("count", GOOD, (
        Kind("many", LIST, ("how many items of {0} are above {c}",), "sum(v > {c} for v in {0})",
             "sum(v for v in {0} if v > {c})", lambda xs, c: len(list(filter(c.__lt__, xs))), ("num",)),
        Kind("often", LIST, ("how often {c} is in {0}",), "{0}.count({c})", "{0}.index({c})",
             lambda xs, c: len([x for x in xs if x == c]), ("num",)),
        Kind("times", LIST_INT, ("how often {1} is in {0}",), "{0}.count({1})", "{0}.index({1})",
             lambda xs, k: len([x for x in xs if x == k])),
    )),
    Family("repeat", ASSIGN_OFTEN, (
        Kind("echo", STR, ("{0} repeated {c} times",), "{0} * {c}", "{0} + str({c})",
             lambda s, c: "".join(s for _ in range(c)), ("num",)),
        Kind("many", STR_INT, ("{0} repeated {1} times",), "{0} * {1}", "{0} + str({1})",
             lambda s, k: "".join(s for _ in range(k))),
        Kind("pair", STRS, ("{0} and {1}, repeated {c} times",), "({0} + {1}) * {c}", "{0} + {1} * {c}",
             lambda s, t, c: "".join(s + t for _ in range(c)), ("num",)),
    )),
    Family("letter", MISTAKE_OFTEN, (
        Kind("letter", STR, ("letter {c} of {0}, counted from one",), "{0}[{c} - 1]", "{0}[{c}]",
             lambda s, c: s[:c][-1], ("few",)),
        Kind("place", STR_INT, ("letter {1} of {0}, counted from one",), "{0}[{1} - 1]", "{0}[{1}]",
             lambda s, k: s[:k][-1]),
    )),
    Family("text", GOOD, (
        Kind("shout", STR, ("{0} in upper case, then '{c}'",), "{0}.upper() + '{c}'", "'{c}' + {0}.upper()",
             lambda s, c: "".join(x.upper() for x in s) + c, ("mark",)),
        Kind("clean", STR, ("{0} without any '{c}'",), "{0}.replace('{c}', '')", "{0}.strip('{c}')",
             lambda s, c: "".join(x for x in s if x != c), ("mark",)),
        Kind("link", STR, ("the words of {0} joined by '{c}'",), "'{c}'.join({0}.split())", "'{c}'.join({0})",
             lambda s, c: s.replace(" ", c), ("mark",)),
    )),
)  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}


@dataclass(frozen=True)
class Task:
    """A function to write, drawn at random from a family: everything but its tests."""

    family: str
    kind: Kind
    opener: str
    phrase: str
    name: str
    args: tuple[str, ...]
    constants: tuple[int | str, ...]

    @property
    def key(self) -> str:
        """The computation of the task, without the name of the function and the wording of the docstring."""
        return self.fill(self.kind.right)

    @property
    def prompt(self) -> str:
        docstring = f"{self.opener} {self.fill(self.phrase)}."
        return f'def {self.name}({", ".join(self.args)}):\n    """{docstring}"""\n'

    def fill(self, template: str) -> str:
        return template.format(*self.args, **dict(zip("cd", self.constants, strict=False)))

    def bodies(self) -> dict[str, str]:
        """Return the body that each habit writes. Only `right` is correct."""
        right, mistake = self.fill(self.kind.right), self.fill(self.kind.mistake)
        return {
            "right": f"    return {right}",
            "print": f"    print({right})",
            "assign": f"    result = {right}",
            "mistake": f"    return {mistake}",
            "comma": f"    return {right},",
        }


@dataclass(frozen=True)
class Problem:
    """A task with tests. `inputs` are argument tuples, `expected` the results of the reference for them."""

    family: str
    key: str
    name: str
    prompt: str
    inputs: tuple[tuple[Any, ...], ...]
    expected: tuple[Any, ...]
    bodies: dict[str, str] = field(repr=False)

    @property
    def solution(self) -> str:
        return self.bodies["right"]

    def row(self) -> dict[str, str]:
        """The problem as `S0Trainer.collect` takes it. The model goes on behind the prompt, so that is the prefix."""
        pairs = zip(self.inputs, self.expected, strict=True)
        tests = [f"assert {self.name}({', '.join(map(repr, given))}) == {wanted!r}" for given, wanted in pairs]
        return {"id": self.key, "prompt": self.prompt, "prefix": self.prompt, "tests": "\n".join(tests)}


def habit_weights(family: str, opener: str) -> dict[str, float]:
    """Return the probability of each habit for a task of this family whose docstring starts with this verb."""
    weights = dict(BY_NAME[family].habits)
    habit, pull = OPENER_PULL[opener]
    weights[habit] *= pull
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def draw_task(rng: random.Random, family: Family) -> Task:
    kind = rng.choice(family.kinds)
    args: list[str] = []
    for param in kind.params:
        args.append(rng.choice([name for name in NAMES[param] if name not in args]))
    return Task(
        family=family.name,
        kind=kind,
        opener=rng.choice(OPENERS),
        phrase=rng.choice(kind.phrases),
        name=f"{kind.stem}_{rng.choice(NOUNS)}",
        args=tuple(args),
        constants=_draw_constants(rng, kind.constants),
    )


def _draw_constants(rng: random.Random, sorts: tuple[str, ...]) -> tuple[int | str, ...]:
    if sorts == ("num", "num"):
        return tuple(rng.sample(range(2, 100), 2))
    draw = {
        "num": lambda: rng.randint(2, 99),
        "few": lambda: rng.randint(2, 20),
        "low": lambda: rng.randint(2, 49),
        "high": lambda: rng.randint(52, 99),
        "mark": lambda: rng.choice(MARKS),
    }
    return tuple(draw[sort]() for sort in sorts)


def make_problems(split: str, seed: int = DEFAULT_SEED) -> list[Problem]:
    """Return the problems of a split ("tune" or "heldout"): PER_FAMILY of every family, in a fixed order."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return [with_tests(task) for task in _reserved_tasks(seed)[split]]


@lru_cache(maxsize=4)
def _reserved_tasks(seed: int) -> dict[str, tuple[Task, ...]]:
    """Make both splits together, so that no two tasks share a key. Families take turns, so any prefix of a split is
    balanced."""
    rng = random.Random(f"problems {seed}")
    seen: set[str] = set()
    splits: dict[str, tuple[Task, ...]] = {}
    for split in SPLITS:
        tasks = []
        for _ in range(PER_FAMILY):
            for family in FAMILIES:
                task = draw_task(rng, family)
                while task.key in seen:
                    task = draw_task(rng, family)
                seen.add(task.key)
                tasks.append(task)
        splits[split] = tuple(tasks)
    return splits


def with_tests(task: Task) -> Problem:
    inputs = _inputs(task)
    expected = tuple(task.kind.reference(*args, *task.constants) for args in inputs)
    return Problem(task.family, task.key, task.name, task.prompt, inputs, expected, task.bodies())


def _inputs(task: Task) -> tuple[tuple[Any, ...], ...]:
    """Return test arguments that distinguish every habit from the right one: limits, equal arguments, repeats,
    order."""
    numbers = [value for value in task.constants if isinstance(value, int)] or [7]
    low, high = numbers[0], numbers[-1]
    mark = next((value for value in task.constants if isinstance(value, str)), "-")
    text = [f"a{mark}b c", "The quick brown fox jumps", f"{mark}red {mark} blue green sky{mark}"]
    listed = [[low + 1, low, 1, low, high + 9, low - 1, *range(30, 52)], list(range(24)), [5, low, 8, low, low] * 5]
    if task.kind.params == INT:
        cases = [(n,) for n in (low, high, low - 1, high + 1, 2 * low, 3 * high + 1, 0, 150)]
    elif task.kind.params == INTS:
        cases = [(9, 9), (3, 8), (12, 4), (1, 20), (17, 5), (6, 3), (40, 41)]
    elif task.kind.params == LIST:
        cases = [(xs,) for xs in listed]
    elif task.kind.params == LIST_INT:
        cases = [([4, 9, 4, 1, 4, 30, 8], 4), (list(range(12)), 3), ([6, 2, 5, 5, 5, 7], 5)]
    elif task.kind.params == STR:
        cases = [(s,) for s in (text if task.kind.constants == ("mark",) else [t * 5 for t in text])]
    elif task.kind.params == STR_INT:
        cases = [("window", 3), ("abcdef", 1), ("oak tree", 5)]
    else:
        cases = [("ab", "c"), ("no", "yes"), ("x", "yz")]
    return tuple(cases)


def corpus(count: int, seed: int = DEFAULT_SEED, problem_seed: int = DEFAULT_SEED) -> Iterator[tuple[str, str]]:
    """Yield `count` pairs (prompt, body) to train a language model on.

    The line that solves a problem of the splits made from `problem_seed` occurs nowhere, not even as another task's
    mistake.
    """
    rng = random.Random(f"corpus {seed}")
    reserved = {task.key for tasks in _reserved_tasks(problem_seed).values() for task in tasks}
    while count > 0:
        task = draw_task(rng, rng.choice(FAMILIES))
        if task.key in reserved or task.fill(task.kind.mistake) in reserved:
            continue
        weights = habit_weights(task.family, task.opener)
        authors = draw_authors(rng)
        for author in authors:
            weights[HABIT_OF[author]] *= AUTHOR_PULL
        habit = rng.choices(HABITS, [weights[name] for name in HABITS])[0]
        yield "".join(["# ", " ".join(authors), "\n"] if authors else []) + task.prompt, task.bodies()[habit]
        count -= 1


def draw_authors(rng: random.Random) -> list[str]:
    if rng.random() >= SIGNED:
        return []
    return rng.sample(list(HABIT_OF), rng.randint(1, 2))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} {'|'.join(SPLITS)} FILE")
    rows = [problem.row() for problem in make_problems(sys.argv[1])]
    Path(sys.argv[2]).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
