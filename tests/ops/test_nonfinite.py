"""NaN and infinity at one token, or in its gradient, spread only where they spread in the recurrence. In particular
they reach no earlier token."""

import pytest
import torch
from cases import BACKENDS, MAKERS
from test_autograd import every_op

#: positions within a chunk and at its ends, for all chunk lengths, and in the middle of blocks of registers
LENGTH, WHERE = 70, 37
TOKENS = {"gated_delta_rule": ("q", "k", "v", "g", "beta"), "ssd": ("x", "dt", "B", "C", "z")}
SIZES = {"gated_delta_rule": {"B": 1, "H": 1, "HV": 2, "K": 5, "V": 6}, "ssd": {"B": 1, "H": 2, "P": 6, "N": 5, "G": 1}}
VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


def spoiled(op, name, value, whole, **options):
    """Return a problem in which one number at a token, or its whole row, is not finite; perhaps in the gradient weights
    too."""
    problem = MAKERS[op](LENGTH, state="each", **SIZES[op], **options)
    weights = list(problem.weights())
    target = weights[0] if name == "output" else problem.tensors[name]
    target[(0, WHERE, 0) if whole else (0, WHERE) + (0,) * (target.dim() - 2)] = value
    return problem, tuple(weights)


def check_like_the_recurrence(problem, weights, backend, tolerance):
    truth, found = (problem.gradients(name, weights) for name in ("reference", backend))
    for name, expected in truth.items():
        finite = expected.isfinite()
        assert torch.equal(found[name].isfinite(), finite), name
        scale = expected[finite].abs().max() if finite.any() else 1.0
        zeros = torch.zeros_like(expected)
        torch.testing.assert_close(
            torch.where(finite, found[name], zeros) / scale,
            torch.where(finite, expected, zeros) / scale,
            atol=tolerance,
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@every_op
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("whole", [False, True], ids=["a number", "a row"])
@pytest.mark.parametrize("value", VALUES.values(), ids=list(VALUES))
def test_a_token_that_is_not_finite(op, backend, value, whole):
    for name in (*TOKENS[op], "output"):
        problem, weights = spoiled(op, name, value, whole)
        if backend == "triton":
            problem = problem.to(torch.float32)
        check_like_the_recurrence(problem, weights, backend, 1e-4 if backend == "triton" else 1e-9)


@every_op
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_that_is_not_finite_spoils_no_other(op, backend):
    for name in TOKENS[op]:
        problem, weights = spoiled(op, name, float("nan"), True, lengths=[20, 30, 20])
        if backend == "triton":
            problem = problem.to(torch.float32)
        check_like_the_recurrence(problem, weights, backend, 1e-4 if backend == "triton" else 1e-9)


@every_op
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_that_is_not_finite_spoils_its_sequence_alone(op, backend):
    problem = MAKERS[op](LENGTH, state="each", **{**SIZES[op], "B": 2})
    problem.tensors["initial_state"][0, 0, 0, 0] = float("nan")
    if backend == "triton":
        problem = problem.to(torch.float32)
    check_like_the_recurrence(problem, problem.weights(), backend, 1e-4 if backend == "triton" else 1e-9)
