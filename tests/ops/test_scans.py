"""Both scans: chunked compared with token by token, in every form of state and packing, forward and backward."""

import pytest
import torch
from cases import (
    BACKENDS,
    CHUNKED,
    MAKERS,
    STATE_KINDS,
    USABLE,
    assert_nearly_equal_keys_are_survived,
    delta_problem,
    error,
    ssd_problem,
)

from s0kernels.backends import torch_chunked
from s0kernels.calls import DeltaInputs, DeltaOptions, Grads, SSDInputs, SSDOptions, Start, Wanted

OPS = sorted(MAKERS)
LENGTHS = (1, 63, 64, 65, 200)
PACKED = [5, 0, 70, 1, 0]
chunked = pytest.mark.parametrize("backend", CHUNKED)


def assert_same(found: dict, truth: dict, tolerance: float) -> None:
    for name in truth:
        assert found[name].shape == truth[name].shape, name
        assert error(found[name], truth[name]) < tolerance, name


@chunked
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_equals_token_by_token(op, T, backend):
    problem = MAKERS[op](T)
    weights = problem.weights()
    assert_same(problem.gradients(backend, weights), problem.gradients("reference", weights), 1e-11)


@chunked
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", [None, *STATE_KINDS])
@pytest.mark.parametrize("lengths", [None, PACKED], ids=["dense", "packed"])
def test_every_form_of_state(op, kind, lengths, backend):
    problem = MAKERS[op](30, B=3, state=kind, lengths=lengths, chunk_size=16)
    weights = problem.weights()
    truth = problem.gradients("reference", weights)
    assert_same(problem.gradients(backend, weights), truth, 1e-11)
    if kind is not None:
        assert truth["dinitial_state"].shape == problem.tensors["initial_state"].shape
        assert truth["dinitial_state"].abs().max() > 0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_may_be_columns_of_a_table(op, backend):
    problem = MAKERS[op](30, state="bank", lengths=PACKED)
    weights = problem.weights()
    found = problem.with_columns().gradients(backend, weights)
    for name, truth in problem.gradients(backend, weights).items():
        assert torch.equal(found[name], truth), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_packed_shared_each_and_bank_agree(op, backend):
    """The same sequences, stored in every way that the contract allows."""
    shared = MAKERS[op](40, B=3)
    state = shared.tensors["initial_state"]
    row_wise = {name for name, x in shared.tensors.items() if x.dim() > 2 and name != "initial_state"}
    packed_tensors = {n: x.flatten(0, 1)[None] if n in row_wise else x for n, x in shared.tensors.items()}
    cu_seqlens = torch.tensor([0, 40, 80, 120])
    bank = torch.stack([torch.zeros_like(state), state])
    ways = [
        (shared.tensors, {}),
        ({**shared.tensors, "initial_state": state.expand(3, *state.shape)}, {}),
        ({**shared.tensors, "initial_state": bank}, {"state_indices": torch.tensor([1, 1, 1])}),
        (packed_tensors, {"cu_seqlens": cu_seqlens}),
        ({**packed_tensors, "initial_state": bank}, {"cu_seqlens": cu_seqlens, "state_indices": torch.tensor([1] * 3)}),
    ]
    truth = shared.run("reference")
    for tensors, options in ways:
        found = type(shared)(op, tensors, {**shared.options, **options}).run(backend)
        assert error(found.output.reshape(truth.output.shape), truth.output) < 1e-12
        assert error(found.final_state, truth.final_state) < 1e-12


@chunked
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nearly_equal_keys_are_survived(backend, dtype):
    """With beta at 2 a chunk amplifies rounding. The recurrence, a product of reflections, does not."""
    assert_nearly_equal_keys_are_survived(dtype, lambda problem, weights: problem.gradients(backend, weights))


def _gradcheck_problem(op: str, state: str, lengths):
    if op == "ssd":
        problem = ssd_problem(5, H=2, P=2, G=1, N=3, state=state, lengths=lengths, chunk_size=2)
        problem.options["dt_limit"] = (0.0, 50.0)  # finite differences must not step over a bound
        return problem
    return delta_problem(5, H=1, HV=2, K=3, V=2, state=state, lengths=lengths, chunk_size=2)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("state", "lengths"), [("shared", None), ("bank", [2, 0, 4])])
