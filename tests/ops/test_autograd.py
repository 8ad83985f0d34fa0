"""Autograd: writes in place, derivatives other than a single backward, and sizes of zero."""

import copy

import pytest
import torch
from cases import BACKENDS, MAKERS, options_of, step, token
from mixers import mixer
from models import MODELS, cached, random_states, tokens
from torch.autograd import forward_ad
from transformers import DynamicCache

from s0kernels import swap_modules
from s0kernels.ops.mixer_steps import gated_delta_mixer_step, ssd_mixer_step

OPS = sorted(MAKERS)
INTERPRETED = pytest.param(
    "triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without GPU")
)
every_backend = pytest.mark.parametrize("backend", [*BACKENDS, INTERPRETED])
every_op = pytest.mark.parametrize("op", OPS)


def saved_by_a_graph(x):
    """Return a loss whose backward needs the current value of x."""
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


SMALL = {"gated_delta_rule": {"H": 1, "HV": 1, "K": 2, "V": 3}, "ssd": {"P": 2, "H": 1, "G": 1, "N": 3}}
COMPILED = [*BACKENDS[:2], INTERPRETED]


def dual(f, x, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction))).tangent


def dual_gradient(f, x, direction):
    """Only the backward sees a tangent."""
    x = x.clone().requires_grad_()
    y = f(x)
    with forward_ad.dual_level():
        grad = torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))[0]
        return forward_ad.unpack_dual(grad).tangent


def twice(f, x, direction):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0]


def batched(f, x, direction):
    x = x.clone().requires_grad_()
    y = f(x)
    return torch.autograd.grad(y, x, torch.stack([torch.ones_like(y), y.detach()]), is_grads_batched=True)[0]


def ensemble(f, x, direction):
    """vmap over inputs that depend on a parameter."""
    scale = torch.ones((), dtype=x.dtype).requires_grad_()
    y = torch.func.vmap(lambda each: f(each * scale))(torch.stack([x, 2 * x]))
    return torch.autograd.grad(y.sum(), scale)[0]


DERIVATIVES = {
    "jvp": lambda f, x, direction: torch.func.jvp(f, (x,), (direction,))[1],
    "dual numbers": dual,
    "dual numbers in the backward": dual_gradient,
    "grad": lambda f, x, direction: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x, direction: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "vmap": lambda f, x, direction: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "vmap beside a gradient": ensemble,
    "jacrev": lambda f, x, direction: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x, direction: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x, direction: torch.func.hessian(lambda x: f(x).square().sum())(x),
    "create_graph": twice,
    "is_grads_batched": batched,
}
#: transforms that are applied after a compiled forward, so that they are refused with or without a named backend
AFTERWARDS = ("dual numbers in the backward", "create_graph", "is_grads_batched")


def differentiate(how, op, backend, dtype=torch.float64):
    """Compute a derivative of a small scan with respect to one input and to its state."""
    problem = MAKERS[op](3, B=1, state="each", **SMALL[op]).to(dtype)
    for name in ("v" if op == "gated_delta_rule" else "x", "initial_state"):
        x = problem.tensors[name]
        yield DERIVATIVES[how](lambda x, name=name: problem.run(backend, **{name: x}).output, x, torch.ones_like(x))


@every_op
@pytest.mark.parametrize("how", DERIVATIVES)
def test_every_derivative_is_right_where_no_backend_is_named(op, how):
    truth = list(differentiate(how, op, "reference"))
    assert all(x.abs().max() > 0 for x in truth)
    if how in AFTERWARDS:
        with pytest.raises(NotImplementedError, match=f"{op}: .*reference"):
            list(differentiate(how, op, None))
        return
    for found, expected in zip(differentiate(how, op, None), truth, strict=True):
        torch.testing.assert_close(found, expected)


@every_op
@pytest.mark.parametrize("how", DERIVATIVES)
@pytest.mark.parametrize("backend", COMPILED)
def test_a_named_backend_is_right_or_says_what_it_does_not_support(op, how, backend):
    if "vmap" in how:
        dtype = torch.float32 if backend == "triton" else torch.float64
        for found, truth in zip(
            differentiate(how, op, backend, dtype), differentiate(how, op, "reference"), strict=True
        ):
            torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=1e-5)
        return
    with pytest.raises(NotImplementedError, match=f"{op}: .*not support.*reference"):
        list(differentiate(how, op, backend, torch.float32))


