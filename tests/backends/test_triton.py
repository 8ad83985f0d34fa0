"""The Triton kernels in the interpreter, compared with the recurrence in fp64. All memory that they do not write holds
NaN."""

import mmap
from typing import NamedTuple

import pytest
import torch
from cases import (
    MAKERS,
    NEARLY_EQUAL,
    STATE_KINDS,
    assert_nearly_equal_keys_are_survived,
    error,
    options_of,
    step,
    token,
)
from torch.utils._python_dispatch import TorchDispatchMode

from s0kernels.backends import triton
from s0kernels.backends.triton.common.launch import recording
from s0kernels.backends.triton.common.targets import known_target
from s0kernels.bench.inputs import nearly_equal_keys
from s0kernels.calls import DeltaInputs, DeltaOptions, SSDInputs, SSDOptions, Start

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_gpu.py runs the kernels on it"),
    pytest.mark.usefixtures("poisoned"),
]
PACKED = [5, 0, 70, 1, 0]


class Op(NamedTuple):
    """The description of an op for the tests: heads of a small problem, the inputs with tokens (first the one that is
    written to the state), and options under which the decays are used as given."""

    small: dict
    tokens: tuple[str, ...]
    decay: str
    plain: dict
    lengths: dict
    sizes: tuple[dict, ...]


ALL = {
    "gated_delta_rule": Op(
        small={"H": 1, "HV": 2, "K": 16, "V": 24},
        tokens=("v", "q", "k", "g", "beta"),
        decay="g",
        plain={},
        lengths={},
        sizes=({"K": 16, "V": 80}, {"K": 40, "V": 5}, {"H": 2, "HV": 6}, {"H": 2, "HV": 2}),
    ),
    "ssd": Op(
        small={"H": 2, "P": 24, "G": 1, "N": 16},
        tokens=("x", "dt", "B", "C", "z"),
        decay="A",
        plain={"extras": False},
        lengths={"H": 4, "G": 2},
        sizes=({"P": 80, "N": 5}, {"P": 5, "N": 72}, {"H": 6, "G": 2}, {"H": 3, "G": 3}, {"H": 4}),
    ),
}


def of(op: str, *values):
    """Return a case of an op. The interpreter is slow, so only the cases of one op run in `make test`."""
    return pytest.param(op, *values, marks=pytest.mark.slow if op == "ssd" else ())


each_op = pytest.mark.parametrize("op", [of(op) for op in ALL])


def small(op: str, *T: int, **changes):
    return MAKERS[op](*T, **ALL[op].small | changes)


