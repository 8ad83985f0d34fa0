"""The gated delta rule; `forward.py` has its formulas."""

from s0kernels.backends.triton.gated_delta_rule.backward import gated_delta_rule_backward, gated_delta_rule_keep
from s0kernels.backends.triton.gated_delta_rule.forward import gated_delta_rule_forward
from s0kernels.backends.triton.gated_delta_rule.step import gated_delta_rule_step

__all__ = ["gated_delta_rule_backward", "gated_delta_rule_forward", "gated_delta_rule_keep", "gated_delta_rule_step"]
