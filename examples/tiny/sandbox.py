"""Run Python functions written by a small language model, and say which ones are right.

Threat model: the code is harmful by accident, not by intent. It must not hang, fill memory or disk, start or
signal processes, delete files, harm the caller, or count as right without giving the right answers.

caller  --jobs-->  launcher (one fresh `python -I -S` per worker)  --fork per job-->  confined child
The caller may hold torch's threads and gigabytes, so it never forks; forks of the small launcher are cheap.

The child has its own session, stdin/stdout/stderr on /dev/null, one result pipe and no other descriptor, an empty
environment, rlimits, uid 65534 if it was root and may change it, SIGKILL when the launcher dies, and a seccomp filter
that lets only pure computation and read-only opens through: fork, threads, exec, kill, sockets, and creating, writing,
renaming or deleting files fail with EPERM. That needs no capability, no namespace and no temporary directory. The
launcher kills the child after `timeout` seconds. Where the filter does not work, `verify` raises RuntimeError.

Expected values never enter the child: it returns what the function returned, as JSON over the pipe, and the caller
compares. So a forged answer must still be the right one, and nothing redefined in the child can turn wrong into
right. Equality is strict: True != 1, 1 != 1.0 unless 1.0 was expected, floats exactly, NaN never. JSON has no tuple,
so tuples count as lists, both as arguments and as results. A function that changes its arguments is not verified.

Not covered: reading what the child's uid may read (it can be sent nowhere, except back as a result). Without a
change of uid that includes the caller's files and /proc entries, and so code that deliberately searches the caller's
memory for the answers. Bugs in the kernel, CPU use within the limits, and answers that are right by luck.
Threads, subprocesses and temporary files are refused to honest code too. When the uid is dropped, modules outside
_PRELOAD can be imported only if that uid can read the standard library. Linux on x86_64 or aarch64 only.
"""

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import math
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import types
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

_RESULT_LIMIT = 1 << 20  # bytes of JSON a child may return
_REASON_LIMIT = 300  # characters
_LAUNCHER_GRACE = 20.0  # seconds on top of a job's timeout before the launcher itself is given up
_NOBODY = 65534
_RESULT_FD = 3
_TIMED_OUT, _FLOOD = 1001, 1002  # beyond any exit code or negated signal number
_FRAME = struct.Struct("<iI")  # exit code (0 in requests), payload bytes
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

# Imported before the fork: a child need not load them again, and uid 65534 may be unable to read them.
_PRELOAD = """
__future__ _strptime array base64 bisect calendar cmath collections copy datetime decimal enum fractions functools
hashlib heapq itertools json math numbers operator random re statistics string textwrap time typing unicodedata
"""

# What pure computation, imports and read-only file access need: name/x86_64/aarch64.
_SYSCALLS = """
read/0/63 write/1/64 pread64/17/67 readv/19/65 writev/20/66 close/3/57 lseek/8/62 fstat/5/80 newfstatat/262/79
statx/332/291 access/21/- faccessat/269/48 faccessat2/439/439 readlink/89/- readlinkat/267/78
getcwd/79/17 getdents64/217/61 mmap/9/222 mprotect/10/226 munmap/11/215 mremap/25/216 brk/12/214 madvise/28/233
rt_sigaction/13/134 rt_sigprocmask/14/135 rt_sigreturn/15/139 futex/202/98 restart_syscall/219/128 nanosleep/35/101
clock_gettime/228/113 clock_getres/229/114 clock_nanosleep/230/115 gettimeofday/96/169 time/201/- times/100/153
getrusage/98/165 sched_yield/24/124 sched_getaffinity/204/123 getrandom/318/278 uname/63/160 sysinfo/99/179
getpid/39/172 getppid/110/173 gettid/186/178 getuid/102/174 geteuid/107/175 getgid/104/176 getegid/108/177
getpgid/121/155 getsid/124/156 getgroups/115/158 exit/60/93 exit_group/231/94
"""


@dataclass(frozen=True)
class Job:
    """One function to check: `source` must define `function`; `inputs` are tuples of plain JSON arguments."""

    source: str
    function: str
    inputs: list[tuple]
    expected: list


@dataclass(frozen=True)
class Verdict:
    """`passed` only if every result equals the expected value; `reason` says why not, in one printable line."""

    passed: bool
    reason: str


