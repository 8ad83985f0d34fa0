"""Attempts of code to escape the sandbox, and helpers to observe them."""

import os
import pathlib
import time

from s0kernels.tuning.verify import sandbox

#: the beginning of a script that imports the sandbox of this tree, without the imports of the package
ALONE = f"""
import sys, types
folder = {str(pathlib.Path(sandbox.__file__).parent)!r}
for name, above in (("s0kernels", "/../.."), ("s0kernels.tuning", "/.."), ("s0kernels.tuning.verify", "")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder + above]
"""

# Launchers and their children have the timeout in their command line: these two identify the processes of this test
# run.
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


def confined(pid) -> bool:
    try:
        return "\nSeccomp:\t2\n" in pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(condition, seconds=5.0) -> bool:
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return bool(value)


def untouched(path) -> bool:
    entries = [path, *sorted(path.iterdir())]
    return (
        [entry.name for entry in entries[1:]] == ["kept", "kept-directory"]
        and all(entry.stat().st_mode & 0o777 == 0o777 for entry in entries)
        and (path / "kept").read_text() == "kept"
    )


def outcomes(sources, playground, make_job, **settings) -> dict:
    """Return by name the verdict on its source, and on a right job that ran after it in the same launcher."""
    right = make_job("def f(x): return x + 1")
    jobs = []
    for source in sources.values():
        source = source.replace("FILE", str(playground / "kept")).replace("MARKER", str(LONG))
        jobs += [make_job(source), right]
    verdicts = sandbox.verify(jobs, workers=1, **settings)
    return dict(zip(sources, zip(verdicts[::2], verdicts[1::2], strict=True), strict=True))


def attempt(statement, header="import os, sys, json, signal"):
    """Return a function that is right if it can first execute `statement`."""
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
    "forge-error": (attempt('os.write(3, b\'{"error": " passed"}\'); os._exit(0)'), "garbled"),
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
