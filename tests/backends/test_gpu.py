"""The contract on a CUDA device: `pytest -m gpu`."""

import contextlib

import pytest
import torch
from cases import (
    FAMILIES,
    MAKERS,
    Problem,
    assert_nearly_equal_keys_are_survived,
    delta_problem,
    error,
    options_of,
    step,
    token,
)
from models import MODELS, random_states, tokens

from s0kernels import heads, swap_modules
from s0kernels.calls import Call
from s0kernels.ops import recompute, registry

pytestmark = pytest.mark.gpu
OPS = sorted(MAKERS)
BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(problem):
    def move(values):
        return {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in values.items()}

    return type(problem)(problem.op, move(problem.tensors), move(problem.options))


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def needs(backend, op, dtype=torch.float32):
    if reason := registry.unusable(backend, Call(op, torch.device("cuda"), dtype)):
        pytest.skip(f"backend {backend} {reason}")


def assert_within_budget(problem, backend, weights=None) -> None:
    """Compare with fp64 on the same inputs; two runs must have the same bits. In Triton operands of matrix products
    have the dtype of the inputs, so their rounding affects fp32 results too."""
    weights = problem.weights() if weights is None else weights
    truth = problem.to(torch.float64).gradients("reference", weights)
    plain, chunked = (problem.gradients(name, weights) for name in ("reference", "torch"))
    weights = [weight.cuda() for weight in weights]
    found, again = (on_gpu(problem).gradients(backend, weights) for _ in range(2))
    rounding = torch.finfo(next(iter(problem.tensors.values())).dtype).eps
    for name in truth:
        theirs = max(error(plain[name], truth[name]), error(chunked[name], truth[name]))
        eps = rounding if backend == "triton" else torch.finfo(plain[name].dtype).eps
        assert error(found[name].cpu(), truth[name]) <= 2 * theirs + eps, name
        assert torch.equal(found[name], again[name]), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", [None, "shared", "each", "bank"])
@pytest.mark.parametrize("lengths", [None, [5, 0, 130, 1]], ids=["dense", "packed"])
def test_scan_is_within_the_error_budget_and_repeats_its_bits(op, backend, dtype, state, lengths, poisoned):
    needs(backend, op)
    problem = MAKERS[op](200, B=4, state=state, lengths=lengths).to(dtype, torch.float32)
    assert_within_budget(problem, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", ["fused", "split"])
@pytest.mark.parametrize("lengths", [None, [5, 0, 130, 1]], ids=["dense", "packed"])
def test_recomputing_gives_the_bits_of_what_was_kept(dtype, schedule, lengths, monkeypatch, poisoned):
    monkeypatch.setenv("S0KERNELS_TRITON_SCHEDULE", schedule)
    problem = MAKERS["gated_delta_rule"](200, B=4, K=64, V=128, state="bank", lengths=lengths)
    problem = problem.to(dtype, torch.float32)
    weights = [weight.cuda() for weight in problem.weights()]
    kept = on_gpu(problem).gradients("triton", weights)
    with recompute():
        again = on_gpu(problem).gradients("triton", weights)
    for name, value in kept.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [{}, {"H": 2, "HV": 2, "K": 96, "V": 192}], ids=["small", "OLMo-Hybrid"])
def test_nearly_equal_keys_are_survived(dtype, backend, sizes, poisoned):
    needs(backend, "gated_delta_rule")

    def run(problem, weights):
        return on_gpu(problem).gradients(backend, [weight.cuda() for weight in weights])

    assert_nearly_equal_keys_are_survived(dtype, run, **sizes)


