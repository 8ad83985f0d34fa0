"""One-token steps: equal to the scan, in place, and only where addressed."""

import pytest
import torch
from cases import BACKENDS, MAKERS, error, options_of, step, token

from s0kernels.backends import torch_chunked
from s0kernels.calls import DeltaInputs, DeltaOptions, Grads, Pool, SSDInputs, SSDOptions, Start, Wanted

OPS = sorted(MAKERS)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_steps_equal_the_scan(op, backend, dtype):
    problem = MAKERS[op](6, state="each").to(dtype)
    truth = problem.run("reference")
    state = problem.tensors["initial_state"].clone()
    outputs = [step(op, token(problem, t), state, backend=backend, **options_of(problem)) for t in range(6)]
    found = torch.stack(outputs, dim=1)
    assert found.dtype == dtype
    assert error(found, truth.output) < (1e-12 if dtype == torch.float64 else 1e-2)
    assert error(state, truth.final_state) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [[4, -1, 2], [-1, -1, -1], [0, 4, 1]])
def test_a_pool_changes_only_where_addressed(op, backend, rows):
    problem = MAKERS[op](1, B=3, state=None)
    shape = problem.run("torch").final_state.shape[1:]
    pool = torch.randn(2, 5, *shape, dtype=torch.float64)[1].mT.contiguous().mT  # not contiguous
    before = pool.clone()
    expected = torch.stack([pool[row] if row >= 0 else torch.zeros_like(pool[0]) for row in rows])
    truth = step(op, token(problem, 0), expected, backend="reference", **options_of(problem))
    indices = torch.tensor(rows, dtype=torch.int32).repeat_interleave(2)[::2]  # not contiguous
    found = step(op, token(problem, 0), pool, state_indices=indices, backend=backend, **options_of(problem))
    assert error(found, truth) < 1e-12
    for row in range(5):
        if row in rows:
            assert error(pool[row], expected[rows.index(row)]) < 1e-12
        else:
            assert torch.equal(pool[row], before[row])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_refused(op, backend):
    problem = MAKERS[op](1, B=2, state="each")
    state, inputs, options = problem.tensors["initial_state"], token(problem, 0), options_of(problem)
    before = state.clone()
    for rows, message in ([0, 0], "twice"), ([0, 2], r"\[-1, 1\]"), ([-2, 0], r"\[-1, 1\]"):
        with pytest.raises(ValueError, match="state_indices.*" + message):
            step(op, inputs, state, state_indices=torch.tensor(rows), backend=backend, **options)
    with pytest.raises(ValueError, match="requires grad"):
        step(op, inputs, state.clone().requires_grad_(), backend=backend, **options)
    name = "q" if op == "gated_delta_rule" else "D"
    with pytest.raises(ValueError, match=f"{name} requires grad"):
        step(op, {**inputs, name: inputs[name].clone().requires_grad_()}, state, backend=backend, **options)
    with pytest.raises(ValueError, match="state is written in place"):
        step(op, inputs, state[:1].expand_as(state), backend=backend, **options)
    assert torch.equal(state, before)
    with torch.no_grad():  # a frozen pass over trainable parameters is the usual decode
        step(op, {**inputs, name: inputs[name].clone().requires_grad_()}, state, backend=backend, **options)
    assert not torch.equal(state, before)


@pytest.mark.parametrize("op", OPS)
def test_empty_calls(op):
    problem = MAKERS[op](1, B=2, state=None)
    shape = problem.run("torch").final_state.shape[1:]
    none = {n: x[:0] if x.dim() > 1 else x for n, x in token(problem, 0).items()}
    assert step(op, none, torch.zeros(0, *shape, dtype=torch.float64), **options_of(problem)).shape[0] == 0
    pool = torch.zeros(0, *shape, dtype=torch.float64)
    rows = torch.tensor([-1, -1])
    assert step(op, token(problem, 0), pool, state_indices=rows, **options_of(problem)).isfinite().all()


@pytest.mark.parametrize("op", OPS)
def test_compiles_in_one_graph(op):
    problem = MAKERS[op](1, B=2, state="each").to(torch.float32)
    inputs, options = token(problem, 0), options_of(problem)
    states = [problem.tensors["initial_state"].clone() for _ in range(2)]

    def call(state):
        return step(op, inputs, state, **options) + 1

    found = torch.compile(call, fullgraph=True, backend="aot_eager")(states[0])
    assert torch.equal(found, call(states[1]))
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", ["each", "bank"])
def test_backend_torch_asks_nothing_of_a_gpu(op, kind):
    """The tensors have no values, so any read by the host, which would synchronise, is an error."""
    problem = MAKERS[op](70, state=kind).to(torch.float32)
    indices, state = problem.options.get("state_indices"), problem.tensors["initial_state"]
    delta = op == "gated_delta_rule"
    record, options = (DeltaInputs, DeltaOptions(0.3, True)) if delta else (SSDInputs, SSDOptions(True, 0.1, 1.5))
    meta = {n: x.to("meta") for n, x in problem.tensors.items()}
    start = Start(meta.pop("initial_state"), None if indices is None else indices.to("meta"))
    inputs, one = record(**meta), record(**{n: x.to("meta") for n, x in token(problem, 0).items()})
    forward, backward, step_of = (getattr(torch_chunked, op + kind) for kind in ("_forward", "_backward", "_step"))
    output, final = forward(inputs, start, options, True)
    wanted = Wanted(frozenset(problem.tensors), tuple(state.shape))
    assert set(backward(Grads(output, final), inputs, start, options, wanted)) == wanted.names
    assert step_of(one, Pool(start.state, start.indices), options).is_meta
