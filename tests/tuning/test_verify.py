"""Checkers: verdicts by tests, by comparison and by a program; messages for incomplete problems."""

import sys
import textwrap
import threading
import time

import pytest

from s0kernels import verify
from s0kernels.tuning.verify.answers import Comparer
from s0kernels.tuning.verify.sandbox import Sandbox
from s0kernels.tuning.verify.shapes import code_blocks, indented

HUMANEVAL = {
    "prefix": 'from math import pi\n\n\ndef half(x):\n    return x / 2\n\n\ndef area(r):\n    """Of a circle."""\n',
    "tests": "def check(candidate):\n    assert candidate(2) == 4 * pi\n    assert area(0) == half(0)\n",
    "entry_point": "area",
}
MBPP = {"tests": "import math\nassert first('ab') == 'a'\nassert set(first('''b\n c''')) == {'b'}\nassert math.pi > 3"}


def test_python_in_the_form_of_humaneval():
    body = "    return pi * r ** 2\n"
    whole = f"def area(r):\n{body}"
    right = [body, body.strip(), whole, f"```python\n{whole}```", f"Sure:\n```\n{body}```\nDone."]
    right += [f"<think>def area(r): no</think>{body}", HUMANEVAL["prefix"] + body]
    assert [verify.python(HUMANEVAL, text) for text in right] == [True] * len(right)
    wrong = [
        "",
        "    return 3 * r ** 2",
        "    import os\n    os._exit(0)",
        "I cannot.",
        "    raise AssertionError",
        "```\n```",
    ]
    assert [verify.python(HUMANEVAL, text) for text in wrong] == [False] * len(wrong)


def test_python_in_the_form_of_mbpp():
    right = [
        "def first(s):\n    return s[0]",
        "Here:\n```python\nimport re\ndef first(s): return s[:1]\n```",
        "first = min",
    ]
    assert [verify.python(MBPP, text) for text in right[:2]] == [True] * 2
    assert verify.python(MBPP, "first = lambda s: s[0]")
    wrong = [
        "",
        "def first(s):\n    return s",
        "    return s[0]",
        "def last(s):\n    return s[0]",
        "import sys\nsys.exit(0)",
    ]
    assert [verify.python(MBPP, text) for text in wrong] == [False] * len(wrong)


def test_tests_run_confined_and_are_given_up():
    assert not verify.python(
        {"tests": "import os\nos.remove('/tmp')\nassert f(1) == 1", "entry_point": "f"}, "def f(x): return x"
    )
    quick = verify.Python(timeout=0.5)
    began = time.monotonic()
    assert not quick({"tests": "assert f(1) == 1"}, "def f(x):\n    while True: pass")
    assert quick({"tests": "assert f(1) == 1"}, "def f(x): return x")
    assert time.monotonic() - began < 10
    quick.close()