# Succeeds only where the filter works: sending signal 0 to oneself is otherwise always allowed.
_PROBE = Job(
    "import os\ndef probe():\n try:\n  os.kill(os.getpid(), 0)\n except PermissionError:\n  return 'confined'",
    "probe",
    [()],
    ["confined"],
)


def verify(
    jobs: Sequence[Job], *, timeout: float = 2.0, memory_mb: int = 256, workers: int = 2, progress: bool = False
) -> list[Verdict]:
    """Verdicts in the order of `jobs`.

    timeout: seconds of wall clock per job, all its inputs together; memory_mb: MiB per job beyond the interpreter's.
    Raises ValueError or TypeError for a job that no solution could meet, RuntimeError if the sandbox does not work
    on this machine.
    """
    if not (timeout > 0 and math.isfinite(timeout) and memory_mb > 0 and workers > 0):
        raise ValueError("timeout, memory_mb and workers must be positive")
    requests = [_request(job) for job in jobs]
    verdicts: list = [None] * len(requests)
    todo = deque(range(len(requests)))  # popleft is atomic, so the workers share it without a lock

    def work() -> None:
        launcher = None
        try:
            while todo:
                try:
                    index = todo.popleft()
                except IndexError:
                    return
                launcher = launcher or _Launcher(timeout, memory_mb)
                verdicts[index] = launcher.judge(jobs[index], requests[index])
                if not launcher.alive:
                    launcher.close()
                    launcher = None
                if progress:
                    print(f"\r{len(jobs) - len(todo)}/{len(jobs)} jobs", end="", file=sys.stderr, flush=True)
        finally:
            if launcher:
                launcher.close()

    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in [pool.submit(work) for _ in range(min(workers, len(requests)))]:
                future.result()
        finally:
            todo.clear()  # after an error or Ctrl-C the other workers stop at their next job
    if progress:
        print(f": {sum(verdict.passed for verdict in verdicts)} verified", file=sys.stderr)
    return verdicts


def _request(job: Job) -> bytes:
    """What the child gets to see of a job: everything but the expected values."""
    if not job.inputs or len(job.inputs) != len(job.expected):
        raise ValueError("a job needs at least one input, and as many expected values as inputs")
    inputs = [json.dumps(arguments) for arguments in job.inputs]
    json.dumps(job.expected)  # like the line above, refuses cycles
    if not _is_plain([job.inputs, job.expected]) or any(type(arguments) is not tuple for arguments in job.inputs):
        raise TypeError("inputs must be tuples, arguments and expected values plain JSON with str keys")
    return json.dumps({"source": job.source, "name": job.function, "inputs": inputs}).encode()


def _is_plain(value) -> bool:
    """Exact types only: a subclass may lie in __eq__, and JSON would turn int keys into strings."""
    stack = [value]
    while stack:
        item = stack.pop()
        if type(item) is dict:
            stack.extend(item.values())
            if any(type(key) is not str for key in item):
                return False
        elif type(item) in (list, tuple):
            stack.extend(item)
        elif type(item) not in (str, int, float, bool, types.NoneType):
            return False
    return True


def _same(want, got) -> bool:
    """Whether `got`, decoded from JSON, is `want`; an int may stand for an expected float, nothing else is bent."""
    if type(want) in (list, tuple):
        return type(got) is list and len(want) == len(got) and all(map(_same, want, got))
    if type(want) is dict:
        return type(got) is dict and want.keys() == got.keys() and all(_same(want[key], got[key]) for key in want)
    if type(want) is float:
        return type(got) in (int, float) and got == want
    return type(got) is type(want) and got == want


def _compare(job: Job, code: int, raw: bytes, timeout: float) -> Verdict:
    """The verdict on a child that ended with `code` and wrote `raw`, of which nothing is trusted."""
    if code == _TIMED_OUT:
        return Verdict(False, f"timed out after {timeout} s")
    if code == _FLOOD:
        return Verdict(False, f"output flood: more than {_RESULT_LIMIT} bytes of results")
    if code or not raw:
        return Verdict(False, f"no result ({f'signal {-code}' if code < 0 else f'exit code {code}'})")
    try:
        answer = json.loads(raw)
        if type(answer) is dict and type(answer.get("error")) is str:
            return Verdict(False, _line(answer["error"]))
        if type(answer) is not list or len(answer) != len(job.expected):
            return Verdict(False, "garbled result")
        for arguments, want, got in zip(job.inputs, job.expected, answer, strict=True):
            if not _same(want, got):
                call = f"{job.function}({', '.join(map(repr, arguments))})"
                return Verdict(False, _line(f"wrong answer: {got!r} instead of {want!r} for {call}"))
    except (ValueError, RecursionError):  # not JSON, not UTF-8, integers or nesting beyond the parser's limits
        return Verdict(False, "garbled result")
    return Verdict(True, "passed")


