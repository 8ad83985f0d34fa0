"""The short causal convolution before a scan, over [B, T, C], with the window that a cache stores."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from s0kernels.modules.packing import sequence_indices

_HAS_CAUSAL_CONV1D = importlib.util.find_spec("causal_conv1d") is not None


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, previous: Tensor | None, *, activate: bool = True
) -> Tensor:
    """Return silu(conv(x)) per channel, or conv(x) without `activate`.

    Args:
        x: [B, T, C].
        weight: [C, W]; its dtype is that of the computation. bias: [C] or None.
        previous: [B, C, W] inputs before the first token, or None for zeros.

    Returns:
        [B, T, C] contiguous, in x's dtype.
    """
    length, width = x.shape[1], weight.shape[1]
    rows = x.to(weight.dtype).transpose(1, 2)
    if previous is not None:
        rows = torch.cat([previous[..., 1 - width :].to(rows.dtype), rows], dim=-1) if width > 1 else rows
    if _HAS_CAUSAL_CONV1D and x.is_cuda:
        from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports]

        out = causal_conv1d_fn(rows, weight, bias, activation="silu" if activate else None)
    else:
        missing = width - 1 if previous is None else 0
        out = F.conv1d(F.pad(rows, (missing, 0)), weight[:, None], bias, groups=weight.shape[0])
        out = F.silu(out) if activate else out
    return out[..., -length:].transpose(1, 2).to(x.dtype).contiguous()


def packed_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, *, activate: bool = True
) -> Tensor:
    """Apply `causal_conv` to each of the sequences packed into x [1, T, C]. A gap as wide as the window separates
    them."""
    length, gap = x.shape[1], weight.shape[1] - 1
    places = torch.arange(length, device=x.device) + gap * sequence_indices(cu_seqlens, length)
    spread = x.new_zeros(1, length + gap * (cu_seqlens.shape[0] - 1), x.shape[2]).index_copy(1, places, x)
    return causal_conv(spread, weight, bias, None, activate=activate).index_select(1, places)


def next_window(x: Tensor, previous: Tensor | None, width: int, lengths: Tensor | None) -> Tensor:
    """Return the last W inputs of each row, [B, C, W]. The first `lengths` [B] tokens of a row are real (None: all).

    Rows shorter than the window are filled from `previous`, or with zeros.
    """
    rows = x.transpose(1, 2)
    before = rows.new_zeros(*rows.shape[:2], width) if previous is None else previous.to(rows.dtype)
    rows = torch.cat([before, rows], dim=-1)
    if lengths is None:
        return rows[..., -width:]
    index = lengths[:, None] + torch.arange(width, device=x.device)
    return rows.gather(2, index[:, None].expand(-1, rows.shape[1], -1))
