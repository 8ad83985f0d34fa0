"""The Mamba-2 mixer of Bamba and of most other families, starting from S0."""

from torch import Tensor

from s0kernels.modules.mamba2 import S0Mamba2Mixer


class S0BambaMixer(S0Mamba2Mixer):
    """Replaces `BambaMixer`, `GraniteMoeHybridMambaLayer`, `NemotronHMamba2Mixer`, `Zamba2MambaMixer` and
    `Mamba2Mixer`, which are the same: they have no multipliers, and the gate always goes through the norm. Their step
    and their prefill disagree in the same two places as those of `FalconH1Mixer`."""

    mamba_rms_norm = True

    def _project(self, x: Tensor) -> Tensor:
        return self.in_proj(x)
