"""The Triton kernels in its interpreter: against the recurrence in fp64, with NaN in all memory they did not write."""

import pytest
import torch
from cases import STATE_KINDS, delta_problem, error
from test_steps import options_of, step, token

from s0kernels.backends.triton.common.launch import recording
from s0kernels.backends.triton.common.targets import known_target

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_gpu.py runs the kernels on it"),
    pytest.mark.usefixtures("poisoned"),
]
PACKED = [5, 0, 70, 1, 0]
SMALL = {"H": 1, "HV": 2, "K": 16, "V": 24}


@pytest.fixture(params=["fused", "split"])
def schedule(request, monkeypatch):
    monkeypatch.setenv("S0KERNELS_TRITON_SCHEDULE", request.param)


def assert_within_budget(problem, wanted=None, part=1.0) -> None:
    """Against fp64: twice the error of plain PyTorch in the same dtype, token by token or in chunks, and the rounding
    of the inputs' dtype, in which the operands of matrix products are; or `part` of that."""
    weights = problem.weights()
    truth = problem.to(torch.float64).gradients("reference", weights, wanted)
    plain, chunked = (problem.gradients(backend, weights, wanted) for backend in ("reference", "torch"))
    found = problem.gradients("triton", weights, wanted)
    rounding = torch.finfo(next(iter(problem.tensors.values())).dtype).eps
    for name in truth:
        assert found[name].dtype == plain[name].dtype, name
        assert found[name].shape == plain[name].shape, name
        theirs = max(error(plain[name], truth[name]), error(chunked[name], truth[name]))
        assert error(found[name], truth[name]) <= part * (2 * theirs + rounding), name


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_lengths(T, dtype):
    assert_within_budget(delta_problem(T, B=1, **SMALL).to(dtype, torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_decays_gradient_has_room_for_what_a_gpu_rounds_besides(seed):
    """tf32 in the inverses, which the interpreter computes in fp32."""
    problem = delta_problem(130, state="shared", seed=seed).to(torch.float16, torch.float32)
    assert_within_budget(problem, ["g"], part=0.7)


@pytest.mark.parametrize("kind", [None, *STATE_KINDS])
@pytest.mark.parametrize("lengths", [None, PACKED], ids=["dense", "packed"])
def test_every_form_of_state(kind, lengths, schedule):
    assert_within_budget(delta_problem(30, B=3, state=kind, lengths=lengths, **SMALL).to(torch.float32))


@pytest.mark.parametrize(
    "sizes", [{"K": 16, "V": 80}, {"K": 40, "V": 5}, {"H": 2, "HV": 6}, {"H": 2, "HV": 2}], ids=str
)
def test_sizes(sizes, schedule):
    assert_within_budget(delta_problem(40, B=1, **SMALL | sizes).to(torch.float16, torch.float32))


def test_without_normalising_and_with_a_scale():
    problem = delta_problem(40, B=1, use_qk_l2norm=False, scale=0.3, chunk_size=16, **SMALL)
    problem.tensors["k"] *= 0.2
    assert_within_budget(problem.to(torch.float32))


@pytest.mark.slow
def test_only_asked_gradients_and_the_state_only_backward():
    problem = delta_problem(70, B=2, state="bank", **SMALL).to(torch.float32)
    weights = problem.weights()
    together = problem.gradients("triton", weights)
    for name in problem.tensors:
        alone = problem.gradients("triton", weights, [name])
        assert set(alone) == {"output", "final_state", f"d{name}"}
        assert torch.equal(alone[f"d{name}"], together[f"d{name}"]), name


@pytest.mark.parametrize("part", ["output", "final_state"])
def test_only_one_of_the_outputs_has_a_gradient(part):
    problem = delta_problem(40, B=1, **SMALL).to(torch.float32)
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


def test_strong_decays_cost_no_precision_and_a_full_reset_is_exact():
    problem = delta_problem(100, B=1, **SMALL).to(torch.float32)
    problem.tensors["g"][:, ::7] = -300.0
    problem.tensors["g"][:, 50] = -torch.inf
    weights = problem.weights()
    wanted = [name for name in problem.tensors if name != "g"]
    truth = problem.to(torch.float64).gradients("reference", weights, wanted)
    for name, value in problem.gradients("triton", weights, wanted).items():
        assert error(value, truth[name]) < 2e-6, name


def test_any_strides():
    """Time-contiguous inputs, as a convolution leaves them, a transposed state and an expanded gradient."""
    problem = delta_problem(40, state="each", **SMALL).to(torch.float32)
    results = []
    for strided in (False, True):
        leaves = {}
        for name, x in problem.tensors.items():
            if strided and name == "initial_state":
                x = x.mT.contiguous().mT
            elif strided:
                x = x.movedim(1, -1).contiguous().movedim(-1, 1)
            leaves[name] = x.detach().requires_grad_()
        output, final = type(problem)(problem.op, leaves, problem.options).run("triton")
        loss = output.sum() + (final * final.detach()).mT.contiguous().sum()
        results.append([output, final, *torch.autograd.grad(loss, list(leaves.values()))])
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize("kind", [None, *STATE_KINDS])
def test_no_tokens(kind):
    for changes in ({"T": 0, "B": 3}, {"lengths": [0, 0, 0]}):
        problem = delta_problem(state=kind, **changes, **SMALL).to(torch.float32)
        leaves = {n: x.clone().requires_grad_() for n, x in problem.tensors.items()}
        result = type(problem)(problem.op, leaves, problem.options).run("triton")
        truth = problem.run("reference")
        assert result.output.shape == truth.output.shape
        assert torch.equal(result.final_state, truth.final_state)
        result.final_state.sum().backward()
        if kind == "shared":
            assert torch.equal(leaves["initial_state"].grad, torch.full_like(leaves["initial_state"], 3.0))


@pytest.mark.slow
def test_sequences_do_not_meet():
    for lengths in (None, [10, 10, 10]):
        problem = delta_problem(10, B=3, lengths=lengths, **SMALL).to(torch.float32)
        weights = problem.weights()
        clean = problem.gradients("triton", weights)
        problem.tensors["v"].view(3, 10, 2, 24)[1] = float("nan")
        found = problem.gradients("triton", weights)
        for name in ("output", "dq", "dk", "dv", "dg", "dbeta"):
            a, b = (x[name].reshape(3, 10, *x[name].shape[2:]) for x in (clean, found))
            assert torch.equal(a[[0, 2]], b[[0, 2]]), name
        assert found["output"].view(3, 10, 2, 24)[1].isnan().any()
        assert torch.equal(clean["dinitial_state"], found["dinitial_state"])


def test_pads_with_zero_decay_and_zero_write_change_nothing():
    problem = delta_problem(40, B=1, **SMALL).to(torch.float32)
    truth = problem.run("triton")
    padded = {n: torch.cat([x[:, :9], x], 1) if n != "initial_state" else x for n, x in problem.tensors.items()}
    for name in ("g", "beta"):
        padded[name][:, :9] = 0.0
    found = type(problem)(problem.op, padded, problem.options).run("triton")
    assert error(found.output[:, 9:], truth.output) < 1e-6
    assert error(found.final_state, truth.final_state) < 1e-6


@pytest.fixture
def unchecked(monkeypatch):
    """Values are not looked at in advance, as on a GPU."""
    monkeypatch.setattr("s0kernels.ops.sequences._reads_values", lambda tensor: False)


def test_a_bad_index_gives_nan_for_its_sequence(unchecked):
    problem = delta_problem(6, B=3, state="bank", **SMALL).to(torch.float32)
    problem.options["state_indices"] = torch.tensor([1, 5, -2])
    leaves = {n: x.clone().requires_grad_() for n, x in problem.tensors.items()}
    result = type(problem)(problem.op, leaves, problem.options).run("triton")
    for x in (result.output, result.final_state):
        assert x[0].isfinite().all()
        assert x[1:].isnan().all()
    result.output[0].sum().backward()
    assert leaves["initial_state"].grad[1].abs().max() > 0
    assert leaves["initial_state"].grad[2:].abs().max() == 0


@pytest.mark.parametrize(
    "ends", [[0, 5], [2, 10], [0, 7, 3, 10], [0, 12], [3, 3], [-4, 10], [0, 2**31 - 1, 10]], ids=str
)
def test_bad_boundaries_give_nan_and_nothing_else(ends, unchecked):
    problem = delta_problem(10, B=1, **SMALL).to(torch.float32)
    leaves = {n: x.clone().requires_grad_() for n, x in problem.tensors.items()}
    problem.options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    output, final = type(problem)(problem.op, leaves, problem.options).run("triton")
    assert output.isnan().all()
    assert final.isnan().all()
    assert final.shape[0] == len(ends) - 1
    (output.sum() + final.sum()).backward()
    for name in ("q", "k", "v", "initial_state"):
        assert leaves[name].grad.isnan().all(), name


def test_steps_equal_the_scan():
    problem = delta_problem(3, B=2, state="each", **SMALL).to(torch.float16, torch.float32)
    truth = problem.run("reference")
    state = problem.tensors["initial_state"].clone()
    outputs = [step(problem.op, token(problem, t), state, backend="triton", **options_of(problem)) for t in range(3)]
    assert error(torch.stack(outputs, dim=1), truth.output) < 1e-3
    assert error(state, truth.final_state) < 1e-6


def test_a_step_changes_a_pool_where_addressed(unchecked):
    problem = delta_problem(1, B=4, state=None, **SMALL).to(torch.float32)
    pool = torch.randn(5, 2, 24, 16).mT  # not contiguous
    before, rows = pool.clone(), [4, -1, 2, 7]
    expected = torch.stack([pool[row] if row in (2, 4) else torch.zeros_like(pool[0]) for row in rows])
    options = options_of(problem)
    truth = step(problem.op, token(problem, 0), expected, backend="reference", **options)
    found = step(problem.op, token(problem, 0), pool, state_indices=torch.tensor(rows), backend="triton", **options)
    assert error(found[:3], truth[:3]) < 1e-6
    assert found[3].isnan().all()
    assert error(pool[[4, 2]], expected[[0, 2]]) < 1e-6
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]])


