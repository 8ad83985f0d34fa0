"""Bad calls are refused before anything runs, and the message names the argument."""

import pytest
import torch
from cases import MAKERS, Problem, options_of, step, token

from s0kernels.ops import Call, explain, registry

INF = float("inf")


def wider(name):
    return lambda p: {name: torch.cat([p.tensors[name], p.tensors[name]], dim=-1)}


def cast(name, dtype):
    return lambda p: {name: p.tensors[name].to(dtype)}


def meta(name):
    return lambda p: {name: p.tensors[name].to("meta")}


def given(**changes):
    return lambda p: changes


def indexed(rows, size=3, dtype=torch.int64):
    def change(p):
        state = p.tensors["initial_state"]
        return {"initial_state": state.expand(size, *state.shape), "state_indices": torch.tensor(rows, dtype=dtype)}

    return change


def packed(ends, dtype=torch.int64):
    """Join the rows of the dense batch into one row of 2 * T tokens, with boundaries at `ends`."""

    def change(p):
        rows = {n: x.flatten(0, 1)[None] for n, x in p.tensors.items() if x.dim() > 2 and n != "initial_state"}
        return {**rows, "cu_seqlens": torch.tensor(ends, dtype=dtype)}

    return change


SHARED = [
    (given(initial_state=[1.0]), TypeError, "initial_state"),
    (cast("initial_state", torch.bfloat16), TypeError, "initial_state"),
    (cast("initial_state", torch.float64), TypeError, "initial_state"),
    (meta("initial_state"), ValueError, "initial_state"),
    (wider("initial_state"), ValueError, "initial_state"),
    (lambda p: {"initial_state": p.tensors["initial_state"][None]}, ValueError, "initial_state.*NSEQ=2"),
    (lambda p: {"initial_state": p.tensors["initial_state"].expand(3, -1, -1, -1)}, ValueError, "initial_state"),
    (lambda p: {"initial_state": p.tensors["initial_state"].mT}, ValueError, "initial_state"),
    (given(initial_state=None, state_indices=torch.tensor([0, 0])), ValueError, "state_indices"),
    (given(state_indices=torch.tensor([0, 0])), ValueError, "initial_state"),
    (indexed([0, 1, 2]), ValueError, "state_indices"),
    (indexed([0, 3]), ValueError, "state_indices"),
    (indexed([0, -2]), ValueError, "state_indices"),
    (indexed([0.0, 1.0], dtype=torch.float32), TypeError, "state_indices"),
    (indexed([[0], [1]]), ValueError, "state_indices"),
    (given(cu_seqlens=torch.tensor([0, 9])), ValueError, "cu_seqlens.*B=2"),
    (packed([0, 9, 18], torch.float32), TypeError, "cu_seqlens"),
    (packed([1, 18]), ValueError, "cu_seqlens"),
    (packed([0, 17]), ValueError, "cu_seqlens"),
    (packed([0, 12, 9, 18]), ValueError, "cu_seqlens"),
    (packed([[0, 18]]), ValueError, "cu_seqlens"),
    (packed([]), ValueError, "cu_seqlens"),
    (given(chunk_size=0), ValueError, "chunk_size"),
    (given(chunk_size=-64), ValueError, "chunk_size"),
    (given(chunk_size=64.0), TypeError, "chunk_size"),
    (given(chunk_size=True), TypeError, "chunk_size"),
    (given(output_final_state=1), TypeError, "output_final_state"),
    (given(backend="cuda9"), ValueError, "backend.*torch.*reference"),
]
DELTA = [
    (given(q=None), TypeError, "q "),
    (lambda p: {"q": p.tensors["q"].int()}, TypeError, "q "),
    (lambda p: {"q": p.tensors["q"][0]}, ValueError, "q "),
    (cast("k", torch.float16), TypeError, "k "),
    (wider("k"), ValueError, "k "),
    (lambda p: {"k": p.tensors["k"][:, 1:]}, ValueError, "k "),
    (cast("v", torch.bfloat16), TypeError, "v "),
    (lambda p: {"v": p.tensors["v"][:, :, :3]}, ValueError, "v .*HV=3"),
    (cast("g", torch.float64), TypeError, "g "),
    (meta("g"), ValueError, "g "),
    (lambda p: {"g": p.tensors["g"][..., None]}, ValueError, "g "),
    (cast("beta", torch.float16), TypeError, "beta "),
    (wider("beta"), ValueError, "beta "),
    (given(scale="1"), TypeError, "scale"),
    (given(scale=INF), ValueError, "scale"),
    (given(use_qk_l2norm=None), TypeError, "use_qk_l2norm"),
]
SSD = [
    (given(x=1.0), TypeError, "x "),
    (lambda p: {"x": p.tensors["x"].long()}, TypeError, "x "),
    (cast("dt", torch.float64), TypeError, "dt "),
    (wider("dt"), ValueError, "dt "),
    (cast("A", torch.bfloat16), TypeError, "A "),
    (lambda p: {"A": p.tensors["A"][:2]}, ValueError, "A "),
    (cast("B", torch.float16), TypeError, "B "),
    (lambda p: {"B": p.tensors["B"].repeat(1, 1, 2, 1)[:, :, :3]}, ValueError, "G=3"),
    (wider("C"), ValueError, "C "),
    (lambda p: {"C": p.tensors["C"][:, :, :1]}, ValueError, "C "),
    (wider("D"), ValueError, "D "),
    (wider("z"), ValueError, "z "),
    (meta("z"), ValueError, "z "),
    (cast("dt_bias", torch.float16), TypeError, "dt_bias"),
    (given(dt_softplus="yes"), TypeError, "dt_softplus"),
    (given(dt_limit=0.1), TypeError, "dt_limit"),
    (given(dt_limit=(1.0, 0.1)), ValueError, "dt_limit"),
    (given(dt_limit=(0.0, None)), TypeError, "dt_limit"),
    (given(dt_limit=(float("nan"), 1.0)), ValueError, "dt_limit"),
]
CASES = [(op, *case) for op, own in (("gated_delta_rule", DELTA), ("ssd", SSD)) for case in own + SHARED]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("op", "change", "kind", "message"), CASES)
def test_scan_refuses(op, change, kind, message, backend):
    problem = MAKERS[op](9).to(torch.float32)
    with pytest.raises(kind, match=message):
        problem.run(**{"backend": backend, **change(problem)})