@every_op
@every_backend
def test_steps_refuse_tangents_and_transforms(op, backend):
    problem = MAKERS[op](1, B=2, state="each").to(torch.float32)
    inputs, state, options = token(problem, 0), problem.tensors["initial_state"], options_of(problem)
    name = "v" if op == "gated_delta_rule" else "x"

    def run(x):
        return step(op, {**inputs, name: x}, state, backend=backend, **options)

    before = state.clone()
    for transform in (dual, DERIVATIVES["jvp"]):
        with pytest.raises(NotImplementedError, match=f"{op}_step: .*not supported"):
            transform(run, inputs[name], torch.ones_like(inputs[name]))
    with pytest.raises(ValueError, match=f"{op}_step: {name} requires grad"):
        torch.func.grad(lambda x: run(x).sum())(inputs[name])
    assert torch.equal(state, before)
    with forward_ad.dual_level():  # these tensors take no part in it
        run(inputs[name])
    assert not torch.equal(state, before)


@pytest.mark.slow
@every_op
def test_a_compiled_transform_is_the_transform(op):
    problem = MAKERS[op](3, state="each", **SMALL[op])
    name = "v" if op == "gated_delta_rule" else "x"
    x = problem.tensors[name]

    def tangent(x):
        return torch.func.jvp(lambda x: problem.run(None, **{name: x}).output, (x,), (torch.ones_like(x),))[1]

    def gradient(x):
        return torch.func.grad(lambda x: problem.run(None, **{name: x}).output.square().sum())(x)

    for each in (tangent, gradient):
        torch.testing.assert_close(torch.compile(each, backend="aot_eager")(x), each(x))


@pytest.mark.parametrize("name", ["qwen", "falcon"])
def test_tangents_go_through_a_whole_model(name):
    """Compare a prefill from S0 and a token after it with finite differences."""
    model = MODELS[name]().double()
    model.set_attn_implementation("eager")  # other attention functions have no forward mode on a CPU
    states = random_states(swap_modules(model)).requires_grad_(False)
    states.attach(model)
    model.requires_grad_(False)
    prompt, following = (model.get_input_embeddings()(ids).detach() for ids in tokens(1, 9).split([8, 1], 1))
    cache = DynamicCache(config=model.config.get_text_config())
    model(inputs_embeds=prompt, **cached(model, cache))

    def after(x):
        return model(inputs_embeds=x, **cached(model, copy.deepcopy(cache))).logits

    for f, x in ((lambda x: model(inputs_embeds=x).logits, prompt), (after, following)):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        differences = (f(x + 1e-5 * direction) - f(x - 1e-5 * direction)) / 2e-5
        for transform in (dual, DERIVATIVES["jvp"]):
            found = transform(f, x, direction)
            assert (found - differences).norm() < 5e-3 * differences.norm()  # parts of the models are in fp32


@every_op
@every_backend
@pytest.mark.parametrize("lengths", [None, [0, 3, 0, 2]], ids=["dense", "packed"])
@pytest.mark.parametrize("empty", ["T", "B", "first", "second", "both"])
def test_sizes_of_zero(op, backend, empty, lengths, poisoned):
    """`first` and `second` are K and V, or P and N. All outputs are written."""
    first, second = ("K", "V") if op == "gated_delta_rule" else ("P", "N")
    sizes = {"T": 5, "B": 2, first: 3, second: 5}
    sizes |= dict.fromkeys({"first": [first], "second": [second], "both": [first, second]}.get(empty, [empty]), 0)
    if lengths and empty in ("T", "B"):
        lengths = [0, 0] if empty == "T" else []
    problem = MAKERS[op](sizes.pop("T"), state="shared" if empty == "B" else "each", lengths=lengths, **sizes)
    problem = problem.to(torch.float32 if backend == "triton" else torch.float64)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in problem.run("reference")]
    truth, found = (problem.gradients(name, tuple(weights)) for name in ("reference", backend))
    for name, expected in truth.items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)


@every_op
@every_backend
@pytest.mark.parametrize("empty", ["first", "second"])
def test_steps_of_size_zero(op, backend, empty, poisoned):
    first, second = ("K", "V") if op == "gated_delta_rule" else ("P", "N")
    problem = MAKERS[op](1, state="each", **{first if empty == "first" else second: 0}).to(torch.float32)
    inputs, state, options = token(problem, 0), problem.tensors["initial_state"], options_of(problem)
    truth = step(op, inputs, state.clone(), backend="reference", **options)
    torch.testing.assert_close(step(op, inputs, state.clone(), backend=backend, **options), truth)


@every_op
def test_a_mixers_step_needs_sizes(op):
    inputs = {name: x.float() for name, x in mixer(op, "odd").items()}
    heads, first, second = inputs["state"].shape[1:]
    inputs["state"] = inputs["state"].new_zeros(3, heads, *((0, second) if op == "gated_delta_rule" else (first, 0)))
    call = gated_delta_mixer_step if op == "gated_delta_rule" else ssd_mixer_step
    with pytest.raises(ValueError, match=r"mixed must have .* channels"):
        call(**inputs, eps=1e-6)
