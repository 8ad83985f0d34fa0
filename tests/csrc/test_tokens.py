"""The one-token kernels on the host: in blocks of a GPU, and in the `cpu` backend. The blocks run warp after warp,
first to last or last to first, up to each barrier. Shared memory is filled with NaN, so a missing barrier is found."""

from functools import partial

import pytest
import torch
from cases import MAKERS, NO_CPU_KERNELS, error, options_of, token
from emulated_blocks import every_way, operators
from mixers import OPS, ROUNDING, SHAPES, STEPS, double, every_dtype, every_finish, mixer, to

from s0kernels.backends import tokens
from s0kernels.calls import (
    DeltaInputs,
    DeltaMixerInputs,
    DeltaMixerOptions,
    DeltaOptions,
    MixerPool,
    Pool,
    SSDInputs,
    SSDMixerInputs,
    SSDMixerOptions,
    SSDOptions,
)
from s0kernels.ops import gated_delta_rule_step_reference, ssd_step_reference

pytestmark = pytest.mark.skipif(NO_CPU_KERNELS is not None, reason=f"backend cpu {NO_CPU_KERNELS}")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def run(op, inputs, way, **options):
    more = {"dt_limit": (0.1, 1.5), "gate_first": False} if op == "ssd" else {"allow_neg_eigval": False}
    options = {"eps": 1e-6, "state_indices": None, **more, **options}
    if way is None:
        return STEPS[op][0](**inputs, **options)
    inputs, indices = dict(inputs), options.pop("state_indices")
    pool = MixerPool(inputs.pop("window"), inputs.pop("state"), indices)
    if op == "ssd":
        inputs, options = (
            SSDMixerInputs(**inputs),
            SSDMixerOptions(options["eps"], options["gate_first"], *options["dt_limit"]),
        )
    else:
        inputs, options = DeltaMixerInputs(**inputs), DeltaMixerOptions(**options)
    return STEPS[op][1](operators(way), inputs, pool, options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES)
@every_way
def test_a_step_is_the_recurrence(op, shape, way):
    each, groups, first, second = SHAPES[shape]
    sizes = {"H": groups, "HV": each * groups, "K": first, "V": second}
    if op == "ssd":
        sizes = {"H": each * groups, "G": groups, "P": first, "N": second}
    problem = MAKERS[op](1, B=2, state="each", **sizes)
    exact = token(problem, 0)
    truth_state = problem.tensors["initial_state"].clone()
    pool, inputs = Pool(truth_state.float()), {n: x.float() for n, x in exact.items()}
    if op == "gated_delta_rule":
        truth = gated_delta_rule_step_reference(**exact, state=truth_state, scale=0.3, use_qk_l2norm=True)
        found = tokens.gated_delta_rule_step(operators(way), DeltaInputs(**inputs), pool, DeltaOptions(0.3, True))
    else:
        truth = ssd_step_reference(**exact, state=truth_state, **options_of(problem))
        options = SSDOptions(True, *problem.options["dt_limit"])
        found = tokens.ssd_step(operators(way), SSDInputs(**inputs), pool, options)
    assert error(found, truth) < 1e-6
    assert error(pool.state, truth_state) < 1e-6


@every_finish
@pytest.mark.parametrize("shape", SHAPES)
@every_way
@torch.no_grad()
def test_a_mixer_step_is_its_parts(op, finish, shape, way):
    inputs, options = mixer(op, shape), {n: x for n, x in finish.items() if n != "norm"}
    inputs |= {n: x for n, x in finish.items() if n == "norm"}
    single = to(inputs, torch.float32)
    inputs = double(single)
    for _ in range(3):  # windows and states continue
        truth, found = run(op, inputs, None, **options), run(op, single, way, **options)
        assert error(found, truth) < 3e-6
    assert torch.equal(single["window"].double(), inputs["window"])
    assert error(single["state"], inputs["state"]) < 1e-6


