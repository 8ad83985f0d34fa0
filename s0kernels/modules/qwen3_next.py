"""The gated delta rule mixer of Qwen3-Next, starting from S0."""

import torch
from torch import Tensor, nn

from s0kernels.modules.gated_deltanet import S0GatedDeltaNet


class S0Qwen3NextGatedDeltaNet(S0GatedDeltaNet):
    """Replaces `Qwen3NextGatedDeltaNet`. It has two projection matrices, whose rows are grouped by key head: one holds
    q, k, v, z of each head, the other b, a."""

    in_proj_qkvz: nn.Module
    in_proj_ba: nn.Module

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        group = self.num_v_heads // self.num_k_heads
        sizes = [self.head_k_dim, self.head_k_dim, group * self.head_v_dim, group * self.head_v_dim]
        *qkv, z = self._by_head(self.in_proj_qkvz(x), sizes)
        b, a = self._by_head(self.in_proj_ba(x), [group, group])
        return torch.cat(qkv, dim=-1), z, b, a

    def _by_head(self, projected: Tensor, sizes: list[int]) -> list[Tensor]:
        heads = projected.unflatten(-1, (self.num_k_heads, -1))
        return [part.flatten(-2) for part in heads.split(sizes, dim=-1)]
