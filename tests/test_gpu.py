"""The contract on a CUDA device: `pytest -m gpu`."""

import contextlib

import pytest
import torch
from cases import MAKERS, delta_problem, error
from models import MODELS, random_states, tokens
from test_steps import options_of, step, token

from s0kernels import swap_modules

pytestmark = pytest.mark.gpu
OPS = sorted(MAKERS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(problem):
    def move(values):
        return {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in values.items()}

    return type(problem)(problem.op, move(problem.tensors), move(problem.options))


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", [None, "shared", "each", "bank"])
@pytest.mark.parametrize("lengths", [None, [5, 0, 130, 1]], ids=["dense", "packed"])
def test_scan_is_within_the_error_budget_and_repeats_its_bits(op, dtype, state, lengths):
    problem = MAKERS[op](200, B=4, state=state, lengths=lengths).to(dtype, torch.float32)
    weights = problem.weights()
    truth = problem.to(torch.float64).gradients("reference", weights)
    plain = problem.gradients("reference", weights)
    weights = [weight.cuda() for weight in weights]
    found, again = (on_gpu(problem).gradients(None, weights) for _ in range(2))
    for name in truth:
        budget = 2 * error(plain[name], truth[name]) + torch.finfo(plain[name].dtype).eps
        assert error(found[name].cpu(), truth[name]) <= budget, name
        assert torch.equal(found[name], again[name]), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("state", ["shared", "bank"])
def test_scan_does_not_synchronise(op, state):
    problem = on_gpu(MAKERS[op](100, B=4, state=state).to(torch.bfloat16, torch.float32))
    leaves = {n: x.requires_grad_() for n, x in problem.tensors.items()}

    def run():
        result = type(problem)(op, leaves, problem.options).run(None)
        result.output.sum().backward()

    run()
    with no_synchronisation():
        run()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step(op, dtype):
    problem = MAKERS[op](1, B=3, state=None).to(dtype, torch.float32)
    shape = problem.run("torch").final_state.shape[1:]
    pool, rows = torch.randn(5, *shape), torch.tensor([4, -1, 2], dtype=torch.int32)
    moved, inputs = pool.cuda(), token(on_gpu(problem), 0)
    truth = step(op, token(problem, 0), pool, state_indices=rows, backend="reference", **options_of(problem))
    rows = rows.cuda()
    step(op, inputs, moved.clone(), state_indices=rows, **options_of(problem))
    with no_synchronisation():
        found = step(op, inputs, moved, state_indices=rows, **options_of(problem))
    assert error(found.cpu(), truth) < 2 * torch.finfo(dtype).eps + 1e-6
    assert error(moved.cpu(), pool) < 1e-5


@pytest.mark.parametrize("op", OPS)
def test_a_bad_index_gives_nan_for_its_sequence_or_an_error_on_demand(op, monkeypatch):
    problem = on_gpu(MAKERS[op](6, B=3, state="bank").to(torch.float32))
    problem.options["state_indices"] = torch.tensor([1, 5, -2], device="cuda")
    result = problem.run(None)
    assert result.output[0].isfinite().all()
    assert result.output[1:].isnan().all()
    monkeypatch.setenv("S0KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="state_indices"):
        problem.run(None)


def test_indices_must_be_on_the_device_of_the_inputs():
    problem = on_gpu(delta_problem(6, B=3, state="bank").to(torch.float32))
    with pytest.raises(ValueError, match="state_indices must be on cuda"):
        problem.run(None, state_indices=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("name", list(MODELS))
@torch.no_grad()
def test_swapped_models(name):
    model, ids = swap_modules(MODELS[name]()), tokens(2, 30)
    states = random_states(model)
    with states.attached(model):
        truth = model(ids).logits
    model.cuda()
    with states.attached(model):
        found = model(ids.cuda()).logits
        model.generate(ids.cuda(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert error(found.cpu(), truth) < 1e-3
