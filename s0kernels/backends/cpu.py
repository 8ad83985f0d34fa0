"""Backend `cpu`: the compiled scans of `csrc/cpu`, for tensors on a CPU.

They scan the chunks of a head with the state in cache, and write only results; the backward recomputes the rest.
Mamba-2 SSD is passed as the recurrence that it shares with the gated delta rule: q = C, k = B, v = x, dt instead of
beta, and a log decay of dt A. PyTorch processes dt, which is one value per token, and applies the gate z, which is one
pass over the output.
"""

import functools
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from s0kernels.backends import tokens
from s0kernels.backends.shared import dt_grad, process_dt, read_boundaries, reduce_state_grad, silu_slope
from s0kernels.calls import (
    Call,
    DeltaInputs,
    DeltaMixerInputs,
    DeltaMixerOptions,
    DeltaOptions,
    Grads,
    MixerPool,
    Pool,
    SSDInputs,
    SSDMixerInputs,
    SSDMixerOptions,
    SSDOptions,
    Start,
    Wanted,
    state_dtype,
)
from s0kernels.hardware import compilers

_SSD_CHUNK = 64
#: chunk lengths of the delta rule. If beta exceeds 1, shorter chunks are more exact, but need more states
_DELTA_CHUNK, _DELTA_CHUNK_ABOVE_1 = 32, 16
#: longer chunks would not fit into the cache
_MAX_CHUNK = 256
#: number of heads of a group that are computed together and share the terms in q and k alone
_HEAD_BLOCK = 4


def supports(call: Call) -> str | None:
    mixer = call.op in ("gated_delta_mixer_step", "ssd_mixer_step")
    if call.device.type != "cpu":
        return f"is for tensors on a CPU, not on {call.device.type}"
    if call.dtype == torch.float64 and mixer:
        return "computes mixers in fp32, not in fp64"
    return missing() or (tokens.too_large(call) if mixer else None)


def rows_that_pay(call: Call) -> float:
    """Return the maximum number of rows for fused tokens. A fused token repeats the convolution of its group for each
    head, which in fp32 pays for few rows only."""
    return 2 if call.dtype == torch.float32 else float("inf")


@functools.cache
def missing() -> str | None:
    """Return None if the library is loaded, else the reason why it cannot be."""
    file = Path(os.environ.get("S0KERNELS_CPU_LIBRARY") or Path(__file__).parents[1] / "_cpu.so")
    if not file.is_file():
        return f"was not built: install with --no-build-isolation, with torch and a C++ compiler: {compilers()}"
    try:
        torch.ops.load_library(str(file))
        torch.ops.s0kernels_cpu.instructions()
    except (OSError, RuntimeError, AttributeError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]  # errors of torch end with a stack trace
        return f"cannot be used beside torch {torch.__version__}: {reason}"
    return None


def _boundaries(cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    return (
        None
        if cu_seqlens is None
        else torch.tensor(read_boundaries(cu_seqlens, length), dtype=torch.int64, device="cpu")
    )


def _index(state_indices: Tensor | None) -> Tensor | None:
    return None if state_indices is None else state_indices.to(torch.int64)


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype).contiguous()


class _Scan(NamedTuple):
    """The inputs of either recurrence, with the fields of the compiled kernels' schema. For SSD q = C, k = B, v = x."""

    q: Tensor
    k: Tensor
    v: Tensor  # None if only the gradient of the state is wanted
    decay: Tensor  # [B, T, heads] in the dtype of states, as weight
    weight: Tensor
    skip: Tensor | None
    initial_state: Tensor | None
    indices: Tensor | None
    boundaries: Tensor | None

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.boundaries is None else self.boundaries.shape[0] - 1


class _ScanOptions(NamedTuple):
    """The options of either recurrence, in the order of the schema."""

    delta: bool
    normalise: bool
    scale: float
    chunk: int
    head_block: int = _HEAD_BLOCK


def _delta(inputs: DeltaInputs, start: Start, options: DeltaOptions) -> tuple[_Scan, _ScanOptions]:
    q, k, v, g, beta = inputs
    dtype = state_dtype(q.dtype)
    of_tokens = q, k, v, _contiguous(g, dtype), _contiguous(beta, dtype), None
    scan = _Scan(*of_tokens, start.state, _index(start.indices), _boundaries(start.cu_seqlens, q.shape[1]))
    chunk = options.chunk_size or (_DELTA_CHUNK_ABOVE_1 if bool((beta > 1).any()) else _DELTA_CHUNK)
    return scan, _ScanOptions(True, options.use_qk_l2norm, options.scale, min(chunk, _MAX_CHUNK))


