"""benchmarks/quality/sandbox.py: right code passes; ways to hang, harm or cheat fail and leave nothing behind."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

QUALITY = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "quality"
sys.path.insert(0, str(QUALITY))
import sandbox  # noqa: E402
from sandbox import Job, verify  # noqa: E402

# Launchers and their children carry the timeout in their command line: these two mark the processes of this test run.
HANG, LONG = 0.4 + os.getpid() * 1e-9, 5 + os.getpid() * 1e-9


def processes(*markers) -> list[int]:
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(str(marker).encode() in words for marker in markers):
                found.append(int(entry.name))
    return found


def wait_until(condition, seconds=5.0) -> bool:
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return bool(value)


@pytest.fixture(autouse=True)
def no_process_left():
    yield
    assert wait_until(lambda: not processes(HANG, LONG), 1.0), "a process outlived the test"


@pytest.fixture(scope="module")
def playground():
    """A directory where any uid may do anything: a file, a directory, and nothing else may ever be in it."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="sandbox-test-", dir="/tmp"))
    (path / "kept").write_text("kept")
    (path / "kept-directory").mkdir()
    for each in (path, *path.iterdir()):
        each.chmod(0o777)
    yield path
    shutil.rmtree(path)


def untouched(path) -> bool:
    entries = [path, *sorted(path.iterdir())]
    return (
        [entry.name for entry in entries[1:]] == ["kept", "kept-directory"]
        and all(entry.stat().st_mode & 0o777 == 0o777 for entry in entries)
        and (path / "kept").read_text() == "kept"
    )


def outcomes(sources, playground, **settings) -> dict:
    """Per name the verdict on its source and on a right job that ran after it, in the same launcher."""
    right = Job("def f(x): return x + 1", "f", [(3,)], [4])
    jobs = []
    for source in sources.values():
        source = source.replace("FILE", str(playground / "kept")).replace("MARKER", str(LONG))
        jobs += [Job(source, "f", [(3,)], [4]), right]
    verdicts = verify(jobs, workers=1, **settings)
    return dict(zip(sources, zip(verdicts[::2], verdicts[1::2], strict=True), strict=True))


def run(source, inputs=((3,),), expected=(4,), **settings):
    (verdict,) = verify([Job(source, "f", list(inputs), list(expected))], **{"timeout": LONG, "workers": 1, **settings})
    assert verdict.passed == (verdict.reason == "passed")
    return verdict


def attempt(statement, header="import os, sys, json, signal"):
    """A function that is right, provided that it may first do `statement`."""
    return f"{header}\ndef f(x):\n    {statement}\n    return x + 1\n"


LIBC = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)"
REFUSED = "PermissionError"