def test_gradcheck_of_every_input(op, backend, state, lengths):
    problem = _gradcheck_problem(op, state, lengths)
    names = list(problem.tensors)
    inputs = tuple(problem.tensors[name].clone().requires_grad_() for name in names)

    def call(*values):
        return tuple(type(problem)(op, dict(zip(names, values, strict=True)), problem.options).run(backend))

    assert torch.autograd.gradcheck(call, inputs)


@chunked
@pytest.mark.parametrize("op", OPS)
def test_only_asked_gradients_and_the_state_only_backward(op, backend):
    """A gradient computed alone equals that computed with all others; for the initial state, bit for bit."""
    problem = MAKERS[op](70, state="bank", B=3)
    weights = problem.weights()
    together = problem.gradients(backend, weights)
    for name in problem.tensors:
        alone = problem.gradients(backend, weights, [name])
        assert set(alone) == {"output", "final_state", f"d{name}"}
        assert error(alone[f"d{name}"], together[f"d{name}"]) < 1e-13, name
    only_state = problem.gradients(backend, weights, ["initial_state"])
    assert torch.equal(only_state["dinitial_state"], together["dinitial_state"])


@chunked
@pytest.mark.parametrize(("op", "unused"), [("gated_delta_rule", ["v"]), ("ssd", ["x", "B", "D"])])
def test_the_state_only_backward_keeps_no_inputs_it_does_not_need(op, unused, backend):
    problem = MAKERS[op](20)
    sizes = []
    leaves = {n: x.clone().requires_grad_(n == "initial_state") for n, x in problem.tensors.items()}

    def pack(tensor):
        sizes.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        type(problem)(op, leaves, problem.options).run(backend)
    assert sizes
    kept = set(sizes)
    for name in [*unused, "initial_state"]:
        assert leaves[name].data_ptr() not in kept, name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("part", ["output", "final_state"])
def test_only_one_of_the_outputs_has_a_gradient(op, part):
    problem = MAKERS[op](20)
    leaves = {n: x.clone().requires_grad_() for n, x in problem.tensors.items()}
    found, truth = (
        torch.autograd.grad(
            getattr(type(problem)(op, leaves, problem.options).run(backend), part).square().sum(),
            list(leaves.values()),
            allow_unused=True,
        )
        for backend in (USABLE[0], "reference")
    )
    for name, ours, theirs in zip(leaves, found, truth, strict=True):
        if theirs is None:  # it is not in the reference's graph, so its gradient is zero
            assert ours.abs().max() == 0, name
        else:
            assert error(ours, theirs) < 1e-10, name


@pytest.mark.parametrize("op", OPS)
def test_two_runs_give_the_same_bits(op):
    problem = MAKERS[op](130, B=4, state="bank").to(torch.float32)
    weights = problem.weights()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, second = problem.gradients(None, weights), problem.gradients(None, weights)
    finally:
        torch.set_num_threads(threads)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@chunked
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(op, dtype, backend):
    """The error against fp64 on the same inputs is at most twice that of the recurrence in that dtype, plus its
    rounding."""
    problem = MAKERS[op](200).to(dtype, torch.float32)
    exact = problem.to(torch.float64)
    weights = problem.weights()
    truth = exact.gradients("reference", weights)
    plain = problem.gradients("reference", weights)
    found = problem.gradients(backend, weights)
    for name in truth:
        budget = 2 * error(plain[name], truth[name]) + torch.finfo(plain[name].dtype).eps
        assert error(found[name], truth[name]) <= budget, name
        assert found[name].dtype == plain[name].dtype, name


@chunked
@pytest.mark.parametrize("op", OPS)
def test_strong_decays_cost_no_precision_and_a_full_reset_is_exact(op, backend):
    problem = MAKERS[op](100, extras=False) if op == "ssd" else MAKERS[op](100)
    problem = problem.to(torch.float32)
    name = "g" if op == "gated_delta_rule" else "A"
    if op == "gated_delta_rule":
        problem.tensors["g"][:, ::7] = -300.0
        problem.tensors["g"][:, 50] = -torch.inf
    else:
        problem.tensors["A"] = problem.tensors["A"] * 300
    weights = problem.weights()
    truth = problem.to(torch.float64).gradients("reference", weights)
    found = problem.gradients(backend, weights, [n for n in problem.tensors if n != name])
    for key, value in found.items():
        assert error(value, truth[key]) < 2e-6, key