@every_way
def test_a_token_at_beta_two_is_undone_by_itself(way):
    """Without decay and value it reverses the state's component along its key."""
    inputs = mixer("gated_delta_rule", "OLMo-Hybrid", width=1)
    values = inputs["z"][0].numel()
    inputs["mixed"][:, -values:] = inputs["conv_bias"][-values:] = 0
    inputs |= {"b": inputs["b"] * 0 + 100, "A_log": inputs["A_log"] * 0 - torch.inf}
    for given in (inputs, to(inputs, torch.float32)):
        way_of = None if given is inputs else way
        before = given["state"].clone()
        run("gated_delta_rule", given, way_of, allow_neg_eigval=True)
        assert error(given["state"].square().sum((2, 3)), before.square().sum((2, 3))) < 1e-6
        assert error(given["state"], before) > 0.1
        run("gated_delta_rule", given, way_of, allow_neg_eigval=True)
        assert error(given["state"], before) < 1e-6


@every_finish
@every_dtype
@every_way
def test_a_mixer_step_rounds_once(op, finish, dtype, way):
    """Inputs (and the output), parameters and windows may have any dtype each."""
    inputs, options = mixer(op, "Bamba"), {n: x for n, x in finish.items() if n != "norm"}
    rounded = to(inputs | {n: x for n, x in finish.items() if n == "norm"}, dtype)
    rounded["conv_weight"] = rounded["conv_weight"].half()
    rounded["window"] = rounded["window"].bfloat16()
    exact = double(rounded)
    truth, found = run(op, exact, None, **options), run(op, rounded, way, **options)
    assert found.dtype == dtype
    twice = 2 if finish.get("norm", True) is not None and op == "ssd" else 1  # the input of the norm was rounded too
    assert error(found, truth) < twice * ROUNDING[dtype]
    assert error(rounded["state"], exact["state"]) < 1e-6
    assert torch.equal(rounded["window"], exact["window"].bfloat16())


@every_finish
@every_way
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_a_pool_changes_only_where_addressed(op, finish, kind, way):
    """-1 starts from zero and stores nothing. An index out of range gives NaN and changes nothing."""
    rows = torch.tensor([4, -1, 2, 5, -2, 2**31 - 1], dtype=kind)
    inputs, options = mixer(op, "three", rows=6, pool=5), {n: x for n, x in finish.items() if n != "norm"}
    single = to(inputs | {n: x for n, x in finish.items() if n == "norm"}, torch.float32)
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in (single["window"], single["state"].mT.contiguous().mT)]
    single |= {"window": strided[0], "state": strided[1]}
    before = {n: single[n].clone() for n in ("window", "state")}
    found = run(op, single, way, state_indices=rows, **options)
    assert found[3:].isnan().all()

    good = [0, 1, 2]
    exact = {n: x if x is None else x.double() for n, x in {**single, **before}.items()}
    exact |= {n: exact[n][good] for n in ("mixed", "z", "b", "a", "gate", "dt") if n in exact}
    truth = run(op, exact, None, state_indices=rows[good], **options)
    assert error(found[good], truth) < 3e-6
    for name in before:
        assert error(single[name][[4, 2]], exact[name][[4, 2]]) < 1e-6
        assert torch.equal(single[name][[0, 1, 3]], before[name][[0, 1, 3]])


@every_finish
@every_way
def test_inputs_of_any_strides_give_the_same_bits(op, finish, way):
    inputs = to(mixer(op, "odd") | {n: x for n, x in finish.items() if n == "norm"}, torch.float32)
    options = {n: x for n, x in finish.items() if n != "norm"}
    spaced = {n: x if x is None else torch.stack([x, x], dim=-1)[..., 0] for n, x in inputs.items()}
    assert torch.equal(run(op, inputs, way, **options), run(op, spaced, way, **options))
    assert torch.equal(inputs["state"], spaced["state"])
    assert torch.equal(inputs["window"], spaced["window"])