def few_heads(model: str) -> tuple[str, dict[str, int]]:
    """Return (op, sizes) with fewer heads of a model's sizes."""
    op, sizes = heads.MODELS[model]
    if op == "gated_delta_rule":
        return op, sizes | {"H": 2, "HV": 2 * sizes["HV"] // sizes["H"]}
    groups = min(sizes["G"], 4)
    return op, sizes | {"G": groups, "H": max(4, 2 * groups)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("model", "schedule"),
    [(model, how) for model in ("qwen3.5-4b", "olmo-hybrid") for how in ("fused", "split")]
    + [(model, None) for model in ("falcon-h1-7b", "falcon-h1-34b", "falcon-h1-0.5b", "nemotron-h")],
)
@pytest.mark.parametrize("time_major", [False, True], ids=["token-major", "channel-first"])
def test_heads_of_models(dtype, schedule, model, time_major, monkeypatch, poisoned):
    """Inputs are in the layouts of projections and of transformers' convolution."""
    if schedule is not None:
        monkeypatch.setenv("S0KERNELS_TRITON_SCHEDULE", schedule)
    op, sizes = few_heads(model)
    problem = MAKERS[op](150, B=2, **sizes, state="bank").to(dtype, torch.float32)
    if time_major:
        for name in {"gated_delta_rule": "qkv", "ssd": "xBC"}[op]:
            problem.tensors[name] = problem.tensors[name].movedim(1, -1).contiguous().movedim(-1, 1)
    assert_within_budget(problem, "triton")


@pytest.mark.parametrize("model", FAMILIES)
def test_a_scan_with_the_heads_of_every_family(model, poisoned):
    """Forward and backward, with all heads of a layer."""
    op, sizes = heads.MODELS[model]
    needs("triton", op)
    problem = MAKERS[op](66, B=1, **sizes)
    if model == "olmo-hybrid":
        problem.tensors["beta"] *= 2
    assert_within_budget(problem.to(torch.bfloat16, torch.float32), "triton")


#: B, T, H, HV, D of flash-linear-attention's own test; there from a zero state
FLA_CASES = [
    (2, 75, 4, 4, 64),
    (2, 500, 3, 3, 60),
    (2, 1000, 3, 3, 64),
    (3, 1024, 4, 4, 100),
    (2, 256, 2, 4, 64),
    (2, 512, 2, 8, 64),
    (2, 1024, 4, 8, 128),
]


@pytest.mark.parametrize(("B", "T", "H", "HV", "D"), FLA_CASES)
def test_the_cases_of_flash_linear_attention(B, T, H, HV, D, poisoned):
    problem = delta_problem(T, B=B, H=H, HV=HV, K=D, V=D, state="each").to(torch.float16, torch.float32)
    weights = problem.weights()
    truth = problem.to(torch.float64).gradients("torch", weights)
    found = on_gpu(problem).gradients("triton", [weight.cuda() for weight in weights])
    tolerances = {"output": 0.005, "final_state": 0.005, "dg": 0.02, "dbeta": 0.02}
    for name in truth:
        assert error(found[name].cpu(), truth[name]) < tolerances.get(name, 0.008), name


def delta_inputs(T: int, H: int = 4, D: int = 128) -> dict:
    q, k, v = (torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return {"q": q, "k": k, "v": v, "g": torch.full((1, T, H), -0.5, device="cuda"), "beta": torch.rand(1, T, H).cuda()}


def ssd_inputs(T: int, H: int = 8, P: int = 128, N: int = 64) -> dict:
    x = torch.randn(1, T, H, P, device="cuda", dtype=torch.bfloat16)
    B, C = (torch.randn(1, T, 1, N, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    dt, A = torch.full((1, T, H), 0.5, device="cuda"), torch.full((H,), -1.0, device="cuda")
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C}


@pytest.mark.parametrize(
    ("op", "make", "width", "options"),
    [("gated_delta_rule", delta_inputs, 4 * 128, {"use_qk_l2norm": True}), ("ssd", ssd_inputs, 8 * 128, {})],
)
def test_more_than_two_to_the_31_elements(op, make, width, options, poisoned):
    """The end of a long sequence after a decay that forgets the rest: alone and after the rest it gives the same
    results."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of memory")
    whole = make(2**31 // width + 1000)
    end = {name: x[:, -640:] if x.dim() > 1 else x for name, x in whole.items()}
    found, alone = (Problem(op, x, options).run("triton").output[:, -100:] for x in (whole, end))
    assert error(found, alone) < 0.01


@pytest.mark.parametrize("graph", ["CUDA graph", "torch.compile"])
def test_captured(graph):
    problem = on_gpu(delta_problem(100, B=2, K=64, V=64, state="bank").to(torch.bfloat16, torch.float32))
    truth = problem.run("triton")
    if graph == "torch.compile":
        found = torch.compile(lambda: problem.run("triton"), fullgraph=True)()
    else:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            found = problem.run("triton")
        recorded.replay()
    assert torch.equal(found.output, truth.output)
    assert torch.equal(found.final_state, truth.final_state)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one():
    problem = delta_problem(100, B=2, K=64, V=64).to(torch.bfloat16, torch.float32)
    truth = on_gpu(problem).run("triton")
    found = type(problem)(problem.op, {n: x.to("cuda:1") for n, x in problem.tensors.items()}, problem.options)
    assert torch.equal(found.run("triton").output.cpu(), truth.output.cpu())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "lengths"), [("torch", None), ("triton", None), ("triton", [40, 0, 60])])
@pytest.mark.parametrize("state", ["shared", "bank"])
def test_scan_does_not_synchronise(op, backend, lengths, state):
    """The torch backend reads packed boundaries on the host."""
    needs(backend, op)
    problem = on_gpu(MAKERS[op](100, B=4, state=state, lengths=lengths).to(torch.bfloat16, torch.float32))
    leaves = {n: x.requires_grad_() for n, x in problem.tensors.items()}

    def run():
        result = type(problem)(op, leaves, problem.options).run(backend)
        result.output.sum().backward()

    run()
    with no_synchronisation():
        run()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step(op, backend, dtype):
    needs(backend, f"{op}_step")
    problem = MAKERS[op](1, B=3, state=None).to(dtype, torch.float32)
    shape = problem.run("torch").final_state.shape[1:]
    pool, rows = torch.randn(5, *shape), torch.tensor([4, -1, 2], dtype=torch.int32)
    moved, inputs = pool.cuda(), token(on_gpu(problem), 0)
    truth = step(op, token(problem, 0), pool, state_indices=rows, backend="reference", **options_of(problem))
    rows = rows.cuda()
    options = {"state_indices": rows, "backend": backend, **options_of(problem)}
    step(op, inputs, moved.clone(), **options)
    with no_synchronisation():
        found = step(op, inputs, moved, **options)
    assert error(found.cpu(), truth) < 2 * torch.finfo(dtype).eps + 1e-6
    assert error(moved.cpu(), pool) < 1e-5


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_index_gives_nan_for_its_sequence_or_an_error_on_demand(op, backend, monkeypatch):
    needs(backend, op)
    problem = on_gpu(MAKERS[op](6, B=3, state="bank").to(torch.float32))
    problem.options["state_indices"] = torch.tensor([1, 5, -2], device="cuda")
    result = problem.run(backend)
    assert result.output[0].isfinite().all()
    assert result.output[1:].isnan().all()
    monkeypatch.setenv("S0KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="state_indices"):
        problem.run(backend)


@pytest.mark.parametrize("ends", [[0, 5], [0, 7, 3, 10], [0, 2**31 - 1, 10]], ids=str)
def test_bad_boundaries_give_nan(ends):
    problem = on_gpu(delta_problem(10, B=1).to(torch.float32))
    problem.options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device="cuda")
    output, final = problem.run("triton")
    assert output.isnan().all()
    assert final.isnan().all()


def test_indices_must_be_on_the_device_of_the_inputs():
    problem = on_gpu(delta_problem(6, B=3, state="bank").to(torch.float32))
    with pytest.raises(ValueError, match="state_indices must be on cuda"):
        problem.run(None, state_indices=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("name", list(MODELS))
@torch.no_grad()
def test_swapped_models(name):
    model, ids = swap_modules(MODELS[name]()), tokens(2, 30)
    states = random_states(model)
    with states.attached(model):
        truth = model(ids).logits
    model.cuda()
    with states.attached(model):
        found = model(ids.cuda()).logits
        model.generate(ids.cuda(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert error(found.cpu(), truth) < 1e-3