def test_the_function_under_test():
    for tests in (
        "assert f(1) == 1",
        "def check(candidate):\n    assert candidate(1) == 1\n\ncheck(f)",
        "from math import isclose\ndef near(a, b): return isclose(a, b)\nassert near(f(1), len([1]))",
    ):
        verify.python.check_problem({"tests": tests})
        assert verify.python({"tests": tests}, "def f(x): return x")
    assert verify.python({"tests": "assert candidate(1) == f(1) == 1", "entry_point": "f"}, "def f(x): return x")
    for problem, message in (
        ({}, "tests must be code, got None"),
        ({"tests": ["assert f(1)"]}, "tests must be code, got"),
        ({"tests": "assert f(1"}, "tests are not Python: '\\(' was never closed"),
        ({"tests": "assert f(g(1))"}, "entry_point is missing, and the tests do not show it: they call f, g"),
        ({"tests": "assert 1"}, "they call no function that they do not define"),
        ({"tests": "def check(candidate):\n    assert candidate(1)"}, "entry_point is missing"),
        ({"tests": "assert f(1)", "entry_point": "f(1)"}, "entry_point must be the name of a function, got 'f\\(1\\)'"),
        ({"tests": "assert f(1)", "prefix": 3}, "prefix must be code, got 3"),
        ({"tests": "assert f(1)", "entry_point": "g"}, "the tests do not call entry_point, 'g'"),
        ({"tests": "assert candidate(1)"}, "entry_point is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            verify.python.check_problem(problem)


def test_indentation():
    for body in ("return [\n    1,\n]", "if x:\n    return 1\nreturn 2", "if x:  # a: b\n    return 1", "a = 1"):
        there = textwrap.indent(body, "    ")
        assert indented(body) == indented(there) == there
    assert indented("  # a\n  if x:\n\n    return 1\n") == "    # a\n    if x:\n\n      return 1"
    assert indented(" \n    # a\n# b\n    return 1") == "    # a\n# b\n    return 1"
    for body in ("    a = 1\n    return a", "    if x:\n        return 1\n    return 2"):
        assert indented(body) == indented(body.strip()) == body
    assert code_blocks("a\n```py\nb\n```\nc\n```\nd") == ["b\n", "d"]


@pytest.mark.parametrize(
    ("right", "texts", "others"),
    [
        ("42", ["42", "The answer is 42.", "#### 42", r"\boxed{42}", "**42**"], ["41", "42 is wrong: 17", "", "####"]),
        ("-1,250", ["−1250", "#### \\$-1,250.00", "-1250 dollars"], ["1250", "-1", "-125"]),
        (r"\frac{1}{2}", ["0.5", r"it is $\frac12$", "1/2", "<think>3</think>0.5"], ["2", "<think>0.5</think>2"]),
        ("x^2+1", ["1+x^2", "It is $1 + x^2$."], ["x^2+2", "1"]),
        ("2", ["2"], [r"\boxed{\pi / 2}"]),
        ("Paris", [" Paris\n", r"It is \boxed{Paris}.", "So:\n#### Paris"], ["It is Paris", "paris"]),
        ("3 apples", ["3 apples"], ["3 oranges", "3"]),
        ("2024-05-01", ["2024-05-01"], ["2018"]),
    ],
)  # fmt: skip
def test_answers(right, texts, others):
    problem = {"answer": right}
    verify.answer.check_problem(problem)
    assert [verify.answer(problem, text) for text in texts] == [True] * len(texts)
    assert [verify.answer(problem, text) for text in others] == [False] * len(others)


def test_answers_that_cannot_be_computed_cost_no_others():
    comparer = Comparer(seconds=1.5)
    began = time.monotonic()
    pairs = [("7", "so 7"), ("7", r"\boxed{9^{9^{9^{9}}}}"), ("7", "so 7"), ("7", "(" * 5000), ("7", "so 7")]
    assert [comparer.same(*pair) for pair in pairs] == [True, False, True, False, True]
    assert time.monotonic() - began < 60
    comparer.close()


def test_what_answers_need_is_said(monkeypatch):
    for problem in ({}, {"answer": 3}, {"answer": " "}):
        with pytest.raises(ValueError, match="answer must be a text, got"):
            verify.answer.check_problem(problem)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    verify.answer.check_problem({"answer": "Paris"})
    with pytest.raises(ImportError, match=r"comparing answers needs math-verify: .*pip install .*verify"):
        verify.answer.check_problem({"answer": "3"})


def test_either_by_what_a_problem_has():
    assert verify.by_problem(MBPP, "def first(s): return s[0]")
    assert verify.by_problem({"answer": "Paris"}, "Paris")
    with pytest.raises(ValueError, match="it must have tests or answer"):
        verify.by_problem.check_problem({"prompt": "a"})


def test_commands(tmp_path):
    check = verify.command([sys.executable, "-c", "import sys; sys.exit(sys.stdin.read() != 'yes; rm *')"])
    assert check({}, "yes; rm *")
    assert not check({}, "no")
    code = "import json, os, sys; sys.exit(json.loads(os.environ['S0KERNELS_PROBLEM'])['answer'] != sys.stdin.read())"
    assert verify.command([sys.executable, "-c", code])({"answer": "é$(x)"}, "é$(x)")
    assert verify.command(["true"])({}, "x" * 3_000_000), "it need not read"
    began = time.monotonic()
    assert not verify.command(["sleep", "60"], timeout=0.3)({}, "")
    assert not verify.command(["yes"])({}, "")
    assert not verify.command(["sh", "-c", "sleep 60 & exec >&-; sleep 60"], timeout=0.3)({}, "")
    assert time.monotonic() - began < 10
    assert not any(thread.name.startswith("Thread") and thread.daemon for thread in threading.enumerate())
    for arguments, error in (
        ("true", TypeError),
        ([], TypeError),
        ([3], TypeError),
        (["no-such-program"], FileNotFoundError),
    ):
        with pytest.raises(error, match=r"verify\.command"):
            verify.command(arguments)
    with pytest.raises(ValueError, match="must be positive"):
        verify.command(["true"], timeout=0)


def test_a_sandbox_keeps_its_launchers():
    from s0kernels.tuning.verify.sandbox import Job

    box, job = Sandbox(), Job("def f(x): return x", "f", [(1,)], [1])
    assert box.run(job).passed
    (launcher,) = box._idle
    assert box.run(job).passed
    assert list(box._idle) == [launcher]
    box.close()
    assert launcher._process.poll() is not None
    assert box.run(job).passed
    box.close()
    with pytest.raises(ValueError, match="must be positive"):
        Sandbox(timeout=0)
