"""The process side of sandbox.py: `python -I -S confined.py` is a launcher, which forks the confined children.

The launcher reads frames on stdin and answers each request with one frame on stdout. A Job or a Call has one child,
which computes and writes the results. A Program has two children, the candidate with the solution and the judge with
the tests:

launcher  <--verdict--  judge  --arguments-->  candidate
                               <--result-----

The launcher never reads the tests. The judge reads them from the launcher's stdin, so that no later candidate finds
them in the memory that it inherits.
"""

import builtins
import contextlib
import ctypes
import dis
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
import sys
import time
import traceback
import types
from collections.abc import Callable
from typing import Any, NamedTuple

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # -I leaves it out
from wire import (
    FLOOD,
    NO_VERDICT,
    PROGRAM,
    REASON_LIMIT,
    TIMED_OUT,
    Limits,
    decode,
    encode,
    frame,
    receive,
    send,
    to_json,
)

del sys.path[0]  # solutions must not find modules beside this one

_READY, _RETURNED, _RAISED, _FAILED = range(4)  # messages of a candidate to its judge
_ORPHANED = 77  # the exit code of a judge that lost its candidate
_TESTS_READ = b"+"  # the first byte that a judge writes
_NOBODY = 65534
_FIRST_PIPE = 3
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CLONE_NEWUSER, _NAMESPACES = 0x10000000, {"net": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000}

# Imported before the fork: children need not load them again, and uid 65534 may not be able to read them.
_PRELOAD = """
__future__ _strptime array base64 bisect calendar cmath collections contextlib copy dataclasses datetime decimal enum
fractions functools hashlib heapq itertools json math numbers operator queue random re sqlite3 statistics string
subprocess textwrap threading time typing unicodedata
"""

# System calls that pure computation, imports and read-only file access need: name/x86_64/aarch64.
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


def _launcher_main(limits: Limits) -> None:
    """Run the launcher: fork children for each request on stdin, until the caller closes it."""
    os.environ.clear()
    for name in _PRELOAD.split():
        with contextlib.suppress(ImportError):  # an interpreter may be built without sqlite3
            importlib.import_module(name)
    send(1, frame(0, (_enter_namespaces() if limits.namespaces else "no namespaces (not asked for)").encode()))
    _prctl(
        _PR_SET_DUMPABLE, 0
    )  # inherited: no process of the same uid can read a judge, not even before it is confined
    box = _Box(limits, os.getpid(), _seccomp_program())
    gc.freeze()  # a collection in a child would otherwise copy every page of the launcher
    while True:
        kind, request = receive(0)
        if kind is None:
            return
        send(1, frame(*_run(kind, request, box)))


class _Box(NamedTuple):
    """The confinement of every child of a launcher."""

    limits: Limits
    launcher: int
    seccomp: bytes


def _run(kind: int, request: bytes, box: _Box) -> tuple[int, bytes]:
    """In the launcher: fork the children of a request, collect their output, and end them all."""
    deadline = time.monotonic() + box.limits.timeout
    result, writable = os.pipe()
    if kind == PROGRAM:
        (questions, ask), (answers, answer) = os.pipe(), os.pipe()
        pipes = (writable, questions, ask, answers, answer)
        candidate = _fork(_CANDIDATE, request, (answer, questions), box)
        children = [_fork(_JUDGE, None, (writable, answers, ask), box), candidate]
    else:
        pipes = (writable,)
        children = [_fork(_SOLVER, request, pipes, box)]
    for pipe in pipes:
        os.close(pipe)
    code, raw = _collect(result, deadline, box.limits.result_bytes, children)
    os.close(result)
    statuses = [_end(child) for child in children]
    if kind == PROGRAM:
        if not raw.startswith(_TESTS_READ):
            sys.exit()  # the tests are still on stdin
        raw = raw[1:]
        if not code and statuses[0] == _ORPHANED:
            return statuses[1], b""
        if not code and (statuses[0] or not raw):
            return NO_VERDICT, b""
    return (code, b"") if code else (statuses[0], raw)


def _collect(result: int, deadline: float, limit: int, children: list[int]) -> tuple[int, bytes]:
    """Read the pipe until it is closed. Return 0 and the data, or the code of an earlier end."""
    poller = select.poll()
    poller.register(result, select.POLLIN)
    poller.register(0, 0)  # hang-up only: the tests may still be on stdin
    raw = bytearray()
    while True:
        events = dict(poller.poll(max(deadline - time.monotonic(), 0) * 1000))
        if 0 in events:
            for child in children:
                os.kill(child, signal.SIGKILL)
            sys.exit()
        if not events:
            return TIMED_OUT, bytes(raw)
        chunk = os.read(result, 1 << 16)
        if not chunk:
            return 0, bytes(raw)
        raw += chunk
        if len(raw) > limit:
            return FLOOD, bytes(raw)


def _end(child: int) -> int:
    """Kill a child if it still runs. Return its exit code or negated signal."""
    # Not yet waited for, so the pid cannot have been reused. A child that is already exiting keeps its exit code.
    os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class _Role(NamedTuple):
    """The task of a child: `work(request, limits)` returns its final output, `failed` encodes the error that ends
    it."""

    work: Callable[[bytes, Limits], bytes]
    failed: Callable[[str], bytes]


