"""Backend `cuda`: the compiled steps of `csrc/cuda`, for tensors on a GPU. It has no scans."""

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
        return f"is for tensors on a GPU, not on {call.device.type}"
    if torch.version.hip is not None:
        return "is for NVIDIA GPUs, and this torch is built for AMD GPUs"
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
    """Return None if the library is loaded, else the reason why it cannot be."""
    file = Path(os.environ.get("S0KERNELS_CUDA_LIBRARY") or Path(__file__).parents[1] / "_cuda.so")
    if not file.is_file():
        return "was not built: install with --no-build-isolation, with nvcc and a torch for CUDA"
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
