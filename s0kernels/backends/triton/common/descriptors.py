"""Tiles by tensor descriptors: the chip computes the addresses of a tile and copies it by itself, so that neither takes
registers or instructions of the kernel. Where a descriptor cannot read a tensor, the same kernel is given a pointer."""

# of Triton's language, which is not quite Python:
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from s0kernels.backends.triton.common.targets import target_of

#: A descriptor has addresses, and steps from row to row, of whole units of these bytes, and tiles of one or more,
_ALIGNED = 16
#: and 32 bits for each size.
_LARGEST = 2**31 - 1


def has_descriptors(device: torch.device) -> bool:
    """Whether kernels on a device take them: they were measured on an H200 alone."""
    return 90 <= target_of(device).capability < 100


def of_tokens(x: Tensor, rows: int, columns: int) -> TensorDescriptor | None:
    """[B, T, H, D] with D contiguous, as [B, H, T, D] in tiles of [1, 1, rows, columns]: zero beyond T and D, where
    nothing is stored either. None where no descriptor can read it."""
    return _at(x, _of_tokens(x.dtype, x.shape, x.stride(), rows, columns))


def of_matrices(x: Tensor, rows: int, columns: int) -> TensorDescriptor | None:
    """Contiguous [.., R, C] as [N, R, C] in tiles of [1, rows, columns]. None where no descriptor can read it."""
    return _at(x, _of_matrices(x.dtype, x.shape, rows, columns))


def _at(x: Tensor, pattern: TensorDescriptor | None) -> TensorDescriptor | None:
    """The descriptor of x that `pattern` is without an address. Making each anew, with Triton's checks of sizes, would
    take a tenth of the host time of a call."""
    if pattern is None or x.data_ptr() % _ALIGNED:
        return None
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.__dict__.update(pattern.__dict__)
    made.base = x
    return made


@functools.lru_cache(maxsize=4096)
def _of_tokens(dtype: torch.dtype, shape, strides, rows: int, columns: int) -> TensorDescriptor | None:
    (B, T, H, D), (step_b, step_t, step_h, step_d) = shape, strides
    # the step of a size of 1 is not used, and torch may call it anything
    step_b, step_t, step_h = step_b if B > 1 else _ALIGNED, step_t if T > 1 else _ALIGNED, step_h if H > 1 else _ALIGNED
    if columns * dtype.itemsize < _ALIGNED or step_d != 1 or min(shape) <= 0 or max(shape) > _LARGEST:
        return None
    if (step_b | step_t | step_h) * dtype.itemsize % _ALIGNED or min(step_b, step_t, step_h) <= 0:
        return None
    steps, nowhere = [step_b, step_h, step_t, 1], torch.empty(0, dtype=dtype)
    return TensorDescriptor(nowhere, [B, H, T, D], steps, [1, 1, rows, columns])


@functools.lru_cache(maxsize=4096)
def _of_matrices(dtype: torch.dtype, shape, rows: int, columns: int) -> TensorDescriptor | None:
    *sizes, R, C = shape
    count = math.prod(sizes)
    if min(count, R, C) <= 0 or count > _LARGEST or C * dtype.itemsize % _ALIGNED:
        return None
    return TensorDescriptor(torch.empty(0, dtype=dtype), [count, R, C], [R * C, C, 1], [1, rows, columns])


@triton.constexpr_function
def element_type(x):
    """Of a pointer or a descriptor."""
    return x.dtype.element_ty if x.dtype.is_ptr() else x.dtype


@triton.jit
def load_token_tile(x, sx, i_b, i_t, i_h, i_d, rows, D, BT: tl.constexpr, BD: tl.constexpr):
    """[BT, BD] of x [B, T, H, D], a pointer with strides sx or what `of_tokens` makes: from token i_t and column i_d
    on. Zero beyond D, and beyond `rows`; a descriptor is zero beyond T alone."""
    if isinstance(x, tl.tensor_descriptor):
        return tl.reshape(x.load([i_b, i_h, i_t, i_d]), [BT, BD])
    else:
        o_t, o_d = tl.arange(0, BT), i_d + tl.arange(0, BD)
        i_b, i_h, i_t = tl.cast(i_b, tl.int64), tl.cast(i_h, tl.int64), tl.cast(i_t, tl.int64)
        base = x + i_b * sx[0] + i_t * sx[1] + i_h * sx[2]
        mask = (o_t < rows)[:, None] & (o_d < D)[None, :]
        return tl.load(base + o_t[:, None] * sx[1] + o_d[None, :] * sx[3], mask=mask, other=0.0)


@triton.jit
def load_matrix(x, at, BR: tl.constexpr, BC: tl.constexpr):
    """[BR, BC], the matrix of that number in x, a pointer or what `of_matrices` makes."""
    if isinstance(x, tl.tensor_descriptor):
        return tl.reshape(x.load([at.to(tl.int32), 0, 0]), [BR, BC])
    else:
        o_r, o_c = tl.arange(0, BR), tl.arange(0, BC)
        return tl.load(x + at.to(tl.int64) * BR * BC + o_r[:, None] * BC + o_c[None, :])


@triton.jit
def store_token_tile(x, b_x, i_b, i_t, i_h, i_d):
    """[BT, BD] to what `of_tokens` makes; nothing beyond T and D."""
    x.store([i_b, i_h, i_t, i_d], tl.reshape(b_x, [1, 1, b_x.shape[0], b_x.shape[1]]))


@triton.jit
def store_matrix(x, at, b_x, R: tl.constexpr, C: tl.constexpr, i_r, BR: tl.constexpr, BC: tl.constexpr):
    """[BR, BC] to the matrix [R, C] of that number in x, from row i_r on; x is as for `load_matrix`."""
    if isinstance(x, tl.tensor_descriptor):
        x.store([at.to(tl.int32), i_r, 0], tl.reshape(b_x, [1, BR, BC]))
    else:
        o_r, o_c = i_r + tl.arange(0, BR), tl.arange(0, BC)
        mask = (o_r < R)[:, None] & (o_c < C)[None, :]
        tl.store(x + at.to(tl.int64) * R * C + o_r[:, None] * C + o_c[None, :], b_x, mask=mask)
