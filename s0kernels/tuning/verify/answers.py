"""Compare final answers with math-verify, in a process that can be killed: `python answers.py` is that process.

math-verify parses the text of a model and passes it to sympy. A power tower can keep sympy busy forever, or fill the
memory. The timeout of math-verify is an alarm signal, which does not interrupt such a computation.
"""

import contextlib
import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from wire import frame, receive, send

    del sys.path[0]
else:
    from s0kernels.tuning.verify.wire import frame, receive, send

_MEMORY = 2 << 30  # bytes of address space beyond those that the process has when it starts
_TO_START = 120.0  # seconds


class Comparer:
    """Compares answers, one at a time. Answers that do not agree within `seconds` count as different."""

    def __init__(self, seconds: float = 10.0):
        self._seconds = seconds
        self._lock = threading.Lock()
        self._worker: list[subprocess.Popen] = []
        weakref.finalize(self, _end, self._worker)

    def same(self, right: str, text: str) -> bool:
        """Whether the final answer in `text` is the `right` one. Raise ImportError if math-verify is not installed."""
        import math_verify  # noqa: F401  # pyright: ignore[reportUnusedImport]

        with self._lock:
            if not self._worker:
                self._worker.append(_start())
            (worker,) = self._worker
            done = False
            try:
                with contextlib.suppress(BrokenPipeError):  # then reading fails too
                    send(_number(worker.stdin), frame(0, json.dumps([right, text]).encode()))
                code, _ = receive(_number(worker.stdout), time.monotonic() + self._seconds)
                done = code is not None
            finally:
                if not done:  # it is still busy, or the input killed it
                    _end(self._worker)
        return code == 1

    def close(self) -> None:
        with self._lock:
            _end(self._worker)


def _start() -> subprocess.Popen:
    command = [sys.executable, "-P", str(Path(__file__).resolve())]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
    code, _ = receive(_number(worker.stdout), time.monotonic() + _TO_START)
    if code is None:
        _end([worker])
        raise RuntimeError("the process that compares answers does not start")
    return worker


def _number(pipe: Any) -> int:
    return pipe.fileno()


def _end(workers: list[subprocess.Popen]) -> None:
    while workers:
        worker = workers.pop()
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                pipe.close()


def _main() -> None:
    import math_verify

    parse: Any = math_verify.parse
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn that its own timeout is off
    answers = os.dup(1)
    os.dup2(2, 1)  # printed text must not get among the results
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    send(answers, frame(0, b""))
    while (question := receive(0))[0] is not None:
        try:
            gold, text = (parse(each, parsing_timeout=None) for each in json.loads(question[1]))
            same = bool(math_verify.verify(gold, text, timeout_seconds=None))
        except Exception:  # sympy may raise any exception
            same = False
        send(answers, frame(int(same), b""))


if __name__ == "__main__":
    _main()
