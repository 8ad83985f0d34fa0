"""Problems that the tiny models cannot solve with any of their habits: their corpus has no functions of this kind.

If S0 only chooses among the abilities of the base, it should not help here, although the solutions that it learns from
are right. The paper uses Spider for this test.
"""

import random

from problems import GOOD, INT, INTS, LIST, STR, Family, Kind, Problem, draw_task, with_tests

from .tiny import Tiny, item

PER_KIND = 6
KINDS = (
    Kind("rest", INT, ("the remainder of {0} divided by {c}",), "{0} % {c}", "{0} // {c}",
         lambda x, c: x - c * (x // c), ("num",)),
    Kind("square", INT, ("{0} squared, minus {c}",), "{0} ** 2 - {c}", "{0} * 2 - {c}",
         lambda x, c: x * x - c, ("num",)),
    Kind("gap", INTS, ("the distance from {0} to {1}, plus {c}",), "abs({0} - {1}) + {c}", "{0} - {1} + {c}",
         lambda x, y, c: max(x, y) - min(x, y) + c, ("num",)),
    Kind("digits", INT, ("the sum of the digits of {0}, times {c}",), "sum(map(int, str({0}))) * {c}", "{0} * {c}",
         lambda x, c: sum(ord(d) - 48 for d in str(x)) * c, ("num",)),
    Kind("mirror", STR, ("{0} backwards, then letter {c}",), "{0}[::-1] + {0}[{c}]", "{0} + {0}[{c}]",
         lambda s, c: "".join(reversed(s)) + s[c:][0], ("few",)),
    Kind("top", LIST, ("the largest item of {0}, plus {c}",), "max({0}) + {c}", "min({0}) + {c}",
         lambda xs, c: sorted(xs)[-1] + c, ("num",)),
    Kind("order", LIST, ("the items of {0} from small to large, without the first {c}",), "sorted({0})[{c}:]",
         "{0}[{c}:]", lambda xs, c: [sorted(xs)[i] for i in range(c, len(xs))], ("few",)),
    Kind("unique", LIST, ("how many different items {0} has, plus {c}",), "len(set({0})) + {c}", "len({0}) + {c}",
         lambda xs, c: len(dict.fromkeys(xs)) + c, ("num",)),
)  # fmt: skip


class Boundary(Tiny):
    name = "boundary"

    def load(self):
        found = make_problems()
        return [item(p) for p in found[::2]], [item(p) for p in found[1::2]]


def make_problems(seed: int = 0) -> list[Problem]:
    """Make PER_KIND problems of every kind for each of the two parts, in turns. No two compute the same."""
    rng = random.Random(f"boundary {seed}")
    found: dict[str, Problem] = {}
    for _ in range(2 * PER_KIND):
        for kind in KINDS:
            task = draw_task(rng, Family("boundary", GOOD, (kind,)))
            while task.key in found:
                task = draw_task(rng, Family("boundary", GOOD, (kind,)))
            found[task.key] = with_tests(task)
    half = list(found.values())
    return [p for pair in zip(half[: len(half) // 2], half[len(half) // 2 :], strict=True) for p in pair]
