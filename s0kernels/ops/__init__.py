"""Scans and steps with a differentiable initial state. Needs torch only."""

from s0kernels.calls import Call
from s0kernels.ops import mixer_steps  # noqa: F401  importing it registers its operators
from s0kernels.ops.gated_delta_rule import (
    gated_delta_rule,
    gated_delta_rule_reference,
    gated_delta_rule_step,
    gated_delta_rule_step_reference,
)
from s0kernels.ops.output import ScanOutput
from s0kernels.ops.registry import explain, recompute
from s0kernels.ops.ssd import ssd, ssd_reference, ssd_step, ssd_step_reference

__all__ = [
    "Call",
    "ScanOutput",
    "explain",
    "gated_delta_rule",
    "gated_delta_rule_reference",
    "gated_delta_rule_step",
    "gated_delta_rule_step_reference",
    "recompute",
    "ssd",
    "ssd_reference",
    "ssd_step",
    "ssd_step_reference",
]
