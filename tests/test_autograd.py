"""What autograd is told: writes in place, derivatives of other kinds than one backward, and sizes of zero."""

import pytest
import torch
from cases import BACKENDS, MAKERS, NO_CPU_KERNELS
from test_steps import options_of, step, token
from test_tokens import mixer

from s0kernels.ops.mixer_steps import gated_delta_mixer_step, ssd_mixer_step

OPS = sorted(MAKERS)
INTERPRETED = pytest.param(
    "triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without GPU")
)
every_backend = pytest.mark.parametrize("backend", [*BACKENDS, INTERPRETED])
every_op = pytest.mark.parametrize("op", OPS)


def saved_by_a_graph(x):
    """A loss whose backward needs x as it is now."""
    return (x * torch.ones_like(x).requires_grad_()).sum()


@every_op
@every_backend
@pytest.mark.parametrize("layout", ["each", "strided", "pool"])
def test_a_step_tells_autograd_what_it_writes(op, backend, layout):
    problem = MAKERS[op](1, B=2, state="each").to(torch.float32)
    state, options = problem.tensors["initial_state"], options_of(problem)
    if layout == "strided":
        state = state.mT.contiguous().mT
    if layout == "pool":
        options["state_indices"] = torch.tensor([1, -1])
    loss = saved_by_a_graph(state)
    with torch.no_grad():
        step(op, token(problem, 0), state, backend=backend, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_op
@pytest.mark.parametrize("backend", [BACKENDS[0], "reference"])
@pytest.mark.parametrize("written", ["window", "state"])
def test_a_mixers_step_tells_autograd_what_it_writes(op, backend, written):
    inputs = {name: x.float() for name, x in mixer(op, "odd").items()}
    loss = saved_by_a_graph(inputs[written])
    call = gated_delta_mixer_step if op == "gated_delta_rule" else ssd_mixer_step
    with torch.no_grad():
        call(**inputs, eps=1e-6, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_op
@every_backend
def test_a_scan_whose_state_a_step_has_changed_has_no_gradient(op, backend):
    problem = MAKERS[op](3, B=2, state="each").to(torch.float32)
    leaves = {name: x.requires_grad_(name != "initial_state") for name, x in problem.tensors.items()}
    loss = problem.run(backend).output.sum()
    with torch.no_grad():
        step(op, token(problem, 0), leaves["initial_state"], backend=backend, **options_of(problem))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_op
@every_backend
def test_a_state_made_in_inference_mode_can_be_stepped_there(op, backend):
    problem = MAKERS[op](1, B=2, state="each").to(torch.float32)
    with torch.inference_mode():
        state = problem.tensors["initial_state"].clone()
        step(op, token(problem, 0), state, backend=backend, **options_of(problem))
    assert not torch.equal(state, problem.tensors["initial_state"])
