"""One token through the operators of `csrc/cuda/operators.h`, which the libraries for a CPU and for GPUs share.

`library` is `torch.ops.s0kernels_cpu` or `torch.ops.s0kernels_cuda`.
"""

import torch
from torch import Tensor

#: K, V, P and N
LARGEST = 256
#: width of a convolution
WIDEST = 8


def too_large(op: str, size: int, width: int) -> str | None:
    if size > LARGEST:
        return f"is for heads of up to {LARGEST}, got {size}"
    return f"is for convolutions of up to {WIDEST}, got {width}" if width > WIDEST else None


def _contiguous(indices: Tensor | None) -> Tensor | None:
    return None if indices is None else indices.contiguous()


def gated_delta_rule_step(
    library, q, k, v, g, beta, state, *, scale, use_qk_l2norm, state_indices, emulated=0
) -> Tensor:
    output = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    without_mixer = (None,) * 7
    library.delta_step(
        *(q, k, v, g, beta, *without_mixer, 0.0, state, _contiguous(state_indices), None, output),
        *(use_qk_l2norm, scale, emulated),
    )
    return output


def ssd_step(
    library, x, dt, A, B, C, state, *, D, z, dt_bias, dt_softplus, dt_limit, state_indices, emulated=0
) -> Tensor:
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    without_mixer = (None,) * 3
    library.ssd_step(
        *(x, dt, A, B, C, D, dt_bias, *without_mixer, z, None, 0.0, False, state, _contiguous(state_indices), None),
        *(output, False, dt_softplus, *dt_limit, emulated),
    )
    return output


def gated_delta_mixer_step(
    library, mixed, z, b, a, conv_weight, conv_bias, A_log, dt_bias, norm, window, state, *, eps, state_indices,
    tickets, emulated=0,
) -> Tensor:  # fmt: skip
    (rows, heads, V), K = z.shape, state.shape[2]
    values = heads * V
    keys = (mixed.shape[1] - values) // 2
    q, k, v = mixed.split([keys, keys, values], dim=1)
    output = torch.empty(z.shape, dtype=mixed.dtype, device=mixed.device)
    library.delta_step(
        *(q.unflatten(1, (-1, K)), k.unflatten(1, (-1, K)), v.unflatten(1, (heads, V)), a, b, A_log, dt_bias),
        *(conv_weight, conv_bias, window, z, norm, eps, state, _contiguous(state_indices)),
        *(_tickets(tickets, rows * (keys // K), mixed), output, True, K**-0.5, emulated),
    )
    return output


def ssd_mixer_step(
    library, gate, mixed, dt, conv_weight, conv_bias, A_log, D, dt_bias, norm, window, state, *, eps, gate_first,
    dt_limit, state_indices, tickets, emulated=0,
) -> Tensor:  # fmt: skip
    rows, (_, heads, P, N) = mixed.shape[0], state.shape
    group = (mixed.shape[1] - heads * P) // 2
    x, B, C = mixed.split([heads * P, group, group], dim=1)
    x, gate = (t.unflatten(1, (heads, P)) for t in (x, gate))
    output = torch.empty(x.shape, dtype=mixed.dtype, device=mixed.device)
    library.ssd_step(
        *(x, dt, A_log, B.unflatten(1, (-1, N)), C.unflatten(1, (-1, N)), D, dt_bias, conv_weight, conv_bias, window),
        *(
            gate,
            norm,
            eps,
            gate_first,
            state,
            _contiguous(state_indices),
            _tickets(tickets, rows * (group // N), mixed),
        ),
        *(output, True, True, *dt_limit, emulated),
    )
    return output


def _tickets(given: Tensor | None, count: int, like: Tensor) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=like.device) if given is None else given