def _ssd(inputs: SSDInputs, start: Start, options: SSDOptions) -> tuple[_Scan, _ScanOptions]:
    """Convert the inputs of SSD. B is None if only the gradient of the state is wanted."""
    C, B = inputs.C, inputs.C if inputs.B is None else inputs.B
    steps = process_dt(inputs, options).detach().contiguous()
    skip = None if inputs.D is None else _contiguous(inputs.D, steps.dtype)
    of_tokens = C, B, inputs.x, steps * inputs.A.to(steps.dtype), steps, skip
    scan = _Scan(*of_tokens, start.state, _index(start.indices), _boundaries(start.cu_seqlens, C.shape[1]))
    return scan, _ScanOptions(False, False, 1.0, min(options.chunk_size or _SSD_CHUNK, _MAX_CHUNK))


def _forward(scan: _Scan, how: _ScanOptions, kind: torch.dtype, output_final_state: bool) -> tuple[Tensor, Tensor]:
    heads, K, V = scan.decay.shape[2], scan.q.shape[3], scan.v.shape[3]
    shape = (heads, K, V) if how.delta else (heads, V, K)
    output = torch.empty(scan.v.shape, dtype=kind, device="cpu")
    final = torch.empty(scan.sequences if output_final_state else 0, *shape, dtype=scan.decay.dtype, device="cpu")
    torch.ops.s0kernels_cpu.scan_forward(*scan, output, final if output_final_state else None, *how)
    return output, final


