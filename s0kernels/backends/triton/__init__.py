"""Backend `triton`: fused scans and steps for GPUs, and for tests in Triton's interpreter on a CPU."""

import torch
from triton.runtime.interpreter import InterpretedFunction

from s0kernels.backends.triton.common.states import state_grad_kernel
from s0kernels.backends.triton.common.targets import Target, target_of
from s0kernels.backends.triton.gated_delta_rule import (
    gated_delta_rule_backward,
    gated_delta_rule_forward,
    gated_delta_rule_keep,
    gated_delta_rule_step,
)
from s0kernels.backends.triton.ssd import ssd_backward, ssd_forward, ssd_step
from s0kernels.calls import Call
from s0kernels.hardware import CHIPS

__all__ = [
    "gated_delta_rule_backward",
    "gated_delta_rule_forward",
    "gated_delta_rule_keep",
    "gated_delta_rule_step",
    "ssd_backward",
    "ssd_forward",
    "ssd_step",
    "supports",
]


def supports(call: Call) -> str | None:
    device, dtype = call.device, call.dtype
    if dtype == torch.float64:
        return "computes in fp32, not in fp64"
    if device.type == "cuda":
        return _unusable(call.op, target_of(device))
    if device.type == "cpu" and isinstance(state_grad_kernel, InterpretedFunction):
        return None
    return f"for tensors on a GPU, not on {device.type} (except in the interpreter, with TRITON_INTERPRET=1)"


def _unusable(op: str, target: Target) -> str | None:
    """A torch for ROCm calls its devices cuda, too. Before 8.0 Triton makes no tensor-core instructions, and scans
    spill kilobytes; a step has no use for them."""
    if target.capability == 0:
        compiled = [name for name, chip in CHIPS.items() if name.startswith("gfx") and chip.tried != "never"]
        if target.name in compiled:
            return None
        return f"was compiled for AMD's {' and '.join(compiled)}, not for {target.name}"
    least = (7, 5) if op.endswith("_step") else (8, 0)
    found = divmod(target.capability, 10)
    if found >= least:
        return None
    steps = "" if found < (7, 5) or op.endswith("_step") else " for sequences (single tokens run)"
    return f"needs compute capability {least[0]}.{least[1]} or newer{steps}, and this is {found[0]}.{found[1]}"
