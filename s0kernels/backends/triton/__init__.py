"""Backend `triton`: fused scans and steps for GPUs, and for tests in Triton's interpreter on a CPU."""

import torch
from triton.runtime.interpreter import InterpretedFunction

from s0kernels.backends.triton.delta import gated_delta_rule_backward, gated_delta_rule_forward, gated_delta_rule_step
from s0kernels.backends.triton.delta_step import gated_delta_rule_step_kernel
from s0kernels.backends.triton.mamba import ssd_backward, ssd_forward, ssd_step
from s0kernels.calls import Call

__all__ = [
    "gated_delta_rule_backward",
    "gated_delta_rule_forward",
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
        return None if torch.cuda.get_device_capability(device) >= (8, 0) else "needs compute capability 8.0 or newer"
    if device.type == "cpu" and isinstance(gated_delta_rule_step_kernel, InterpretedFunction):
        return None
    return f"for tensors on a GPU, not on {device.type} (except in the interpreter, with TRITON_INTERPRET=1)"