@pytest.mark.parametrize("op", OPS)
def test_any_strides(op):
    """Inputs are contiguous in time, as after a convolution; the state is expanded, the gradient transposed."""
    problem = MAKERS[op](33, state="each")
    truth = problem.run("torch")
    strided = {}
    for name, x in problem.tensors.items():
        if x.dim() == 4 and name != "initial_state":
            strided[name] = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            assert not strided[name].is_contiguous()
        elif x.dim() == 4:
            strided[name] = x.mT.contiguous().mT
        else:
            strided[name] = torch.stack([x, x], dim=-1)[..., 0]
    for backend in USABLE:
        found = type(problem)(op, strided, problem.options).run(backend)
        assert error(found.output, truth.output) < 1e-12
        assert error(found.final_state, truth.final_state) < 1e-12


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", [None, *STATE_KINDS])
def test_no_tokens(op, backend, state):
    """T = 0, an empty batch, and packed sequences without tokens end in their initial states."""
    for changes in ({"T": 0, "B": 3}, {"lengths": [0, 0, 0]}):
        problem = MAKERS[op](state=state, **changes)
        leaves = {n: x.clone().requires_grad_() for n, x in problem.tensors.items()}
        result = type(problem)(op, leaves, problem.options).run(backend)
        assert result.output.shape[1] == 0
        assert result.final_state.shape[0] == 3
        if state == "shared":
            assert torch.equal(result.final_state, leaves["initial_state"].expand(3, -1, -1, -1))
            result.final_state.sum().backward()
            assert torch.equal(leaves["initial_state"].grad, torch.full_like(leaves["initial_state"], 3.0))
    if state in (None, "shared"):
        for rows, kept, extra in ((0, 5, {}), (1, 0, {"cu_seqlens": torch.tensor([0])})):
            empty = MAKERS[op](5, B=2, state=state)
            for name, x in empty.tensors.items():
                x = x[:rows, :kept] if x.dim() > 2 and name != "initial_state" else x
                empty.tensors[name] = x.clone().requires_grad_()
            empty.options |= extra
            result = empty.run(backend)
            first = empty.tensors["v" if op == "gated_delta_rule" else "x"]
            assert result.output.shape == first.shape
            assert result.final_state.shape[0] == 0
            (result.output.sum() + result.final_state.sum()).backward()
            assert first.grad.shape == first.shape


@chunked
@pytest.mark.parametrize("op", OPS)
def test_sequences_do_not_meet(op, backend):
    """A sequence full of NaN does not affect its neighbours in a packed row or in a batch."""
    for lengths in (None, [10, 10, 10]):
        problem = MAKERS[op](10, B=3, lengths=lengths)
        clean = problem.run(backend)
        first = "v" if op == "gated_delta_rule" else "x"
        poisoned = problem.tensors[first].clone()
        poisoned.view(3, 10, *poisoned.shape[2:])[1] = float("nan")
        found = problem.run(backend, **{first: poisoned})
        shape = (3, 10, *clean.output.shape[2:])
        for i in (0, 2):
            assert torch.equal(found.output.view(shape)[i], clean.output.view(shape)[i])
            assert torch.equal(found.final_state[i], clean.final_state[i])
        assert found.output.view(shape)[1].isnan().any()


