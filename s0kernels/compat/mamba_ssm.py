"""mamba_ssm's functions for Mamba-2 (`mamba_ssm.ops.triton`, as of 2026-07): `ssd_combined`, `selective_state_update`.

Signatures and semantics are mamba_ssm's, with three differences. First, each of the sequences that `seq_idx` packs into
a row starts from the row's initial state, and the gradient of that state is summed over them. In mamba_ssm only the
first sequence of a row starts from it. Second, an initial state without the batch dimension is shared by all sequences.
Third, only the requested gradients are computed, including that of the varlen states. States may have any floating
dtype; they are computed and returned in fp32. If x, B, C and z have different dtypes, the widest is used for the
computation, and the output has that of x. `seq_idx` is read on the host, to count sequences. An argument that is not
supported raises ValueError or TypeError.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s0kernels.calls import SSDInputs, Start
from s0kernels.compat._dtypes import as_scalar, under_the_name, widest
from s0kernels.modules.convolution import causal_conv, packed_causal_conv
from s0kernels.modules.packing import find_boundaries
from s0kernels.ops import ssd, ssd_step

__all__ = ["mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined", "selective_state_update"]


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """S = exp(dt_t A) S + dt_t x_t B_t^T;  y_t = (S C_t + D x_t) * silu(z_t)

    Args:
        x, z: [B, T, H, P].
        dt: [B, T, H]; dt_bias: [H].
        A: [H].
        B, C: [B, T, G, N].
        chunk_size: a positive int. It is checked but not used: the backend chooses the size of chunks.
        D: [H] or [H, P].
        initial_states: [B, H, P, N], or [H, P, N] for all sequences.
        seq_idx: [B, T], a number for each token; where it changes within a row, a sequence begins.
        cu_seqlens: [NSEQ + 1], used with `return_varlen_states` only, and then instead of seq_idx, which must agree
            with it. B must be 1.
        return_final_states: also return the state at the end of every row, [B, H, P, N].
        return_varlen_states: also return the state at the end of every sequence, [NSEQ, H, P, N].
        state_dtype: None or torch.float32.

    Returns:
        y [B, T, H, P], or a tuple of y and the requested states, those of the rows first.
    """
    name = "mamba_chunk_scan_combined"
    _check(name, chunk_size, state_dtype)
    if return_varlen_states:
        for what, value in (("cu_seqlens", cu_seqlens), ("seq_idx", seq_idx)):
            if value is None:
                raise ValueError(f"{name}: return_varlen_states needs {what}")
    boundaries = cu_seqlens if return_varlen_states else _boundaries(name, seq_idx, x.shape[0], x.shape[1])
    inputs, start = SSDInputs(x, dt, A, B, C, D, z, dt_bias), Start(initial_states, None, boundaries)
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit}
    y, final, ends = _scan(name, inputs, start, return_final_states or return_varlen_states, **options)
    if final is None:
        return y
    rows = (final if ends is None else final.index_select(0, ends),) if return_final_states else ()
    return (y, *rows, final) if return_varlen_states else (y, *rows)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute a Mamba-2 layer after its input projection: convolution, scan, gate or gated norm, output projection.

    Args:
        zxbcdt: [B, T, 2 * (columns of a parallel MLP, if any) + 2 * H * P + 2 * G * N + H].
        conv1d_weight: [H * P + 2 * G * N, W]; conv1d_bias: [H * P + 2 * G * N] or None.
        dt_bias, A: [H].
        D: [H, P], or [H], which needs `headdim` P.
        chunk_size, initial_states, seq_idx, dt_limit, return_final_states, state_dtype: as in
            `mamba_chunk_scan_combined`; the convolution does not cross sequences either.
        activation: activation after the convolution: "silu", "swish" or None.
        rmsnorm_weight: [H * P], norms over each of `ngroups` groups of channels, gated by z after it or before it
            (`norm_before_gate`); without it the scan is gated.
        outproj_weight: [out, columns], outproj_bias: [out]; or None.

    Returns:
        [B, T, H * P] or [B, T, out], or a tuple of that and the state at the end of every row.
    """
    name = "mamba_split_conv1d_scan_combined"
    _check(name, chunk_size, state_dtype)
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{name}: activation must be 'silu', 'swish' or None, got {activation!r}")
    if outproj_bias is not None and outproj_weight is None:
        raise ValueError(f"{name}: outproj_bias needs outproj_weight")
    heads, P = D.shape if D.dim() == 2 else (D.shape[0], headdim)
    if P is None:
        raise ValueError(f"{name}: headdim must be given if D is [H]")
    batch, length, columns = zxbcdt.shape
    inner, mixed = heads * P, conv1d_weight.shape[0]
    N = (mixed - inner) // ngroups // 2
    mlp = (columns - inner - mixed - heads) // 2
    if mlp < 0 or mixed != inner + 2 * ngroups * N or columns != 2 * mlp + inner + mixed + heads:
        raise ValueError(
            f"{name}: zxbcdt [.., {columns}] and conv1d_weight [{mixed}, ..] do not fit {heads} heads of {P} channels "
            f"in {ngroups} groups"
        )
    up, z, xBC, dt = zxbcdt.split([2 * mlp, inner, mixed, heads], dim=-1)
    boundaries = _boundaries(name, seq_idx, batch, length)
    xBC = _convolve(xBC, conv1d_weight, conv1d_bias, boundaries, activation is not None)
    x, B, C = xBC.split([inner, ngroups * N, ngroups * N], dim=-1)
    x, z = x.unflatten(-1, (heads, P)), z.unflatten(-1, (heads, P))
    B, C = (t.unflatten(-1, (ngroups, N)) for t in (B, C))
    gate = z if rmsnorm_weight is None else None
    inputs, start = SSDInputs(x, dt, A, B, C, D, gate, dt_bias), Start(initial_states, None, boundaries)
    y, final, ends = _scan(name, inputs, start, return_final_states, dt_softplus=True, dt_limit=dt_limit)
    y = y.flatten(2)
    if rmsnorm_weight is not None:
        y = _gated_norm(y, z.flatten(2), rmsnorm_weight, rmsnorm_eps, inner // ngroups, norm_before_gate)
    if mlp:
        first, second = up.chunk(2, dim=-1)
        y = torch.cat([F.silu(first) * second, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    if final is None:
        return y
    return y, final if ends is None else final.index_select(0, ends)


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Advance `state` by one token, in place.

    Args:
        state: [B, H, P, N], or with `state_batch_indices` a pool [S, H, P, N]; without H it has one head. A state that
            is not in fp32 (or fp64 with fp64 inputs) is converted and converted back as a whole.
        x, z: [B, H, P].
        dt: [B, H, P], A: [H, P, N], dt_bias: [H, P]: one number per head, expanded (stride 0), as Mamba-2 has them.
        B, C: [B, G, N].
        D: [H, P], or [H]; or [H * P, P], expanded, as `Mamba2` gives one number per channel.
        state_batch_indices: [B], rows of the pool; -1 computes from zero and stores nothing.

    Returns:
        y [B, H, P], or [B, P] if the state has no H.
    """
    if state.dim() == 3:
        one = {"D": D, "z": z, "dt_bias": dt_bias}
        one = {n: t if t is None else t.unsqueeze(0 if n != "z" else 1) for n, t in one.items()}
        tokens = [t.unsqueeze(1) for t in (x, dt)], [t.unsqueeze(1) for t in (B, C)]
        y = selective_state_update(
            *(state.unsqueeze(1), *tokens[0], A.unsqueeze(0), *tokens[1]),
            **one,
            dt_softplus=dt_softplus,
            state_batch_indices=state_batch_indices,
        )
        return y.squeeze(1)
    name, dtype = "selective_state_update", widest(x, B, C, z)
    work = state.to(torch.float64 if dtype == torch.float64 else torch.float32)
    D, per_channel = _skip(D, x)
    with under_the_name(name, "ssd_step", state_indices="state_batch_indices"):
        y = ssd_step(
            *(x.to(dtype), as_scalar(_per_head("dt", dt, 1), dtype), as_scalar(_per_head("A", A, 2), dtype)),
            *(B.to(dtype), C.to(dtype), work),
            D=None if D is None else as_scalar(D, dtype),
            z=None if z is None or per_channel is not None else z.to(dtype),
            dt_bias=None if dt_bias is None else as_scalar(_per_head("dt_bias", dt_bias, 1), dtype),
            dt_softplus=dt_softplus,
            state_indices=state_batch_indices,
        )
    if work is not state:
        state.copy_(work)
    return (y if per_channel is None else _finish(name, y, x, per_channel, z)).to(x.dtype)


def _skip(D: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return (D [H], None), or (None, D [H, P]) if D has a number for each channel."""
    if D is None or D.dim() == 1:
        return D, None
    heads, P = x.shape[-2:]
    if D.dim() == 2 and _is_expanded(D, 1):
        D = D[:, 0]
        return (D, None) if D.shape[0] != heads * P or P == 1 else (None, D.view(heads, P))
    return None, D


def _check(name: str, chunk_size: int, state_dtype: torch.dtype | None) -> None:
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"{name}: chunk_size must be a positive int, got {chunk_size!r}")
    if state_dtype not in (None, torch.float32):
        raise ValueError(f"{name}: state_dtype must be None or torch.float32, got {state_dtype}")


def _boundaries(name: str, seq_idx: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Return cu_seqlens for the rows laid end to end."""
    if seq_idx is None:
        return None
    if tuple(seq_idx.shape) != (batch, length) or seq_idx.is_floating_point():
        raise ValueError(f"{name}: seq_idx must be integers [{batch}, {length}], got {seq_idx.dtype} {seq_idx.shape}")
    return find_boundaries(batch, length, {"seq_idx": seq_idx}, False) if length else None


def _scan(
    name: str, inputs: SSDInputs, start: Start, want_states: bool, **options
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (y, the state of every sequence if wanted, the indices of the last sequence of each row, or None for
    all)."""
    x, dt, A, B, C, D, z, dt_bias = inputs
    state, _, cu_seqlens = start
    (batch, length), dtype = x.shape[:2], widest(x, B, C, z)
    D, per_channel = (None, D) if D is not None and D.dim() == 2 else (D, None)
    tokens = {"x": x.to(dtype), "dt": as_scalar(dt, dtype), "B": B.to(dtype), "C": C.to(dtype)}
    if z is not None and per_channel is None:
        tokens["z"] = z.to(dtype)
    indices = ends = None
    if cu_seqlens is not None:
        tokens = {key: t.flatten(0, 1)[None] for key, t in tokens.items()}
        ends = _last_of_rows(cu_seqlens, batch, length)
        if state is not None and state.dim() == 4:
            indices = torch.div(cu_seqlens[:-1], max(length, 1), rounding_mode="floor").clamp(max=batch - 1)
    if state is not None:
        state = state.to(torch.float64 if dtype == torch.float64 else torch.float32)
    with under_the_name(name, "ssd", initial_state="initial_states"):
        y, final = ssd(
            **tokens,
            A=as_scalar(A, dtype),
            D=None if D is None else as_scalar(D, dtype),
            dt_bias=None if dt_bias is None else as_scalar(dt_bias, dtype),
            initial_state=state,
            state_indices=indices,
            cu_seqlens=cu_seqlens,
            output_final_state=want_states,
            **options,
        )
    y = y.view(x.shape)
    return (y if per_channel is None else _finish(name, y, x, per_channel, z)).to(x.dtype), final, ends


def _last_of_rows(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """Return the index of the last sequence of every row, [B]."""
    last = torch.arange(1, batch + 1, device=cu_seqlens.device, dtype=cu_seqlens.dtype) * length - 1
    return torch.searchsorted(cu_seqlens[1:], last, right=True)


def _finish(name: str, y: Tensor, x: Tensor, D: Tensor, z: Tensor | None) -> Tensor:
    """Return (y + D x) silu(z) for a D with a number for each channel."""
    if D.shape != x.shape[-2:]:
        raise ValueError(f"{name}: D must have shape [H] or [H, P], here {list(x.shape[-2:])}, got {list(D.shape)}")
    out = y + D.to(torch.promote_types(D.dtype, torch.float32)) * x
    return out if z is None else out * F.silu(z.to(out.dtype))


def _convolve(x, weight, bias, cu_seqlens, activate: bool) -> Tensor:
    if cu_seqlens is None:
        return causal_conv(x, weight, bias, None, activate=activate)
    return packed_causal_conv(x.flatten(0, 1)[None], weight, bias, cu_seqlens, activate=activate).view(x.shape)


def _gated_norm(x, z, weight, eps: float, group: int, norm_before_gate: bool) -> Tensor:
    """Compute the RMS norm in fp32 over groups of channels, multiplied by silu(z) after the norm or before it."""
    dtype = x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    x, gate = x.to(wide), F.silu(z.to(wide))
    x = x if norm_before_gate else x * gate
    x = F.rms_norm(x.unflatten(-1, (-1, group)), (group,), eps=eps).flatten(-2) * weight.to(wide)
    return (x * gate if norm_before_gate else x).to(dtype)


def _is_expanded(t: Tensor, dims: int) -> bool:
    return all(size == 1 or stride == 0 for size, stride in zip(t.shape[-dims:], t.stride()[-dims:], strict=True))


def _per_head(name: str, t: Tensor, dims: int) -> Tensor:
    """Return one number per head, by removing the last `dims` dimensions, over which `t` is expanded."""
    if not _is_expanded(t, dims):
        raise ValueError(
            f"selective_state_update: {name} must be one number per head, expanded over the last {dims} dimensions "
            f"(stride 0), got {list(t.shape)} with strides {t.stride()}; Mamba-1 is not supported"
        )
    return t[(..., *[0] * dims)]