@pytest.fixture
def schedule(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setenv("S0KERNELS_TRITON_SCHEDULE", request.param)


#: the gated delta rule has two schedules of its forward
each_schedule = pytest.mark.parametrize(
    ("op", "schedule"),
    [of("gated_delta_rule", "fused"), of("gated_delta_rule", "split"), of("ssd", None)],
    indirect=["schedule"],
)


@pytest.fixture
def unchecked(monkeypatch):
    """Turn off the checks of index values, as on a GPU."""
    monkeypatch.setattr("s0kernels.ops.sequences._reads_values", lambda tensor: False)


def run(problem, leaves: dict, backend: str = "triton"):
    return type(problem)(problem.op, leaves, problem.options).run(backend)


def leaves_of(problem) -> dict:
    return {name: x.clone().requires_grad_() for name, x in problem.tensors.items()}


def assert_within_budget(problem, wanted=None, part=1.0) -> None:
    """Compare with fp64. The budget is twice the error of plain PyTorch in the same dtype, token by token or in chunks,
    plus the rounding of the inputs' dtype, which operands of matrix products have; or `part` of that."""
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


@each_op
@pytest.mark.parametrize("T", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_lengths(op, T, dtype):
    assert_within_budget(small(op, T, B=1, **ALL[op].lengths).to(dtype, torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("op", "names"), [("gated_delta_rule", ["g"]), ("ssd", ["A", "D", "dt_bias"])])
def test_gradients_that_cancel_have_room_for_what_a_gpu_rounds_besides(op, names, seed):
    """The interpreter rounds less than a GPU, for example in products of tf32. Sums to one number per head also show
    values that are rounded twice."""
    problem = MAKERS[op](130, state="shared", seed=seed).to(torch.float16, torch.float32)
    assert_within_budget(problem, names, part=0.7)


@pytest.mark.parametrize(
    ("dtype", "among"),
    [
        (torch.float16, NEARLY_EQUAL[:1]),
        pytest.param(torch.float16, NEARLY_EQUAL[1:], marks=pytest.mark.slow),
        pytest.param(torch.float32, NEARLY_EQUAL, marks=pytest.mark.slow),
    ],
    ids=["some, fp16", "others, fp16", "fp32"],
)
def test_nearly_equal_keys_are_survived(dtype, among):
    assert_nearly_equal_keys_are_survived(dtype, lambda problem, weights: problem.gradients("triton", weights), among)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["fused", "split"], indirect=True)
def test_few_chunks_that_amplify(schedule):
    """One of three chunks in one of two sequences amplifies. If W has no second part, none is read."""
    problem = small("gated_delta_rule", lengths=[150, 40], state="each")
    values = {n: x[:, 64:128] for n, x in problem.tensors.items() if n != "initial_state"}
    for name, x in nearly_equal_keys(values, 0.03, (2.0, 2.0)).items():
        problem.tensors[name][:, 64:128] = x
    problem = problem.to(torch.float16, torch.float32)
    weights = problem.weights()
    truth = problem.to(torch.float64).gradients("reference", weights)
    for name, value in problem.gradients("triton", weights).items():
        assert error(value, truth[name]) < 4e-3, name


@each_schedule
@pytest.mark.parametrize("kind", [None, *STATE_KINDS])
@pytest.mark.parametrize("lengths", [None, PACKED], ids=["dense", "packed"])
def test_every_form_of_state(op, kind, lengths, schedule):
    assert_within_budget(small(op, 30, B=3, state=kind, lengths=lengths).to(torch.float32))


@pytest.mark.parametrize(
    ("op", "sizes", "schedule"),
    [of("gated_delta_rule", sizes, how) for how in ("fused", "split") for sizes in ALL["gated_delta_rule"].sizes]
    + [of("ssd", sizes, None) for sizes in ALL["ssd"].sizes],
    indirect=["schedule"],
    ids=str,
)
def test_sizes(op, sizes, schedule):
    problem = small(op, 40, B=1, **sizes)
    assert_within_budget(problem.to(torch.float16, torch.float32))
    problem = problem.to(torch.float32)
    for found, exact in zip(problem.run("triton"), problem.to(torch.float64).run("reference"), strict=True):
        assert error(found, exact) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("T", [127, 128, 129, 300])
def test_lengths_of_chunks_of_128(T):
    """They are what 16 bits have on a large chip, for sequences of more than 64 tokens."""
    problem = small("ssd", T, B=1, **ALL["ssd"].lengths).to(torch.float16, torch.float32)
    assert_within_budget(problem)


@pytest.mark.slow
@pytest.mark.parametrize(("chunk_size", "dtype"), [(16, torch.float32), (32, torch.float32), (64, torch.float16)])
def test_shorter_chunks_of_ssd(chunk_size, dtype):
    problem = small("ssd", lengths=[70, 0, 130, 3], state="bank", chunk_size=chunk_size)
    assert_within_budget(problem.to(dtype, torch.float32))


@pytest.mark.slow
def test_wide_states_of_ssd():
    """With more than one tile of N in every kernel."""
    assert_within_budget(small("ssd", 20, B=1, P=5, N=260).to(torch.float16, torch.float32))


@pytest.mark.parametrize(
    ("op", "changes", "dtype"),
    [
        of("gated_delta_rule", {"use_qk_l2norm": False, "scale": 0.3}, torch.float32),
        of("ssd", {"extras": False}, torch.float32),
        of("ssd", {"extras": False}, torch.float16),
    ],
    ids=str,
)
def test_without_what_is_optional_and_with_short_chunks(op, changes, dtype):
    problem = small(op, 40, B=1, chunk_size=16, **changes)
    if op == "gated_delta_rule":
        problem.tensors["k"] *= 0.2  # because k is not normalised
    assert_within_budget(problem.to(dtype, torch.float32))


@pytest.mark.slow
def test_softplus_does_not_round_to_zero():
    """log(1 + exp(x)) would be zero for x = -17, and for x = -90, where exp(x) is subnormal."""
    problem = small("ssd", 8, B=1, dt_limit=(0.0, float("inf"))).to(torch.float32)
    problem.tensors["dt"] = torch.linspace(-85.0, 85.0, 16).view(1, 8, 2)
    problem.tensors["dt_bias"] = torch.zeros(2)
    problem.tensors["A"] *= 1e-2
    for t in range(8):
        one = {n: x[:, t : t + 1] if n in ALL["ssd"].tokens else x for n, x in problem.tensors.items()}
        one.pop("initial_state")
        found, truth = (run(problem, one, backend).final_state for backend in ("triton", "reference"))
        assert truth.abs().amin((0, 2, 3)).min() > 0
        for head in range(2):
            assert error(found[:, head], truth[:, head]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "changes"), [("gated_delta_rule", {"T": 70, "B": 2}), ("ssd", {"lengths": [40, 6], "H": 1})], ids=str
)
def test_only_asked_gradients_and_the_state_only_backward(op, changes):
    problem = small(op, state="bank", **changes).to(torch.float32)
    weights = problem.weights()
    together = problem.gradients("triton", weights)
    for name in problem.tensors:
        alone = problem.gradients("triton", weights, [name])
        assert set(alone) == {"output", "final_state", f"d{name}"}
        assert torch.equal(alone[f"d{name}"], together[f"d{name}"]), name


@each_op
@pytest.mark.parametrize("part", ["output", "final_state"])
def test_only_one_of_the_outputs_has_a_gradient(op, part):
    problem = small(op, 40, B=1).to(torch.float32)
    weights = problem.weights()
    grads = []
    for backend, one in (("triton", problem), ("reference", problem.to(torch.float64))):
        leaves = leaves_of(one)
        result = getattr(run(one, leaves, backend), part)
        loss = (result * weights[part == "final_state"].float()).sum()
        grads.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))
    for name, ours, theirs in zip(problem.tensors, *grads, strict=True):
        if theirs is None:
            assert ours.abs().max() == 0, name
        else:
            assert error(ours, theirs) < 1e-5, name


