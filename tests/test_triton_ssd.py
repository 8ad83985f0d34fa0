"""The Triton kernels of Mamba-2 SSD in its interpreter, as in test_triton.py."""

import pytest
import torch
from cases import STATE_KINDS, error, ssd_problem
from test_steps import options_of, step, token
from test_triton import PACKED, assert_within_budget, launched, schedule, unchecked  # noqa: F401
from test_triton import pytestmark as of_triton

pytestmark = [*of_triton, pytest.mark.slow]  # the interpreter takes its time; test_triton.py stays in `make test`

SMALL = {"H": 2, "P": 24, "G": 1, "N": 16}
HEADS = {"H": 4, "P": 24, "G": 2, "N": 16}
SIZES = [{"P": 80, "N": 5}, {"P": 5, "N": 72}, {"H": 6, "G": 2}, {"H": 3, "G": 3}, {"H": 4}]
TOKENS = ("x", "dt", "B", "C", "z")


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_lengths(T, dtype):
    assert_within_budget(ssd_problem(T, B=1, **HEADS).to(dtype, torch.float32))


@pytest.mark.parametrize("seed", range(4))
def test_sums_to_one_number_a_head(seed):
    """They cancel, so what is rounded twice on the way shows."""
    problem = ssd_problem(130, state="shared", seed=seed).to(torch.float16, torch.float32)
    assert_within_budget(problem, ["A", "D", "dt_bias"], part=0.7)


@pytest.mark.parametrize("kind", [None, *STATE_KINDS])
@pytest.mark.parametrize("lengths", [None, PACKED], ids=["dense", "packed"])
def test_every_form_of_state(kind, lengths):
    assert_within_budget(ssd_problem(30, B=3, state=kind, lengths=lengths, **SMALL).to(torch.float32))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes):
    assert_within_budget(ssd_problem(40, B=1, **SMALL | sizes).to(torch.float16, torch.float32))


@pytest.mark.parametrize("changes", [{}, {"state": "bank", "lengths": PACKED}, {"state": None}, *SIZES], ids=str)
def test_both_schedules_of_the_forward(changes, monkeypatch):
    problem = ssd_problem(**{"T": 40, "B": 1} | SMALL | changes).to(torch.float32)
    truth = problem.to(torch.float64).run("reference")
    for form in ("fused", "split"):
        monkeypatch.setenv("S0KERNELS_TRITON_SCHEDULE", form)
        for found, exact in zip(problem.run("triton"), truth, strict=True):
            assert error(found, exact) < 1e-6


def test_a_state_too_wide_for_the_fused_scan():
    assert_within_budget(ssd_problem(20, B=1, **SMALL | {"P": 5, "N": 260}).to(torch.float16, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_without_extras_and_with_short_chunks(dtype):
    assert_within_budget(ssd_problem(40, B=1, extras=False, chunk_size=16, **SMALL).to(dtype, torch.float32))


def test_softplus_does_not_round_to_zero():
    """As log(1 + exp(x)) would for x = -17, and for x = -90 where exp(x) is no normal number any more."""
    problem = ssd_problem(8, B=1, dt_limit=(0.0, float("inf")), **SMALL).to(torch.float32)
    problem.tensors["dt"] = torch.linspace(-85.0, 85.0, 16).view(1, 8, 2)
    problem.tensors["dt_bias"] = torch.zeros(2)
    problem.tensors["A"] *= 1e-2
    for t in range(8):
        one = {n: x[:, t : t + 1] if n in TOKENS else x for n, x in problem.tensors.items()}
        one.pop("initial_state")
        found, truth = (
            type(problem)(problem.op, one, problem.options).run(backend).final_state
            for backend in ("triton", "reference")
        )
        assert truth.abs().amin((0, 2, 3)).min() > 0
        for head in range(2):
            assert error(found[:, head], truth[:, head]) < 1e-6


@pytest.mark.slow
def test_only_asked_gradients_and_the_state_only_backward():
    problem = ssd_problem(state="bank", lengths=[40, 6], **SMALL | {"H": 1}).to(torch.float32)
    weights = problem.weights()
    together = problem.gradients("triton", weights)
    for name in problem.tensors:
        alone = problem.gradients("triton", weights, [name])
        assert set(alone) == {"output", "final_state", f"d{name}"}
        assert torch.equal(alone[f"d{name}"], together[f"d{name}"]), name


@pytest.mark.parametrize("part", ["output", "final_state"])
def test_only_one_of_the_outputs_has_a_gradient(part):
    problem = ssd_problem(40, B=1, **SMALL).to(torch.float32)
    weights = problem.weights()
    grads = []
    for backend in ("triton", "reference"):
        leaves = {n: x.clone().requires_grad_() for n, x in problem.tensors.items()}
        result = getattr(type(problem)(problem.op, leaves, problem.options).run(backend), part)
        loss = (result * weights[part == "final_state"].float()).sum()
        grads.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))
    for name, ours, theirs in zip(problem.tensors, *grads, strict=True):
        if theirs is None:
            assert ours.abs().max() == 0, name
        else:
            assert error(ours, theirs) < 1e-5, name


