"""Checkers for `S0Trainer.collect` and `evaluate`: callables `(problem, answer) -> bool`.

`python` runs a problem's tests in the sandbox, `answer` compares with a problem's answer, `by_problem` does either by
what the problem has, and `command([...])` makes a checker of a program. `Python(timeout=60)` and `Answer(timeout=60)`
are the first two with other limits.
"""

from s0kernels.tuning.verify.checkers import Answer, ByProblem, Checker, Python
from s0kernels.tuning.verify.checkers import Command as command

__all__ = ["Answer", "Checker", "Python", "answer", "by_problem", "command", "python"]

python = Python()
answer = Answer()
by_problem = ByProblem()
