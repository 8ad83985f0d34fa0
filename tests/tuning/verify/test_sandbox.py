"""s0kernels/tuning/verify/sandbox.py, jobs: right code passes; ways to hang, harm or cheat are refused."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from escapes import ALONE, ESCAPES, HANG, HANGS, LONG, attempt, outcomes, processes, sandbox, untouched, wait_until

from s0kernels.tuning.verify.sandbox import Job, verify

pytestmark = pytest.mark.slow  # many processes


def run(source, inputs=((3,),), expected=(4,), **settings):
    (verdict,) = verify([Job(source, "f", list(inputs), list(expected))], **{"timeout": LONG, "workers": 1, **settings})
    assert verdict.passed == (verdict.reason == "passed")
    return verdict


def one_job(source):
    return Job(source, "f", [(3,)], [4])


@pytest.fixture(scope="module")
def escapes(namespaces, playground):
    sources = {name: source for name, (source, _) in ESCAPES.items()}
    return outcomes(sources, playground, one_job, timeout=LONG, memory_mb=64)


@pytest.fixture(scope="module")
def hangs(namespaces, playground):
    return outcomes(HANGS, playground, one_job, timeout=HANG, memory_mb=64)


@pytest.mark.parametrize("name", ESCAPES)
def test_escape_is_not_verified(name, escapes, playground):
    verdict, after = escapes[name]
    assert not verdict.passed
    assert ESCAPES[name][1] in verdict.reason
    assert after.passed, "the next job suffered"
    assert untouched(playground)


@pytest.mark.parametrize("name", HANGS)
def test_hang_is_stopped(name, hangs, playground):
    verdict, after = hangs[name]
    assert verdict == sandbox.Verdict(False, f"timed out after {HANG} s")
    assert after.passed, "the next job suffered"
    assert untouched(playground)


def test_recursion_without_limit():
    # The failure depends on the interpreter: MemoryError, a segmentation fault or the timeout.
    assert not run("import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f([x])", timeout=HANG).passed


IMPORTS = """
import bisect, collections, fractions, functools, hashlib, heapq, itertools, math, random, re, statistics
from datetime import datetime
def f(x): return math.gcd(x, 6) + len(hashlib.md5(b"").digest()) + datetime.strptime("3", "%d").day
"""
DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class A:
    x: int
def f(x): return A(x).x
"""
RIGHT = {
    "plain": ("def f(x): return x + 1", [(3,), (-1,)], [4, 0]),
    "two-arguments": ("def f(a, b): return a + b", [("a", "b"), ([1], [2])], ["ab", [1, 2]]),
    "no-arguments": ("def f(): return None", [()], [None]),
    "tuple-as-list": ("def f(x): return x, (x,)", [(1,)], [(1, [1])]),
    "dict": ("def f(x): return {'b': x, 'a': [True, 1.5]}", [(None,)], [{"a": [True, 1.5], "b": None}]),
    "unicode": ("def f(x): return x[::-1]", [("\u00e9\U0001f600\ud800",)], ["\ud800\U0001f600\u00e9"]),
    "big-integer": ("def f(x): return x ** 64", [(10,)], [10**64]),
    "infinity": ("def f(x): return x * 10", [(1e308,)], [float("inf")]),
    "prints-a-lot": ("def f(x):\n for _ in range(9999): print('x' * 99)\n return x", [(1,)], [1]),
    "imports": (IMPORTS, [(4,)], [21]),
    "dataclass": (DATACLASS, [(1,)], [1]),
    "main-guard": ("def f(x): return x\nif __name__ == '__main__':\n raise SystemExit", [(1,)], [1]),
    "reads-a-file": ("def f(x):\n with open('/proc/version') as file: return len(file.read()) > x", [(1,)], [True]),
    "empty-stdin": ("import sys\ndef f(x): return sys.stdin.read()", [(1,)], [""]),
    "large-input": ("def f(x): return len(x)", [(list(range(100000)),)], [100000]),
    "large-result": ("def f(x): return 'x' * x", [(1000000,)], ["x" * 1000000]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_code_passes(name):
    source, inputs, expected = RIGHT[name]
    assert run(source, inputs, expected).reason == "passed"


def test_strict_types():
    cases = [  # expected, what the function returns, passes
        (1, "1", True),
        (1, "True", False),
        (1, "1.0", False),
        (True, "True", True),
        (True, "1", False),
        (1.0, "1.0", True),
        (1.0, "1", True),
        (1.0, "True", False),
        (0.3, "0.1 + 0.2", False),
        (0, "False", False),
        (0, "None", False),
        ("1", "1", False),
        (float("nan"), "float('nan')", False),
        ([1], "(1,)", True),
        ((1,), "[1]", True),
        ([1, [0]], "[1, [False]]", False),
        ([1, 2], "[1]", False),
        ([1], "[1, 2]", False),
        ([], "{}", False),
        ({}, "[]", False),
        ("a", "['a']", False),
        (["a"], "'a'", False),
        ({"1": 2}, "{'1': 2}", True),
        ({"1": 2}, "{1: 2}", False),
        ({"a": 1}, "{'a': True}", False),
        ({"a": 1}, "{'a': 1, 'b': 1}", False),
        ({"a": 1, "b": 1}, "{'a': 1}", False),
    ]
    verdicts = verify([Job(f"def f(): return {got}", "f", [()], [want]) for want, got, _ in cases], timeout=LONG)
    assert [case for case, verdict in zip(cases, verdicts, strict=True) if verdict.passed != case[2]] == []


def test_memory_counts_from_the_size_of_the_interpreter():
    assert run(attempt("bytearray(16 << 20)"), memory_mb=32).passed
    assert run(attempt("bytearray(48 << 20)"), memory_mb=32).reason == "MemoryError:"


def test_every_input_counts():
    assert run("def f(x): return 4", [(3,), (3,), (4,)], [4, 4, 5]).reason.startswith("wrong answer: 4 instead of 5")


def test_changed_arguments_are_refused():
    source = "def f(x):\n x.sort()\n return x"
    assert "changed its arguments" in run(source, [([2, 1],)], [[1, 2]]).reason
    assert run(source, [([1, 2],)], [[1, 2]]).passed


def test_result_counts_as_it_was_returned():
    # The second call changes the list that the first call returned into the expected result of the first.
    source = "shared = []\ndef f(x):\n shared[:] = [x]\n return shared"
    assert not run(source, [(1,), (2,)], [[2], [2]]).passed


def test_expected_values_stay_with_the_caller():
    source = """
import gc, sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    text = repr(seen) + repr(gc.get_objects()) + open("/proc/self/cmdline").read()
    return [name in text for name in ("get_objects", "-".join(["only", "the", "caller", "knows"]))]
"""
    assert run(source, [(3,)], ["only-the-caller-knows"]).reason.startswith("wrong answer: [True, False]")


def test_environment_and_descriptors_are_empty(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "x")
    assert run("import os\ndef f(): return dict(os.environ)", [()], [{}]).passed
    with open(tmp_path / "secret", "w") as secret:
        os.set_inheritable(secret.fileno(), True)
        os.dup2(secret.fileno(), 200)
        source = """
import os
def f():
    found = []
    for fd in range(256):
        try:
            found.append([fd, os.fstat(fd).st_rdev])
        except OSError:
            pass
    return found
"""
        null = os.stat("/dev/null").st_rdev
        try:
            assert run(source, [()], [[[0, null], [1, null], [2, null], [3, 0]]]).reason == "passed"
        finally:
            os.close(200)


def test_each_layer_is_in_place():
    """The layers overlap, so most escapes would still fail without one of them. This test checks each layer
    separately."""
    source = """
import os
def f():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    limits = {line[:26].strip(): line[26:].split()[0] for line in open("/proc/self/limits")}
    names = "Max cpu time", "Max file size", "Max processes", "Max open files"
    return {
        "uids": sorted(set(status["Uid"].split() + status["Gid"].split())), "groups": status["Groups"].split(),
        "capabilities": int(status["CapEff"], 16), "no_new_privileges": int(status["NoNewPrivs"]),
        "seccomp": int(status["Seccomp"]), "limits": [limits[name] for name in names], "cwd": os.getcwd(),
        "own_session": os.getsid(0) == os.getpid(), "tasks": len(os.listdir("/proc/self/task")),
        "core_dumps": os.stat("/proc/self/status").st_uid == os.getuid(),
    }
"""
    root, outside = os.geteuid() == 0, "namespaces: " in sandbox.confinement()  # groups from outside the namespace
    want = {
        "uids": ["65534"] if root else sorted({str(i) for i in (*os.getresuid(), *os.getresgid())}),
        "groups": [] if root else ["65534" if outside else str(group) for group in os.getgroups()],
        "capabilities": 0,
        "no_new_privileges": 1,
        "seccomp": 2,
        "limits": ["7", "0", "0", "32"],
        "cwd": "/",
        "own_session": True,
        "tasks": 1,
        "core_dumps": False,  # /proc entries of a process that may not dump core belong to root
    }
    groups = os.getgroups()
    try:
        if root:
            os.setgroups([4])  # so that there is a group to drop
    except PermissionError:
        pytest.skip("this root may not change its ids: only the filter protects, which the other tests show")
    try:
        assert run(source, [()], [want]).reason == "passed"
    finally:
        if root:
            os.setgroups(groups)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_as_a_normal_user(playground):
    """Run without a change of uid, where files and processes of the same user are accessible."""
    python = sys.executable if os.stat("/root").st_mode & 0o001 else "/usr/bin/python3"
    script = f"""
import os, sys
if sys.version_info < (3, 11):
    sys.exit("too old")
{ALONE}
from s0kernels.tuning.verify import sandbox
from s0kernels.tuning.verify.sandbox import Job, Program, verify
print("started", flush=True)
sandbox._TRY_NAMESPACES = {sandbox._TRY_NAMESPACES}
bodies = ["pass", "os.kill(os.getppid(), 9)", "os.kill(-1, 0)", "os.remove({str(playground / "kept")!r})", "os.fork()"]
jobs = [Job(f"import os\\ndef f(x):\\n {{body}}\\n return x", "f", [(1,)], [1]) for body in bodies]
jobs += [Program(job.source, "f", "def check(c): assert c(1) == 1") for job in jobs]
powers = "int(open('/proc/self/status').read().split('CapEff:')[1].split()[0], 16)"
jobs.append(Job(f"def f(x): return {{powers}}", "f", [(1,)], [0]))
for verdict in verify(jobs, timeout={LONG!r}):
    print(verdict.reason.removeprefix("the candidate raised ").split(":")[0])
print(sandbox.confinement())
launcher = sandbox._Launcher(sandbox.Limits(2, 64, 1 << 20, {sandbox._TRY_NAMESPACES:d}))
print(os.stat(f"/proc/{{launcher._process.pid}}/mem").st_uid)  # that of who may read it
launcher.close()
"""
    somebody = {"user": 12345, "group": 12345, "extra_groups": []}
    try:
        done = subprocess.run([python, "-B", "-c", script], cwd="/", capture_output=True, text=True, **somebody)
    except OSError as error:
        pytest.skip(f"no interpreter for another user: {error}")
    if not done.stdout and ("too old" in done.stderr or "Permission denied" in done.stderr):
        pytest.skip(f"the other user cannot run this interpreter or read this tree: {done.stderr}")
    _, *reasons, confinement, owner = done.stdout.splitlines()
    assert reasons == [*(["passed"] + ["PermissionError"] * 4) * 2, "passed"], done.stderr
    assert confinement.startswith("seccomp filter, rlimits, uid 12345; ")
    assert owner == "0"


def test_many_mixed_jobs_keep_their_order(capsys):
    sources = ["return x + 1", "return x", "import os; os._exit(0)", "os", "import os; os.read(0, 9999); return x + 1"]
    jobs = [Job(f"def f(x): {sources[i % 5]}", "f", [(i,)], [i + 1]) for i in range(200)]
    jobs[77] = Job("def f(x):\n while True: pass", "f", [(1,)], [1])
    verdicts = verify(jobs, timeout=1.5, workers=3, progress=True)
    assert verdicts[77].reason == "timed out after 1.5 s"
    starts = ["passed", "wrong answer", "no result", "NameError", "passed"]
    assert all(v.reason.startswith(starts[i % 5]) for i, v in enumerate(verdicts) if i != 77)
    said = capsys.readouterr().err
    assert "running: 200 of 200 jobs" in said
    assert said.endswith(f"{sum(v.passed for v in verdicts)} verified\n")


def test_no_jobs():
    assert verify([]) == []


def test_reason_is_one_short_printable_line():
    verdict = run("def f(x): raise ValueError('\\x1b[31m\\n\\ud800' + 'x' * 9999)")
    assert verdict.reason.isprintable()
    assert verdict.reason.startswith("ValueError")
    assert len(verdict.reason) <= 300


@pytest.mark.parametrize(
    ("job", "error"),
    [
        (Job("", "f", [], []), ValueError),  # it would be right without being called
        (Job("", "f", [(1,)], [1, 2]), ValueError),
        (Job("", "f", [1], [1]), TypeError),
        (Job("", "f", [({1},)], [1]), TypeError),
        (Job("", "f", [(1,)], [{1: 2}]), TypeError),
    ],
)
def test_impossible_jobs_raise(job, error):
    with pytest.raises(error):
        verify([job])


@pytest.mark.parametrize("setting", [{"timeout": 0}, {"timeout": float("inf")}, {"memory_mb": 0}, {"workers": 0}])
def test_bad_settings_raise(setting):
    with pytest.raises(ValueError, match="positive"):
        verify([], **setting)


def test_raises_where_the_filter_does_not_work(monkeypatch):
    monkeypatch.setattr(sandbox, "_PROBE", Job("def f(): return 'open'", "f", [()], ["confined"]))
    with pytest.raises(RuntimeError, match="does not work here: wrong answer"):
        run("def f(x): return x + 1")


def test_dead_launcher_is_replaced(monkeypatch):
    sleeper = Job("import time\ndef f(x): time.sleep(99)", "f", [(1,)], [1])
    launchers, judge = [], sandbox._Launcher.judge

    def spy(self, job, request):
        if job is sleeper:  # not the probe
            launchers.append(self._process.pid)
        return judge(self, job, request)

    monkeypatch.setattr(sandbox._Launcher, "judge", spy)
    verdicts = []
    jobs = [sleeper, Job("def f(x): return x", "f", [(1,)], [1])]
    thread = threading.Thread(target=lambda: verdicts.extend(verify(jobs, timeout=LONG, workers=1)))
    thread.start()
    assert wait_until(lambda: launchers and len(processes(LONG)) == 2)
    (child,) = {*processes(LONG)} - {*launchers}
    os.kill(launchers[0], signal.SIGKILL)
    assert wait_until(lambda: child not in processes(LONG), 1.0)
    thread.join()
    assert [verdict.reason for verdict in verdicts] == ["the launcher died", "passed"]


def test_nothing_outlives_a_killed_caller():
    script = f"""
{ALONE}
from s0kernels.tuning.verify.sandbox import Job, verify
verify([Job("def f(x):\\n while True: pass", "f", [(1,)], [1])] * 2, timeout={LONG!r})
"""
    caller = subprocess.Popen([sys.executable, "-c", script])
    assert wait_until(lambda: len(processes(LONG)) == 4)
    time.sleep(0.2)  # past the probes, into the jobs
    assert len(processes(LONG)) == 4
    caller.kill()
    caller.wait()
    assert wait_until(lambda: not processes(LONG), 1.0)
