"""Argument checks shared by the ops. Every message names the argument, the expected value and the given value."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from s0kernels.calls import (
    DeltaInputs,
    DeltaMixerInputs,
    MixerPool,
    Pool,
    SSDInputs,
    SSDMixerInputs,
    Start,
    state_dtype,
)

Inputs = DeltaInputs | SSDInputs | DeltaMixerInputs | SSDMixerInputs
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDICES = (torch.int32, torch.int64)


class Checker:
    """Checks tensors against named dimensions. The first tensor that has a dimension fixes its size."""

    def __init__(self, op: str, name: str, first: Tensor):
        """`first` is the first tensor of a call. It fixes dtype and device for the others."""
        if not isinstance(first, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(first).__name__}")
        if first.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must have dtype bfloat16, float16, float32 or float64, got {first.dtype}")
        self.op = op
        self.device, self.dtype = first.device, first.dtype
        self.sizes: dict[str, int] = {}

    def tensor(self, name: str, value: Tensor, dims: str, dtypes: Sequence[torch.dtype]) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.op}: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.dtype not in dtypes:
            wanted = " or ".join(dict.fromkeys(str(dtype) for dtype in dtypes))
            raise TypeError(f"{self.op}: {name} must have dtype {wanted}, got {value.dtype}")
        if value.device != self.device:
            raise ValueError(f"{self.op}: {name} must be on {self.device} like the first tensor, got {value.device}")
        names, shape, sizes = dims.split(), list(value.shape), self.sizes
        if len(shape) != len(names) or [*map(sizes.get, names, shape)] != shape:
            raise ValueError(f"{self.op}: {name} must have shape {self._wanted(dims)}, got {shape}")
        sizes.update(zip(names, shape))  # noqa: B905  `strict` would take as long as the rest of this function

    def _wanted(self, dims: str) -> str:
        return f"[{', '.join(f'{d}={self.sizes[d]}' if d in self.sizes else d for d in dims.split())}]"

    def multiple(self, larger: str, smaller: str, name: str) -> None:
        a, b = self.sizes[larger], self.sizes[smaller]
        if a == 0 or b == 0 or a % b != 0:
            raise ValueError(
                f"{self.op}: the heads of {name} ({larger}={a}) must be a positive multiple of {smaller}={b}"
            )

    def start(self, start: Start, dims: str) -> None:
        """Check where sequences begin, and the initial state [*dims]."""
        self._sequences(start.cu_seqlens)
        self._state("initial_state", start.state, start.indices, dims, state_dtype(self.dtype))

    def _sequences(self, cu_seqlens: Tensor | None) -> None:
        """Fix NSEQ: the number of rows, or of packed sequences."""
        if cu_seqlens is None:
            self.sizes["NSEQ"] = self.sizes["B"]
            return
        self.tensor("cu_seqlens", cu_seqlens, "NSEQ+1", INDICES)
        if self.sizes["B"] != 1:
            raise ValueError(
                f"{self.op}: cu_seqlens packs sequences into one row, so B must be 1, got B={self.sizes['B']}"
            )
        if cu_seqlens.shape[0] < 1:
            raise ValueError(f"{self.op}: cu_seqlens must have shape [NSEQ+1], got [0]")
        self.sizes["NSEQ"] = cu_seqlens.shape[0] - 1

    def _state(self, name: str, state: Tensor | None, indices: Tensor | None, dims: str, dtype: torch.dtype) -> None:
        """Check a state: one shared by all sequences, one per sequence, or a bank with indices."""
        if state is None:
            if indices is not None:
                raise ValueError(f"{self.op}: state_indices was given without {name}")
            return
        if not isinstance(state, Tensor):
            raise TypeError(f"{self.op}: {name} must be a torch.Tensor, got {type(state).__name__}")
        rank = len(dims.split())
        if indices is not None:
            self.tensor(name, state, "S " + dims, (dtype,))
            self.tensor("state_indices", indices, "NSEQ", INDICES)
        elif state.dim() in (rank, rank + 1):
            self.tensor(name, state, dims if state.dim() == rank else "NSEQ " + dims, (dtype,))
        else:
            raise ValueError(
                f"{self.op}: {name} must have shape {self._wanted(dims)} (shared), {self._wanted('NSEQ ' + dims)} "
                f"(one per sequence) or, with state_indices, {self._wanted('S ' + dims)}, got {list(state.shape)}"
            )

    def pool(self, pool: Pool | MixerPool, dims: str) -> None:
        """Check the states of a step: one state [*dims] per row of the batch, or a pool with indices."""
        state, indices, dtype = pool.state, pool.indices, state_dtype(self.dtype)
        if indices is not None:
            self.tensor("state", state, "S " + dims, (dtype,))
            self.tensor("state_indices", indices, "B", INDICES)
        else:
            self.tensor("state", state, "B " + dims, (dtype,))
        self.writable("state", state)

    def writable(self, name: str, value: Tensor) -> None:
        if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
            raise ValueError(
                f"{self.op}: {name} is written in place, so it must not be expanded, got {name}.stride()="
                f"{value.stride()}"
            )


def check_scan(op: str, output_final_state: bool, chunk_size: int | None) -> None:
    check_flag(op, "output_final_state", output_final_state)
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"{op}: chunk_size must be a positive int or None, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"{op}: chunk_size must be a positive int or None, got {chunk_size}")


def check_flag(op: str, name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def check_scale(op: str, scale: float | None) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale must be a number or None, got {type(scale).__name__}")
    if not -math.inf < scale < math.inf:  # torch.compile does not trace math.isfinite of a dynamic number
        raise ValueError(f"{op}: scale must be finite, got {scale}")


def check_dt_limit(op: str, dt_limit: tuple[float, float]) -> None:
    if not isinstance(dt_limit, (tuple, list)) or len(dt_limit) != 2:
        raise TypeError(f"{op}: dt_limit must be a pair (lowest, highest), got {dt_limit!r}")
    for bound in dt_limit:
        if isinstance(bound, bool) or not isinstance(bound, (int, float)):
            raise TypeError(f"{op}: dt_limit must hold two numbers, got {dt_limit!r}")
    if not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"{op}: dt_limit must be (lowest, highest) with lowest <= highest, got {dt_limit!r}")


def check_no_grad(op: str, inputs: Inputs, **written: Tensor) -> None:
    """Raise ValueError if a tensor requires grad: a step overwrites its state and has no backward."""
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in (*inputs, *written.values())):
        return
    tensors = inputs._asdict() | written
    name = next(name for name, x in tensors.items() if x is not None and x.requires_grad)
    raise ValueError(
        f"{op}: {name} requires grad, but a step updates its state in place and has no backward; "
        "call it under torch.no_grad() or use the scan with T = 1"
    )