def launched(problem, wanted) -> list[str]:
    """Names of the kernels of forward and backward, and of everything they are given to write to."""
    weights = problem.weights()
    with recording(known_target("sm_90")) as found:
        problem.gradients("triton", weights, wanted)
    return [x.kernel.__name__ for x in found]


@pytest.mark.parametrize("kind", STATE_KINDS)
def test_a_state_adds_no_launch(kind, schedule):
    def kernels(state, wanted):
        return launched(delta_problem(40, state=state, **SMALL).to(torch.float32), wanted)

    everything = ["q", "k", "v", "g", "beta"]
    without, with_state = kernels(None, everything), kernels(kind, everything)
    assert with_state == without
    forward = without.index("gated_delta_rule_scan_bwd_kernel") - 1
    assert forward <= 3
    assert len(without) - forward <= 4
    tuned = kernels(kind, [*everything, "initial_state"])
    assert len(tuned) - forward <= 5
    assert tuned[: len(without)] == without
    assert len(kernels(kind, ["initial_state"])) - forward <= 3


def test_a_state_of_one_sequence_is_not_summed():
    for lengths in (None, [40]):
        problem = delta_problem(40, B=1, lengths=lengths, **SMALL).to(torch.float32)
        assert "state_grad_kernel" not in launched(problem, ["initial_state"])
        assert_within_budget(problem, ["initial_state"])


def test_a_schedule_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("S0KERNELS_TRITON_SCHEDULE", "fusd")
    with pytest.raises(ValueError, match="S0KERNELS_TRITON_SCHEDULE must be fused or split, got 'fusd'"):
        delta_problem(4, **SMALL).to(torch.float32).run("triton")
