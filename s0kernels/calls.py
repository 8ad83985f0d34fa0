"""The records in which a call's arguments travel, from a public op down to a kernel.

They are unpacked in two places: the schema of a torch operator, and the launch of a kernel. Options are flat, so that a
schema can hold them.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class DeltaInputs(NamedTuple):
    """Of the gated delta rule; a step has no T. v is None in the backward of the initial state alone."""

    q: Tensor  # [B, T, H, K]
    k: Tensor
    v: Tensor  # [B, T, HV, V]
    g: Tensor  # [B, T, HV]
    beta: Tensor


class DeltaOptions(NamedTuple):
    scale: float
    use_qk_l2norm: bool
    chunk_size: int = 0  # the backend's choice


class DeltaKept(NamedTuple):
    """What a forward of the gated delta rule leaves for its backward, where the backend does that, in its own shapes.
    The backward recomputes what is None."""

    w: Tensor  # what solves the triangular systems of the chunks
    p: Tensor  # attention inside the chunks
    gates: Tensor  # factors of tokens: of decays, norms and beta
    r: Tensor | None = None  # residuals
    h: Tensor | None = None  # states at the starts of chunks


class SSDInputs(NamedTuple):
    """Of Mamba-2 SSD; a step has no T. x, B and D are None in the backward of the initial state alone."""

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
    chunk_size: int = 0  # the backend's choice

    @property
    def dt_limit(self) -> tuple[float, float]:
        return self.dt_min, self.dt_max


class Start(NamedTuple):
    """Where sequences begin and what they start from. They are the rows of a dense batch, or the pieces that
    `cu_seqlens` cuts out of one packed row; `state` is shared by all of them, one for each, or a bank for `indices`."""

    state: Tensor | None = None
    indices: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def sequences(self, batch: int) -> int:
        """NSEQ."""
        return batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


class Pool(NamedTuple):
    """The states that a step writes: one for each row, or those that `indices` addresses."""

    state: Tensor
    indices: Tensor | None = None


class Grads(NamedTuple):
    """What comes back to a scan; at least one of them."""

    output: Tensor | None
    final_state: Tensor | None

    def columns(self, axis: int) -> int:
        """The last size of the output, which is that of a state at `axis`."""
        if self.output is not None:
            return self.output.shape[-1]
        assert self.final_state is not None
        return self.final_state.shape[axis]


class Wanted(NamedTuple):
    """Names of the inputs, `initial_state` among them, whose gradients are asked for, and the shape of that state."""

    names: frozenset[str]
    state_shape: tuple[int, ...]


class DeltaMixerInputs(NamedTuple):
    """A token between the projections of a mixer with the gated delta rule."""

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
    """A token between the projections of a Mamba-2 mixer."""

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
    """What a mixer's token moves on: the windows of its convolution [., C, W] and the states."""

    window: Tensor
    state: Tensor
    indices: Tensor | None = None


class Call(NamedTuple):
    """What decides which backend runs a call: the op's public name, the device and dtype of its inputs, and where they
    matter the largest dimension of a head and the width of a convolution."""

    op: str
    device: torch.device
    dtype: torch.dtype
    size: int = 0
    width: int = 0


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States and arithmetic are fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
