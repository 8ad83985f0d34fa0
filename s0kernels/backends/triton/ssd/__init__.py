"""Mamba-2 SSD; `forward.py` has its formulas."""

from s0kernels.backends.triton.ssd.backward import ssd_backward
from s0kernels.backends.triton.ssd.forward import ssd_forward
from s0kernels.backends.triton.ssd.step import ssd_step

__all__ = ["ssd_backward", "ssd_forward", "ssd_step"]