def _fork(role: _Role, request: bytes | None, pipes: tuple[int, ...], box: _Box) -> int:
    """Fork a child with `pipes` as descriptors 3, 4, ... Without a request it reads the next frame of the caller."""
    child = os.fork()
    if child:
        return child
    write, leave = send, os._exit  # bound now, because the solution may replace them
    status = 1
    try:
        if request is None:
            code, request = receive(0)
            if code is None:
                leave(status)
            write(pipes[0], _TESTS_READ)
        try:
            _confine(pipes, box)
            answer = role.work(request, box.limits)
        except BaseException as error:  # SystemExit and KeyboardInterrupt are failures too
            answer = role.failed(f"{type(error).__name__}: {error}"[:REASON_LIMIT])
        write(_FIRST_PIPE, answer)
        status = 0
    finally:
        leave(status)


def _load(source: str, name: str, title: str) -> dict:
    """Execute `source` as a module, and return its namespace."""
    module = sys.modules.setdefault(name, types.ModuleType(name))  # registered because dataclasses look it up
    exec(compile(source, f"<{title}>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _function(job: dict):
    function = _load(job["source"], "solution", "solution").get(job["name"])
    if not callable(function):
        raise TypeError(f"no function {job['name']!r}")
    return function


def _solve(request: bytes, _limits: Limits) -> bytes:
    """Call the function on each input, and return the list of results, as JSON or with exact types."""
    dumps = json.dumps
    job = json.loads(request)
    exact, inputs = job["exact"], job["inputs"]
    from_text, to_text = (decode, encode) if exact else (json.loads, to_json)
    function = _function(job)
    results = ['"list"'] if exact else []
    for text in inputs:
        arguments = from_text(text)
        value = function(*arguments)
        if not exact and dumps(arguments) != text:
            raise ValueError("the function changed its arguments")
        results.append(to_text(value))  # encoded at once, because a later call may change the object
    return f"[{','.join(results)}]".encode()


def _serve(request: bytes, _limits: Limits) -> bytes:
    """In the candidate: call the function with the arguments that the judge sends, until it closes the pipe."""
    write, read, pack, to_text, from_text = send, receive, frame, encode, decode
    function = _function(json.loads(request))
    write(_FIRST_PIPE, pack(_READY, b"null"))
    while True:
        code, question = read(_FIRST_PIPE + 1)
        if code is None:
            return b""
        arguments, keywords = from_text(question)
        try:
            value = function(*arguments, **keywords)
        except Exception as error:
            base = next(cls.__name__ for cls in type(error).__mro__ if cls.__module__ == "builtins")
            raised = [base, type(error).__name__, str(error)[:REASON_LIMIT]]
            write(_FIRST_PIPE, pack(_RAISED, to_text(raised).encode()))
        else:
            write(_FIRST_PIPE, pack(_RETURNED, to_text(value).encode()))


def _candidate_failed(text: str) -> bytes:
    return frame(_FAILED, text.encode(errors="replace"))


def _judge(request: bytes, limits: Limits) -> bytes:
    """In the judge: run the tests on a stand-in for the candidate."""
    job = json.loads(request)
    candidate = _StandIn(job["name"], limits.result_bytes)
    candidate.hear()
    try:
        _load(job["prelude"], "tests", "prelude")[job["name"]] = candidate  # some tests call it by its name
        check = _load(job["tests"], "tests", "tests")["check"]
    except BaseException as error:
        return _report(f"the tests do not load: {type(error).__name__}: {error}")
    try:
        check(candidate)
        candidate.check_seen()
    except BaseException as error:
        if error is candidate.raised:
            return _report(f"the candidate raised {candidate.raised_text}")
        # The caller quotes the tests. This text must not, because it passes through the launcher's memory.
        lines = [step.lineno for step in traceback.extract_tb(error.__traceback__) if step.filename == "<tests>"]
        said = "" if isinstance(error, AssertionError) or not str(error) else f": {error}"
        return _report(f"wrong: {type(error).__name__}{said}", lines[-1] if lines else None)
    return json.dumps({"passed": True}).encode() if candidate.calls else _report("the tests never call the candidate")


def _report(reason: str, line: int | None = None) -> bytes:
    return json.dumps({"error": reason[:REASON_LIMIT], "line": line}).encode()


class _StandIn:
    """The candidate as the tests see it: a call is sent to the candidate's process. An error that no test may catch
    ends the judge at once."""

    def __init__(self, name: str, limit: int):
        self.__name__ = name
        self.calls, self.raised_text = 0, ""
        self.raised: Exception | None = None
        self._limit = limit

    def __call__(self, *arguments, **keywords):
        try:
            question = encode([arguments, keywords])
        except (TypeError, ValueError) as error:
            self._finish(_report(f"the tests pass an argument that cannot be sent: {error}"))
        self.check_seen()
        self.calls += 1
        try:
            send(_FIRST_PIPE + 2, frame(0, question.encode()))
        except BrokenPipeError:
            self._finish(b"", _ORPHANED)
        return self.hear()

    def hear(self):
        try:
            code, payload = receive(_FIRST_PIPE + 1, limit=self._limit)
            if code is None:
                self._finish(b"", _ORPHANED)
            if code == _FAILED:
                self._finish(_report(payload.decode(errors="replace")))
            answer = decode(payload)
            if code == _RAISED:
                self.raised = _exception(*answer)
                self.raised_text = f"{answer[1]}: {answer[2]}"
        except OverflowError:
            self._finish(_report("output flood: a result beyond the limit"))
        except (TypeError, ValueError):
            self._finish(_report("garbled result"))
        if self.raised is not None and code == _RAISED:
            raise self.raised
        return answer

    def check_seen(self) -> None:
        """End the judge if C code swallowed the candidate's last exception: all, map, getattr and others treat
        StopIteration, IndexError or AttributeError as a result, so that tests would wrongly pass."""
        if self.raised is not None and not _is_caught(self.raised):
            self._finish(_report(f"the candidate raised {self.raised_text}, which the tests do not catch"))

    @staticmethod
    def _finish(verdict: bytes, status: int = 0) -> None:
        send(_FIRST_PIPE, verdict)
        os._exit(status)


def _is_caught(error: BaseException) -> bool:
    """Whether the outermost frame in the traceback of an exception has a handler at that instruction."""
    reached = error.__traceback__
    if reached is None or reached.tb_frame.f_code.co_filename == __file__:
        return False
    parse: Any = getattr(dis, "_parse_exception_table")  # noqa: B009
    handlers = parse(reached.tb_frame.f_code)
    return any(entry.start <= reached.tb_lasti < entry.end for entry in handlers)


def _exception(base: str, _name: str, text: str) -> Exception:
    """Make an exception of a builtin class, which represents an exception of the candidate in the tests."""
    cls: Any = getattr(builtins, base, None)
    if type(text) is not str or not issubclass(cls, Exception):
        raise TypeError
    try:
        return cls(text)
    except TypeError:  # such as UnicodeDecodeError, which needs more arguments
        return Exception(text)


_SOLVER = _Role(_solve, lambda text, dumps=json.dumps: dumps({"error": text}).encode())
_CANDIDATE = _Role(_serve, _candidate_failed)
_JUDGE = _Role(_judge, _report)


def _enter_namespaces() -> str:
    """In the launcher: leave the caller's network, IPC and UTS namespaces, if the kernel allows it. Return the outcome
    as text.

    A PID namespace is not used: its first process is its init, which treats signals differently and whose end prevents
    further forks. The filter already keeps children from sending signals. Root does not use a user namespace: uid 65534
    would not exist in it, and that uid protects more.
    """
    trial = os.fork()
    if not trial:  # a failure half way cannot be undone
        status = 255
        try:
            _unshare()
            status = 0
        except OSError as error:
            status = error.errno or 255
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(trial, 0)[1])
    if status:
        return f"no namespaces (unshare: {os.strerror(status)})"
    _unshare()
    return f"namespaces: {' '.join(_NAMESPACES)}"


def _unshare() -> None:
    uid, gid = os.geteuid(), os.getegid()
    _check(_LIBC.unshare(sum(_NAMESPACES.values()) + (_CLONE_NEWUSER if uid else 0)), "unshare")
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        # The creator of a namespace has every capability in it. Drop them all: version 3 of the call, this thread.
        _check(_LIBC.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)), "capset")


