"""What forwards on a GPU leave for their backwards: the same bits as without, and no more than the gradients need."""

import contextlib

import pytest
import torch
from cases import delta_problem, ssd_problem
from torch.utils.checkpoint import checkpoint

from s0kernels.backends.triton.common.launch import recording
from s0kernels.backends.triton.common.targets import known_target
from s0kernels.ops import gated_delta_rule, recompute
from s0kernels.tuning import memory

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_gpu.py runs the kernels on it"),
    pytest.mark.usefixtures("poisoned"),
]
INPUTS = ("q", "k", "v", "g", "beta")
SMALL = {"B": 1, "H": 1, "HV": 2, "K": 16, "V": 24}
#: bytes of a token of SMALL in fp32, chunks of 32: of what `prepare` makes, and with residuals and states
FACTORS = 2 * 4 * (32 + 32 + 8)
ALL = FACTORS + 2 * 4 * (24 + 24 * 16 // 32)


def small(T=64, **changes):
    return delta_problem(T, **SMALL | changes).to(torch.float32)


def leaves_of(problem, wanted=(*INPUTS, "initial_state")):
    return {name: x.clone().requires_grad_(name in wanted) for name, x in problem.tensors.items()}


def loss_of(problem, leaves):
    output, final = type(problem)(problem.op, leaves, problem.options).run("triton")
    return output.square().sum() + final.square().sum()


def gradients(problem, wanted=(*INPUTS, "initial_state")):
    leaves = leaves_of(problem, wanted)
    loss_of(problem, leaves).backward()
    return {name: leaves[name].grad for name in wanted}


def saved_bytes(problem, wanted):
    """Of a forward, beyond its inputs."""
    leaves, storages = leaves_of(problem, wanted), {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        type(problem)(problem.op, leaves, problem.options).run("triton")
    for x in (*leaves.values(), *problem.options.values()):
        if isinstance(x, torch.Tensor):
            storages.pop(x.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def launched(problem, wanted):
    """Kernels of a forward, and of its backward."""
    leaves = leaves_of(problem, wanted)
    with recording(known_target("sm_90")) as found:
        loss = loss_of(problem, leaves)
        forward = len(found)
        loss.backward()
    names = [x.kernel.fn.__name__.removeprefix("gated_delta_rule_").removesuffix("_kernel") for x in found]
    return names[:forward], names[forward:]


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("fused", (*INPUTS, "initial_state")),
        pytest.param("split", (*INPUTS, "initial_state"), marks=pytest.mark.slow),
        ("fused", ("initial_state",)),
        pytest.param("fused", ("v", "initial_state"), marks=pytest.mark.slow),
    ],
    ids=["fused, all", "split, all", "S0", "v and S0"],
)
def test_recomputing_gives_the_same_bits(schedule, wanted, monkeypatch):
    monkeypatch.setenv("S0KERNELS_TRITON_SCHEDULE", schedule)
    problem = small(lengths=[33, 0, 1], state="bank")
    kept = gradients(problem, wanted)
    with recompute():
        again = gradients(problem, wanted)
    for name in wanted:
        assert torch.equal(kept[name], again[name]), name


@pytest.mark.parametrize(
    ("wanted", "bytes_per_token"),
    [((*INPUTS, "initial_state"), ALL), (("k",), ALL), (("v",), FACTORS), (("initial_state",), FACTORS), ((), 0)],
    ids=["all", "k", "v", "S0", "none"],
)
def test_no_more_is_kept_than_the_gradients_need(wanted, bytes_per_token):
    assert saved_bytes(small(), wanted) == 64 * bytes_per_token
    with recompute():
        assert saved_bytes(small(), wanted) == 0
    with torch.no_grad():
        assert saved_bytes(small(), wanted) == 0


def test_a_backward_launches_nothing_that_was_kept():
    wanted = (*INPUTS, "initial_state")
    forward, backward = launched(small(), wanted)
    assert forward == ["prepare_fwd", "scan_fwd"]
    assert backward == ["scan_bwd", "intra_bwd", "inputs_bwd"]
    assert launched(small(), ("initial_state",)) == (forward, ["scan_bwd"])
    with recompute():
        assert launched(small(), wanted) == (
            forward,
            ["prepare_fwd", "scan_bwd", "scan_fwd", "intra_bwd", "inputs_bwd"],
        )
        assert launched(small(), ("initial_state",)) == (forward, ["prepare_fwd", "scan_bwd"])


def test_the_environment_asks_for_it_everywhere(monkeypatch):
    monkeypatch.setenv("S0KERNELS_RECOMPUTE", "1")
    assert saved_bytes(small(), INPUTS) == 0
    with recompute(False):
        assert saved_bytes(small(), INPUTS) == 64 * ALL
        with recompute():
            assert saved_bytes(small(), INPUTS) == 0
    assert saved_bytes(small(), INPUTS) == 0
    with pytest.raises(TypeError, match="recompute: on must be a bool, got int"), recompute(1):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("how", [contextlib.nullcontext, recompute])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_call_has_the_same_gradients(how, reentrant):
    problem = small(8)
    plain, leaves = gradients(problem), leaves_of(problem)
    with how():
        loss = checkpoint(
            lambda *values: loss_of(problem, dict(zip(leaves, values, strict=True))),
            *leaves.values(),
            use_reentrant=reentrant,
        )
        loss.backward()
    for name, x in leaves.items():
        assert torch.equal(x.grad, plain[name]), name


@pytest.mark.slow
def test_compiled_with_dynamic_sizes():
    """One graph for two lengths, and another where it is to recompute."""
    from torch._dynamo import lookup_backend

    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph.code)
        return lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(loss_of_tensors, backend=compiler, dynamic=True, fullgraph=True)
    for T, context in ((40, contextlib.nullcontext()), (70, contextlib.nullcontext()), (70, recompute())):
        problem = small(T, lengths=[T - 20, 20])
        plain, leaves = gradients(problem), leaves_of(problem)
        with context:
            compiled(*(leaves[name] for name in (*INPUTS, "initial_state")), problem.options["cu_seqlens"]).backward()
        for name, x in leaves.items():
            assert torch.equal(x.grad, plain[name]), (T, name)
    assert ["gated_delta_rule_keeping" in graph for graph in graphs] == [True, False]