@pytest.mark.parametrize("op", sorted(MAKERS))
def test_mixed_dtypes_as_autocast_leaves_them_are_fine(op):
    for scalars in (torch.bfloat16, torch.float32):
        problem = MAKERS[op](9).to(torch.bfloat16, scalars)
        assert problem.run(None).output.dtype == torch.bfloat16
        assert problem.run(None).final_state.dtype == torch.float32


@pytest.mark.parametrize("op", sorted(MAKERS))
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda s: s[:1], ValueError),
        (lambda s: s[0], ValueError),
        (lambda s: s.double(), TypeError),
        (lambda s: s.to("meta"), ValueError),
        (lambda s: s.mT, ValueError),
        (lambda s: None, TypeError),
    ],
)
def test_step_refuses_a_bad_state(op, change, kind):
    problem: Problem = MAKERS[op](1, state="each").to(torch.float32)
    with pytest.raises(kind, match="state must"):
        step(op, token(problem, 0), change(problem.tensors["initial_state"]), **options_of(problem))


@pytest.mark.parametrize("op", sorted(MAKERS))
def test_the_shape_wanted_is_spelled_out(op):
    problem = MAKERS[op](9).to(torch.float32)
    with pytest.raises(ValueError, match=r"shape \[HV?=4, .*\(shared\), \[NSEQ=2, .*, got \[2, 3\]"):
        problem.run(None, initial_state=torch.zeros(2, 3))


@pytest.mark.parametrize("op", registry.OPS)
def test_explain_says_what_happens(op):
    """The first backend without a reason is the default. A backend with a reason is refused with that reason."""
    call = Call(op, torch.device("cpu"), torch.float32)
    found = explain(call)
    assert list(found) == list(registry.ORDER)
    assert next(name for name, reason in found.items() if reason is None) == registry.choose(None, *call)
    assert found["reference"] is None
    assert "GPU" in found["cuda"] or "has no" in found["cuda"]
    with pytest.raises(ValueError, match=f"{op}: backend 'cuda' cannot run this call"):
        registry.choose("cuda", *call)