def _confine(pipes: tuple[int, ...], box: _Box) -> None:
    """In the child: give up everything that a pure computation does not need."""
    for moved, pipe in enumerate(pipes, 48):  # moved away first: the number of one pipe may be the target of another
        os.dup2(pipe, moved)
    for place in range(len(pipes)):
        os.dup2(48 + place, _FIRST_PIPE + place)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(_FIRST_PIPE + len(pipes), 64)  # the launcher holds only a handful
    os.setsid()

    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    for what, value in (
        (resource.RLIMIT_CPU, math.ceil(box.limits.timeout) + 1),
        (resource.RLIMIT_AS, used + (box.limits.memory_mb << 20)),
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
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # after setuid, which resets this
    if os.getppid() != box.launcher:
        raise RuntimeError("the launcher died")
    _prctl(_PR_SET_DUMPABLE, 0)  # no core dump; RLIMIT_CORE does not stop handlers that read it from a pipe
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    code = ctypes.create_string_buffer(box.seccomp, len(box.seccomp))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(box.seccomp) // 8, ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(program))


def _prctl(option: int, *values: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    _check(_LIBC.prctl(option, *padded), f"prctl {option}")


def _check(failed: int, what: str) -> None:
    if failed:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _seccomp_program() -> bytes:
    """Return the seccomp filter as classic BPF: it allows the listed system calls and read-only opens, and all else
    fails with EPERM."""
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
    _launcher_main(Limits(float(sys.argv[1]), *map(int, sys.argv[2:])))
