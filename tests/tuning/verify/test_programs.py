"""s0kernels/tuning/verify/sandbox.py, programs: verdicts of tests as code, and attempts to evade them."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from escapes import (
    ALONE,
    ESCAPES,
    HANG,
    HANGS,
    LONG,
    attempt,
    confined,
    outcomes,
    processes,
    sandbox,
    untouched,
    wait_until,
)

from s0kernels.tuning.verify.sandbox import Program, verify

pytestmark = pytest.mark.slow  # many processes


CHECK = "def check(candidate):\n    assert candidate(3) == 4\n"
DIED = "no result (exit code 0)"
FLOOD = "output flood"
WRONG = "wrong: AssertionError (line 2: assert candidate(3) == 4)"

# Reasons that differ from those of a job.
REASONS = {
    "hostile-exception": "SystemExit",
    "forge-error": FLOOD,
    "pipe-flood": FLOOD,
    "close-descriptors": "no result",
    "forge-wrong-and-exit": DIED,
    "forge-before-answer": FLOOD,
    "forge-right-then-crash": "no result (exit code 1)",
    "forge-verdict": FLOOD,
    "forge-frame": "garbled",
    "forge-extra-results": DIED,
    "forge-deep-json": FLOOD,
    "forge-huge-integer": FLOOD,
    "forge-on-stdout": DIED,
    "replace-comparison": WRONG,
    "replace-os-exit": WRONG,
    "replace-json": WRONG,
    "lying-equality": "not a plain value: Liar",
    "subclass-of-int": "not a plain value: Int",
    "set-result": WRONG,
}
FORGE = "import os, struct\ndef say(code, text): os.write(3, struct.pack('<iI', code, len(text)) + text)\n"
VERDICT = "b'{\"passed\": true}'"
# Attempts that only the candidate of a program can make: (source, part of the reason).
CHEATS = {
    "verdict-on-every-descriptor": (
        f"import os\ndef f(x):\n for fd in range(64):\n  try: os.write(fd, b'+' + {VERDICT})\n  except OSError: pass",
        FLOOD,
    ),
    "verdict-as-answer": (f"{FORGE}def f(x): say(1, {VERDICT}); os._exit(0)", "garbled"),
    "verdict-at-import": (f"{FORGE}say(0, {VERDICT})\ndef f(x): return x", "garbled"),
    "ready-twice": (f"{FORGE}def f(x): say(0, b'null'); return 4", WRONG),
    "wrong-answer-and-exit": (f"{FORGE}def f(x): say(1, b'5'); os._exit(0)", WRONG),
    "unknown-frame": (f"{FORGE}def f(x): say(9, b'5'); return 4", WRONG),
    "forge-failure": (f"{FORGE}def f(x): say(3, b'passed'); return 4", "garbled"),
    "forge-exception": (f'{FORGE}def f(x): say(2, b\'["list", "SystemExit", "a", "b"]\')', "garbled"),
    "forge-exception-class": (f'{FORGE}def f(x): say(2, b\'["list", "exec", "a", "b"]\')', "garbled"),
    "forge-container": (f"{FORGE}def f(x): say(1, b'[\"object\"]')", "garbled"),
    "not-unicode": (f"{FORGE}def f(x): say(1, b'\\xff')", "garbled"),
    "empty-frame": (f"{FORGE}def f(x): say(1, b'')", "garbled"),
    "claims-a-huge-frame": ("import os\ndef f(x): os.write(3, b'\\1\\0\\0\\0' + b'\\xff' * 4)", FLOOD),
    "answers-every-equality": (
        "class Liar:\n def __eq__(self, other): return True\ndef f(x): return Liar()",
        "not a plain value: Liar",
    ),
    "liar-in-a-list": ("class Liar(int): pass\ndef f(x): return [Liar(4)]", "not a plain value: Liar"),
    "liar-among-dicts": (
        "class Liar(dict):\n def __eq__(self, other): return True\ndef f(x): return Liar()",
        "not a plain value: Liar",
    ),
    "named-as-a-list": ("class list(list): pass\ndef f(x): return list()", "not a plain value: list"),
    "generator": ("def f(x): yield 4", "not a plain value: generator"),
    "function": ("def f(x): return f", "not a plain value: function"),
    "cyclic-list": ("def f(x):\n x = []\n x.append(x)\n return x", "cyclic"),
    "base-exception": ("class B(BaseException): pass\ndef f(x): raise B('b')", "B: b"),
    "own-exception": ("class E(Exception): pass\ndef f(x): raise E('e')", "the candidate raised E: e"),
    "kill-the-judge": (attempt("for pid in range(os.getpid() + 9): os.kill(pid, 9)"), "PermissionError"),
    "stop-the-judge": (attempt("os.kill(os.getpid() + 1, signal.SIGSTOP)"), "PermissionError"),
    "attach-to-the-judge": (
        attempt("assert libc.ptrace(16, os.getpid() + 1, 0, 0) == 0", "import ctypes, os; libc = ctypes.CDLL(None)"),
        "the candidate raised AssertionError",
    ),
    "read-the-judge": (attempt("open(f'/proc/{os.getpid() + 1}/mem', 'rb').read(1)"), "the candidate raised"),
    "replace-the-wire": (
        "import sys\nwire = sys.modules['wire']\nwire._tagged = wire.encode = wire.frame = lambda *a: b'4'\n"
        "wire.json.dumps = lambda *a: '4'\ndef f(x): return 5",
        "",
    ),
    "replace-the-judge": (
        f"import __main__ as m\nm._judge = m._report = m._StandIn = lambda *a: {VERDICT}\ndef f(x): return 5",
        WRONG,
    ),
    "exit-later": ("import atexit, os\natexit.register(os._exit, 0)\ndef f(x):\n if x: raise SystemExit", "SystemExit"),
}
STALLS = {
    "replace-builtins": ESCAPES["replace-builtins"][0],
    "replace-os-write": ESCAPES["replace-os-write"][0],
    "half-a-frame": "import os\ndef f(x):\n os.write(3, b'\\1\\0')\n while True: pass",
    "reads-the-questions": "import os\ndef f(x):\n os.read(4, 99)\n return x + 1",
    "never-ready": "import os\nos.read(4, 1)\ndef f(x): return x + 1",
}


def program(source, tests=CHECK, prelude=""):
    return Program(source, "f", tests, prelude)


def run(source, tests=CHECK, prelude="", **settings):
    (verdict,) = verify([program(source, tests, prelude)], **{"timeout": LONG, "workers": 1, **settings})
    assert verdict.passed == (verdict.reason == "passed")
    return verdict


@pytest.fixture(scope="module")
def escapes(namespaces, playground):
    sources = {name: source for name, (source, _) in (ESCAPES | CHEATS).items()}
    sources = {name: source for name, source in sources.items() if name not in STALLS}
    return outcomes(sources, playground, program, timeout=LONG, memory_mb=64)


@pytest.fixture(scope="module")
def hangs(namespaces, playground):
    return outcomes(HANGS | STALLS, playground, program, timeout=HANG, memory_mb=64)


@pytest.mark.parametrize("name", [name for name in ESCAPES | CHEATS if name not in STALLS])
def test_escape_is_not_verified(name, escapes, playground):
    verdict, after = escapes[name]
    assert not verdict.passed
    assert REASONS.get(name, (ESCAPES | CHEATS)[name][1]) in verdict.reason
    assert after.passed, "the next program suffered"
    assert untouched(playground)


@pytest.mark.parametrize("name", HANGS | STALLS)
def test_hang_is_stopped(name, hangs, playground):
    verdict, after = hangs[name]
    assert verdict == sandbox.Verdict(False, f"timed out after {HANG} s")
    assert after.passed, "the next program suffered"
    assert untouched(playground)


VALUES = r"""
def check(candidate):
    values = [
        None, True, 1, 1.0, -0.0, 1e-320, float("inf"), 2**63, -(2**63), 1 << 9999, 1j, "", "\ud800\0", b"\xff", [], (),
        {}, set(), [(1, [2]), {3: (4,)}], {1: 2, (1,): {"a"}, None: b"", frozenset({1, (2,)}): 1.5}, {1, 2.5, "a"},
    ]
    for value in values:
        back = candidate(value)
        assert back == value and type(back) is type(value), value
    assert repr(candidate((1, True, 1.0, -0.0, (2,), [2]))) == "(1, True, 1.0, -0.0, (2,), [2])"
    assert candidate([float("nan")])[0] != candidate(float("nan"))