@pytest.mark.parametrize("op", OPS)
@every_way
def test_states_at_any_address_give_the_same_bits(op, way):
    """The address of a state need not be a multiple of 16 bytes."""
    inputs = to(mixer(op, "Qwen3.5-4B"), torch.float32)
    state = inputs["state"]
    moved = torch.zeros(state.numel() + 1)[1:].view(state.shape).copy_(state)
    assert moved.data_ptr() % 16
    found = run(op, {**inputs, "window": inputs["window"].clone(), "state": moved}, way)
    assert error(found, run(op, inputs, way)) < 1e-6
    assert error(moved, state) < 1e-6


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("width", [1, 2, 8])
@every_way
def test_windows_of_any_width(op, width, way):
    single = to(mixer(op, "three", width=width) | {"conv_bias": None}, torch.float32)
    exact = double(single)
    assert error(run(op, single, way), run(op, exact, None)) < 3e-6
    assert torch.equal(single["window"].double(), exact["window"])


@pytest.mark.parametrize("op", OPS)
@every_way
def test_extremes_are_what_the_reference_makes_of_them(op, way):
    """Gates are extreme on both sides, so that exp overflows."""
    inputs = mixer(op, "three")
    for name in ("z", "b", "a", "gate", "dt"):
        if name in inputs:
            inputs[name] = 1e4 * inputs[name].sign()
    single = to(inputs, torch.float32)
    exact = double(single)
    assert error(run(op, single, way), run(op, exact, None)) < 3e-6
    assert single["state"].isfinite().all()


@pytest.mark.parametrize("op", OPS)
@every_way
def test_an_empty_batch(op, way):
    assert run(op, to(mixer(op, "three", rows=0), torch.float32), way).shape[0] == 0


@pytest.mark.parametrize("op", OPS)
def test_the_operators_refuse_what_memory_safety_needs(op):
    inputs = to(mixer(op, "three"), torch.float32)
    for change in (
        {"window": inputs["window"][:2]},
        {"state": inputs["state"][:2]},
        {"mixed": inputs["mixed"][:, :-2]},
        {"norm": inputs["norm"][:-1]},
    ):
        with pytest.raises(RuntimeError, match=r"s0kernels|shape|size|length"):
            run(op, inputs | change, "whole heads")


# The public ops


@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_ops_choose_and_validate(op):
    public = partial(STEPS[op][2], eps=1e-6)
    inputs = to(mixer(op, "three"), torch.float32)
    exact = double(inputs)
    assert error(public(**inputs), public(**exact)) < 3e-6  # fp64 uses the reference
    for change, message in (
        ({"window": inputs["window"][..., :1].expand_as(inputs["window"])}, "window is written in place"),
        ({"mixed": inputs["mixed"][:, 1:], "conv_bias": None}, "conv_weight must have shape"),
        ({"A_log": inputs["A_log"].double()}, "A_log must have dtype"),
        ({"state": inputs["state"].half()}, "state must have dtype"),
        ({"state_indices": torch.tensor([0, 0, 1])}, "twice"),
        ({"state_indices": torch.tensor([0, 3, 1])}, r"\[-1, 2\]"),
        ({"backend": "torch"}, f"backend 'torch' cannot run this call: has no {'gated_delta' if op != 'ssd' else op}"),
        ({"backend": "cuda"}, "not on cpu"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            public(**{**inputs, **change})
    if op == "gated_delta_rule":
        with pytest.raises(TypeError, match="allow_neg_eigval must be True or False, got 2"):
            public(**inputs, allow_neg_eigval=2)
    wide = to(mixer(op, "three", width=9), torch.float32)
    with pytest.raises(ValueError, match="convolutions of up to 8, got 9"):
        public(**wide, backend="cpu")
    assert public(**wide).isfinite().all()
    with torch.enable_grad(), pytest.raises(ValueError, match="norm requires grad"):
        public(**{**inputs, "norm": inputs["norm"].clone().requires_grad_()})


@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_ops_compile_in_one_graph(op):
    calls = [to(mixer(op, "three"), torch.float32) for _ in range(2)]

    def call(inputs):
        return STEPS[op][2](**inputs, eps=1e-6) + 1

    found = torch.compile(call, fullgraph=True, backend="aot_eager")(calls[0])
    assert torch.equal(found, call(calls[1]))
    for name in ("window", "state"):
        assert torch.equal(calls[0][name], calls[1][name])
