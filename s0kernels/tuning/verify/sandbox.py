"""Run Python functions written by a language model: say which are right, or return their results.

    verify([Job(source, "f", [(3,)], [4])])             the results are compared with expected values
    verify([Program(source, "f", tests, prelude)])      tests as code: they define check(candidate)
    evaluate([Call(source, "f", (3,))])                 the value itself

Threat model: the code is harmful by accident, not by intent. It must not hang, fill memory or disk, start or
signal processes, delete files, harm the caller, or count as right without giving the right answers.

caller  --jobs-->  launcher (one fresh `python -I -S` per worker)  --forks per job-->  confined children
The caller may hold torch's threads and gigabytes, so it never forks; forks of the small launcher are cheap.

A child has its own session, stdin/stdout/stderr on /dev/null, its pipes and no other descriptor, an empty environment,
rlimits, uid 65534 if it was root and may change it, and SIGKILL when the launcher dies. A seccomp filter allows only
pure computation and read-only opens: fork, threads, exec, kill, sockets, and creating, writing, renaming or deleting
files fail with EPERM. That needs no capability, no namespace and no temporary directory. If the kernel allows it, the
launcher first enters new network, IPC and UTS namespaces as a second barrier; `confinement` describes the result. The
launcher kills its children after `timeout` seconds. If the filter does not work, `verify` and `evaluate` raise
RuntimeError.

The expected values never enter the child that runs the source. The child of a Job returns the results of the function,
and the caller compares them. The tests of a Program run in a second child, the judge, which is confined too and never
runs the source. Its `candidate` sends the arguments to the first child over a pipe, and returns the result or raises
the nearest builtin exception. Only the judge reports to the launcher, and a program passes only if `check` has returned
there and has called the candidate at least once. So a forged result must still be the right one, and code beside the
function that redefines, prints or exits cannot turn wrong into right. An exit, a crash or a value that is not plain
ends the job, even if the tests catch everything. So does an exception that C code treats as a result before the tests
can catch it: StopIteration within all(map(candidate, ...)), AttributeError under getattr with a default.

Plain values are None, bool, int, float, complex, str, bytes, list, tuple, dict, set and frozenset, of exactly these
types. Programs and Calls transfer them as copies that keep their types, so tests cannot see a changed argument; a
Counter, OrderedDict or defaultdict becomes the equal dict. Jobs transfer them as JSON, and equality is strict: True !=
1, 1 != 1.0 unless 1.0 was expected, floats must be identical, and NaN is never equal. JSON has no tuple, so tuples
count as lists, both as arguments and as results. A function that changes its arguments does not pass.

SQLite databases can be read through the library: `sqlite3.connect("file:PATH?mode=ro&immutable=1", uri=True)`, with
`PRAGMA temp_store=memory`, because temporary files are refused. The file and its folders must be readable by the
child's uid, which usually means by others. sqlite3 only says "unable to open database file"; open() the file first to
see the reason.

Not covered: reading files that the child's uid may read (their content can be sent nowhere, except back as a result).
Without a change of uid these include the caller's files and /proc entries, so code can deliberately search the caller's
memory for the answers. Also not covered: tests that execute the candidate's results, bugs in the kernel, CPU use within
the limits, and answers that are right by luck. Honest code cannot use threads, subprocesses and temporary files either.
If the uid was changed, modules that are not preloaded (_PRELOAD in confined.py) can be imported only if that uid can
read the standard library. Linux on x86_64 or aarch64 only.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from s0kernels.progress import Progress, say
from s0kernels.tuning.verify.wire import (
    FLOOD,
    NO_VERDICT,
    PROGRAM,
    REASON_LIMIT,
    SOLVE,
    TIMED_OUT,
    Limits,
    decode,
    encode,
    frame,
    is_json,
    receive,
    send,
)

__all__ = ["Call", "Job", "Outcome", "Program", "Sandbox", "Verdict", "confinement", "evaluate", "verify"]

_LAUNCHER_GRACE = 20.0  # seconds beyond a job's timeout after which the launcher itself is killed
_TRY_NAMESPACES = True


@dataclass(frozen=True)
class Job:
    """One function to check: `source` must define `function`; `inputs` are tuples of plain JSON arguments."""

    source: str
    function: str
    inputs: list[tuple]
    expected: list


@dataclass(frozen=True)
class Program:
    """One function to check by tests: `tests` must define check(candidate), which raises if the candidate is wrong.

    `prelude` is code that the tests may use; it runs before them. Both can use the candidate by its own name as well.
    """

    source: str
    function: str
    tests: str
    prelude: str = ""


@dataclass(frozen=True)
class Verdict:
    """`passed` is True if every result is as expected; otherwise `reason` says why not, in one printable line."""

    passed: bool
    reason: str


@dataclass(frozen=True)
class Call:
    """One function to run: `source` must define `function`; the arguments are plain values."""

    source: str
    function: str
    arguments: tuple = ()


@dataclass(frozen=True)
class Outcome:
    """`value` is the result of a call if `ok`; otherwise it is None, and `reason` says why in one printable line."""

    value: object
    reason: str
    ok: bool


# Succeeds only if the filter works: without it a process may always send signal 0 to itself.
_PROBE = Job(
    "import os\ndef probe():\n try:\n  os.kill(os.getpid(), 0)\n except PermissionError:\n  return 'confined'",
    "probe",
    [()],
    ["confined"],
)


def verify(
    jobs: Sequence[Job | Program],
    *,
    timeout: float = 2.0,
    memory_mb: int = 256,
    workers: int = 2,
    progress: bool = False,
) -> list[Verdict]:
    """Check jobs, and return verdicts in the order of `jobs`.

    timeout: seconds of wall clock per job, for all its inputs or tests together. memory_mb: MiB per child beyond the
    interpreter's own. Raise ValueError or TypeError for a job that no solution could pass, RuntimeError if the sandbox
    does not work on this machine.
    """
    verdicts = _each(jobs, timeout, memory_mb, 1, workers, progress)
    if progress:
        say(f"{sum(verdict.passed for verdict in verdicts)} verified")
    return verdicts


def evaluate(
    calls: Sequence[Call],
    *,
    timeout: float = 2.0,
    memory_mb: int = 256,
    result_mb: int = 1,
    workers: int = 2,
    progress: bool = False,
) -> list[Outcome]:
    """Run calls, and return outcomes in the order of `calls`. result_mb: limit on the text of a value in MiB. The other
    arguments are those of `verify`."""
    outcomes = _each(calls, timeout, memory_mb, result_mb, workers, progress)
    if progress:
        say(f"{sum(outcome.ok for outcome in outcomes)} returned")
    return outcomes


def confinement() -> str:
    """Describe the confinement of children on this machine, in one line."""
    call = Call("import os\ndef uid(): return os.getuid()", "uid")
    try:
        launcher = _Launcher(Limits(2.0, 256, 1 << 20, int(_TRY_NAMESPACES)))
    except RuntimeError as error:
        return str(error)
    try:
        uid = launcher.judge(call, _request(call)).value
        return f"seccomp filter, rlimits, uid {uid}; {launcher.namespaces}"
    finally:
        launcher.close()


class Sandbox:
    """Runs jobs, one at a time for each calling thread, and keeps its launchers for later jobs.

    timeout, memory_mb, result_mb: as for `verify` and `evaluate`. `close`, or the end of the process, ends the waiting
        launchers.
    """

    def __init__(self, *, timeout: float = 2.0, memory_mb: int = 256, result_mb: int = 1):
        if not (timeout > 0 and math.isfinite(timeout) and memory_mb > 0 and result_mb > 0):
            raise ValueError("timeout, memory_mb and result_mb must be positive")
        self._limits = (timeout, memory_mb, result_mb << 20)
        self._idle: deque[_Launcher] = deque()  # append and pop are atomic
        weakref.finalize(self, _close_all, self._idle)

    @overload
    def run(self, job: "Job | Program") -> "Verdict": ...
    @overload
    def run(self, job: "Call") -> "Outcome": ...
    def run(self, job):
        """Run a job, and return its verdict or outcome. It raises the same errors as `verify`."""
        return self.judge(job, _request(job))

    def judge(self, job: "Job | Program | Call", request: bytes) -> Any:
        """Run a job whose `request` has been encoded by `run`."""
        try:
            launcher = self._idle.pop()
        except IndexError:
            launcher = _Launcher(Limits(*self._limits, int(_TRY_NAMESPACES)))
        try:
            found = launcher.judge(job, request)
        except BaseException:
            launcher.close()
            raise
        if launcher.alive:
            self._idle.append(launcher)
        else:
            launcher.close()
        return found

    def close(self) -> None:
        _close_all(self._idle)


def _close_all(launchers: "deque[_Launcher]") -> None:
    while launchers:
        launchers.pop().close()


def _each(jobs: Sequence, timeout: float, memory_mb: int, result_mb: int, workers: int, progress: bool) -> list:
    """Run the jobs on `workers` launchers, and return the verdict or outcome of each."""
    if not workers > 0:
        raise ValueError("workers must be positive")
    sandbox = Sandbox(timeout=timeout, memory_mb=memory_mb, result_mb=result_mb)
    requests = [_request(job) for job in jobs]
    answers: list = [None] * len(requests)
    todo = deque(range(len(requests)))  # popleft is atomic, so the workers share it without a lock

    def work() -> None:
        while todo:
            try:
                index = todo.popleft()
            except IndexError:
                return
            answers[index] = sandbox.judge(jobs[index], requests[index])
            with lock:
                bar.reach(bar.done + 1)

    bar, lock = Progress("running", len(jobs), "job", shown=progress), threading.Lock()
    with contextlib.closing(sandbox), bar, ThreadPoolExecutor(workers) as pool:
        try:
            for future in [pool.submit(work) for _ in range(min(workers, len(requests)))]:
                future.result()
        finally:
            todo.clear()  # after an error or Ctrl-C the other workers stop at their next job
    return answers


def _request(job: Job | Program | Call) -> bytes:
    """Encode a job for the launcher: a Job without its expected values; a Program with its tests in a separate
    frame."""
    asked = {"source": job.source, "name": job.function}
    if isinstance(job, Program):
        if not all(type(text) is str for text in (job.tests, job.prelude)) or "check" not in job.tests:
            raise ValueError("tests must be code that defines check(candidate)")
        tests = {"name": job.function, "tests": job.tests, "prelude": job.prelude}
        return frame(PROGRAM, json.dumps(asked).encode()) + frame(0, json.dumps(tests).encode())
    if isinstance(job, Call):
        if type(job.arguments) is not tuple:
            raise TypeError("the arguments of a call must be a tuple")
        return frame(SOLVE, json.dumps(asked | {"inputs": [encode(job.arguments)], "exact": True}).encode())
    if not job.inputs or len(job.inputs) != len(job.expected):
        raise ValueError("a job needs at least one input, and as many expected values as inputs")
    inputs = [json.dumps(arguments) for arguments in job.inputs]
    json.dumps(job.expected)  # like the line above, refuses cycles
    if not is_json([job.inputs, job.expected]) or any(type(arguments) is not tuple for arguments in job.inputs):
        raise TypeError("inputs must be tuples, arguments and expected values plain JSON with str keys")
    return frame(SOLVE, json.dumps(asked | {"inputs": inputs, "exact": False}).encode())


def _same(want, got) -> bool:
    """Whether `got`, decoded from JSON, equals `want`. An int may stand for an expected float; otherwise types must
    agree."""
    if type(want) in (list, tuple):
        return type(got) is list and len(want) == len(got) and all(map(_same, want, got))
    if type(want) is dict:
        return type(got) is dict and want.keys() == got.keys() and all(_same(want[key], got[key]) for key in want)
    if type(want) is float:
        return type(got) in (int, float) and got == want
    return type(got) is type(want) and got == want


def _answer(job: Job | Program | Call, code: int, raw: bytes, limits: Limits) -> Verdict | Outcome:
    """Return the verdict or outcome for children that ended with `code` and wrote `raw`, which is not trusted."""
    good, value, reason = False, None, _failure(code, raw, limits)
    if not reason:
        reason = "garbled result"
        try:
            answer = json.loads(raw)
            if type(answer) is dict and type(answer.get("error")) is str:
                reason = answer["error"] + _quote(job, answer.get("line"))
            elif isinstance(job, Job):
                reason = _difference(job, answer)
                good = not reason
            elif isinstance(job, Program):
                good = answer == {"passed": True}
            else:
                (value,) = decode(raw)
                good = True
        except (
            TypeError,
            ValueError,
            RecursionError,
        ):  # invalid JSON or UTF-8, or integers or nesting beyond the limits
            pass
    praise = "returned" if isinstance(job, Call) else "passed"
    reason = praise if good else _line(reason)
    if not good and reason == praise:  # an error must not have the text of a success
        reason = "garbled result"
    return Outcome(value, reason, good) if isinstance(job, Call) else Verdict(good, reason)


def _failure(code: int, raw: bytes, limits: Limits) -> str | None:
    """Return the reason why there is no result, or None."""
    if code == TIMED_OUT:
        return f"timed out after {limits.timeout} s"
    if code == FLOOD:
        return f"output flood: more than {limits.result_bytes} bytes of results"
    if code == NO_VERDICT:
        return "the tests ended without a verdict"
    if code or not raw:
        return f"no result ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
    return None


def _difference(job: Job, answer) -> str:
    """Return the first difference from the expected results, or ""."""
    if type(answer) is not list or len(answer) != len(job.expected):
        return "garbled result"
    for arguments, want, got in zip(job.inputs, job.expected, answer, strict=True):
        if not _same(want, got):
            call = f"{job.function}({', '.join(map(repr, arguments))})"
            return f"wrong answer: {got!r} instead of {want!r} for {call}"
    return ""


def _quote(job: Job | Program | Call, number: int | None) -> str:
    """Return the line at which a program's tests failed."""
    if not isinstance(job, Program) or type(number) is not int:
        return ""
    line = "".join(job.tests.splitlines()[number - 1 : number]).strip()
    return f" (line {number}: {line})"