"""
SWALLOW = "def check(candidate):\n try: candidate(3)\n except Exception: pass\n"
STUBBORN = "def check(candidate):\n try: candidate(3)\n except: pass\n finally: return True\n"
HELPER = 'import math\ndef twice(x): return 2 * x\ndef f(x: int) -> int:\n    """Twice x."""\n'
RIGHT = {
    "plain": ("def f(x): return x + 1", CHECK, ""),
    "values": ("def f(x): return x", VALUES, ""),
    "keywords": (
        "def f(a, *, b=1): return a, b",
        "def check(c): assert c(1, b=(2,)) == (1, (2,)) and c(a=3) == (3, 1)",
        "",
    ),
    "dicts": (
        "from collections import *\ndef f(x): return Counter(x), OrderedDict(a=1), defaultdict(list, a=[])",
        "def check(c): assert c('aab') == ({'a': 2, 'b': 1}, {'a': 1}, {'a': []})",
        "",
    ),
    "many-calls": ("def f(x): return x", "def check(c):\n for i in range(2000): assert c(i) == i", ""),
    "large-values": ("def f(x): return x", "def check(c): x = 'x' * 900000; assert c(x) == x", ""),
    "keeps-its-state": (
        "n = 0\ndef f():\n global n\n n += 1\n return n",
        "def check(c): assert [c(), c()] == [1, 2]",
        "",
    ),
    "prelude": ("def f(x): return x + x", "def check(c): assert c(3) == twice(3) == math.gcd(6)", HELPER),
    "own-name": ("def f(x): return x + x", "def check(c): assert f(4) == 8 and f is c and c.__name__ == 'f'", HELPER),
    "prints-a-lot": ("def f(x):\n for _ in range(9999): print('x' * 99)\n return x + 1", CHECK, ""),
    "reads-stdin": ("import sys\ndef f(x): return sys.stdin.read()", "def check(c): assert c(1) == ''", ""),
    "changes-its-argument": (
        "def f(x):\n x.sort()\n return x",
        "def check(c):\n x = [2, 1]\n assert c(x) == [1, 2] and x == [2, 1]",
        "",
    ),
    "expected-exception": (
        "class E(ValueError): pass\ndef f(x): raise E('e')",
        "def check(c):\n try: c(1)\n except ValueError as e: assert str(e) == 'e' and type(e) is ValueError",
        "",
    ),
    "peculiar-exception": ("def f(x): return b'\\xff'.decode()", SWALLOW, ""),
    "exception-of-a-module": ("import json\ndef f(x): json.loads('')", SWALLOW, ""),
    "swallowed-exception": ("def f(x): raise ValueError", STUBBORN, ""),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_code_passes(name):
    assert run(*RIGHT[name]).reason == "passed"


# The tests catch everything, so the sandbox must detect the failure: (source, part of the reason).
UNFORGIVEN = {
    "exit": ("def f(x): raise SystemExit(0)", "SystemExit: 0"),
    "os-exit": ("import os\ndef f(x): os._exit(0)", DIED),
    "interrupt": ("def f(x): raise KeyboardInterrupt", "KeyboardInterrupt"),
    "liar": ("class Liar: pass\ndef f(x): return Liar()", "not a plain value"),
    "garbled": (f"{FORGE}def f(x): say(1, b'[')", "garbled"),
    "flood": ("def f(x): return 'x' * (2 << 20)", FLOOD),
    "missing": ("def g(x): return x", "no function 'f'"),
}


@pytest.mark.parametrize("tests", [SWALLOW, STUBBORN], ids=["swallow", "stubborn"])
@pytest.mark.parametrize("name", UNFORGIVEN)
def test_what_no_test_may_forgive(name, tests):
    source, reason = UNFORGIVEN[name]
    assert reason in run(source, tests).reason


# Exceptions of a candidate that C code treats as a result: (exception, tests that would then check nothing).
SEQUENCE = "class S:\n def __init__(self, c): self.c = c\n def __getitem__(self, i): return self.c(i)\n"
PROPERTY = "class P:\n def __init__(self, c): self.c = c\n @property\n def p(self): return self.c(1)\n"
UNSEEN = {
    "all": ("StopIteration", "def check(c): assert all(map(c, [1, 2]))"),
    "list": ("StopIteration", "def check(c): assert list(map(c, [1, 2])) == []"),
    "loop": ("StopIteration", "def check(c):\n for x in map(c, [1, 2]): assert x == 4"),
    "later right": ("StopIteration() if x == 1 else IndexError", "def check(c): assert not sum(map(c, [1, 2]))"),
    "caught later": (
        "StopIteration",
        "def check(c):\n assert all(map(c, [1]))\n try: c(2)\n except StopIteration: pass",
    ),
    "sequence": ("IndexError", f"{SEQUENCE}def check(c): assert list(S(c)) == []"),
    "in": ("IndexError", f"{SEQUENCE}def check(c): assert 5 not in S(c)"),
    "getattr": ("AttributeError", f"{PROPERTY}def check(c): assert getattr(P(c), 'p', 4) == 4"),
    "hasattr": ("AttributeError", f"{PROPERTY}def check(c): assert not hasattr(P(c), 'p')"),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_tests_do_not_see_is_not_forgiven(name):
    error, tests = UNSEEN[name]
    verdict = run(f"def f(x): raise {error}", tests)
    assert not verdict.passed
    assert "which the tests do not catch" in verdict.reason


@pytest.mark.parametrize("error", ["StopIteration", "IndexError", "AttributeError", "KeyError"])
@pytest.mark.parametrize(
    "tests",
    [
        "def check(c):\n try: c(1)\n except {0}: pass\n else: assert False",
        "import contextlib\ndef check(c):\n with contextlib.suppress({0}): c(1); assert False",
        "class Raises:\n def __enter__(self): pass\n def __exit__(self, kind, *_): return kind is {0}\n"
        "def check(c):\n with Raises(): c(1)",
        "def check(c):\n def raises(x):\n  try: c(x)\n  except {0}: return True\n assert all(map(raises, [1, 2]))",
    ],
    ids=["try", "suppress", "with", "within map"],
)
def test_an_error_that_the_tests_want_is_right(error, tests):
    assert run(f"def f(x): raise {error}", tests.format(error)).reason == "passed"


# Tests that fail or report an error although the candidate is right: (tests, prelude, beginning of the reason).
JUDGES = {
    "never-calls": ("def check(candidate): pass", "", "the tests never call the candidate"),
    "message": ("def check(c): assert c(3) == 5, f'not {c(3)}'", "", "wrong: AssertionError (line 1: def check"),
    "other-error": ("def check(c): c(3)()", "", "wrong: TypeError: 'int' object is not callable (line 1"),
    "own-exit": ("def check(c):\n c(3)\n raise SystemExit", "", "wrong: SystemExit"),
    "exit-at-import": ("import sys\nsys.exit()\ndef check(c): c(3)", "", "the tests do not load: SystemExit"),
    "os-exit": ("import os\ndef check(c):\n c(3)\n os._exit(0)", "", "the tests ended without a verdict"),
    "forge": ("import os\ndef check(c):\n os.write(3, b'1')\n os._exit(0)", "", "garbled result"),
    "crash": ("import os\ndef check(c): os.abort()", "", "the tests ended without a verdict"),
    "syntax": ("def check(c) pass", "", "the tests do not load: SyntaxError"),
    "no-check": ("checked = 1", "", "the tests do not load: KeyError: 'check'"),
    "prelude": ("def check(c): c(3)", "1 / 0", "the tests do not load: ZeroDivisionError"),
    "argument": (
        "def check(c): c(len)",
        "",
        "the tests pass an argument that cannot be sent: not a plain value: builtin",
    ),
    "hang": ("def check(c):\n while True: pass", "", "timed out"),
    "memory": ("def check(c): bytearray(1 << 30)", "", "wrong: MemoryError"),
    "fork": ("import os\ndef check(c): os.fork()", "", "wrong: PermissionError"),
    "write": ("def check(c): open('/tmp/new', 'w')", "", "wrong: PermissionError"),
}


@pytest.mark.parametrize("name", JUDGES)
def test_tests_at_fault(name):
    tests, prelude, reason = JUDGES[name]
    verdict = run("def f(x): return x + 1", tests, prelude, timeout=HANG if reason == "timed out" else LONG)
    assert not verdict.passed
    assert verdict.reason.startswith(reason)


def test_pipes_full_in_both_directions():
    flood = "import os\ndef f(x):\n while True: os.write(3, b'\\1\\0\\0\\0\\1\\0\\0\\0000' * 9999)"
    verdict = run(flood, "def check(c):\n while True: c('x' * 900000)", timeout=HANG)
    assert verdict.reason.startswith("timed out")


def test_candidate_holds_two_pipes_and_the_judge_three():
    opened = """
