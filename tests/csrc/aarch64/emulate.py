"""Run the compiled kernels of another architecture: they are built without torch, run in an emulator, and are called
from torch here.

    python emulate.py FOLDER EMULATOR COMPILER...   builds FOLDER/driver by COMPILER, and a command that runs it

As a pytest plugin it turns `S0KERNELS_CPU_LIBRARY=FOLDER/run` into a library whose operators run in that command. So
the tests of the `cpu` backend test the kernels of the other architecture.
"""

import os
import shlex
import struct
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
SOURCES = ["cpu/library.cpp", "cpu/portable.cpp"]
#: headers of torch that `torch.h` replaces
HEADERS = ["csrc/stable/library.h", "csrc/stable/ops.h", "csrc/stable/tensor.h", "headeronly/util/Exception.h"]


def build(folder: Path, emulator: list[str], compiler: list[str]) -> Path:
    """Build the driver, and return the command that runs it. `compiler` must make a static program for the other
    architecture."""
    for header in HEADERS:
        (folder / "torch" / header).parent.mkdir(parents=True, exist_ok=True)
        (folder / "torch" / header).touch()
    program, command = folder.resolve() / "driver", folder / "run"
    flags = [
        "-O2",
        "-std=c++20",
        "-ffp-contract=fast",
        "-Wall",
        f"-I{folder}",
        f"-I{CSRC}",
        "-include",
        HERE / "torch.h",
    ]
    files = [CSRC / source for source in SOURCES]
    subprocess.run([*compiler, *flags, *files, HERE / "driver.cpp", "-static", "-o", program], check=True)
    command.write_text(f"#!/bin/sh\nexec {shlex.join([*emulator, str(program)])}\n")
    command.chmod(0o755)
    return command


class Driver:
    """The running program. A forked process starts its own."""

    def __init__(self, command: Path):
        self.command, self.owner, self.lock = command, None, threading.Lock()
        self.start()

    def start(self) -> None:
        self.owner = os.getpid()
        self.process = subprocess.Popen([self.command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.schemas = [self.text() for _ in range(self.number("q"))]

    def take(self, size: int) -> bytes:
        data = self.process.stdout.read(size)
        if len(data) != size:
            raise RuntimeError(f"{self.command} ended with status {self.process.wait()}")
        return data

    def number(self, kind: str) -> int:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        return self.take(self.number("q")).decode()

    def call(self, schema, arguments: tuple):
        import torch

        name = schema.name.partition("::")[2]
        message, memory = [struct.pack("q", len(name)), name.encode()], []
        for argument, value in zip(schema.arguments, arguments, strict=True):
            message.append(struct.pack("B", value is not None))
            if isinstance(value, torch.Tensor):
                memory.append((argument, reached(value)))
                message += described(value, memory[-1][1])
            elif value is not None:
                kind = {"int": "q", "float": "d", "bool": "?"}[str(argument.type)]
                message.append(struct.pack(kind, value))
        with self.lock:
            if self.owner != os.getpid():
                self.start()
            self.process.stdin.write(b"".join(message))
            self.process.stdin.flush()
            if self.number("B"):
                raise RuntimeError(self.text())
            for argument, window in memory:
                data = bytearray(self.take(window.numel() * window.element_size()))
                if data and argument.alias_info is not None and argument.alias_info.is_write:
                    window.copy_(torch.frombuffer(data, dtype=window.dtype))
            return self.number("q") if schema.returns else None


def reached(x):
    """Return the memory from the first to the last element of a tensor, as a one-dimensional tensor."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.detach().as_strided((span,), (1,), x.storage_offset())


def described(x, window) -> list[bytes]:
    import torch

    types = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64]
    data = window.clone().view(torch.uint8).numpy().tobytes() if x.numel() else b""
    return [struct.pack(f"qq{2 * x.dim()}qq", types.index(x.dtype), x.dim(), *x.shape, *x.stride(), len(data)), data]


def pretend(command: Path) -> None:
    """Make torch load `command` as a library: it starts the program and registers its operators."""
    import torch

    load, kept = torch.ops.load_library, []

    def load_library(path: str) -> None:
        if Path(path) != command:
            return load(path)
        if kept:
            return None
        driver, library = Driver(command), torch.library.Library("s0kernels_cpu", "DEF")
        kept.extend([driver, library])
        for text in driver.schemas:
            name = library.define(text).partition(".")[0]
            schema = torch._C.parse_schema(f"s0kernels_cpu::{text}")
            library.impl(name, lambda *given, schema=schema: driver.call(schema, given), "CompositeExplicitAutograd")

    torch.ops.load_library = load_library


if __name__ == "__main__":
    folder, emulator, *compiler = sys.argv[1:]
    print(build(Path(folder), shlex.split(emulator), compiler))
elif os.environ.get("S0KERNELS_CPU_LIBRARY", "").endswith("/run"):
    pretend(Path(os.environ["S0KERNELS_CPU_LIBRARY"]))