@each_op
def test_strong_decays_cost_no_precision_and_a_full_reset_is_exact(op):
    decay = ALL[op].decay
    problem = small(op, 100, B=1, **ALL[op].plain).to(torch.float32)
    if op == "gated_delta_rule":
        problem.tensors["g"][:, ::7] = -300.0
        problem.tensors["g"][:, 50] = -torch.inf
    else:
        problem.tensors["A"] *= 300
    weights = problem.weights()
    wanted = [name for name in problem.tensors if name != decay]
    truth = problem.to(torch.float64).gradients("reference", weights, wanted)
    for name, value in problem.gradients("triton", weights, wanted).items():
        assert error(value, truth[name]) < 2e-6, name


@each_op
def test_any_strides(op):
    """Inputs are contiguous in time, as after a convolution; the state is transposed, the gradient expanded."""
    problem = small(op, 40, state="each").to(torch.float32)
    results = []
    for strided in (False, True):
        leaves = {}
        for name, x in problem.tensors.items():
            if strided and name == "initial_state":
                x = x.mT.contiguous().mT
            elif strided and name in ALL[op].tokens:
                x = x.movedim(1, -1).contiguous().movedim(-1, 1)
            elif strided:
                x = torch.stack([x, x], dim=-1)[..., 0]
            leaves[name] = x.detach().requires_grad_()
        output, final = run(problem, leaves)
        loss = output.sum() + (final * final.detach()).mT.contiguous().sum()
        results.append([output, final, *torch.autograd.grad(loss, list(leaves.values()))])
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 1e-6


@each_op
def test_indices_may_be_columns_of_a_table(op):
    problem = small(op, state="bank", lengths=[5, 0, 20, 1]).to(torch.float32)
    weights = problem.weights()
    found = problem.with_columns().gradients("triton", weights)
    for name, truth in problem.gradients("triton", weights).items():
        assert torch.equal(found[name], truth), name


def apart(x: torch.Tensor, step: int) -> torch.Tensor:
    """Return [B, T, H, ...] with `step` elements from head to head, in memory that is not there until it is written."""
    sizes = x[:, :, 0].numel() + step * (x.shape[2] - 1)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # since Python 3.13
    memory = torch.frombuffer(mmap.mmap(-1, sizes * x.itemsize, flags=flags), dtype=x.dtype)
    strides = list(x[:, :, 0].contiguous().stride())
    return memory.as_strided(x.shape, (*strides[:2], step, *strides[2:])).copy_(x)


