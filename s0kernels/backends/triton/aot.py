"""Kernels compiled ahead of time, on any machine: what each launch of a call would take of a chip."""

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from s0kernels.backends.triton.launch import Launch, Target, recording

#: Multiprocessors of an A100, an H100 or H200, and a B200.
TARGETS = {80: Target(80, 108), 90: Target(90, 132), 100: Target(100, 148)}
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Usage(NamedTuple):
    """What a compiled kernel takes: registers of a thread, bytes of its stack (spills), bytes of shared memory, and the
    tensor-core instructions in it."""

    kernel: str
    programs: int
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    tensor: int


def delta_calls(B=1, T=8192, H=16, HV=32, K=128, V=128, dtype=torch.bfloat16) -> dict[str, Callable[[], object]]:
    """Calls of the gated delta rule with a shared initial state, on tensors without memory."""
    from s0kernels.backends.triton import delta

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens = [empty(B, T, H, K), empty(B, T, H, K), empty(B, T, HV, V), *(empty(B, T, HV) for _ in range(2))]
    state = empty(HV, K, V, dtype=torch.float32)
    options = {"scale": K**-0.5, "use_qk_l2norm": True, "chunk_size": None}
    q, k, v, g, beta = tokens

    def backward(wanted: set[str]):
        states = (state, None, None)
        delta.gated_delta_rule_backward(
            v, None, q, k, v, g, beta, *states, state_shape=tuple(state.shape), wanted=wanted, **options
        )

    def step():
        first = [x[:, 0] for x in tokens]
        pool = empty(B, HV, K, V, dtype=torch.float32)
        delta.gated_delta_rule_step(*first, pool, scale=0.1, use_qk_l2norm=True, state_indices=None)

    return {
        "forward": lambda: delta.gated_delta_rule_forward(
            *tokens, state, None, None, output_final_state=True, **options
        ),
        "backward": lambda: backward({"q", "k", "v", "g", "beta", "initial_state"}),
        "state-only backward": lambda: backward({"initial_state"}),
        "step": step,
    }


def mamba_calls(
    B=1, T=8192, H=24, P=128, N=256, G=1, dtype=torch.bfloat16, options=("D", "z", "dt_bias")
) -> dict[str, Callable[[], object]]:
    """Calls of Mamba-2 SSD with a shared initial state, on tensors without memory. `options` are the optional inputs
    that are given."""
    from s0kernels.backends.triton import mamba

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, z, dt, b, c = empty(B, T, H, P), empty(B, T, H, P), empty(B, T, H), empty(B, T, G, N), empty(B, T, G, N)
    A, D, bias = (empty(H, dtype=torch.float32) for _ in range(3))
    state = empty(H, P, N, dtype=torch.float32)
    given = {name: value if name in options else None for name, value in (("D", D), ("z", z), ("dt_bias", bias))}
    inputs, how = (x, dt, A, b, c, *given.values(), state, None, None), {"dt_softplus": True, "dt_limit": (0.0, 1.0)}

    def backward(wanted: set[str]):
        shape, wanted = tuple(state.shape), wanted - ({*given} - {*options})
        mamba.ssd_backward(x, None, *inputs, state_shape=shape, chunk_size=None, wanted=wanted, **how)

    def step():
        pool, extras = (
            empty(B, H, P, N, dtype=torch.float32),
            given | {"z": z[:, 0] if given["z"] is not None else None},
        )
        mamba.ssd_step(x[:, 0], dt[:, 0], A, b[:, 0], c[:, 0], pool, state_indices=None, **extras, **how)

    return {
        "forward": lambda: mamba.ssd_forward(*inputs, output_final_state=True, chunk_size=None, **how),
        "backward": lambda: backward({"x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"}),
        "frozen backward": lambda: backward({"x", "dt", "B", "C", "z", "initial_state"}),
        "state-only backward": lambda: backward({"initial_state"}),
        "step": step,
    }


#: What is compiled, by name. The flagships are the heads of Qwen3.5-4B and those of Falcon-H1-7B.
CASES: dict[str, Callable[[], dict[str, Callable[[], object]]]] = {
    "delta rule 128/128 bf16": functools.partial(delta_calls, B=8, T=1024),
    "delta rule 128/128 bf16, few heads": functools.partial(delta_calls, H=4, HV=8),
    "delta rule 64/64 fp16": functools.partial(delta_calls, B=8, T=1024, K=64, V=64, dtype=torch.float16),
    "delta rule 256/256 bf16": functools.partial(delta_calls, B=8, T=1024, K=256, V=256),
    "delta rule 128/128 fp32": functools.partial(delta_calls, B=8, T=1024, dtype=torch.float32),
    "Falcon-H1-7B bf16": functools.partial(mamba_calls, B=8, T=1024),
    "Falcon-H1-7B bf16, one sequence": mamba_calls,
    "Falcon-H1-0.5B bf16": functools.partial(mamba_calls, B=8, T=1024, P=64, N=128),
    "Falcon-H1-1.5B bf16": functools.partial(mamba_calls, B=8, T=1024, H=48, P=64),
    "Falcon-H1-3B bf16": functools.partial(mamba_calls, B=8, T=1024, H=32),
    "Falcon-H1-34B bf16": functools.partial(mamba_calls, B=8, T=1024, H=32, G=2),
    "Bamba, Granite bf16": functools.partial(mamba_calls, B=8, T=1024, H=128, P=64, N=128),
    "Nemotron-H bf16": functools.partial(mamba_calls, B=8, T=1024, H=128, P=64, N=128, G=8),
    "Mamba-2 2.7B fp16": functools.partial(mamba_calls, B=8, T=1024, H=80, P=64, N=128, dtype=torch.float16),
    "Falcon-H1-7B bf16, no optional input": functools.partial(mamba_calls, B=8, T=1024, options=()),
    "Falcon-H1-7B fp32": functools.partial(mamba_calls, B=8, T=1024, dtype=torch.float32),
}


def launches_of(call: Callable[[], object], capability: int) -> list[Launch]:
    """What a call on tensors of the device "meta" would launch."""
    with recording(TARGETS[capability]) as found:
        call()
    return found


def table(cases: Iterable[str], capabilities: Iterable[int]) -> Iterator[tuple[str, str, int, Usage]]:
    """(case, call, capability, usage) of every launch, each compiled as it is asked for."""
    for name in cases:
        for capability in capabilities:
            for call, run in CASES[name]().items():
                for launch in launches_of(run, capability):
                    yield name, call, capability, compile_launch(launch, capability)


def compile_launch(launch: Launch, capability: int) -> Usage:
    kernel, programs, arguments, constants, tiles = launch
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", values[name]
        elif isinstance(values[name], tuple):
            signature[name] = tuple(_type_of(x, (i, j), constexprs, attributes) for j, x in enumerate(values[name]))
        else:
            signature[name] = _type_of(values[name], (i,), constexprs, attributes)
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills, tensor = _inspect(compiled.asm["cubin"])
    name = kernel.__name__.removesuffix("_kernel")
    return Usage(name, programs, tiles.warps, tiles.stages, registers, spills, compiled.metadata.shared, tensor)


def _type_of(value, path: tuple[int, ...], constexprs: dict, attributes: dict) -> str:
    """The type of an argument, specialised as the just-in-time compiler does it."""
    if value is None or (isinstance(value, int) and value == 1):
        constexprs[path] = value
        return "constexpr"
    if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


def _inspect(cubin: bytes) -> tuple[int, int, int]:
    """(registers, bytes of stack, tensor-core instructions)."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    return int(found[1]), int(found[2]), len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b", code))
