"""The gated delta rule mixer of Qwen3.5, starting from S0."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s0kernels.calls import state_dtype
from s0kernels.modules.mixer import LiveCache, Rows, S0Mixer, norm_eps
from s0kernels.ops import gated_delta_rule, gated_delta_rule_step
from s0kernels.ops.mixer_steps import gated_delta_mixer_step


class S0GatedDeltaNet(S0Mixer):
    """Replaces `Qwen3_5GatedDeltaNet`, `Qwen3_5MoeGatedDeltaNet` and `LaraMiniGatedDeltaNet`, which are the same.
    Without S0 it computes the same as the original. See `s0kernels.modules` for when S0 enters."""

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    key_dim: int
    value_dim: int
    #: whether beta lies in (0, 2) instead of (0, 1)
    allow_neg_eigval: bool = False
    in_proj_qkv: nn.Module
    in_proj_z: nn.Module
    in_proj_b: nn.Module
    in_proj_a: nn.Module

    def _forward(self, hidden_states: Tensor, rows: Rows) -> Tensor:
        projected = self._project(hidden_states)
        output = self._fused_step(*projected, rows)
        if output is None:
            output = self._mix(*projected, rows)
        return self.out_proj(output.view(*hidden_states.shape[:2], self.value_dim))

    def _mix(self, mixed: Tensor, z: Tensor, b: Tensor, a: Tensor, rows: Rows) -> Tensor:
        """Compute convolution, gates, scan and gated norm, one after the other."""
        mixed = self._convolve(mixed, rows)
        q, k, v = torch.split(mixed, [self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q, k = (x.unflatten(-1, (self.num_k_heads, self.head_k_dim)) for x in (q, k))
        v = v.unflatten(-1, (self.num_v_heads, self.head_v_dim))
        beta = b.sigmoid() * 2.0 if self.allow_neg_eigval else b.sigmoid()
        g = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)
        if rows.padding is not None:  # a pad neither decays the state nor writes to it
            g, beta = g.masked_fill(rows.padding.pads, 0.0), beta.masked_fill(rows.padding.pads, 0.0)

        output = self.scan(q, k, v, g, beta.to(q.dtype), rows)
        return self.norm(output.reshape(-1, self.head_v_dim), z.reshape(-1, self.head_v_dim))

    def _fused_step(self, mixed: Tensor, z: Tensor, b: Tensor, a: Tensor, rows: Rows) -> Tensor | None:
        """Compute `_mix` of one token by one kernel. Return None if no kernel supports it."""
        conv, cache = self.conv1d, rows.cache
        if not isinstance(cache, LiveCache) or rows.padding is not None:
            return None
        norm: Any = self.norm
        eps = norm_eps(norm)
        parameters = (conv.weight, conv.bias, self.A_log, self.dt_bias, norm.weight)
        backend = self.fused_backend("gated_delta_mixer_step", cache, mixed, z, b, a, *parameters)
        if backend is None or eps is None:
            return None
        return gated_delta_mixer_step(
            mixed[:, 0],
            z[:, 0].unflatten(1, (self.num_v_heads, self.head_v_dim)),
            b[:, 0],
            a[:, 0],
            conv.weight[:, 0],
            *parameters[1:],
            cache.window,
            cache.state,
            eps=eps,
            allow_neg_eigval=self.allow_neg_eigval,
            backend=backend,
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (q|k|v side by side, for the convolution; z [B, T, value_dim]; b and a [B, T, num_v_heads])."""
        return self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)

    def scan(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, rows: Rows) -> Tensor:
        """Run the recurrence alone, over all tokens or one, from the state in the cache or from S0."""
        inputs, dtype, cache = (q, k, v, g, beta), state_dtype(q.dtype), rows.cache
        if q.shape[1] == 1 and isinstance(cache, LiveCache) and cache.can_step(*inputs):
            token = (q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0])
            return cache.step(lambda state: gated_delta_rule_step(*token, state, use_qk_l2norm=True), dtype)[:, None]
        output, final_state = gated_delta_rule(
            *inputs, use_qk_l2norm=True, output_final_state=cache.present, **self._start(rows, q.device, dtype)
        )
        cache.store_state(final_state)
        return output