import os
def opened():
    found = []
    for fd in range(256):
        try: found.append((fd, os.fstat(fd).st_mode >> 12 == 1))
        except OSError: pass
    return found
"""
    three = [(0, False), (1, False), (2, False), (3, True)]
    want = [*three, (4, True)], [*three, (4, True), (5, True)]
    tests = f"{opened}\ndef check(c): assert (c(), opened()) == {want}"
    assert run(f"{opened}\nf = opened", tests).reason == "passed"


def test_judge_is_confined_like_the_candidate():
    layers = """
import os
def layers():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    names = "Uid", "Gid", "Groups", "CapEff", "NoNewPrivs", "Seccomp"
    return [status[name] for name in names] + [open("/proc/self/limits").read().replace("x", ""), dict(os.environ)]
"""
    check = "def check(c):\n ours, theirs = layers(), c()\n assert len(ours) == 8 and ours[5].strip() == '2'\n"
    same = " assert ours[:6] == theirs[:6] and ours[7] == theirs[7] == {}\n"
    limits = " for name in ('processes', 'file size', 'open files', 'cpu time'):\n"
    each = (
        "  assert [x for x in ours[6].splitlines() if name in x] == [x for x in theirs[6].splitlines() if name in x]\n"
    )
    assert run(f"{layers}\nf = layers", layers + check + same + limits + each).reason == "passed"


SEARCH = """
import ctypes
def f(backwards):  # so that what is looked for is not in memory because it is looked for
    places, pieces = [line.split() for line in open("/proc/self/maps")], []
    for bounds, mode, *rest in places:
        if mode.startswith("rw"):
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            pieces += [ctypes.string_at(at, min((1 << 16) + 99, end - at)) for at in range(start, end, 1 << 16)]
    return any(bytes(backwards) in piece[::-1] for piece in pieces)  # only-the-source-knows
