"""Kernels with code that Triton compiles wrongly for Hopper, and similar kernels without it. As a script it prints the
findings for each of them, and what is refused."""

import json

import torch
import triton
import triton.language as tl


@triton.jit
def transpose_of_a_product(x, y, n, B: tl.constexpr):
    o = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    b_x = tl.load(x + o)
    b_y = tl.dot(b_x, tl.load(y + o))
    tl.store(y + o, tl.dot(tl.trans((b_y * 2.0).to(b_x.dtype)), b_x).to(b_x.dtype))


@triton.jit
def transpose_of_the_product_before(x, y, n, B: tl.constexpr):
    o = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    b_x = tl.load(x + o)
    b_sum = tl.zeros([B, B], tl.float32)
    for _ in range(n):
        b_sum += tl.dot(b_x, tl.trans(b_sum.to(b_x.dtype)))
    tl.store(y + o, b_sum.to(b_x.dtype))


@triton.jit
def transpose_of_a_product_in_a_branch(x, y, n, B: tl.constexpr):
    o = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    b_x = tl.load(x + o)
    b_y = b_x
    if n > 3:
        b_y = tl.dot(b_x, b_y).to(b_x.dtype)
    tl.store(y + o, tl.dot(b_x, tl.trans(b_y)).to(b_x.dtype))


@triton.jit
def same_on_both_sides(x, y, n, B: tl.constexpr):
    o = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    b_w = tl.load(x + o)
    b_y = tl.dot(tl.trans(b_w), tl.load(y + o))
    tl.store(y + o, tl.dot(b_y.to(b_w.dtype), tl.trans(b_w)).to(b_w.dtype))


@triton.jit
def loaded_as_its_transpose(x, y, n, B: tl.constexpr):
    o = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    b_w = tl.load(x + tl.trans(o))
    b_y = tl.dot(b_w, tl.load(y + o))
    tl.store(y + o, tl.dot(b_y.to(b_w.dtype), b_w).to(b_w.dtype))


@triton.jit
def transposes_of_what_was_loaded(x, y, n, B: tl.constexpr):
    o = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    b_x, b_y = tl.load(x + o), tl.load(y + o)
    b_sum = tl.zeros([B, B], tl.float32)
    for _ in range(n):
        b_sum = tl.dot(tl.dot(b_sum.to(b_x.dtype), tl.trans(b_x)).to(b_x.dtype), tl.trans(b_y))
    tl.store(y + o, b_sum.to(b_x.dtype))


@triton.jit
def nothing(x, y, n, B: tl.constexpr):
    """What is left of a kernel that Triton takes for impossible."""


KERNELS = (
    transpose_of_a_product,
    transpose_of_the_product_before,
    transpose_of_a_product_in_a_branch,
    same_on_both_sides,
    loaded_as_its_transpose,
    transposes_of_what_was_loaded,
)

if __name__ == "__main__":
    from s0kernels.backends.triton.aot import compile_launch
    from s0kernels.backends.triton.common.launch import Launch
    from s0kernels.backends.triton.common.targets import known_target
    from s0kernels.backends.triton.common.tiles import Tiles

    hopper, found = known_target("sm_90"), {}
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    for kernel in KERNELS:
        launch = Launch(kernel, 1, (x, x, 7), {"B": 64}, Tiles(0, 4, 1))
        found[kernel.__name__] = [what.partition(" ")[2] for what in compile_launch(launch, hopper)[1]]
    for refused, target in (
        (launch, hopper._replace(shared=1000)),
        (launch._replace(tiles=Tiles(0, 4, 1, 50, 10), constants={"B": 64, "BK": 64}), hopper),
        (launch._replace(kernel=nothing), hopper),
        (launch._replace(kernel=nothing), known_target("gfx942")),
    ):
        try:
            compile_launch(refused, target)
        except ValueError as error:
            found.setdefault("refused", []).append(str(error))
    print(json.dumps(found))
