"""Checkers for `S0Trainer.collect` and `S0Trainer.evaluate`: callables `(problem, answer) -> bool`.

`python` runs the tests of a problem in a sandbox. `answer` compares with the problem's reference answer. `by_problem`
uses the tests if the problem has them, and the answer otherwise. `command([...])` turns a program into a checker.
`Python(timeout=60)` and `Answer(timeout=60)` are the first two with another time limit.
"""

from s0kernels.tuning.verify.checkers import Answer, ByProblem, Checker, Python
from s0kernels.tuning.verify.checkers import Command as command

__all__ = ["Answer", "Checker", "Python", "answer", "by_problem", "command", "python"]

python = Python()
answer = Answer()
by_problem = ByProblem()
