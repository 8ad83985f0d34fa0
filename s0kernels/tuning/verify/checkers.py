"""Checkers, which decide whether an answer to a problem is right.

A checker is any callable `(problem, answer) -> bool`. `problem` is the mapping of the problem, `answer` the unchanged
text of a completion. A checker may also have two methods and an attribute, as the checkers here do.
`check_problem(problem)` is called before sampling, and raises ValueError if the problem lacks a key that the checker
needs. `close()` ends processes that wait for more answers. `workers` is the number of threads that may call it at a
time; the default is one.
"""

import ast
import builtins
import contextlib
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from s0kernels.messages import advice
from s0kernels.tuning.verify.answers import Comparer
from s0kernels.tuning.verify.sandbox import Program, Sandbox
from s0kernels.tuning.verify.shapes import extracted, final_answers, final_number, without_thoughts

Checker = Callable[[Mapping[str, Any], str], bool]


class Python:
    """Runs the tests of a problem on the function in the answer, in the sandbox.

    `problem["tests"]` is code. It defines `check(candidate)`, like the tests of HumanEval, or it has assert statements,
    like those of MBPP, which can use the name of the function or `candidate`. `problem["entry_point"]` is the name of
    the function. If it is missing, the tests must show it: they call `check` with it, or they call exactly one function
    that is neither a builtin nor defined in them. Thoughts before the answer are removed. If the answer has code
    blocks, the one with the function is used. If the answer is only a function body, it is put after
    `problem["prefix"]`, which is the prompt in HumanEval. If it is a whole function, the imports of the prefix are put
    before it.

    Args:
        timeout: time limit for all tests of an answer, in seconds of wall clock.
        memory_mb: memory limit of each of the two processes, in MiB beyond the interpreter's own.

    Answers are assumed to be harmful by accident, not by intent: `s0kernels.tuning.verify.sandbox` has the threat
    model. The sandbox needs Linux on x86_64 or aarch64. A call raises RuntimeError if its filter does not work.
    """

    workers = 2

    def __init__(self, *, timeout: float = 10.0, memory_mb: int = 1024):
        self._sandbox = Sandbox(timeout=timeout, memory_mb=memory_mb)

    def __call__(self, problem: Mapping[str, Any], answer: str) -> bool:
        tests, name, prefix = _read_tests(problem)
        if not _defines_check(ast.parse(tests)):
            run = f"exec(compile({tests!r}, '<tests>', 'exec'), globals())"
            tests = f"def check(found):\n    global candidate\n    candidate = found\n    {run}\n"
        return self._sandbox.run(Program(extracted(prefix, name, answer), name, tests, prefix)).passed

    def check_problem(self, problem: Mapping[str, Any]) -> None:
        _read_tests(problem)

    def close(self) -> None:
        self._sandbox.close()


def _read_tests(problem: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return (tests, name of the function, prefix)."""
    tests, name, prefix = problem.get("tests"), problem.get("entry_point"), problem.get("prefix") or ""
    if not isinstance(tests, str) or not tests.strip():
        raise ValueError(f"tests must be code, got {tests!r}")
    if not isinstance(prefix, str):
        raise ValueError(f"prefix must be code, got {prefix!r}")
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"tests are not Python: {error}") from None
    if name is None:
        found = _called(tree)
        if len(found) != 1:
            calls = f"they call {', '.join(found)}" if found else "they call no function that they do not define"
            raise ValueError(f"entry_point is missing, and the tests do not show it: {calls}")
        (name,) = found
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"entry_point must be the name of a function, got {name!r}")
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if not _defines_check(tree) and not {name, "candidate"} & named:
        raise ValueError(f"the tests do not call entry_point, {name!r}")
    return tests, name, prefix


def _defines_check(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body)


def _called(tree: ast.Module) -> list[str]:
    """Return the names of the functions under test: the arguments of `check`, or the functions that the tests call but
    do not define."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    if _defines_check(tree):
        given = [node.args[0] for node in calls if getattr(node.func, "id", "") == "check" and len(node.args) == 1]
        return sorted({node.id for node in given if isinstance(node, ast.Name)})
    own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            own |= {(name.asname or name.name).partition(".")[0] for name in node.names}
    names = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    return sorted(names - own - set(dir(builtins)) - {"candidate"})


class Answer:
    """Compares the end of an answer with `problem["answer"]`, a text.

    An answer is right if, apart from surrounding blanks, one of these equals that text: the whole answer, the content
    of its last `\\boxed{}`, or the rest of the line after its last `####`. If `problem["answer"]` is a number or an
    expression, in LaTeX or plain, an answer is also right if math-verify finds it equal: it compares the content of
    `\\boxed{}`, or else the last formula or number. Thoughts before the answer are removed.

    Args:
        timeout: time limit for a comparison in seconds. It runs in a separate process, and an unfinished one counts as
            wrong.
    """

    def __init__(self, *, timeout: float = 10.0):
        self._comparer = Comparer(timeout)

    def __call__(self, problem: Mapping[str, Any], answer: str) -> bool:
        right = problem["answer"].strip()
        text = without_thoughts(answer)
        if right in final_answers(text):
            return True
        if not text.strip() or not _is_mathematical(right):
            return False
        return self._comparer.same(_formula(right), _formula(final_number(text)))

    def check_problem(self, problem: Mapping[str, Any]) -> None:
        right = problem.get("answer")
        if not isinstance(right, str) or not right.strip():
            raise ValueError(f"answer must be a text, got {right!r}")
        if _is_mathematical(right):
            try:
                import math_verify  # noqa: F401
            except ImportError as error:
                raise ImportError(f"comparing answers needs math-verify: {advice(error)}", name=error.name) from error

    def close(self) -> None:
        self._comparer.close()


_FUNCTIONS = (
    "arccos arcsin arctan cos cot cup csc deg det exp frac gcd inf infty lcm ln log max min mod pi sec sin sqrt tan"
)


def _is_mathematical(text: str) -> bool:
    """Whether the text is nothing but a formula. math-verify would take a number out of any sentence."""
    if re.search(r"\d:\d|\b\d{4}-\d\d?-\d\d?\b", text):  # times and dates
        return False
    bare = re.sub(r"\\(text|mathrm|mbox|textbf)\{[^{}]*\}|\\[A-Za-z]+", " ", text)
    return not {*re.findall(r"[^\W\d_]{2,}", bare)} - {*_FUNCTIONS.split()} and bool(re.search(r"\w", text))


def _formula(text: str) -> str:
    """Prepare a text for math-verify: remove thousands separators, replace the minus sign by one that it reads, and
    mark the text as LaTeX if it is nothing but a formula."""
    text = text.strip().replace("\\$", "").replace("−", "-")
    text = re.sub(r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,])", lambda number: number[0].replace(",", ""), text)
    if not _is_mathematical(text) or "$" in text or "\\boxed" in text:
        return text
    return f"${text.strip('*_. ')}$"


