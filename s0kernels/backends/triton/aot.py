"""Kernels compiled ahead of time, on any machine: what each launch of a call would take of a chip."""

import ast
import hashlib
import importlib
import inspect
import pkgutil
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from s0kernels.backends.triton.aot_cases import CASES
from s0kernels.backends.triton.common.hopper import miscompiled
from s0kernels.backends.triton.common.launch import VARYING, Launch, power_of_two, recording
from s0kernels.backends.triton.common.targets import Target, known_target

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
#: Every kernel stores something. Triton 3.6 to 3.8 compile some for sm_100 into a return and say nothing.
_STORES_OF_NVIDIA = r"\bst\.global\b|cp\.async\.bulk\.tensor\S*\.global\.shared"
_STORES_OF_AMD = r"\b(?:global|buffer|flat)_store_"


class Usage(NamedTuple):
    """What a compiled kernel takes: registers of a thread, bytes of its stack (spills), bytes of shared memory, and the
    instructions in it that multiply matrices."""

    registers: int
    spills: int
    shared: int
    tensor: int


def launches_of(call: Callable[[], object], target: Target) -> list[Launch]:
    """What a call on tensors of the device "meta" would launch."""
    with recording(target) as found:
        call()
    return found


def table(cases: Iterable[str], chips: Iterable[str]) -> Iterator[dict]:
    """A row for each launch, which is compiled as it is asked for. Before 8.0 there are steps alone."""
    for name in cases:
        for target in map(known_target, chips):
            for call, run in CASES[name]().items():
                if 0 < target.capability < 80 and call != "step":
                    continue
                for launch in launches_of(run, target):
                    row = {"case": name, "target": target.name, "call": call, "kernel": launch.kernel.__name__}
                    row |= {"programs": launch.programs, "warps": launch.tiles.warps, "stages": launch.tiles.stages}
                    yield row | compile_launch(launch, target)[0]._asdict()


class Specialised(NamedTuple):
    """A launch as the just-in-time compiler looks at it: what makes it compile anew."""

    signature: dict
    constants: dict
    attributes: dict

    def key(self, launch: Launch) -> str:
        tiles = launch.tiles
        limit = (tiles.registers,) if tiles.registers else ()
        what = repr((*self, (tiles.warps, tiles.stages, *limit)))
        return hashlib.sha256(what.encode()).hexdigest()[:8]


def specialise(launch: Launch) -> Specialised:
    kernel, _, arguments, constants, _ = launch
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    found = Specialised({}, {}, {})
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            found.signature[name], found.constants[(i,)] = "constexpr", values[name]
        elif isinstance(values[name], tuple):
            found.signature[name] = tuple(_type_of(x, (i, j), found) for j, x in enumerate(values[name]))
        elif name in VARYING:
            found.signature[name] = _integer(values[name])
        else:
            found.signature[name] = _type_of(values[name], (i,), found)
    return found


def _type_of(value, path: tuple[int, ...], found: Specialised) -> str:
    if value is None or (isinstance(value, int) and value == 1):
        found.constants[path] = value
        return "constexpr"
    if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
        found.attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype].removeprefix('*')}{list(value.block_shape)}>"
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return _integer(value)


def _integer(value: int) -> str:
    return "i32" if abs(value) < 2**31 else "i64"


def compile_launch(launch: Launch, target: Target) -> tuple[Usage, list[str]]:
    """What it takes, and what `hopper.miscompiled` finds in it.

    Raises:
        ValueError: it takes more shared memory than the chip has, or than its tiles say; or Triton made nothing of it.
    """
    tiles = launch.tiles
    source = ASTSource(launch.kernel, *specialise(launch))
    if amd := target.capability == 0:
        chip = GPUTarget("hip", target.name, target.warp)
    else:
        chip = GPUTarget("cuda", target.capability, target.warp)
    compiled = triton.compile(source, target=chip, options=tiles.options())
    shared = compiled.metadata.shared
    room = target.shared
    if tiles.base:
        room = min(room, tiles.base + tiles.per_column * _width(launch))
    if shared > room:
        name = launch.kernel.__name__
        raise ValueError(f"{name} with {tiles} takes {shared} bytes of shared memory on {target.name}, of {room}")
    asm = compiled.asm
    if not re.search(_STORES_OF_AMD if amd else _STORES_OF_NVIDIA, asm["amdgcn" if amd else "ptx"]):
        raise ValueError(f"{launch.kernel.__name__} with {tiles} compiles to nothing for {target.name}")
    registers, spills, tensor = _of_amd(asm["amdgcn"]) if amd else _of_nvidia(asm["cubin"], asm["ptx"])
    return Usage(registers, spills, shared, tensor), miscompiled(asm["ttir"])


def _width(launch: Launch) -> int:
    constants = launch.constants
    return constants["BK"] if "BK" in constants else power_of_two(constants["N"])


def _of_amd(assembly: str) -> tuple[int, int, int]:
    """(vector registers, bytes of scratch memory, instructions on matrices) from the metadata of an object."""
    registers, scratch = (
        re.findall(rf"\.{name}:\s*(\d+)", assembly)[0] for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return int(registers), int(scratch), len(re.findall(r"\bv_mfma_", assembly))


def _of_nvidia(cubin: bytes, ptx: str) -> tuple[int, int, int]:
    """(registers, bytes of stack, instructions on matrices)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)[0]
    return int(registers), int(stack), len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.", ptx))


def kernels() -> dict[str, triton.runtime.JITFunction]:
    """All that are launched, by name."""
    package = importlib.import_module("s0kernels.backends.triton")
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    modules = [importlib.import_module(module.name) for module in found]
    return {name: x for module in modules for name, x in vars(module).items() if name.endswith("_kernel")}


def source_hash(kernel) -> str:
    """Of a kernel, of all functions of ours that it calls, and of the constants they use: what a change of leads to
    another kernel, on every version of Triton alike. Comments, docstrings and where a function stands do not matter."""
    texts, waiting = {}, [kernel]
    while waiting:
        function = waiting.pop().fn
        if function in texts:
            continue
        texts[function] = _without_comments(inspect.getsource(function))
        for used in function.__code__.co_names:
            value = function.__globals__.get(used)
            if isinstance(value, triton.language.constexpr):
                texts[used, value.value] = f"{used} = {value.value}"
            elif hasattr(value, "fn") and value.fn.__module__.startswith("s0kernels."):
                waiting.append(value)
    return hashlib.sha256("".join(sorted(texts.values())).encode()).hexdigest()[:8]


def _without_comments(source: str) -> str:
    tree = ast.parse(textwrap.dedent(source))
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and ast.get_docstring(function) is not None:
            del function.body[0]
    return ast.unparse(tree)