def gated_delta_rule_forward(
    inputs: DeltaInputs, start: Start, options: DeltaOptions, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    return _forward(*_delta(inputs, start, options), inputs.v.dtype, output_final_state)


def gated_delta_rule_backward(
    grads: Grads, inputs: DeltaInputs, start: Start, options: DeltaOptions, wanted: Wanted
) -> dict[str, Tensor]:
    names = {"q": "q", "k": "k", "v": "v", "decay": "g", "weight": "beta"}
    asked = frozenset(name for name in names if names[name] in wanted.names) | wanted.names & {"initial_state"}
    found = _backward(grads, *_delta(inputs, start, options), asked)
    found = {names.get(name, name): grad for name, grad in found.items() if name in asked}
    if "initial_state" in found:
        found["initial_state"] = reduce_state_grad(found["initial_state"], wanted.state_shape, start.indices)
    return found


def _backward(grads: Grads, scan: _Scan, how: _ScanOptions, wanted: frozenset[str]) -> dict[str, Tensor]:
    """Return gradients by the names of the shared recurrence. Those of q and k are summed over the heads of a group."""
    dtype, (batch, length, heads), (groups, K) = scan.decay.dtype, scan.decay.shape, scan.q.shape[2:]
    V = grads.columns(3 if how.delta else 2)
    parts = -(-(heads // groups) // how.head_block)
    out: dict[str, Tensor | None] = dict.fromkeys(("initial_state", "q", "k", "v", "decay", "weight"))
    if "initial_state" in wanted:
        layout = (heads, K, V) if how.delta else (heads, V, K)
        out["initial_state"] = torch.empty(scan.sequences, *layout, dtype=dtype, device="cpu")
    if wanted & {"q", "k", "decay", "weight"}:
        out["q"], out["k"] = (torch.empty(batch, length, groups, parts, K, dtype=dtype, device="cpu") for _ in range(2))
        out["decay"], out["weight"] = torch.empty_like(scan.decay), torch.empty_like(scan.decay)
    else:  # needs neither the values nor the states
        scan = scan._replace(v=None, initial_state=None, indices=None)
    if "v" in wanted:
        out["v"] = torch.empty(batch, length, heads, V, dtype=dtype, device="cpu")
    q, k, v, *rest = scan
    torch.ops.s0kernels_cpu.scan_backward(*grads, q, k, v, V, *rest, *out.values(), *how)
    found = {name: grad for name, grad in out.items() if grad is not None}
    for name in found.keys() & {"q", "k"}:
        found[name] = found[name].squeeze(3) if parts == 1 else found[name].sum(3)
    return found


def ssd_forward(
    inputs: SSDInputs, start: Start, options: SSDOptions, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    (scan, how), z, kind = _ssd(inputs, start, options), inputs.z, inputs.x.dtype
    output, final = _forward(scan, how, kind if z is None else scan.decay.dtype, output_final_state)
    if z is not None:
        output = output.mul_(torch.nn.functional.silu(z.to(output.dtype))).to(kind)
    return output, final


def ssd_backward(
    grads: Grads, inputs: SSDInputs, start: Start, options: SSDOptions, wanted: Wanted
) -> dict[str, Tensor]:
    (scan, how), names, z = _ssd(inputs, start, options), wanted.names, inputs.z
    dtype, doutput = scan.decay.dtype, grads.output
    if doutput is None and names & {"z", "D"}:
        doutput = inputs.C.new_zeros(*inputs.dt.shape, grads.columns(2))
    dy = doutput if z is None or doutput is None else doutput * torch.nn.functional.silu(z.to(dtype))
    found: dict[str, Tensor | None] = {}
    if "D" in names and dy is not None:
        found["D"] = (dy.to(dtype) * inputs.x).sum((0, 1, 3))
    if "z" in names and z is not None and doutput is not None:
        y, _ = _forward(scan, how, dtype, False)
        found["z"] = doutput * y * silu_slope(z.to(dtype))
    asked = names & {"initial_state"} | ({"v"} if "x" in names else set())
    asked |= {"q", "k", "decay", "weight"} if names & {"B", "C", "dt", "dt_bias", "A"} else set()
    of_scan = _backward(Grads(dy, grads.final_state), scan, how, asked) if asked else {}
    if names & {"dt", "dt_bias", "A"}:
        decay = of_scan["decay"]
        ddt = dt_grad(inputs.A.to(dtype) * decay + of_scan["weight"], inputs, options)
        found |= {"dt": ddt, "dt_bias": ddt.sum((0, 1)), "A": (scan.weight * decay).sum((0, 1))}
    found |= {"x": of_scan.get("v"), "C": of_scan.get("q"), "B": of_scan.get("k")}
    if "initial_state" in names:
        found["initial_state"] = reduce_state_grad(of_scan["initial_state"], wanted.state_shape, start.indices)
    return {name: grad for name, grad in found.items() if grad is not None and name in names}


def gated_delta_rule_step(inputs: DeltaInputs, pool: Pool, options: DeltaOptions) -> Tensor:
    return _step((*inputs, None), pool, inputs.v.dtype, (True, options.use_qk_l2norm, options.scale))


def ssd_step(inputs: SSDInputs, pool: Pool, options: SSDOptions) -> Tensor:
    x, z, steps = inputs.x, inputs.z, process_dt(inputs, options)
    token = inputs.C, inputs.B, x, steps * inputs.A.to(steps.dtype), steps, inputs.D
    output = _step(token, pool, x.dtype if z is None else steps.dtype, (False, False, 1.0))
    return output if z is None else output.mul_(torch.nn.functional.silu(z.to(output.dtype))).to(x.dtype)


def _step(token: tuple, pool: Pool, kind: torch.dtype, how: tuple[bool, bool, float]) -> Tensor:
    """Run one token of either recurrence. Its tensors are those of `_Scan` without T."""
    (q, k, v, *gates), state = token, pool.state
    output = torch.empty(v.shape, dtype=kind, device="cpu")
    place = state if state.is_contiguous() else state.contiguous()
    gates = [None if x is None else _contiguous(x, state.dtype) for x in gates]
    torch.ops.s0kernels_cpu.scan_step(
        q[:, None], k[:, None], v[:, None], *gates, place, _index(pool.indices), output, *how
    )
    if place is not state:
        state.copy_(place)
    return output


def gated_delta_mixer_step(inputs: DeltaMixerInputs, pool: MixerPool, options: DeltaMixerOptions) -> Tensor:
    return tokens.gated_delta_mixer_step(torch.ops.s0kernels_cpu, inputs, pool, options)


def ssd_mixer_step(inputs: SSDMixerInputs, pool: MixerPool, options: SSDMixerOptions) -> Tensor:
    return tokens.ssd_mixer_step(torch.ops.s0kernels_cpu, inputs, pool, options)
