"""The gated delta rule mixer of Qwen3.5, starting from S0."""

import torch
import torch.nn.functional as F
from torch import Tensor

from s0kernels.modules.mixer import MixerCache, S0Mixer, state_dtype
from s0kernels.modules.padding import Padding
from s0kernels.ops import gated_delta_rule, gated_delta_rule_step


class S0GatedDeltaNet(S0Mixer):
    """Replaces `Qwen3_5GatedDeltaNet`. With no S0 attached it computes what the original computes; see
    `s0kernels.modules` for when S0 enters."""

    def forward(
        self, hidden_states: Tensor, cache_params=None, attention_mask: Tensor | None = None, **kwargs
    ) -> Tensor:
        """[B, T, hidden] to [B, T, hidden]; `attention_mask` [B, T] is 0 at pads, None where there are none."""
        self._reject_packed(kwargs)
        batch, length = hidden_states.shape[:2]
        cache = MixerCache(cache_params, self.layer_idx, self.conv_kernel_size)
        padding = Padding.of(attention_mask, length)
        if padding is not None:
            hidden_states = padding.compact(hidden_states)

        mixed = self._convolve(self.in_proj_qkv(hidden_states), cache, padding)
        q, k, v = torch.split(mixed, [self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q, k = (x.unflatten(-1, (self.num_k_heads, self.head_k_dim)) for x in (q, k))
        v = v.unflatten(-1, (self.num_v_heads, self.head_v_dim))
        beta = self.in_proj_b(hidden_states).sigmoid()
        g = -self.A_log.float().exp() * F.softplus(self.in_proj_a(hidden_states).float() + self.dt_bias)
        if padding is not None:  # a pad neither decays the state nor writes to it
            g, beta = g.masked_fill(padding.pads, 0.0), beta.masked_fill(padding.pads, 0.0)

        output = self._scan(q, k, v, g, beta.to(q.dtype), cache, kwargs)
        z = self.in_proj_z(hidden_states).view(-1, self.head_v_dim)
        output = self.norm(output.reshape(-1, self.head_v_dim), z).view(batch, length, self.value_dim)
        output = self.out_proj(output)
        return output if padding is None else padding.expand(output)

    def _scan(self, q, k, v, g, beta, cache: MixerCache, kwargs: dict) -> Tensor:
        dtype, inputs = state_dtype(q), (q, k, v, g, beta)
        if q.shape[1] == 1 and cache.can_step(*inputs):
            token = [x[:, 0] for x in inputs]
            output = cache.step(lambda state: gated_delta_rule_step(*token, state, use_qk_l2norm=True), dtype)
            return output[:, None]
        if cache.live:
            initial_state, indices = cache.starting_state(dtype), None
        else:
            initial_state, indices = self._bound_states(kwargs, q.shape[0]).for_layer(self.layer_idx, q.device, dtype)
        output, final_state = gated_delta_rule(
            *inputs,
            initial_state=initial_state,
            state_indices=indices,
            use_qk_l2norm=True,
            output_final_state=cache.present,
        )
        if cache.present:
            cache.store_state(final_state)
        return output