"""


def test_tests_are_nowhere_in_the_candidates_memory():
    """Neither are the tests of earlier programs, which freed memory might hold."""
    tests = """
def check(candidate):
    candidate([])
    assert candidate(list(b"only-the-source-knows"[::-1])), "the search does not work"
    assert not candidate(list(b"only-the-tests-know"[::-1]))
"""
    verdicts = verify([program("def f(x): return x", tests)] * 3 + [program(SEARCH, tests)], timeout=LONG, workers=1)
    assert [verdict.passed for verdict in verdicts] == [False] * 3 + [True], verdicts[3].reason


def test_launcher_that_was_not_sent_the_tests_ends():
    """It could not distinguish later input from the tests."""
    launcher = sandbox._Launcher(sandbox.Limits(HANG, 64, 1 << 20, 0))
    try:
        source = sandbox.frame(sandbox.PROGRAM, b'{"source": "def f(x): return x", "name": "f"}')
        sandbox.send(launcher._process.stdin.fileno(), source)
        assert launcher._read() == (None, b"")
    finally:
        launcher.close()


SLEEPER = program("import time\ndef f(x): time.sleep(99)")


@pytest.mark.parametrize(
    ("victim", "reason"),
    [(0, "the launcher died"), (1, "no result (signal 9)"), (2, "the tests ended without a verdict")],
    ids=["launcher", "candidate", "judge"],
)
def test_killed_from_outside(victim, reason):
    """The processes are forked in this order, so their pids are usually in this order. None outlives the others, and
    the next program is judged."""
    verdicts = []
    programs = [SLEEPER, program("def f(x): return x + 1")]
    thread = threading.Thread(target=lambda: verdicts.extend(verify(programs, timeout=LONG, workers=1)))
    thread.start()
    assert wait_until(lambda: sum(map(confined, processes(LONG))) == 2)
    found = sorted(processes(LONG))
    os.kill(found[victim], signal.SIGKILL)
    assert wait_until(lambda: not {*found[1:]} & {*processes(LONG)}, 1.0)
    thread.join()
    assert [verdict.reason for verdict in verdicts] == [reason, "passed"]


def test_nothing_outlives_a_killed_caller():
    script = f"""
{ALONE}
from s0kernels.tuning.verify.sandbox import Program, verify
verify([{SLEEPER!r}] * 2, timeout={LONG!r})
"""
    caller = subprocess.Popen([sys.executable, "-c", script])
    assert wait_until(lambda: sum(map(confined, processes(LONG))) == 4)
    caller.kill()
    caller.wait()
    assert wait_until(lambda: not processes(LONG), 1.0)


def test_many_mixed_programs_keep_their_order():
    sources = ["return x + 1", "return x", "import os; os._exit(0)", "raise KeyError(x)"]
    programs = [program(f"def f(x): {sources[i % 4]}", f"def check(c): assert c({i}) == {i + 1}") for i in range(100)]
    starts = ["passed", "wrong: AssertionError", DIED, "the candidate raised KeyError"]
    for i, verdict in enumerate(verify(programs, timeout=LONG, workers=3)):
        assert verdict.reason.startswith(starts[i % 4])


@pytest.mark.parametrize("tests", ["", "assert f(3) == 4", None, 3])
def test_impossible_programs_raise(tests):
    with pytest.raises(ValueError, match="defines check"):
        verify([program("def f(x): return x", tests)])
