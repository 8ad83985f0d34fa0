"""Find the boundaries of sequences packed into one row, from any of the ways in which a caller can give them."""

from collections.abc import Mapping

import torch
from torch import Tensor


def find_boundaries(batch: int, length: int, kwargs: Mapping, live: bool) -> Tensor | None:
    """Return `cu_seqlens` over the batch * length tokens laid end to end, or None if no row holds more than one
    sequence.

    They come from `cu_seq_lens_q`, else from `seq_idx` [B, T], else from `position_ids` that restart within a row, as
    in the attention of transformers. The last two are read on the host. Rows that continue a `live` cache are never
    packed.
    """
    if (given := kwargs.get("cu_seq_lens_q")) is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q packs sequences into one row, so the batch must be 1, got {batch}")
        return given
    if kwargs.get("cu_seq_lens_k") is not None:
        raise ValueError("cu_seq_lens_k needs cu_seq_lens_q, which is missing")
    if (seq_idx := kwargs.get("seq_idx")) is not None:
        return _cut(seq_idx[:, 1:] != seq_idx[:, :-1], batch, length)
    positions = kwargs.get("position_ids")
    if positions is None or live or kwargs.get("attention_mask") is not None:
        return None
    if positions.dim() == 3:  # multimodal rotary positions: the first of four are the positions in the text
        if positions.shape[0] != 4:
            return None
        positions = positions[0]
    starts = positions[:, 1:] != positions[:, :-1] + 1
    return _cut(starts.expand(batch, -1), batch, length) if bool(starts.any()) else None


def _cut(starts: Tensor, batch: int, length: int) -> Tensor:
    """Return boundaries from marks [B, T - 1], which say whether tokens 1, 2, ... begin a sequence. Every row begins
    one too."""
    marks = torch.nn.functional.pad(starts, (1, 0), value=True).reshape(-1)
    ends = torch.nn.functional.pad(marks.nonzero()[:, 0], (0, 1), value=batch * length)
    return ends.to(torch.int32)


def sequence_indices(cu_seqlens: Tensor, length: int) -> Tensor:
    """Return the index of the sequence of each token, [T]."""
    tokens = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], tokens, right=True)


def sequence_positions(cu_seqlens: Tensor, length: int) -> Tensor:
    """Return the position of each token in its sequence, [1, T]."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    return (tokens - cu_seqlens.long()[sequence_indices(cu_seqlens, length)])[None]
