"""Backend `cpu`: the compiled scans of `csrc/cpu`, for tensors on a CPU.

They walk the chunks of a head with the state in cache and write nothing but results; the backward recomputes. Mamba-2
SSD is handed over as the recurrence it shares with the gated delta rule: q = C, k = B, v = x, dt in the place of beta,
and a log decay of dt A. What is one value per token (processing dt) or one pass over the output (the gate z) stays in
PyTorch.
"""

import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from s0kernels.backends import _tokens
from s0kernels.backends._states import dt_grad, process_dt, read_boundaries, reduce_state_grad, silu_slope, state_dtype
from s0kernels.hardware import compilers

#: with the delta rule and without: there shorter chunks are more exact and as fast
_CHUNK = {True: 32, False: 64}
#: longer ones would outgrow the cache
_LONGEST = 256
#: heads of a group that are worked on together, sharing what depends on q and k alone
_BLOCK = 4


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"for tensors on a CPU, not on {device.type}"
    if dtype == torch.float64 and op in ("gated_delta_mixer_step", "ssd_mixer_step"):
        return "computes mixers in fp32, not in fp64"
    return missing()


def too_large(op: str, size: int, width: int) -> str | None:
    return _tokens.too_large(op, size, width) if width else None


@functools.cache
def missing() -> str | None:
    """None once the library is there, else the reason why not."""
    file = Path(os.environ.get("S0KERNELS_CPU_LIBRARY") or Path(__file__).parents[1] / "_cpu.so")
    if not file.is_file():
        return f"was not built: install with --no-build-isolation where torch and a C++ compiler are: {compilers()}"
    try:
        torch.ops.load_library(str(file))
        torch.ops.s0kernels_cpu.instructions()
    except (OSError, RuntimeError, AttributeError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]  # the stack follows in errors of torch
        return f"cannot be used beside torch {torch.__version__}: {reason}"
    return None


