"""Choices that depend on the device: tiles, precision, and whether the Triton kernels run on it at all."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cases import delta_problem, ssd_problem
from test_triton import assert_within_budget
from test_triton import pytestmark as of_triton

from s0kernels import hardware
from s0kernels.backends import cuda
from s0kernels.backends import triton as backend
from s0kernels.backends.triton.common import targets
from s0kernels.backends.triton.common.targets import assuming, dot_precision, known_target
from s0kernels.backends.triton.common.tiles import choose_tiles
from s0kernels.backends.triton.gated_delta_rule import call as gated_delta_rule
from s0kernels.backends.triton.ssd import call as ssd
from s0kernels.calls import Call, DeltaInputs, DeltaOptions, SSDInputs, SSDOptions, Start
from s0kernels.hardware import CHIPS

pytestmark = of_triton
CUDA = torch.device("cuda")


def chosen(table, chip: str, width: int) -> tuple[int, int, int]:
    with assuming(known_target(chip)):
        return choose_tiles(table, CUDA, width)[:3]


def test_tiles_where_memory_is_large():
    """The tiles of sm_90 were measured, except those of the inputs. New measurements may change them."""
    by_stage = {  # on sm_80, sm_90 and sm_100
        "prepare": ((0, 8, 1), (0, 4, 1), (0, 4, 1)),
        "scan": ((64, 8, 2), (64, 4, 2), (64, 8, 2)),
        "output": ((64, 4, 2), (128, 4, 2), (64, 4, 2)),
        "intra": ((32, 8, 2), (64, 4, 3), (32, 4, 1)),
        "inputs": ((32, 8, 2), (32, 4, 3), (32, 8, 1)),
    }
    for stage, tiles in by_stage.items():
        for chip, expected in zip(("sm_80", "sm_90", "sm_100"), tiles, strict=True):
            for width in (64, 128):
                assert chosen(gated_delta_rule.TILES[stage, 2], chip, width) == expected
    for stage, tiles in {"heads": (64, 8, 3), "groups": (128, 8, 3)}.items():
        for chip in ("sm_90", "sm_100"):
            assert chosen(ssd.TILES[stage, 2], chip, 256) == tiles
    assert chosen(ssd.TILES["states", 2], "sm_90", 256) == (256, 8, 3)
    assert chosen(ssd.TILES["states", 2], "sm_100", 256) == (128, 8, 3)


def ssd_chunk(chip: str, T: int, dtype: torch.dtype = torch.bfloat16) -> int:
    like = torch.empty(1, T, 1, 16, dtype=dtype, device="meta")
    with assuming(known_target(chip)):
        return ssd.longest_chunk(like)


def test_chunks_of_ssd_are_long_where_there_is_room_for_them():
    for chip in CHIPS:
        assert ssd_chunk(chip, 65) == (128 if chip in ("sm_90", "sm_100") else 64)
        assert ssd_chunk(chip, 64) == 64
        assert ssd_chunk(chip, 1000, torch.float32) == 32


@pytest.mark.parametrize(("heads", "directions", "BN"), [(24, 1, 128), (24, 2, 256), (4, 1, 64), (96, 1, 256)])
def test_tiles_of_states_leave_few_multiprocessors_idle(heads, directions, BN):
    x = torch.empty(1, 200, heads, 128, dtype=torch.bfloat16, device="meta")
    B = torch.empty(1, 200, 1, 256, dtype=torch.bfloat16, device="meta")
    with assuming(known_target("sm_90")):
        call = ssd.Call.of(SSDInputs(x, x[..., 0], x[0, 0, :, 0], B, B), 128, Start(), SSDOptions(False, 0.0, 1.0))
        found = call.scan_tiles(directions)
    assert found.blocks == {"BP": 64, "BN": BN}
    assert found.programs == heads * 2 * 256 // BN


@pytest.mark.parametrize("chip", ["sm_86", "sm_89", "sm_120"])
def test_tiles_where_memory_is_small(chip):
    scan = gated_delta_rule.TILES["scan", 2]
    assert [chosen(scan, chip, width) for width in (128, 256)] == [(64, 8, 2), (32, 8, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "dtype"),
    [("sm_90", torch.float16), ("sm_86", torch.float16), ("gfx942", torch.float16), ("gfx942", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize(
    "make",
    [
        partial(delta_problem, 66, B=1, H=1, HV=1, K=256, V=256),
        partial(delta_problem, 66, B=1, H=1, HV=1, K=96, V=192),
        partial(ssd_problem, 66, B=1, H=1, G=1, P=128, N=256),
        partial(ssd_problem, 66, B=1, H=1, G=1, P=64, N=128),
    ],
    ids=["delta 256/256", "delta 96/192", "ssd 128/256", "ssd 64/128"],
)
def test_every_choice_of_tiles(chip, make, dtype):
    """In fp32 all chips have tiles of the same sizes."""
    with assuming(known_target(chip)):
        assert_within_budget(make().to(dtype, torch.float32))


@pytest.mark.parametrize("chip", ["sm_86", "gfx950"])
def test_small_tiles(chip):
    with assuming(known_target(chip)):
        problem = delta_problem(40, B=1, H=1, HV=1, K=256, V=80).to(torch.float16, torch.float32)
        inputs = {name: x for name, x in problem.tensors.items() if name != "initial_state"}
        assert gated_delta_rule.Call.of(
            DeltaInputs(**inputs), 80, Start(), DeltaOptions(1.0, True)
        ).scan_tiles.blocks == {"BV": 32}
        assert_within_budget(problem)


def test_amd_is_not_asked_for_tf32():
    for chip in CHIPS:
        with assuming(known_target(chip)):
            assert dot_precision(4, CUDA) == "ieee"
            assert dot_precision(2, CUDA) == ("ieee" if chip.startswith("gfx") else "tf32")


def reason(op: str, **target) -> str | None:
    found = known_target("sm_90")._replace(**target)
    with assuming(found):
        return backend.supports(Call(op, CUDA, torch.bfloat16))


SCANS, STEPS = ("gated_delta_rule", "ssd"), ("gated_delta_rule_step", "ssd_step")


def test_a_t4_has_steps():
    for op in STEPS:
        assert reason(op, name="sm_75") is None
        assert reason(op, name="sm_70") == "needs compute capability 7.5 or newer, and this is 7.0"
    for op in SCANS:
        assert reason(op, name="sm_75") == (
            "needs compute capability 8.0 or newer for sequences (single tokens run), and this is 7.5"
        )


@pytest.mark.parametrize("op", SCANS + STEPS)
def test_newer_chips_and_those_of_amd_that_it_was_compiled_for(op):
    for name in ("sm_80", "sm_87", "sm_103", "sm_121", "gfx942", "gfx950"):
        assert reason(op, name=name) is None
    assert reason(op, name="gfx90a") == "was compiled for AMD's gfx942 and gfx950, not for gfx90a"


def test_a_chip_that_was_never_tried_is_refused(monkeypatch):
    monkeypatch.setitem(hardware.CHIPS, "gfx942", CHIPS["gfx942"]._replace(tried="never"))
    assert reason("ssd", name="gfx942") == "was compiled for AMD's gfx950, not for gfx942"


def found(monkeypatch, properties, hip=None) -> targets.Target:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    targets._properties.cache_clear()
    try:
        return targets.target_of(torch.device("cuda", 0))
    finally:
        targets._properties.cache_clear()


def test_what_a_device_says(monkeypatch):
    l4 = SimpleNamespace(major=8, minor=9, multi_processor_count=58, warp_size=32, shared_memory_per_block=49152)
    l4.shared_memory_per_block_optin = 101376
    assert found(monkeypatch, l4) == known_target("sm_89")
    mi300 = SimpleNamespace(
        major=9, minor=4, multi_processor_count=304, warp_size=64, gcnArchName="gfx942:sramecc+:xnack-"
    )
    assert found(monkeypatch, mi300, "7.1") == known_target("gfx942")
    mi300.shared_memory_per_block = 32768
    assert found(monkeypatch, mi300, "7.1").shared == 32768
    mi200 = SimpleNamespace(**vars(mi300) | {"gcnArchName": "gfx90a:sramecc+:xnack-"})
    assert found(monkeypatch, mi200, "7.1").name == "gfx90a"
    del mi200.shared_memory_per_block
    assert found(monkeypatch, mi200, "7.1").shared == 65536, "no chip by AMD has less"


def test_the_cuda_kernels_are_not_for_amd(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    found = cuda.supports(Call("ssd_step", CUDA, torch.bfloat16))
    assert found == "is for NVIDIA GPUs, and this torch is built for AMD GPUs"


def test_chunks_of_wide_states_are_short_where_longer_ones_cannot_be():
    for chip, width, size in (("sm_100", 128, 0), ("sm_100", 256, 32), ("sm_90", 256, 0), ("sm_86", 256, 32)):
        q = torch.empty(2, 100, 1, width, dtype=torch.bfloat16, device="meta")
        with assuming(known_target(chip)):
            assert gated_delta_rule.chunk_size(q, DeltaOptions(1.0, True)) == size
            assert gated_delta_rule.chunk_size(q, DeltaOptions(1.0, True, 16)) == 16
    assert chosen(gated_delta_rule.TILES["scan", 2], "sm_100", 256) == (32, 8, 2)
