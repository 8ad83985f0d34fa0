"""FLA's functions: signatures, semantics, and FLA's own layer with our op in place of FLA's."""

import pytest
import torch
from cases import delta_problem, error
from surroundings import FLA, python

from s0kernels.compat.fla import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

FUNCTIONS = [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule]


def inputs(**options) -> tuple[dict, torch.Tensor]:
    problem = delta_problem(20, state="each", **options)
    tensors = dict(problem.tensors)
    return tensors, tensors.pop("initial_state")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_states_of_either_layout_and_any_dtype(function):
    tensors, state = inputs()
    truth = delta_problem(20, state="each").run("reference")
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    output, final = function(**tensors, initial_state=state, **options)
    assert error(output, truth.output) < 1e-12
    assert error(final, truth.final_state) < 1e-12
    output, final = function(**tensors, initial_state=state.mT, state_v_first=True, **options)
    assert error(output, truth.output) < 1e-12
    assert error(final, truth.final_state.mT) < 1e-12
    half = {name: x.bfloat16() for name, x in tensors.items()}
    found, final = function(**half, initial_state=state.bfloat16(), use_qk_l2norm_in_kernel=True)
    assert error(found, truth.output) < 2e-2
    assert final is None, "by default no final state"
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        again, _ = function(**tensors, initial_state=state.mT, transpose_state_layout=True, **options)
    assert torch.equal(again, output)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gates_made_inside(function):
    tensors, state = inputs()
    raw, beta, A_log, dt_bias = (
        torch.randn(shape, dtype=torch.float64) for shape in ([2, 20, 4], [2, 20, 4], [4], [4])
    )
    made = {**tensors, "g": raw, "beta": beta}
    gates = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias, "use_beta_sigmoid_in_kernel": True}
    found, _ = function(**made, initial_state=state, allow_neg_eigval=True, **gates)
    g = -A_log.exp() * torch.nn.functional.softplus(raw + dt_bias)
    truth, _ = function(**{**tensors, "g": g, "beta": 2 * beta.sigmoid()}, initial_state=state)
    assert error(found, truth) < 1e-6


def test_packed_sequences_and_a_shared_state():
    problem = delta_problem(state="shared", lengths=[5, 9, 6], use_qk_l2norm=False)
    problem.tensors["k"] *= 0.1
    leaves = {n: x.clone().requires_grad_() for n, x in problem.tensors.items()}
    truth = type(problem)(problem.op, leaves, problem.options).run("reference").output
    grads = torch.autograd.grad(truth.square().sum(), leaves.values())
    for function in FUNCTIONS:
        found, _ = function(**leaves, cu_seqlens=problem.options["cu_seqlens"])
        for a, b in zip(torch.autograd.grad(found.square().sum(), leaves.values()), grads, strict=True):
            assert error(a, b) < 1e-10


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("dtypes", "gates"),
    [
        ({"v": torch.float16}, {"beta": torch.float16}),  # the dtypes of FLA's own tests
        ({"q": torch.bfloat16, "k": torch.bfloat16}, {"g": torch.float64}),
        ({"q": torch.bfloat16, "k": torch.float16, "v": torch.bfloat16}, {}),
    ],
    ids=["v in fp16", "q and k in bf16", "three"],
)
def test_tensors_of_several_dtypes(function, dtypes, gates):
    tensors, state = inputs()
    given = {name: x.to({**dtypes, **gates}.get(name, torch.float32)).requires_grad_() for name, x in tensors.items()}
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    found, final = function(**given, initial_state=state.float(), **options)
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    truth, expected = function(**exact, initial_state=state, **options)
    assert found.dtype == given["v"].dtype
    assert final.dtype == torch.float32
    assert error(found, truth) < (1e-6 if found.dtype == torch.float32 else 4e-3)  # computed exactly, rounded once
    assert error(final, expected) < 1e-6
    grads = torch.autograd.grad((found.float() * truth.detach().float()).sum(), given.values())
    wanted = torch.autograd.grad((truth * truth.detach()).sum(), exact.values())
    for name, grad, right in zip(given, grads, wanted, strict=True):
        assert grad.dtype == given[name].dtype
        assert error(grad, right) < 1e-2, name


