"""Mamba-2 SSD on a CUDA device, beyond what test_gpu.py asks of both scans."""

import pytest
import torch
from cases import error, ssd_problem
from test_gpu import DTYPES, assert_within_budget

from s0kernels.ops import ssd

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
#: heads, channels, groups, state of Falcon-H1-7B and 34B, of its 0.5B and Bamba, of Nemotron-H; with fewer heads
SHAPES = {"7B": (4, 128, 1, 256), "34B": (4, 128, 2, 256), "0.5B": (4, 64, 1, 128), "Nemotron-H": (8, 64, 4, 128)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", ["fused", "split"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("time_major", [False, True], ids=["token-major", "channel-first"])
def test_heads_of_models(dtype, schedule, shape, time_major, monkeypatch):
    """In the layouts that projections and transformers' convolution leave."""
    monkeypatch.setenv("S0KERNELS_TRITON_SCHEDULE", schedule)
    H, P, G, N = SHAPES[shape]
    problem = ssd_problem(150, B=2, H=H, P=P, G=G, N=N, state="bank").to(dtype, torch.float32)
    if time_major:
        for name in ("x", "B", "C"):
            problem.tensors[name] = problem.tensors[name].movedim(1, -1).contiguous().movedim(-1, 1)
    assert_within_budget(problem, "triton")


def test_more_than_two_to_the_31_elements():
    """The end of a long sequence whose decay forgets the rest, alone and after the rest."""
    T, H, P, N = 2**31 // (8 * 128) + 1000, 8, 128, 64
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of memory")
    x = torch.randn(1, T, H, P, device="cuda", dtype=torch.bfloat16)
    B, C = (torch.randn(1, T, 1, N, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    dt, A = torch.full((1, T, H), 0.5, device="cuda"), torch.full((H,), -1.0, device="cuda")
    end = [t[:, -640:] for t in (x, dt, B, C)]
    whole = ssd(x, dt, A, B, C, backend="triton").output[:, -100:]
    alone = ssd(end[0], end[1], A, *end[2:], backend="triton").output[:, -100:]
    assert error(whole, alone) < 0.01
