"""The records that carry the arguments of a call from a public op down to a kernel.

They are unpacked in two places: the schema of a torch operator, and the launch of a kernel. Options are plain numbers
and flags, so that a schema can hold them.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class DeltaInputs(NamedTuple):
    """The inputs of the gated delta rule. A step has no T. v is None where the backward computes the gradient of the
    initial state alone."""

    q: Tensor  # [B, T, H, K]
    k: Tensor
    v: Tensor  # [B, T, HV, V]
    g: Tensor  # [B, T, HV]
    beta: Tensor


class DeltaOptions(NamedTuple):
    scale: float
    use_qk_l2norm: bool
    chunk_size: int = 0  # 0: the backend chooses


class DeltaKept(NamedTuple):
    """What a forward of the gated delta rule leaves for its backward, where the backend does that, in its own shapes.
    The backward recomputes what is None."""

    w: Tensor  # what solves the triangular systems of the chunks
    p: Tensor  # attention inside the chunks
    gates: Tensor  # factors of tokens: of decays, norms and beta
    r: Tensor | None = None  # residuals
    h: Tensor | None = None  # states at the starts of chunks


class SSDInputs(NamedTuple):
    """The inputs of Mamba-2 SSD. A step has no T. x, B and D are None where the backward computes the gradient of the
    initial state alone."""

    x: Tensor  # [B, T, H, P]
    dt: Tensor  # [B, T, H]
    A: Tensor  # [H]
    B: Tensor  # [B, T, G, N]
    C: Tensor
    D: Tensor | None = None  # [H]
    z: Tensor | None = None  # [B, T, H, P]
    dt_bias: Tensor | None = None  # [H]


class SSDOptions(NamedTuple):
    dt_softplus: bool
    dt_min: float
    dt_max: float
    chunk_size: int = 0  # 0: the backend chooses

    @property
    def dt_limit(self) -> tuple[float, float]:
        return self.dt_min, self.dt_max


class Start(NamedTuple):
    """Where sequences begin, and the states they start from. The sequences are the rows of a dense batch, or the pieces
    that `cu_seqlens` cuts out of one packed row. `state` is one state shared by all sequences, one state for each, or a
    bank whose rows `indices` picks."""

    state: Tensor | None = None
    indices: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def sequences(self, batch: int) -> int:
        """The number of sequences, NSEQ."""
        return batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


class Pool(NamedTuple):
    """The states that a step updates: one for each row, or the rows of a pool that `indices` picks."""

    state: Tensor
    indices: Tensor | None = None


class Grads(NamedTuple):
    """The gradients of a scan's two results. At least one is not None."""

    output: Tensor | None
    final_state: Tensor | None

    def columns(self, axis: int) -> int:
        """The last dimension of the output, which equals dimension `axis` of a state."""
        if self.output is not None:
            return self.output.shape[-1]
        assert self.final_state is not None
        return self.final_state.shape[axis]


class Wanted(NamedTuple):
    """The gradients to compute: the names of inputs, which may include `initial_state`, and the shape of that state."""

    names: frozenset[str]
    state_shape: tuple[int, ...]


class DeltaMixerInputs(NamedTuple):
    """One token between the input and output projections of a gated delta rule mixer."""

    mixed: Tensor  # [B, C]
    z: Tensor  # [B, HV, V]
    b: Tensor  # [B, HV]
    a: Tensor
    conv_weight: Tensor  # [C, W]
    conv_bias: Tensor | None  # [C]
    A_log: Tensor  # [HV]
    dt_bias: Tensor
    norm: Tensor  # [V]


class DeltaMixerOptions(NamedTuple):
    eps: float
    allow_neg_eigval: bool  # beta = 2 sigmoid(b)


class SSDMixerInputs(NamedTuple):
    """One token between the input and output projections of a Mamba-2 mixer."""

    gate: Tensor  # [B, H P]
    mixed: Tensor  # [B, C]
    dt: Tensor  # [B, H]
    conv_weight: Tensor  # [C, W]
    conv_bias: Tensor | None  # [C]
    A_log: Tensor  # [H]
    D: Tensor
    dt_bias: Tensor
    norm: Tensor | None  # [H P]


class SSDMixerOptions(NamedTuple):
    eps: float
    gate_first: bool
    dt_min: float
    dt_max: float

    @property
    def dt_limit(self) -> tuple[float, float]:
        return self.dt_min, self.dt_max


class MixerPool(NamedTuple):
    """The memory that a mixer's step updates: the windows of its convolution [., C, W] and the states."""

    window: Tensor
    state: Tensor
    indices: Tensor | None = None


class Call(NamedTuple):
    """The properties of a call that decide which backend runs it: the op's public name, the device and dtype of its
    inputs, and, where they matter, the largest dimension of a head and the width of a convolution."""

    op: str
    device: torch.device
    dtype: torch.dtype
    size: int = 0
    width: int = 0


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states and of arithmetic: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