def test_without_decay_and_with_full_writes():
    tensors, _ = inputs()
    plain = {"g": torch.zeros_like(tensors["g"]), "beta": torch.ones_like(tensors["beta"])}
    found, _ = fused_recurrent_gated_delta_rule(*(tensors[name] for name in "qkv"), use_qk_l2norm_in_kernel=True)
    truth, _ = chunk_gated_delta_rule(**{**tensors, **plain}, use_qk_l2norm_in_kernel=True)
    assert torch.equal(found, truth)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (chunk_gated_delta_rule, {"cp_context": object()}, "cp_context"),
        (chunk_gated_delta_rule, {"head_first": True}, "head_first"),
        (chunk_gated_delta_rule, {"use_gate_in_kernel": True}, "A_log"),
        (chunk_gated_delta_rule, {"allow_neg_eigval": True}, "use_beta_sigmoid_in_kernel"),
        (
            chunk_gated_delta_rule,
            {"initial_state": torch.zeros(1, 4, 8, 12)},
            "^chunk_g.*: initial_state must have shape",
        ),
        (fused_recurrent_gated_delta_rule, {"k": torch.zeros(2, 20, 2, 9)}, "^fused_recurrent_g.*: k must have shape"),
        (fused_recurrent_gated_delta_rule, {"gk": torch.zeros(1)}, "gk"),
        (fused_recurrent_gated_delta_rule, {"g": None, "use_gate_in_kernel": True}, "needs g"),
        (fused_recurrent_gated_delta_rule, {"state_v_first": True, "transpose_state_layout": True}, "not both"),
    ],
)
def test_refused(function, options, message):
    tensors, _ = inputs()
    with pytest.raises((ValueError, TypeError), match=message):
        function(**{**tensors, **options})


LAYER = """
import inspect
import torch
import fla.layers.gated_deltanet as layers
import fla.ops.gated_delta_rule as theirs
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from s0kernels.compat import fla as ours

for name in ours.__all__:
    a, b = (inspect.signature(getattr(module, name)).parameters.values() for module in (ours, theirs))
    assert [(p.name, p.kind, p.default) for p in a] == [(p.name, p.kind, p.default) for p in b], name

torch.manual_seed(0)
q, k = torch.randn(2, 2, 9, 4, 16).unbind()
v, g, beta = torch.randn(2, 9, 4, 24), -torch.rand(2, 9, 4), torch.rand(2, 9, 4)
k, state = 0.1 * k, torch.randn(2, 4, 16, 24)
truth, last = naive_recurrent_gated_delta_rule(q, k, v, beta, g, initial_state=state, output_final_state=True)
found, final = ours.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
assert (found - truth).abs().max() < 1e-5 and (final - last).abs().max() < 1e-5

# S0 is learned through FLA's layer: a target made with one state is met from zero
layer = layers.GatedDeltaNet(
    hidden_size=32, expand_v=1.5, head_dim=16, num_heads=1, num_v_heads=2, use_short_conv=False, use_gate=False
).requires_grad_(False)
layer.o_norm = torch.nn.RMSNorm(24)  # its own needs a GPU, to tune itself
layer.A_log.fill_(-4.0)
s0 = torch.zeros(2, 24, 16, requires_grad=True)  # [HV, V, K], as the layer has its states
layers.chunk_gated_delta_rule = lambda **call: ours.chunk_gated_delta_rule(**{**call, "initial_state": s0})
x = torch.randn(3, 10, 32)
with torch.no_grad():
    s0.copy_(torch.randn_like(s0))
    target = layer(x)[0]
    s0.zero_()
optimizer, losses = torch.optim.Adam([s0], lr=0.05), []
for _ in range(60):
    optimizer.zero_grad()
    loss = (layer(x)[0] - target).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(losses[0], losses[-1])
assert losses[-1] < 0.05 * losses[0]
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="FLA's layer is given what it needs to run on a CPU")
@pytest.mark.skipif(not FLA.is_dir(), reason="flash-linear-attention is not in .deps/fla; `make test` puts it there")
def test_fla_layer_with_an_initial_state_that_is_learned():
    done = python("-c", LAYER, path=FLA)
    assert done.returncode == 0, done.stderr[-3000:]