# name: (source, part of the reason). FILE is a path in the playground. f(3) must be 4.
ESCAPES = {
    "exit-at-import": ("import sys\nsys.exit(0)", "SystemExit: 0"),
    "exit-in-call": (attempt("sys.exit(0)"), "SystemExit: 0"),
    "raise-system-exit": (attempt("raise SystemExit"), "SystemExit"),
    "os-exit": (attempt("os._exit(0)"), "no result (exit code 0)"),
    "keyboard-interrupt": (attempt("raise KeyboardInterrupt"), "KeyboardInterrupt"),
    "abort": (attempt("os.abort()"), "no result (signal"),
    "hostile-exception": (
        "class E(Exception):\n def __str__(self): raise SystemExit(0)\ndef f(x): raise E",
        "no result (exit code 1)",
    ),
    "syntax-error": ("def f(x) return x + 1", "SyntaxError"),
    "null-byte": ("def f(x): return x + 1\n\0", "null bytes"),
    "nested-source": ("f = " + "(" * 5000, "SyntaxError"),
    "function-missing": ("def g(x): return x + 1", "no function 'f'"),
    "function-not-callable": ("f = 4", "no function 'f'"),
    "infinite-recursion": ("def f(x): return f(x)", "RecursionError"),
    "memory-bomb": (attempt("bytearray(300 << 20)"), "MemoryError"),
    "memory-bomb-in-steps": (attempt("y = [0]\n    while len(y) < 1 << 26: y += y"), "MemoryError"),
    "result-flood": ("def f(x): return 'x' * (2 << 20)", "output flood"),
    "pipe-flood": (attempt("while os.write(3, b'x' * 65536): pass"), "output flood"),
    "fork": (attempt("os.fork()"), REFUSED),
    "fork-and-daemonise": (attempt("os.fork() or (os.setsid(), os.fork(), signal.pause())"), REFUSED),
    "thread": (attempt("threading.Thread(target=print).start()", "import threading"), "can't start new thread"),
    "subprocess": (attempt("subprocess.Popen(['sleep', 'MARKER'])", "import subprocess"), REFUSED),
    "os-system": (attempt("assert os.system('touch FILE-new') == 0"), "AssertionError"),
    "exec": (attempt("os.execv('/bin/sh', ['sh', '-c', 'printf [4] >&3'])"), REFUSED),
    "write-new-file": (attempt("open('FILE-new', 'w')"), REFUSED),
    "write-to-cwd": (attempt("open('new', 'w')"), REFUSED),
    "write-old-file": (attempt("open('FILE', 'r+').write('x')"), REFUSED),
    "append": (attempt("open('FILE', 'a').write('x')"), REFUSED),
    "truncate": (attempt("os.truncate('FILE', 0)"), REFUSED),
    "delete": (attempt("os.remove('FILE')"), REFUSED),
    "delete-directory": (attempt("os.rmdir('FILE-directory')"), REFUSED),
    "rename": (attempt("os.rename('FILE', 'FILE-new')"), REFUSED),
    "link": (attempt("os.symlink('/', 'FILE-new')"), REFUSED),
    "mkdir": (attempt("os.mkdir('FILE-new')"), REFUSED),
    "chmod": (attempt("os.chmod('FILE', 0o600)"), REFUSED),
    "memory-file": (attempt("os.memfd_create('x')"), REFUSED),
    "kill-launcher": (attempt("os.kill(os.getppid(), signal.SIGKILL)"), REFUSED),
    "signal-everyone": (attempt("os.kill(-1, 0)"), REFUSED),
    "signal-by-libc": (attempt("assert libc.kill(libc.getppid(), 9) == 0", LIBC), "AssertionError"),
    "network": (attempt("assert libc.socket(2, 1, 0) >= 0", LIBC), "AssertionError"),
    "system-v-shared-memory": (attempt("assert libc.shmget(0, 4096, 0o1666) >= 0", LIBC), "AssertionError"),
    "change-limits": (attempt("resource.setrlimit(resource.RLIMIT_CPU, (1, 1))", "import resource"), "ValueError"),
    "be-root-again": (attempt("os.setuid(0)"), REFUSED),
    "other-process-priority": (attempt("os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)"), REFUSED),
    "segfault": (attempt("libc.strlen(1)", LIBC), "no result (signal 11)"),
    "close-descriptors": (attempt("os.closerange(0, 64)"), "no result"),
    "close-and-hang": (attempt("os.close(3)\n    while True: pass"), "no result (signal 9)"),
    "forge-wrong-and-exit": (attempt("os.write(3, b'[5]'); os._exit(0)"), "wrong answer: 5 instead of 4"),
    "forge-before-answer": (attempt("os.write(3, b'[4]')"), "garbled"),
    "forge-right-then-crash": (attempt("os.write(3, b'[4]'); os._exit(1)"), "no result (exit code 1)"),
    "forge-verdict": (attempt("os.write(3, b'{\"passed\": true}'); os._exit(0)"), "garbled"),
    "forge-frame": (attempt("os.write(3, b'\\0' * 4 + b'\\3\\0\\0\\0[4]'); os._exit(0)"), "garbled"),
    "forge-extra-results": (attempt("os.write(3, b'[4, 4]'); os._exit(0)"), "garbled"),
    "forge-deep-json": (attempt("os.write(3, b'[' * 60000); os._exit(0)"), "garbled"),
    "forge-huge-integer": (attempt("os.write(3, b'[' + b'4' * 9999 + b']'); os._exit(0)"), "garbled"),
    "forge-on-stdout": (attempt("os.write(1, b'\\0' * 4 + b'\\3\\0\\0\\0[4]'); os._exit(0)"), "no result"),
    "replace-builtins": (
        "import builtins\nbuiltins.type = lambda value: int\nbuiltins.len = lambda value: 4\ndef f(x): return 5",
        "",
    ),
    "replace-comparison": (
        "import __main__\n__main__._same = __main__._is_plain = lambda *a: True\ndef f(x): return 5",
        "wrong answer",
    ),
    "replace-os-exit": (attempt("os._exit = sys.exit = lambda *a: None; x = 4"), "wrong answer"),
    "replace-os-write": (attempt("os.write = lambda fd, data: len(data)"), "no result (exit code 0)"),
    "replace-json": (attempt("json.dumps = json.loads = lambda *a: '4'; x = 4"), "wrong answer"),
    "lying-equality": (
        "class Liar(int):\n def __eq__(self, other): return True\n __hash__ = int.__hash__\ndef f(x): return Liar(5)",
        "not plain JSON",
    ),
    "subclass-of-int": ("class Int(int): pass\ndef f(x): return Int(4)", "not plain JSON"),
    "cyclic-result": ("def f(x):\n x = []\n x.append(x)\n return x", "ValueError"),
    "set-result": ("def f(x): return {4}", "TypeError"),
}
HANGS = {
    "infinite-loop": attempt("while True: pass"),
    "hang-at-import": "while True: pass",
    "sleep": attempt("time.sleep(99)", "import time"),
    "stuck-in-c": attempt("9 ** 9 ** 9"),
    "print-flood": attempt("while True: print('x' * 9999)"),
    "stderr-flood": attempt("while True: os.write(2, b'x' * 9999)"),
    "ignore-signals": attempt("signal.signal(15, signal.SIG_IGN)\n    while True: pass"),
    "swallow-exceptions": "import os\ndef f(x):\n while True:\n  try: os.fork(), open('FILE', 'w')\n  except: pass",
    "hang-after-right-answer": attempt("os.write(3, b'[4]')\n    while True: pass"),
}