def _boundaries(cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    return (
        None
        if cu_seqlens is None
        else torch.tensor(read_boundaries(cu_seqlens, length), dtype=torch.int64, device="cpu")
    )


def _sequences(x: Tensor, boundaries: Tensor | None) -> int:
    return x.shape[0] if boundaries is None else boundaries.shape[0] - 1


def _chunk(size: int | None, delta: bool) -> int:
    return min(size or _CHUNK[delta], _LONGEST)


def _index(state_indices: Tensor | None) -> Tensor | None:
    return None if state_indices is None else state_indices.to(torch.int64).contiguous()


def _plain(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.detach().to(dtype).contiguous()


def gated_delta_rule_forward(
    q, k, v, g, beta, initial_state, state_indices, cu_seqlens, *, scale, use_qk_l2norm, output_final_state, chunk_size
) -> tuple[Tensor, Tensor]:
    dtype, boundaries = state_dtype(q.dtype), _boundaries(cu_seqlens, q.shape[1])
    shape = (_sequences(q, boundaries), v.shape[2], q.shape[3], v.shape[3])
    output = torch.empty(v.shape, dtype=v.dtype, device="cpu")
    final = torch.empty(shape if output_final_state else (0, *shape[1:]), dtype=dtype, device="cpu")
    torch.ops.s0kernels_cpu.scan_forward(
        q,
        k,
        v,
        _plain(g, dtype),
        _plain(beta, dtype),
        None,
        initial_state,
        _index(state_indices),
        boundaries,
        output,
        final if output_final_state else None,
        True,
        use_qk_l2norm,
        scale,
        _chunk(chunk_size, True),
        _BLOCK,
    )
    return output, final


def gated_delta_rule_backward(
    doutput,
    dfinal,
    q,
    k,
    v,
    g,
    beta,
    initial_state,
    state_indices,
    cu_seqlens,
    *,
    state_shape,
    scale,
    use_qk_l2norm,
    chunk_size,
    wanted,
) -> dict[str, Tensor]:
    dtype, boundaries = state_dtype(q.dtype), _boundaries(cu_seqlens, q.shape[1])
    heads, value = g.shape[2], doutput.shape[3] if doutput is not None else dfinal.shape[3]
    found = _backward(
        doutput,
        dfinal,
        q,
        k,
        v,
        value,
        _plain(g, dtype),
        _plain(beta, dtype),
        None,
        initial_state,
        state_indices,
        boundaries,
        (_sequences(q, boundaries), heads, q.shape[3], value),
        {"q", "k", "g", "beta"} & wanted,
        wanted,
        True,
        use_qk_l2norm,
        scale,
        chunk_size,
    )
    names = {"q": "q", "k": "k", "v": "v", "decay": "g", "weight": "beta"}
    grads = {names[name]: grad for name, grad in found.items() if names.get(name) in wanted}
    if "initial_state" in wanted:
        grads["initial_state"] = reduce_state_grad(found["initial_state"], state_shape, state_indices)
    return grads


def _backward(
    doutput,
    dfinal,
    q,
    k,
    v,
    value,
    decay,
    weight,
    skip,
    initial_state,
    state_indices,
    boundaries,
    shape,
    others,
    wanted,
    delta,
    normalise,
    scale,
    chunk_size,
) -> dict[str, Tensor]:
    """Gradients under the names of the shared recurrence, those of q and k summed over the heads of a group."""
    dtype = decay.dtype
    batch, length, heads = decay.shape
    parts = -(-(heads // q.shape[2]) // _BLOCK)
    out: dict[str, Tensor | None] = dict.fromkeys(("initial_state", "q", "k", "v", "decay", "weight"))
    if "initial_state" in wanted:
        layout = shape if delta else (*shape[:2], shape[3], shape[2])
        out["initial_state"] = torch.empty(layout, dtype=dtype, device="cpu")
    if others:
        out["q"], out["k"] = (
            torch.empty(batch, length, q.shape[2], parts, q.shape[3], dtype=dtype, device="cpu") for _ in range(2)
        )
        out["decay"], out["weight"] = torch.empty_like(decay), torch.empty_like(decay)
    if "v" in wanted:
        out["v"] = torch.empty(batch, length, heads, value, dtype=dtype, device="cpu")
    torch.ops.s0kernels_cpu.scan_backward(
        doutput,
        dfinal,
        q,
        k,
        v if others else None,
        value,
        decay,
        weight,
        skip,
        initial_state if others else None,
        _index(state_indices) if others else None,
        boundaries,
        *out.values(),
        delta,
        normalise,
        scale,
        _chunk(chunk_size, delta),
        _BLOCK,
    )
    for name in ("q", "k"):
        if out[name] is not None:
            out[name] = out[name].squeeze(3) if parts == 1 else out[name].sum(3)
    return {name: grad for name, grad in out.items() if grad is not None}


def ssd_forward(
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    initial_state,
    state_indices,
    cu_seqlens,
    *,
    dt_softplus,
    dt_limit,
    output_final_state,
    chunk_size,
) -> tuple[Tensor, Tensor]:
    dtype, boundaries = state_dtype(x.dtype), _boundaries(cu_seqlens, x.shape[1])
    steps = process_dt(dt.detach().to(dtype), dt_bias, dt_softplus, dt_limit).contiguous()
    return _ssd_scan(
        x, steps, A, B, C, D, z, initial_state, state_indices, boundaries, output_final_state, chunk_size, x.dtype
    )


def _ssd_scan(
    x, steps, A, B, C, D, z, initial_state, state_indices, boundaries, output_final_state, chunk_size, output_dtype
) -> tuple[Tensor, Tensor]:
    dtype = steps.dtype
    shape = (_sequences(x, boundaries), *x.shape[2:], B.shape[3])
    output = torch.empty(x.shape, dtype=output_dtype if z is None else dtype, device="cpu")
    final = torch.empty(shape if output_final_state else (0, *shape[1:]), dtype=dtype, device="cpu")
    torch.ops.s0kernels_cpu.scan_forward(
        C,
        B,
        x,
        steps * A.to(dtype),
        steps,
        _plain(D, dtype),
        initial_state,
        _index(state_indices),
        boundaries,
        output,
        final if output_final_state else None,
        False,
        False,
        1.0,
        _chunk(chunk_size, False),
        _BLOCK,
    )
    if z is not None:
        output = output.mul_(torch.nn.functional.silu(z.to(dtype))).to(output_dtype)
    return output, final


def ssd_backward(
    doutput,
    dfinal,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    initial_state,
    state_indices,
    cu_seqlens,
    *,
    state_shape,
    dt_softplus,
    dt_limit,
    chunk_size,
    wanted,
) -> dict[str, Tensor]:
    dtype, boundaries = state_dtype(C.dtype), _boundaries(cu_seqlens, C.shape[1])
    raw_dt = dt.detach().to(dtype)
    steps = process_dt(raw_dt, dt_bias, dt_softplus, dt_limit).contiguous()
    head = doutput.shape[3] if doutput is not None else dfinal.shape[2]
    if doutput is None and wanted & {"z", "D"}:
        doutput = C.new_zeros(*dt.shape, head)
    dy = doutput if z is None or doutput is None else doutput * torch.nn.functional.silu(z.to(dtype))
    grads: dict[str, Tensor] = {}
    if "D" in wanted:
        grads["D"] = (dy.to(dtype) * x).sum((0, 1, 3))
    if "z" in wanted:
        states = (initial_state, state_indices, boundaries)
        y, _ = _ssd_scan(x, steps, A, B, C, D, None, *states, False, chunk_size, dtype)
        grads["z"] = doutput * y * silu_slope(z.to(dtype))
    if not wanted - {"D", "z"}:
        return grads
    found = _backward(
        dy,
        dfinal,
        C,
        C if B is None else B,  # None where the gradient of the state is all that is wanted, which does not need it
        x,
        head,
        steps * A.to(dtype),
        steps,
        _plain(D, dtype),
        initial_state,
        state_indices,
        boundaries,
        (_sequences(C, boundaries), dt.shape[2], C.shape[3], head),
        {"B", "C", "dt", "dt_bias", "A"} & wanted,
        {"v" if name == "x" else name for name in wanted},
        False,
        False,
        1.0,
        chunk_size,
    )
    if "x" in wanted:
        grads["x"] = found["v"]
    if wanted & {"dt", "dt_bias", "A"}:
        decay = found["decay"]
        ddt = dt_grad(A.to(dtype) * decay + found["weight"], raw_dt, dt_bias, dt_softplus, dt_limit)
        grads |= {"dt": ddt, "dt_bias": ddt.sum((0, 1)), "A": (steps * decay).sum((0, 1))}
    grads |= {"C": found.get("q"), "B": found.get("k")}
    grads = {name: grad for name, grad in grads.items() if name in wanted}
    if "initial_state" in wanted:
        grads["initial_state"] = reduce_state_grad(found["initial_state"], state_shape, state_indices)
    return grads


def gated_delta_rule_step(q, k, v, g, beta, state, *, scale, use_qk_l2norm, state_indices) -> Tensor:
    return _step(q, k, v, g.to(state.dtype), beta, None, state, state_indices, v.dtype, True, use_qk_l2norm, scale)


def ssd_step(x, dt, A, B, C, state, *, D, z, dt_bias, dt_softplus, dt_limit, state_indices) -> Tensor:
    dtype = state.dtype
    steps = process_dt(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    kind = x.dtype if z is None else dtype
    output = _step(C, B, x, steps * A.to(dtype), steps, D, state, state_indices, kind, False, False, 1.0)
    return output if z is None else output.mul_(torch.nn.functional.silu(z.to(dtype))).to(x.dtype)


def _step(q, k, v, decay, weight, skip, state, state_indices, kind, delta, normalise, scale) -> Tensor:
    dtype = state.dtype
    output = torch.empty(v.shape, dtype=kind, device="cpu")
    place = state if state.is_contiguous() else state.contiguous()
    torch.ops.s0kernels_cpu.scan_step(
        q[:, None],
        k[:, None],
        v[:, None],
        _plain(decay, dtype),
        _plain(weight, dtype),
        _plain(skip, dtype),
        place,
        _index(state_indices),
        output,
        delta,
        normalise,
        scale,
    )
    if place is not state:
        state.copy_(place)
    return output


def gated_delta_mixer_step(*inputs, **options) -> Tensor:
    return _tokens.gated_delta_mixer_step(torch.ops.s0kernels_cpu, *inputs, **options)


def ssd_mixer_step(*inputs, **options) -> Tensor:
    return _tokens.ssd_mixer_step(torch.ops.s0kernels_cpu, *inputs, **options)