class Command:
    """Runs a program with the answer on standard input. The answer is right if the program exits with 0.

    The environment variable S0KERNELS_PROBLEM holds the problem as JSON. No shell is used, and the arguments come from
    the caller alone, never from a problem. **The program is not sandboxed**: it has the caller's permissions, and so
    has any code of a model that it runs.

    Args:
        arguments: the program and its arguments.
        timeout: time limit in seconds. After it the program and its session are killed, and the answer is wrong.
        output_mb: limit on its output in MiB. The output is ignored. A program that writes more is killed, and the
            answer is wrong.
    """

    def __init__(self, arguments: Sequence[str], *, timeout: float = 10.0, output_mb: float = 1.0):
        if isinstance(arguments, str) or not arguments or not all(isinstance(part, str) for part in arguments):
            raise TypeError(f"verify.command: arguments must be a list of strings, got {arguments!r}")
        if not (timeout > 0 and math.isfinite(timeout) and output_mb > 0):
            raise ValueError("verify.command: timeout and output_mb must be positive")
        if shutil.which(arguments[0]) is None:
            raise FileNotFoundError(f"verify.command: there is no program {arguments[0]!r}")
        self._arguments, self._timeout, self._most = list(arguments), timeout, int(output_mb * 2**20)

    def __call__(self, problem: Mapping[str, Any], answer: str) -> bool:
        environment = {**os.environ, "S0KERNELS_PROBLEM": json.dumps(problem, default=str)}
        process = subprocess.Popen(
            self._arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            env=environment,
            start_new_session=True,
        )
        deadline = time.monotonic() + self._timeout
        feeder = threading.Thread(target=_feed, args=(process.stdin, answer.encode(errors="replace")), daemon=True)
        feeder.start()
        try:
            if not self._ends_quietly(process, deadline):
                return False
            return process.wait(max(deadline - time.monotonic(), 0)) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            feeder.join()
            if process.stdout is not None:
                process.stdout.close()

    def _ends_quietly(self, process: subprocess.Popen, deadline: float) -> bool:
        """Read the output until the program closes it. Return whether it did so before the deadline and within the
        limit."""
        assert process.stdout is not None
        poller, read = select.poll(), 0
        poller.register(process.stdout, select.POLLIN)
        while read <= self._most:
            if not poller.poll(max(deadline - time.monotonic(), 0) * 1000):
                return False
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                return True
            read += len(chunk)
        return False


def _feed(pipe: Any, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError), pipe:  # the program need not read it
        pipe.write(data)


class ByProblem:
    """Uses `Python` for problems with `tests`, and `Answer` for other problems."""

    workers = Python.workers

    def __init__(self):
        self._tests, self._answer = Python(), Answer()

    def __call__(self, problem: Mapping[str, Any], answer: str) -> bool:
        return self._of(problem)(problem, answer)

    def check_problem(self, problem: Mapping[str, Any]) -> None:
        if problem.get("tests") is None and problem.get("answer") is None:
            raise ValueError("it must have tests or answer, by which its answers are checked")
        self._of(problem).check_problem(problem)

    def close(self) -> None:
        self._tests.close()
        self._answer.close()

    def _of(self, problem: Mapping[str, Any]) -> "Python | Answer":
        return self._answer if problem.get("tests") is None else self._tests