@pytest.fixture(scope="module")
def escapes(playground):
    return outcomes({name: source for name, (source, _) in ESCAPES.items()}, playground, timeout=LONG, memory_mb=64)


@pytest.fixture(scope="module")
def hangs(playground):
    return outcomes(HANGS, playground, timeout=HANG, memory_mb=64)


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
    # How it dies depends on the interpreter: MemoryError, a segmentation fault or the timeout.
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
    # The second call changes the list that the first returned into what was expected of the first.
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
    """The layers overlap, so most escapes would still fail with one of them gone; here each is seen by itself."""
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
    root = os.geteuid() == 0
    want = {
        "uids": ["65534"] if root else sorted({str(i) for i in (*os.getresuid(), *os.getresgid())}),
        "groups": [] if root else [str(group) for group in os.getgroups()],
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
            os.setgroups([4])  # so that there is a group to give up
    except PermissionError:
        pytest.skip("this root may not change its ids: only the filter protects, which the other tests show")
    try:
        assert run(source, [()], [want]).reason == "passed"
    finally:
        if root:
            os.setgroups(groups)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_as_a_normal_user(playground):
    """The part without a change of uid, where files and processes of the same user are within reach."""
    python = sys.executable if os.stat("/root").st_mode & 0o001 else "/usr/bin/python3"
    script = f"""
import sys
if sys.version_info < (3, 11):
    sys.exit("too old")
sys.path.insert(0, {str(QUALITY)!r})
from sandbox import Job, verify
bodies = ["pass", "os.kill(os.getppid(), 9)", "os.kill(-1, 0)", "os.remove({str(playground / "kept")!r})", "os.fork()"]
jobs = [Job(f"import os\\ndef f(x):\\n {{body}}\\n return x", "f", [(1,)], [1]) for body in bodies]
print(*[verdict.reason.split(":")[0] for verdict in verify(jobs, timeout={LONG!r})])
"""
    somebody = {"user": 12345, "group": 12345, "extra_groups": []}
    try:
        done = subprocess.run([python, "-B", "-c", script], cwd="/", capture_output=True, text=True, **somebody)
    except OSError as error:
        pytest.skip(f"no interpreter for another user: {error}")
    if done.returncode and ("too old" in done.stderr or "Permission denied" in done.stderr):
        pytest.skip(f"the other user cannot run this interpreter or read this tree: {done.stderr}")
    assert done.stdout.split() == ["passed"] + ["PermissionError"] * 4, done.stderr


def test_many_mixed_jobs_keep_their_order(capsys):
    sources = ["return x + 1", "return x", "import os; os._exit(0)", "os", "import os; os.read(0, 9999); return x + 1"]
    jobs = [Job(f"def f(x): {sources[i % 5]}", "f", [(i,)], [i + 1]) for i in range(200)]
    jobs[77] = Job("def f(x):\n while True: pass", "f", [(1,)], [1])
    verdicts = verify(jobs, timeout=1.5, workers=3, progress=True)
    assert verdicts[77].reason == "timed out after 1.5 s"
    starts = ["passed", "wrong answer", "no result", "NameError", "passed"]
    assert all(v.reason.startswith(starts[i % 5]) for i, v in enumerate(verdicts) if i != 77)
    assert "200/200 jobs" in capsys.readouterr().err


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
        (Job("", "f", [], []), ValueError),  # would be right without having been called
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
import sys
sys.path.insert(0, {str(QUALITY)!r})
from sandbox import Job, verify
verify([Job("def f(x):\\n while True: pass", "f", [(1,)], [1])] * 2, timeout={LONG!r})
"""
    caller = subprocess.Popen([sys.executable, "-c", script])
    assert wait_until(lambda: len(processes(LONG)) == 4)
    time.sleep(0.2)  # past the probes, into the jobs
    assert len(processes(LONG)) == 4
    caller.kill()
    caller.wait()
    assert wait_until(lambda: not processes(LONG), 1.0)