@each_op
def test_heads_that_lie_more_than_two_to_the_31_elements_apart(op):
    """As after a convolution of a very long sequence."""
    heads = {"gated_delta_rule": {"H": 3, "HV": 3}, "ssd": {"H": 3, "G": 3}}[op]
    problem = small(op, 20, B=1, **heads).to(torch.float32)
    results = []
    for step_of in (0, 2**30):
        leaves = {
            name: (apart(x, step_of) if step_of and name in ALL[op].tokens else x.clone()).requires_grad_()
            for name, x in problem.tensors.items()
        }
        output, final = run(problem, leaves)
        results.append([output, final, *torch.autograd.grad(output.sum() + final.sum(), list(leaves.values()))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@each_op
def test_no_rows(op):
    """Also where Hopper's descriptors would read them."""
    problem = small(op, 5, B=2, state=None).to(torch.float16, torch.float32)
    leaves = {name: x[:0].clone().requires_grad_() if x.dim() > 1 else x for name, x in problem.tensors.items()}
    result = run(problem, leaves)
    assert result.output.numel() == result.final_state.numel() == 0
    result.output.sum().backward()
    assert all(leaves[name].grad.shape == leaves[name].shape for name in ALL[op].tokens)


@each_op
@pytest.mark.parametrize("kind", [None, *STATE_KINDS])
def test_no_tokens(op, kind):
    for changes in ({"T": 0, "B": 3}, {"lengths": [0, 0, 0]}):
        problem = small(op, state=kind, **changes).to(torch.float32)
        leaves = leaves_of(problem)
        result, truth = run(problem, leaves), problem.run("reference")
        assert result.output.shape == truth.output.shape
        assert torch.equal(result.final_state, truth.final_state)
        result.final_state.sum().backward()
        if op == "ssd":
            assert leaves["A"].grad.abs().max() == 0
        if kind == "shared":
            assert torch.equal(leaves["initial_state"].grad, torch.full_like(leaves["initial_state"], 3.0))


@pytest.mark.slow
@pytest.mark.parametrize(("op", "changes"), [("gated_delta_rule", {}), ("ssd", {"H": 1})])
def test_sequences_do_not_meet(op, changes):
    def rows(x):
        return x.reshape(3, 10, *x.shape[2:])

    written = ALL[op].tokens[0]
    for lengths in (None, [10, 10, 10]):
        problem = small(op, 10, B=3, lengths=lengths, **changes).to(torch.float32)
        weights = problem.weights()
        clean = problem.gradients("triton", weights)
        problem.tensors[written].view(3, 10, *problem.tensors[written].shape[2:])[1] = float("nan")
        found = problem.gradients("triton", weights)
        for name in ("output", *(f"d{name}" for name in ALL[op].tokens)):
            assert torch.equal(rows(clean[name])[[0, 2]], rows(found[name])[[0, 2]]), name
        assert rows(found["output"])[1].isnan().any()
        assert torch.equal(clean["dinitial_state"], found["dinitial_state"])


@each_op
def test_pads_that_neither_decay_nor_write_change_nothing(op):
    problem = small(op, 40, B=1, **ALL[op].plain).to(torch.float32)
    truth = problem.run("triton")
    padded = {n: torch.cat([x[:, :9], x], 1) if n in ALL[op].tokens else x for n, x in problem.tensors.items()}
    for name in ("g", "beta") if op == "gated_delta_rule" else ("dt",):
        padded[name][:, :9] = 0.0
    found = run(problem, padded)
    assert error(found.output[:, 9:], truth.output) < 1e-6
    assert error(found.final_state, truth.final_state) < 1e-6


@each_op
def test_a_bad_index_gives_nan_for_its_sequence(op, unchecked):
    problem = small(op, 6, B=3, state="bank").to(torch.float32)
    problem.options["state_indices"] = torch.tensor([1, 5, -2])
    leaves = leaves_of(problem)
    result = run(problem, leaves)
    for x in (result.output, result.final_state):
        assert x[0].isfinite().all()
        assert x[1:].isnan().all()
    result.output[0].sum().backward()
    assert leaves["initial_state"].grad[1].abs().max() > 0
    assert leaves["initial_state"].grad[2:].abs().max() == 0


@each_op
@pytest.mark.parametrize(
    "ends", [[0, 5], [2, 10], [0, 7, 3, 10], [0, 12], [3, 3], [-4, 10], [0, 2**31 - 1, 10]], ids=str
)
def test_bad_boundaries_give_nan_and_nothing_else(op, ends, unchecked, monkeypatch):
    problem = small(op, 10, B=1).to(torch.float32)
    leaves = leaves_of(problem)
    problem.options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    for form in ("split", "fused"):
        monkeypatch.setenv("S0KERNELS_TRITON_SCHEDULE", form)
        output, final = run(problem, leaves)
        assert output.isnan().all()
        assert final.isnan().all()
        assert final.shape[0] == len(ends) - 1
    (output.sum() + final.sum()).backward()
    for name in ("q", "k", "v", "initial_state") if op == "gated_delta_rule" else ("x", "B", "C", "initial_state"):
        assert leaves[name].grad.isnan().all(), name


@each_op
def test_steps_equal_the_scan(op):
    problem = small(op, 3, B=2, state="each").to(torch.float16, torch.float32)
    truth = problem.run("reference")
    state = problem.tensors["initial_state"].clone()
    outputs = [step(op, token(problem, t), state, backend="triton", **options_of(problem)) for t in range(3)]
    assert error(torch.stack(outputs, dim=1), truth.output) < 1e-3
    assert error(state, truth.final_state) < 1e-6


@each_op
def test_a_step_changes_a_pool_where_addressed(op, unchecked):
    problem = small(op, 1, B=4, state=None).to(torch.float32)
    heads, rows, columns = problem.run("torch").final_state.shape[1:]
    pool = torch.randn(5, heads, columns, rows).mT  # not contiguous
    before, indices = pool.clone(), [4, -1, 2, 7]
    expected = torch.stack([pool[i] if i in (2, 4) else torch.zeros_like(pool[0]) for i in indices])
    options = options_of(problem)
    truth = step(op, token(problem, 0), expected, backend="reference", **options)
    options |= {"state_indices": torch.tensor(indices).repeat_interleave(2)[::2], "backend": "triton"}
    found = step(op, token(problem, 0), pool, **options)
    assert error(found[:3], truth[:3]) < 1e-6
    assert found[3].isnan().all()
    assert error(pool[[4, 2]], expected[[0, 2]]) < 1e-6
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]])


