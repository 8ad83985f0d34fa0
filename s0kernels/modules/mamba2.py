"""The Mamba-2 mixer of Falcon-H1, starting from S0."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s0kernels.calls import state_dtype
from s0kernels.modules.mixer import LiveCache, Rows, S0Mixer, as_scalar, norm_eps
from s0kernels.modules.padding import Padding
from s0kernels.ops import ssd, ssd_step
from s0kernels.ops.mixer_steps import ssd_mixer_step


class S0Mamba2Mixer(S0Mixer):
    """Replaces `FalconH1Mixer`. Without S0 it computes the same as the original. See `s0kernels.modules` for when S0
    enters.

    In two places the original disagrees with its own prefill without padding, which this class follows: the one-token
    step of the original ignores `time_step_limit`, and with `mamba_proj_bias` its pads enter the convolution.
    """

    intermediate_size: int
    conv_dim: int
    num_heads: int
    head_dim: int
    n_groups: int
    ssm_state_size: int
    mamba_rms_norm: bool
    time_step_limit: tuple[float, float]
    ssm_in_multiplier: float
    mup_vector: Tensor
    D: Tensor
    in_proj: nn.Module

    def _forward(self, hidden_states: Tensor, rows: Rows) -> Tensor:
        sizes = [self.intermediate_size, self.conv_dim, self.num_heads]
        gate, mixed, dt = self._project(hidden_states).split(sizes, dim=-1)
        output = self._fused_step(gate, mixed, dt, rows)
        if output is None:
            output = self._mix(gate, mixed, dt, rows)
        return self.out_proj(output.view(*hidden_states.shape[:2], -1).to(hidden_states.dtype))

    def _mix(self, gate: Tensor, mixed: Tensor, dt: Tensor, rows: Rows) -> Tensor:
        """Compute convolution, scan, gate and norm, one after the other."""
        mixed = self._convolve(mixed, rows)
        state_size = self.n_groups * self.ssm_state_size
        x, B, C = mixed.split([self.intermediate_size, state_size, state_size], dim=-1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (t.unflatten(-1, (self.n_groups, self.ssm_state_size)) for t in (B, C))
        z = None if self.mamba_rms_norm else gate.unflatten(-1, (self.num_heads, self.head_dim)).to(x.dtype)

        output = self.scan(x, dt, B, C, z, rows).flatten(2)
        return self.norm(output, gate) if self.mamba_rms_norm else output

    def _fused_step(self, gate: Tensor, mixed: Tensor, dt: Tensor, rows: Rows) -> Tensor | None:
        """Compute `_mix` of one token by one kernel. Return None if no kernel supports it."""
        conv, cache, eps, norm = self.conv1d, rows.cache, 0.0, None
        if not isinstance(cache, LiveCache) or rows.padding is not None:
            return None
        if self.mamba_rms_norm:
            eps, norm = norm_eps(self.norm), getattr(self.norm, "weight", None)
            size = getattr(self.norm, "group_size", self.intermediate_size // getattr(self.norm, "n_groups", 1))
            if size * self.n_groups != self.intermediate_size:  # older versions of Bamba's norm have no groups
                return None
        parameters = (conv.weight, conv.bias, self.A_log, self.D, self.dt_bias, norm)
        backend = self.fused_backend("ssd_mixer_step", cache, mixed, gate, dt, *parameters)
        if backend is None or eps is None:
            return None
        return ssd_mixer_step(
            gate[:, 0],
            mixed[:, 0],
            dt[:, 0],
            conv.weight[:, 0],
            *parameters[1:],
            cache.window,
            cache.state,
            eps=eps,
            gate_first=not getattr(self.norm, "norm_before_gate", False),
            dt_limit=self._dt_limit(),
            backend=backend,
        )

    def _project(self, x: Tensor) -> Tensor:
        """Return the gate, x|B|C for the convolution, and dt side by side, [B, T, intermediate_size + conv_dim +
        num_heads]."""
        return self.in_proj(x * self.ssm_in_multiplier) * self.mup_vector

    def _dt_limit(self) -> tuple[float, float]:
        low, high = self.time_step_limit  # a config may hold ints
        return float(low), float(high)

    def _step_sizes(self, dt: Tensor, padding: Padding | None) -> tuple[Tensor, dict]:
        """Return dt, and the options by which the scan processes it. With pads it is processed here, because a pad
        takes a step of zero even if `time_step_limit` has a lower limit."""
        if padding is None:
            return dt, {"dt_bias": as_scalar(self.dt_bias, dt), "dt_softplus": True, "dt_limit": self._dt_limit()}
        dt = F.softplus(dt.to(state_dtype(dt.dtype)) + self.dt_bias).clamp(*self._dt_limit())
        return dt.masked_fill(padding.pads, 0.0), {}

    def scan(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None, rows: Rows) -> Tensor:
        """Run the recurrence alone, over all tokens or one, from the state in the cache or from S0."""
        dtype, cache = state_dtype(x.dtype), rows.cache
        A = -torch.exp(self.A_log.to(dtype))
        dt, options = self._step_sizes(dt.to(x.dtype), rows.padding)
        options["D"] = as_scalar(self.D, x)
        if x.shape[1] == 1 and isinstance(cache, LiveCache) and cache.can_step(x, dt, A, B, C, z, self.D, self.dt_bias):
            token = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])
            z = None if z is None else z[:, 0]
            return cache.step(lambda state: ssd_step(*token, state, z=z, **options), dtype)[:, None]
        start = self._start(rows, x.device, dtype)
        output, final_state = ssd(x, dt, A, B, C, z=z, output_final_state=cache.present, **start, **options)
        cache.store_state(final_state)
        return output