def loss_of_tensors(q, k, v, g, beta, initial_state, cu_seqlens):
    options = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "use_qk_l2norm": True}
    output, final = gated_delta_rule(q, k, v, g, beta, **options, backend="triton")
    return output.square().sum() + final.square().sum()


def test_the_trainers_meter_counts_what_is_kept():
    def counted():
        leaves = leaves_of(problem)
        with memory._Counted() as meter:
            loss = loss_of(problem, leaves)
            assert loss.requires_grad
            return meter.now()

    problem = small()
    kept = counted()
    with recompute():
        assert kept - counted() == pytest.approx(memory.UNCOUNTED * 64 * ALL, abs=1)


def test_ssd_keeps_nothing():
    problem = ssd_problem(8, B=1).to(torch.float32)
    assert saved_bytes(problem, tuple(problem.tensors)) == 0


def test_under_vmap():
    """Where an entry's tensors require gradients of what is outside."""
    problems = [small(8, seed=seed) for seed in range(2)]
    both = {name: torch.stack([x.tensors[name] for x in problems]).requires_grad_() for name in INPUTS}
    state = problems[0].tensors["initial_state"].clone().requires_grad_()

    def output(q, k, v, g, beta):
        options = {"initial_state": state, "use_qk_l2norm": True}
        return gated_delta_rule(q, k, v, g, beta, **options, backend="triton").output

    leaves = (*both.values(), state)
    found = torch.autograd.grad(torch.vmap(output)(*both.values()).square().sum(), leaves)
    one_by_one = [output(*(x[i] for x in both.values())) for i in range(2)]
    for ours, theirs in zip(found, torch.autograd.grad(torch.stack(one_by_one).square().sum(), leaves), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
