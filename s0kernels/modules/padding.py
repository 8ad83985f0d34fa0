"""Move pads to the end of rows, so that they do not decay a state, write to it or enter a convolution window."""

import torch
from torch import Tensor


class Padding:
    """The real tokens of a padded batch, moved to the front of their rows.

    Between `compact` and `expand` there is right padding only, whether the pads were on the left, on the right, or
    between the turns of a conversation.
    """

    def __init__(self, attention_mask: Tensor, length: int):
        self.real = attention_mask[:, -length:].bool()
        lengths = self.real.sum(1, keepdim=True)
        places = torch.where(self.real, self.real.cumsum(1) - 1, lengths + (~self.real).cumsum(1) - 1)
        self._places = places[..., None]
        #: [B] number of real tokens in each row
        self.lengths = lengths[:, 0]
        #: [B, T, 1] True where a compacted row holds a pad
        self.pads = (torch.arange(length, device=lengths.device) >= lengths)[..., None]

    @classmethod
    def of(cls, attention_mask: Tensor | None, length: int) -> "Padding | None":
        return None if attention_mask is None or attention_mask.dim() != 2 else cls(attention_mask, length)

    def compact(self, x: Tensor) -> Tensor:
        """Move the real tokens of [B, T, C] to the front, in order, and fill the rest with zeros."""
        rows = torch.zeros_like(x).scatter(1, self._places.expand_as(x), x)
        return rows.masked_fill(self.pads, 0.0)

    def expand(self, x: Tensor) -> Tensor:
        """The inverse of `compact`. The values at pads have no meaning."""
        return x.gather(1, self._places.expand_as(x))