def _line(text: str) -> str:
    """Make a text printable on any terminal or log: it may hold control characters or lone surrogates."""
    return "".join(c if c.isprintable() else " " for c in text[:REASON_LIMIT]).strip()


class _Launcher:
    """The caller's end of one launcher process."""

    def __init__(self, limits: Limits):
        self.alive = True
        self._limits = limits
        # Some interpreters do not start without the library path; the launcher clears it for the children.
        env = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
        script = Path(__file__).resolve().with_name("confined.py")
        command = [sys.executable, "-I", "-S", script, *map(str, limits)]
        self._process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd="/", env=env, start_new_session=True
        )
        try:
            self.namespaces = self._read()[1].decode()
            probe = self.judge(_PROBE, _request(_PROBE))
            if not probe.passed:
                raise RuntimeError(f"the sandbox does not work here: {probe.reason}")
        except BaseException:
            self.close()
            raise

    def judge(self, job: Job | Program | Call, request: bytes) -> Any:
        """Run a job, and return an Outcome for a Call, else a Verdict."""
        with contextlib.suppress(BrokenPipeError):  # then reading fails as well
            send(self._process.stdin.fileno(), request)
        code, raw = self._read()
        if code is None:
            self.alive = False
            reason = "the launcher died"
            return Outcome(None, reason, False) if isinstance(job, Call) else Verdict(False, reason)
        return _answer(job, code, raw, self._limits)

    def _read(self) -> tuple[int | None, bytes]:
        return receive(self._process.stdout.fileno(), time.monotonic() + self._limits.timeout + _LAUNCHER_GRACE)

    def close(self) -> None:
        self._process.kill()  # a child that still runs dies with its launcher
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