def _line(text: str) -> str:
    """Printable on any terminal or log: the text may hold control characters or lone surrogates."""
    return "".join(c if c.isprintable() else " " for c in text[:_REASON_LIMIT]).strip()


class _Launcher:
    """The caller's end of one launcher process."""

    def __init__(self, timeout: float, memory_mb: int):
        self.alive = True
        self._timeout = timeout
        # Some interpreters do not even start without the library path; the launcher clears it for the children.
        env = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), str(timeout), str(memory_mb)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd="/", env=env, start_new_session=True
        )
        try:
            probe = self.judge(_PROBE, _request(_PROBE))
            if not probe.passed:
                raise RuntimeError(f"the sandbox does not work here: {probe.reason}")
        except BaseException:
            self.close()
            raise

    def judge(self, job: Job, request: bytes) -> Verdict:
        deadline = time.monotonic() + self._timeout + _LAUNCHER_GRACE
        with contextlib.suppress(BrokenPipeError):  # then reading fails as well
            _send(self._process.stdin.fileno(), _FRAME.pack(0, len(request)) + request)
        code, raw = _receive(self._process.stdout.fileno(), deadline)
        if code is None:
            self.alive = False
            return Verdict(False, "the launcher died")
        return _compare(job, code, raw, self._timeout)

    def close(self) -> None:
        self._process.kill()  # a child that still runs dies with its launcher
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def _send(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _receive(fd: int, deadline: float = math.inf) -> tuple[int | None, bytes]:
    """One frame; (None, b"") at end of file or at the deadline."""
    poller = select.poll()  # not select(): the caller may have more than 1024 descriptors
    poller.register(fd, select.POLLIN)
    data, size = bytearray(), _FRAME.size
    while len(data) < size:
        wait = None if deadline == math.inf else max(deadline - time.monotonic(), 0) * 1000
        chunk = os.read(fd, min(size - len(data), 1 << 16)) if poller.poll(wait) else b""
        if not chunk:
            return None, b""
        data += chunk
        if len(data) == _FRAME.size == size:
            size += _FRAME.unpack(data)[1]
    return _FRAME.unpack_from(data)[0], bytes(data[_FRAME.size :])


def _launcher_main(timeout: float, memory_mb: int) -> None:
    """In the launcher: one forked child per request on stdin, until the caller closes it."""
    os.environ.clear()
    for name in _PRELOAD.split():
        importlib.import_module(name)
    seccomp = _seccomp_program()
    gc.freeze()  # a collection in a child would otherwise copy every page of the launcher
    while True:
        code, request = _receive(0)
        if code is None:
            return
        code, raw = _run_child(request, timeout, memory_mb, seccomp)
        _send(1, _FRAME.pack(code, len(raw)) + raw)


def _run_child(request: bytes, timeout: float, memory_mb: int, seccomp: bytes) -> tuple[int, bytes]:
    """In the launcher: fork a child for the request, collect what it writes, and leave nothing of it behind."""
    readable, writable = os.pipe()
    launcher, deadline = os.getpid(), time.monotonic() + timeout
    child = os.fork()
    if not child:
        _child_main(request, writable, launcher, timeout, memory_mb, seccomp)
    os.close(writable)
    poller = select.poll()
    poller.register(readable, select.POLLIN)
    poller.register(0, select.POLLIN)
    code, raw = None, bytearray()
    while code is None:
        events = dict(poller.poll(max(deadline - time.monotonic(), 0) * 1000))
        if 0 in events:  # the caller sends one request at a time, so this is its end
            os.kill(child, signal.SIGKILL)
            sys.exit()
        if not events:
            code = _TIMED_OUT
        elif chunk := os.read(readable, 1 << 16):
            raw += chunk
            code = _FLOOD if len(raw) > _RESULT_LIMIT else None
        else:
            break
    os.close(readable)
    # Not yet waited for, so the pid cannot have been reused. A child that is already exiting keeps its exit code.
    os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (status, bytes(raw)) if code is None else (code, b"")


def _child_main(request: bytes, pipe: int, launcher: int, timeout: float, memory_mb: int, seccomp: bytes) -> None:
    """In the child: confine it, solve, answer, exit."""
    send, leave, dumps = _send, os._exit, json.dumps  # taken now, because the solution may replace them
    status = 1
    try:
        try:
            _confine(pipe, launcher, timeout, memory_mb, seccomp)
            answer = _solve(request)
        except BaseException as error:  # SystemExit and KeyboardInterrupt are no results either
            answer = dumps({"error": f"{type(error).__name__}: {error}"[:_REASON_LIMIT]})
        send(_RESULT_FD, answer.encode())
        status = 0
    finally:
        leave(status)


def _solve(request: bytes) -> str:
    """Call the function on each input; a JSON list of the results."""
    dumps, loads = json.dumps, json.loads
    job = loads(request)
    module = sys.modules["solution"] = types.ModuleType("solution")  # registered because dataclasses look it up
    exec(compile(job["source"], "<solution>", "exec", dont_inherit=True), module.__dict__)
    if not callable(function := module.__dict__.get(job["name"])):
        raise TypeError(f"no function {job['name']!r}")
    results = []
    for text in job["inputs"]:
        arguments = loads(text)
        value = function(*arguments)
        if dumps(arguments) != text:
            raise ValueError("the function changed its arguments")
        results.append(dumps(value))  # at once, because a later call may change the object; refuses cycles
        if not _is_plain(value):
            raise TypeError("the result is not plain JSON")
    return f"[{','.join(results)}]"


def _confine(pipe: int, launcher: int, timeout: float, memory_mb: int, seccomp: bytes) -> None:
    """In the child: give up everything a pure computation does not need."""
    os.dup2(pipe, _RESULT_FD)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(_RESULT_FD + 1, 64)  # the launcher holds only a handful
    os.setsid()

    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    for what, value in (
        (resource.RLIMIT_CPU, math.ceil(timeout) + 1),
        (resource.RLIMIT_AS, used + (memory_mb << 20)),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))

    if os.geteuid() == 0:
        # Containers may withhold these capabilities or the uid; the filter below protects without them.
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # after setuid, which resets it
    if os.getppid() != launcher:
        raise RuntimeError("the launcher died")
    _prctl(_PR_SET_DUMPABLE, 0)  # no core dump; RLIMIT_CORE does not stop handlers that read it from a pipe
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    code = ctypes.create_string_buffer(seccomp, len(seccomp))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(seccomp) // 8, ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(program))