@chunked
@pytest.mark.parametrize("op", OPS)
def test_pads_with_zero_decay_and_zero_write_change_nothing(op, backend):
    problem = MAKERS[op](40, extras=False) if op == "ssd" else MAKERS[op](40)
    pads = {"gated_delta_rule": ("g", "beta"), "ssd": ("dt",)}[op]
    truth = problem.run(backend)
    padded = {
        n: torch.cat([x[:, :9], x], 1) if x.dim() > 2 and n != "initial_state" else x
        for n, x in problem.tensors.items()
    }
    for name in pads:
        padded[name][:, :9] = 0.0
    found = type(problem)(op, padded, problem.options).run(backend)
    assert error(found.output[:, 9:], truth.output) < 1e-12
    assert error(found.final_state, truth.final_state) < 1e-12


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mode", ["plain", "no final state", "autocast"])
def test_modes_do_not_touch_inputs_nor_alias_outputs(op, mode):
    problem = MAKERS[op](20).to(torch.float32)
    before = {n: x.clone() for n, x in problem.tensors.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        result = problem.run(None, output_final_state=mode != "no final state")
    truth = problem.run(None)
    assert torch.equal(result.output, truth.output)
    assert (result.final_state is None) == (mode == "no final state")
    for name, x in problem.tensors.items():
        assert torch.equal(x, before[name])
    if result.final_state is not None:
        result.final_state.zero_()
        assert torch.equal(problem.tensors["initial_state"], before["initial_state"])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_under_autocast(op, backend):
    problem = MAKERS[op](20).to(torch.float32)
    weights = problem.weights()
    truth = problem.gradients(backend, weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = problem.gradients(backend, weights)
    for name in truth:
        assert torch.equal(found[name], truth[name]), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, hidden by it
@pytest.mark.parametrize("op", OPS)
def test_registration(op):
    """Schema, fake tensors and autograd of the registered op agree with its results."""
    problem = MAKERS[op](6, state="bank")
    calls = []
    registered = getattr(torch.ops.s0kernels, op)

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is registered.default:
                calls.append(args)
            return func(*args, **(kwargs or {}))

    with Record():
        problem.run("torch")
    arguments = tuple(
        x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in calls[0]
    )
    torch.library.opcheck(registered.default, arguments)


class _Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products, including those inside the registered ops."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


def _products(problem, wanted) -> int:
    """Return the number of matrix products of the backward alone, called like in the registered op."""
    tensors = dict(problem.tensors)
    state, weights = tensors.pop("initial_state"), problem.weights()
    start = Start(state, problem.options.get("state_indices"), problem.options.get("cu_seqlens"))
    if problem.op == "gated_delta_rule":
        inputs, options = DeltaInputs(**tensors), DeltaOptions(0.3, problem.options["use_qk_l2norm"])
    else:
        inputs, options = SSDInputs(**tensors), SSDOptions(problem.options["dt_softplus"], *problem.options["dt_limit"])
    backward = getattr(torch_chunked, f"{problem.op}_backward")
    with _Products() as counter:
        backward(Grads(*weights), inputs, start, options, Wanted(frozenset(wanted), tuple(state.shape)))
    return counter.count


def test_the_fewer_gradients_are_wanted_the_less_is_computed():
    delta, mamba = delta_problem(40), ssd_problem(40)
    everything = _products(delta, delta.tensors)
    assert _products(delta, ["initial_state"]) < _products(delta, ["v"]) + 1 < everything
    assert _products(delta, ["initial_state"]) < 0.7 * everything
    everything = _products(mamba, mamba.tensors)
    assert _products(mamba, ["D"]) == 0
    assert _products(mamba, ["initial_state"]) == len(range(0, 40, 64)) == 1
    for wanted in (["x"], ["B"], ["C"], ["z"]):
        assert _products(mamba, ["initial_state"]) < _products(mamba, wanted) < everything


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ends", [[0, 5], [2, 10], [0, 7, 3, 10], [0, 12], [3, 3]], ids=str)
def test_packed_boundaries_are_checked_wherever_they_are_read(op, backend, ends, monkeypatch):
    """This holds even if values are not checked in advance, as on a GPU."""
    monkeypatch.setattr("s0kernels.ops.sequences._reads_values", lambda tensor: False)
    problem = MAKERS[op](10, B=1)
    with pytest.raises(ValueError, match="cu_seqlens"):
        problem.run(backend, cu_seqlens=torch.tensor(ends))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_index_that_nobody_checked_gives_nan_for_its_sequence(op, backend, monkeypatch):
    monkeypatch.setattr("s0kernels.ops.sequences._reads_values", lambda tensor: False)
    problem = MAKERS[op](6, B=3, state="bank")
    problem.options["state_indices"] = torch.tensor([1, 5, -2])
    leaves = {n: x.clone().requires_grad_() for n, x in problem.tensors.items()}
    result = type(problem)(op, leaves, problem.options).run(backend)
    assert result.output[0].isfinite().all()
    assert result.output[1:].isnan().all()
    assert result.final_state[1:].isnan().all()
    result.output[0].sum().backward()
    assert leaves["initial_state"].grad[2:].abs().max() == 0


def test_many_short_packed_sequences_are_not_padded_to_a_long_chunk():
    from s0kernels.backends.chunks import Chunks

    chunks = Chunks(torch.zeros(1, 512, 1), torch.arange(513), 64)
    assert (chunks.size, chunks.count) == (1, 512)
