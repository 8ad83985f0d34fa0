"""The gated delta rule mixer of OLMo-Hybrid, starting from S0."""

import torch
from torch import Tensor, nn

from s0kernels.modules.gated_deltanet import S0GatedDeltaNet


class S0OlmoHybridGatedDeltaNet(S0GatedDeltaNet):
    """Replaces `OlmoHybridGatedDeltaNet`. It has separate projections for q, k, v, the gate, beta and the decay, and
    beta is doubled if the config allows negative eigenvalues."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    g_proj: nn.Module
    b_proj: nn.Module
    a_proj: nn.Module
    o_norm: nn.Module
    o_proj: nn.Module

    @property
    def norm(self) -> nn.Module:
        return self.o_norm

    @property
    def out_proj(self) -> nn.Module:
        return self.o_proj

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        return qkv, self.g_proj(x), self.b_proj(x), self.a_proj(x)