def launched(problem, wanted) -> list[str]:
    """Return the names of the kernels of forward and backward, and of all memory that they may write."""
    weights = problem.weights()
    with recording(known_target("sm_90")) as found:
        problem.gradients("triton", weights, wanted)
    return [x.kernel.__name__ for x in found]


@each_schedule
@pytest.mark.parametrize("kind", STATE_KINDS)
def test_a_state_adds_no_launch(op, kind, schedule):
    def kernels(state, wanted):
        return launched(small(op, 40, state=state).to(torch.float32), wanted)

    frozen = {"gated_delta_rule": ["q", "k", "v", "g", "beta"], "ssd": ["x", "dt", "B", "C"]}[op]
    without, with_state = kernels(None, frozen), kernels(kind, frozen)
    assert with_state == without
    forward = without.index(f"{op}_scan_bwd_kernel") - 1
    assert forward <= 3
    assert len(without) - forward <= 4
    tuned = kernels(kind, [*frozen, "initial_state"])
    assert len(tuned) - forward <= 5
    assert tuned[: len(without)] == without
    assert len(kernels(kind, ["initial_state"])) - forward <= 3
    if op == "ssd":
        trained = kernels(kind, [*frozen, "z", "A", "D", "dt_bias", "initial_state"])
        assert len(trained) - forward <= 6


@pytest.mark.parametrize("op", ALL)
def test_a_forward_copies_nothing(op):
    """Whatever its inputs' strides: PyTorch is asked for memory alone, as often with what is optional as without."""
    records, options = {
        "gated_delta_rule": (DeltaInputs, DeltaOptions(1.0, True)),
        "ssd": (SSDInputs, SSDOptions(True, 0.0, 1.0)),
    }[op]
    counts = set()
    for extras in ({}, {"extras": False})[: 1 + (op == "ssd")]:
        tensors = small(op, 40, state="each", **extras).to(torch.float16, torch.float32).tensors
        start = Start(tensors.pop("initial_state").mT.contiguous().mT)
        inputs = records(**{n: x.mT.contiguous().mT if x.dim() > 1 else x for n, x in tensors.items()})
        with recording(known_target("sm_90")), Asked() as asked:
            getattr(triton, f"{op}_forward")(inputs, start, options, True)
        assert set(asked.names) == {"aten.empty.memory_format", "aten.fill_.Scalar"}  # the second is `poisoned`
        counts.add(len(asked.names))
    assert len(counts) == 1


class Asked(TorchDispatchMode):
    """The operators of PyTorch that are called meanwhile, views left out."""

    def __enter__(self):
        self.names: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@each_op
def test_a_state_of_one_sequence_is_not_summed(op):
    for lengths in (None, [40]):
        problem = small(op, 40, B=1, lengths=lengths).to(torch.float32)
        assert "state_grad_kernel" not in launched(problem, ["initial_state"])
        assert_within_budget(problem, ["initial_state"])


def test_a_schedule_that_does_not_exist_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setenv("S0KERNELS_TRITON_SCHEDULE", "fusd")
    problem = small("gated_delta_rule", 4).to(torch.float32)
    with recording(known_target("sm_90")) as found:
        with pytest.raises(ValueError, match="S0KERNELS_TRITON_SCHEDULE must be fused or split, got 'fusd'"):
            problem.run("triton")
        assert not found