def test_strong_decays_cost_no_precision():
    problem = ssd_problem(100, B=1, extras=False, **SMALL).to(torch.float32)
    problem.tensors["A"] *= 300
    weights = problem.weights()
    wanted = [name for name in problem.tensors if name != "A"]
    truth = problem.to(torch.float64).gradients("reference", weights, wanted)
    for name, value in problem.gradients("triton", weights, wanted).items():
        assert error(value, truth[name]) < 2e-6, name


def test_any_strides():
    """Time-contiguous inputs, as a convolution leaves them, a transposed state and an expanded gradient."""
    problem = ssd_problem(40, state="each", **SMALL).to(torch.float32)
    results = []
    for strided in (False, True):
        leaves = {}
        for name, x in problem.tensors.items():
            if strided and name == "initial_state":
                x = x.mT.contiguous().mT
            elif strided and name in TOKENS:
                x = x.movedim(1, -1).contiguous().movedim(-1, 1)
            elif strided:
                x = torch.stack([x, x], dim=-1)[..., 0]
            leaves[name] = x.detach().requires_grad_()
        output, final = type(problem)(problem.op, leaves, problem.options).run("triton")
        loss = output.sum() + (final * final.detach()).mT.contiguous().sum()
        results.append([output, final, *torch.autograd.grad(loss, list(leaves.values()))])
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize("kind", [None, *STATE_KINDS])
def test_no_tokens(kind):
    for changes in ({"T": 0, "B": 3}, {"lengths": [0, 0, 0]}):
        problem = ssd_problem(state=kind, **changes, **SMALL).to(torch.float32)
        leaves = {n: x.clone().requires_grad_() for n, x in problem.tensors.items()}
        result = type(problem)(problem.op, leaves, problem.options).run("triton")
        truth = problem.run("reference")
        assert result.output.shape == truth.output.shape
        assert torch.equal(result.final_state, truth.final_state)
        result.final_state.sum().backward()
        assert leaves["A"].grad.abs().max() == 0
        if kind == "shared":
            assert torch.equal(leaves["initial_state"].grad, torch.full_like(leaves["initial_state"], 3.0))


def test_sequences_do_not_meet():
    for lengths in (None, [10, 10, 10]):
        problem = ssd_problem(10, B=3, lengths=lengths, **SMALL | {"H": 1}).to(torch.float32)
        weights = problem.weights()
        clean = problem.gradients("triton", weights)
        problem.tensors["x"].view(3, 10, 1, 24)[1] = float("nan")
        found = problem.gradients("triton", weights)
        for name in ("output", *(f"d{name}" for name in TOKENS)):
            a, b = (x[name].reshape(3, 10, *x[name].shape[2:]) for x in (clean, found))
            assert torch.equal(a[[0, 2]], b[[0, 2]]), name
        assert found["output"].view(3, 10, 1, 24)[1].isnan().any()
        assert torch.equal(clean["dinitial_state"], found["dinitial_state"])


