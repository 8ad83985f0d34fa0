"""Tensor descriptors: what they read, and that a scan finds the same by them as by pointers."""

import pytest
import torch
from cases import delta_problem, error
from test_triton import pytestmark as of_triton
from triton.tools.tensor_descriptor import TensorDescriptor

from s0kernels.backends.triton.common.descriptors import of_matrices, of_tokens
from s0kernels.backends.triton.common.launch import recording
from s0kernels.backends.triton.common.targets import known_target

pytestmark = of_triton


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("x", "readable"),
    [
        (half(2, 5, 3, 24), True),
        (half(2, 5, 160)[..., 24:96].unflatten(2, (3, 24)), True),  # of what a projection wrote at once
        (half(1, 5, 1, 24).as_strided((1, 5, 1, 24), (7, 24, 3, 1)), True),  # steps that nobody takes
        (half(2, 3, 24, 5).permute(0, 3, 1, 2), False),  # channel-first
        (half(2, 5, 3, 20), False),  # 40 bytes from head to head
        (half(2, 5, 160)[..., 4:76].unflatten(2, (3, 24)), False),  # begins at 8 bytes
        (half(2, 5, 1, 24).expand(2, 5, 3, 24), False),
        (half(2, 0, 3, 24), False),
    ],
    ids=["whole", "slice", "single", "channel-first", "odd", "misaligned", "expanded", "empty"],
)
def test_what_can_be_read(x, readable):
    assert (of_tokens(x, 16, 32) is not None) == readable


def test_matrices():
    assert of_matrices(half(3, 2, 16, 24), 16, 32).shape == [6, 16, 24]
    for x in (half(0, 2, 16, 16), half(2, 16, 20)):
        assert of_matrices(x, 16, 32) is None


def packed(**changes):
    lengths = [5, 18, 0, 16, 7]
    return delta_problem(lengths=lengths, H=1, HV=2, K=16, V=24, chunk_size=16, **changes).to(
        torch.float16, torch.float32
    )


@pytest.mark.parametrize(
    ("problem", "schedule", "apart"),
    [
        (delta_problem(18, H=1, HV=2, K=24, V=40, chunk_size=16).to(torch.float16, torch.float32), "split", 0.0),
        (packed(state="bank"), "fused", 3e-4),  # the last chunks of sequences have operands in two parts
    ],
    ids=["dense, wider than its tiles", "packed"],
)
def test_the_same_as_by_pointers(problem, schedule, apart, monkeypatch):
    monkeypatch.setenv("S0KERNELS_TRITON_SCHEDULE", schedule)
    found = problem.run("triton")
    monkeypatch.setattr("s0kernels.backends.triton.gated_delta_rule.forward.has_descriptors", lambda device: False)
    for ours, theirs in zip(found, problem.run("triton"), strict=True):
        assert error(ours, theirs) <= apart


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_neighbour_is_neither_read_nor_written():
    """A descriptor reads a sequence's last chunk together with the beginning of the next one, where all is NaN here."""
    problem = packed(state="each")
    clean = problem.run("triton")
    for name in ("q", "k", "v", "g", "beta"):
        problem.tensors[name][:, 23:39] = float("nan")
    found = problem.run("triton")
    assert found.output[:, 23:39].isnan().all()
    assert found.final_state[3].isnan().all()
    others = torch.tensor([0, 1, 2, 4])
    assert torch.equal(found.output[:, :23], clean.output[:, :23])
    assert torch.equal(found.output[:, 39:], clean.output[:, 39:])
    assert torch.equal(found.final_state[others], clean.final_state[others])


def scan_launch(problem, chip: str = "sm_90"):
    with recording(known_target(chip)) as found:
        problem.run("triton")
    return found[1]


def test_who_takes_them(monkeypatch):
    monkeypatch.setenv("S0KERNELS_TRITON_SCHEDULE", "fused")

    def count(problem, chip="sm_90"):
        return sum(isinstance(x, TensorDescriptor) for x in scan_launch(problem, chip).arguments)

    problem = packed()
    assert count(problem) == 6
    assert count(problem, "sm_80") == count(problem, "gfx942") == 0
    assert count(problem.to(torch.float32)) == 0
    problem.tensors["k"] = problem.tensors["k"].movedim(1, -1).contiguous().movedim(-1, 1)
    assert count(problem) == 0


def test_stages_leave_room_for_two_programs_where_there_are_two(monkeypatch):
    monkeypatch.setenv("S0KERNELS_TRITON_SCHEDULE", "fused")
    heads = {"H": 1, "HV": 2, "K": 128, "V": 64, "state": None}
    for sequences, stages in ((1, 3), (100, 2)):
        problem = delta_problem(2, B=sequences, **heads).to(torch.float16, torch.float32)
        assert scan_launch(problem).tiles.stages == stages


@pytest.mark.slow
def test_a_backward_finds_the_same_as_by_pointers(monkeypatch):
    problem = packed(state="bank")
    weights = problem.weights()
    found = problem.gradients("triton", weights)
    for module in ("forward", "backward", "input_grads"):
        monkeypatch.setattr(
            f"s0kernels.backends.triton.gated_delta_rule.{module}.has_descriptors", lambda device: False
        )
    for name, value in problem.gradients("triton", weights).items():
        assert error(found[name], value) <= 5e-4, name  # the last chunks of sequences have operands in two parts


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_backward_does_not_read_or_write_a_neighbour():
    problem = packed(state="each")
    weights = problem.weights()
    clean = problem.gradients("triton", weights)
    weights[0][:, 23:39] = float("nan")
    weights[1][3] = float("nan")
    found = problem.gradients("triton", weights)
    others = torch.tensor([0, 1, 2, 4])
    assert torch.equal(found["dinitial_state"][others], clean["dinitial_state"][others])
    for name in ("q", "k", "v", "g", "beta"):
        ours, theirs = found[f"d{name}"], clean[f"d{name}"]
        assert ours[:, 23:39].isnan().any(), name
        for rows in (slice(23), slice(39, None)):
            assert torch.equal(ours[:, rows], theirs[:, rows]), name


@pytest.mark.parametrize(("wanted", "most"), [(None, 15), (["initial_state"], 5)], ids=["all", "S0"])
def test_a_backward_takes_them(wanted, most):
    problem = packed()
    weights = problem.weights()

    def count(problem, chip="sm_90"):
        with recording(known_target(chip)) as found:
            problem.gradients("triton", weights, wanted)
        backward = [x for x in found if "bwd" in x.kernel.fn.__name__]
        return sum(isinstance(y, TensorDescriptor) for x in backward for y in x.arguments)

    assert count(problem) == most
    assert count(problem, "sm_80") == 0
    weights = tuple(x[..., :1].expand_as(x) for x in weights)  # a gradient that no descriptor can read is copied
    assert count(problem) == most


def test_a_second_program_has_the_memory_that_stores_would_take():
    """What the scan from the end writes goes by pointers where more programs run than there are multiprocessors."""
    heads = {"H": 1, "HV": 2, "K": 128, "V": 64, "state": None}
    for sequences, stages, stores in ((1, 3, 2), (100, 2, 0)):
        problem = delta_problem(2, B=sequences, **heads).to(torch.float16, torch.float32)
        weights = problem.weights()
        with recording(known_target("sm_90")) as found:
            problem.gradients("triton", weights)
        scan = next(x for x in found if x.kernel.fn.__name__ == "gated_delta_rule_scan_bwd_kernel")
        assert scan.tiles.stages == stages
        assert sum(isinstance(x, TensorDescriptor) for x in scan.arguments) == 5 + stores
