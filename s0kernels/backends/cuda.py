"""Backend `cuda`: the compiled steps of `csrc/cuda`, for tensors on a GPU. Sequences are not its business."""

import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from s0kernels.backends import tokens
from s0kernels.calls import (
    Call,
    DeltaInputs,
    DeltaMixerInputs,
    DeltaMixerOptions,
    DeltaOptions,
    MixerPool,
    Pool,
    SSDInputs,
    SSDMixerInputs,
    SSDMixerOptions,
    SSDOptions,
)


def supports(call: Call) -> str | None:
    if call.dtype == torch.float64:
        return "computes in fp32, not in fp64"
    if call.device.type != "cuda":
        return f"for tensors on a GPU, not on {call.device.type}"
    if torch.version.hip is not None:
        return "is for GPUs by NVIDIA, and this torch is for those by AMD"
    return _unusable(
        torch.cuda.current_device() if call.device.index is None else call.device.index
    ) or tokens.too_large(call)


@functools.cache
def _unusable(index: int) -> str | None:
    if (reason := missing()) is not None:
        return reason
    problem = torch.ops.s0kernels_cuda.unusable(index)
    return f"does not run on {torch.cuda.get_device_name(index)}: {problem}" if problem else None


@functools.cache
def missing() -> str | None:
    """None once the library is there, else the reason why not."""
    file = Path(os.environ.get("S0KERNELS_CUDA_LIBRARY") or Path(__file__).parents[1] / "_cuda.so")
    if not file.is_file():
        return "was not built: install with --no-build-isolation where nvcc and a torch for CUDA are"
    try:
        torch.ops.load_library(str(file))
        _ = torch.ops.s0kernels_cuda.gated_delta_rule_step
    except (OSError, RuntimeError, AttributeError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        return f"cannot be used beside torch {torch.__version__}: {reason}"
    return None


def gated_delta_rule_step(inputs: DeltaInputs, pool: Pool, options: DeltaOptions) -> Tensor:
    return tokens.gated_delta_rule_step(torch.ops.s0kernels_cuda, inputs, pool, options)


def ssd_step(inputs: SSDInputs, pool: Pool, options: SSDOptions) -> Tensor:
    return tokens.ssd_step(torch.ops.s0kernels_cuda, inputs, pool, options)


def gated_delta_mixer_step(inputs: DeltaMixerInputs, pool: MixerPool, options: DeltaMixerOptions) -> Tensor:
    return tokens.gated_delta_mixer_step(torch.ops.s0kernels_cuda, inputs, pool, options)


def ssd_mixer_step(inputs: SSDMixerInputs, pool: MixerPool, options: SSDMixerOptions) -> Tensor:
    return tokens.ssd_mixer_step(torch.ops.s0kernels_cuda, inputs, pool, options)
