"""Time scans and steps by backend, dtype and heads: forward, forward and backward, the backward of S0 alone, one
token."""

import pytest
import torch
from conftest import DEVICE

from s0kernels.bench.passes import DTYPES, PASSES, Shape, case, step_case
from s0kernels.calls import Call
from s0kernels.ops import registry

SHAPES = ("1x8192", "8x1024") if DEVICE == "cuda" else ("1x512", "4x64")
BATCHES = (1, 32, 256) if DEVICE == "cuda" else (1, 8)
MEASURED = ("qwen3.5-0.8b", "qwen3.5-4b", "falcon-h1-0.5b", "falcon-h1-7b")
BACKENDS = [
    name
    for name in ("triton", "cpu", "torch")
    if not registry.unusable(name, Call("ssd", torch.device(DEVICE), torch.half))
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_model = pytest.mark.parametrize("model", MEASURED)


@every_backend
@every_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["forward", "training", "state"])
@pytest.mark.parametrize("sizes", SHAPES)
def test_scan(sizes, what, dtype, model, backend, benchmark, timed):
    benchmark.group = f"{model} {sizes} {dtype}, {PASSES[what]}"
    shape = Shape.parse(f"{model}:{sizes}")
    timed(case(shape.op, shape.op.by(backend), shape.values(DEVICE, DTYPES[dtype]), what))


@every_backend
@every_model
@pytest.mark.parametrize("batch", BATCHES)
def test_step(batch, model, backend, benchmark, timed):
    benchmark.group = f"{model}, one token of {batch}"
    shape = Shape(model, batch, 1)
    timed(step_case(shape.op, shape.op.step_by(backend), shape.values(DEVICE, torch.float32)), rounds=20)