def _prctl(option: int, *values: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    if _LIBC.prctl(option, *padded):
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def _seccomp_program() -> bytes:
    """Classic BPF: the listed system calls and opens that only read are allowed, the rest fails with EPERM."""
    machine = os.uname().machine
    if machine not in ("x86_64", "aarch64"):
        raise RuntimeError(f"no system call table for {machine}")
    column, arch, openat = (1, 0xC000003E, 257) if machine == "x86_64" else (2, 0xC00000B7, 56)
    load, if_equal, if_any_bit, leave = 0x20, 0x15, 0x45, 0x06
    allow, deny = (leave, 0, 0, 0x7FFF0000), (leave, 0, 0, 0x00050000 | errno.EPERM)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    # struct seccomp_data: number at 0, architecture at 4, arguments of 8 bytes from 16; both machines little-endian.
    code = [(load, 0, 0, 4), (if_equal, 1, 0, arch), deny, (load, 0, 0, 0)]
    for entry in _SYSCALLS.split():
        if (number := entry.split("/")[column]) != "-":
            code += [(if_equal, 0, 1, int(number)), allow]
    code += [(if_equal, 1, 0, openat), deny, (load, 0, 0, 16 + 2 * 8), (if_any_bit, 0, 1, writing), deny, allow]
    return b"".join(struct.pack("=HBBI", *step) for step in code)


if __name__ == "__main__":
    _launcher_main(float(sys.argv[1]), int(sys.argv[2]))