def test_pads_with_zero_dt_change_nothing():
    problem = ssd_problem(40, B=1, extras=False, **SMALL).to(torch.float32)
    truth = problem.run("triton")
    padded = {n: torch.cat([x[:, :9], x], 1) if n in TOKENS else x for n, x in problem.tensors.items()}
    padded["dt"][:, :9] = 0.0
    found = type(problem)(problem.op, padded, problem.options).run("triton")
    assert error(found.output[:, 9:], truth.output) < 1e-6
    assert error(found.final_state, truth.final_state) < 1e-6


@pytest.mark.usefixtures("unchecked")
def test_a_bad_index_gives_nan_for_its_sequence():
    problem = ssd_problem(6, B=3, state="bank", **SMALL).to(torch.float32)
    problem.options["state_indices"] = torch.tensor([1, 5, -2])
    leaves = {n: x.clone().requires_grad_() for n, x in problem.tensors.items()}
    result = type(problem)(problem.op, leaves, problem.options).run("triton")
    for x in (result.output, result.final_state):
        assert x[0].isfinite().all()
        assert x[1:].isnan().all()
    result.output[0].sum().backward()
    assert leaves["initial_state"].grad[1].abs().max() > 0
    assert leaves["initial_state"].grad[2:].abs().max() == 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "ends", [[0, 5], [2, 10], [0, 7, 3, 10], [0, 12], [3, 3], [-4, 10], [0, 2**31 - 1, 10]], ids=str
)
def test_bad_boundaries_give_nan_and_nothing_else(ends, monkeypatch):
    problem = ssd_problem(10, B=1, **SMALL).to(torch.float32)
    leaves = {n: x.clone().requires_grad_() for n, x in problem.tensors.items()}
    problem.options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    for form in ("split", "fused"):
        monkeypatch.setenv("S0KERNELS_TRITON_SCHEDULE", form)
        output, final = type(problem)(problem.op, leaves, problem.options).run("triton")
        assert output.isnan().all()
        assert final.isnan().all()
        assert final.shape[0] == len(ends) - 1
    (output.sum() + final.sum()).backward()
    for name in ("x", "B", "C", "initial_state"):
        assert leaves[name].grad.isnan().all(), name


def test_steps_equal_the_scan():
    problem = ssd_problem(3, B=2, state="each", **SMALL).to(torch.float16, torch.float32)
    truth = problem.run("reference")
    state = problem.tensors["initial_state"].clone()
    outputs = [step(problem.op, token(problem, t), state, backend="triton", **options_of(problem)) for t in range(3)]
    assert error(torch.stack(outputs, dim=1), truth.output) < 1e-3
    assert error(state, truth.final_state) < 1e-6


@pytest.mark.usefixtures("unchecked")
def test_a_step_changes_a_pool_where_addressed():
    problem = ssd_problem(1, B=4, state=None, **SMALL).to(torch.float32)
    pool = torch.randn(5, 2, 16, 24).mT  # not contiguous
    before, rows = pool.clone(), [4, -1, 2, 7]
    expected = torch.stack([pool[row] if row in (2, 4) else torch.zeros_like(pool[0]) for row in rows])
    options = options_of(problem)
    truth = step(problem.op, token(problem, 0), expected, backend="reference", **options)
    found = step(problem.op, token(problem, 0), pool, state_indices=torch.tensor(rows), backend="triton", **options)
    assert error(found[:3], truth[:3]) < 1e-6
    assert found[3].isnan().all()
    assert error(pool[[4, 2]], expected[[0, 2]]) < 1e-6
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("kind", STATE_KINDS)
def test_a_state_adds_no_launch(kind):
    def kernels(state, wanted):
        return launched(ssd_problem(40, state=state, **SMALL).to(torch.float32), wanted)

    frozen = ["x", "dt", "B", "C"]
    without, with_state = kernels(None, frozen), kernels(kind, frozen)
    assert with_state == without
    forward = without.index("ssd_scan_bwd_kernel") - 1
    assert forward <= 3
    assert len(without) - forward <= 4
    tuned = kernels(kind, [*frozen, "initial_state"])
    assert len(tuned) - forward <= 5
    assert tuned[: len(without)] == without
    trained = kernels(kind, [*frozen, "z", "A", "D", "dt_bias", "initial_state"])
    assert len(trained) - forward <= 6
    assert len(kernels(kind, ["initial_state"])) - forward <= 3
