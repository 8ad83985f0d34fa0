"""The CUDA kernels of one token on a GPU: `pytest -m gpu`. `make sanitize-gpu` runs these under compute-sanitizer."""

import copy

import pytest
import torch
from cases import FAMILIES, MAKERS, error, options_of, step, token
from mixers import FINISHES, OPS, ROUNDING, SHAPES, STEPS, double, mixer, to
from models import MODELS, close, every_model, fails_upstream, mixers
from test_gpu import no_synchronisation, on_gpu
from transformers import DynamicCache

from s0kernels import heads, swap_modules
from s0kernels.bench.inputs import mixer_inputs
from s0kernels.calls import Call
from s0kernels.ops import registry

UNUSABLE = (
    registry.unusable("cuda", Call("ssd_step", torch.device("cuda"), torch.float32))
    if torch.cuda.is_available()
    else None
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(UNUSABLE is not None, reason=f"backend cuda {UNUSABLE}")]
every_dtype = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
every_finish = pytest.mark.parametrize(
    ("op", "finish"), [(op, finish) for op in OPS for finish in FINISHES[op]], ids=lambda x: x if x in OPS else str(x)
)


def cuda(inputs):
    return {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}


def run(op, inputs, backend, **options):
    limits = {"dt_limit": (0.1, 1.5)} if op == "ssd" else {}
    return STEPS[op][2](**inputs, eps=1e-6, backend=backend, **limits, **options)


def given(op, finish, shape, dtype, **sizes):
    """Return (arguments in `dtype` on the CPU, options)."""
    inputs = mixer(op, shape, **sizes) | {n: x for n, x in finish.items() if n == "norm"}
    return to(inputs, dtype), {n: x for n, x in finish.items() if n != "norm"}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES)
@every_dtype
def test_a_step_is_the_recurrence(op, shape, dtype):
    each, groups, first, second = SHAPES[shape]
    sizes = {"H": groups, "HV": each * groups, "K": first, "V": second}
    if op == "ssd":
        sizes = {"H": each * groups, "G": groups, "P": first, "N": second}
    problem = MAKERS[op](1, B=3, state="each", **sizes).to(dtype, torch.float32)
    exact = problem.to(torch.float64)
    states = exact.tensors["initial_state"].clone()
    truth = step(op, token(exact, 0), states, backend="reference", **options_of(problem))
    moved = on_gpu(problem)
    mine = moved.tensors["initial_state"].clone()
    with no_synchronisation():
        found = step(op, token(moved, 0), mine, backend="cuda", **options_of(problem))
    assert error(found.cpu(), truth) < ROUNDING[dtype]
    assert error(mine.cpu(), states) < 1e-6


@every_finish
@pytest.mark.parametrize("shape", SHAPES)
@every_dtype
@torch.no_grad()
def test_a_mixer_step_is_its_parts(op, finish, shape, dtype):
    inputs, options = given(op, finish, shape, dtype)
    exact, moved = double(inputs), cuda(inputs)
    for _ in range(3):
        truth = run(op, exact, "reference", **options)
        found = run(op, moved, "cuda", **options)
        assert error(found.cpu(), truth) < 3 * ROUNDING[dtype]
    assert error(moved["state"].cpu(), exact["state"]) < 1e-6
    assert error(moved["window"].cpu(), exact["window"]) < ROUNDING[dtype]


@pytest.mark.parametrize("model", FAMILIES)
@torch.no_grad()
def test_a_mixer_step_with_the_heads_of_every_family(model):
    """With all heads of a layer."""
    op, sizes = heads.MODELS[model]
    for finish in FINISHES[op]:
        values = mixer_inputs(op, sizes, (3,), states=3) | {n: x for n, x in finish.items() if n == "norm"}
        inputs, options = to(values, torch.bfloat16), {n: x for n, x in finish.items() if n != "norm"}
        exact, moved = double(inputs), cuda(inputs)
        truth, found = run(op, exact, "reference", **options), run(op, moved, "cuda", **options)
        assert error(found.cpu(), truth) < 3 * ROUNDING[torch.bfloat16]
        assert error(moved["state"].cpu(), exact["state"]) < 1e-6


@every_finish
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@torch.no_grad()
def test_a_pool_changes_only_where_addressed(op, finish, kind):
    """-1 starts from zero and stores nothing. An index out of range gives NaN and changes nothing."""
    rows, good = torch.tensor([4, -1, 2, 5, -2, 2**31 - 1], dtype=kind), [0, 1, 2]
    inputs, options = given(op, finish, "three", torch.float32, rows=6, pool=5)
    moved, exact = cuda(inputs), double(inputs)
    index = rows.cuda()
    with no_synchronisation():
        found = run(op, moved, "cuda", state_indices=index, **options)
    found = found.cpu()
    assert found[3:].isnan().all()
    exact |= {n: exact[n][good] for n in ("mixed", "z", "b", "a", "gate", "dt") if n in exact}
    truth = run(op, exact, "reference", state_indices=rows[good], **options)
    assert error(found[good], truth) < 3e-6
    for name in ("window", "state"):
        assert error(moved[name][[4, 2]].cpu(), exact[name][[4, 2]]) < 1e-6
        assert torch.equal(moved[name][[0, 1, 3]].cpu(), inputs[name][[0, 1, 3]])


@every_finish
@torch.no_grad()
def test_blocks_that_wait_for_each_other(op, finish):
    """Many rows, many times: the results have the same bits each time, and windows are shifted by one each time."""
    inputs, options = given(op, finish, "Bamba", torch.bfloat16, rows=200)
    results = []
    for _ in range(2):
        moved, outputs = cuda(copy.deepcopy(inputs)), []
        for turn in range(20):
            moved["mixed"] = (inputs["mixed"] * (turn + 1)).cuda()
            outputs.append(run(op, moved, "cuda", **options))
        results.append((torch.stack(outputs), moved["window"], moved["state"]))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    last = torch.stack([(inputs["mixed"] * turn) for turn in range(17, 21)], -1)
    assert torch.equal(results[0][1].cpu(), last)


@every_finish
@pytest.mark.parametrize("graph", ["CUDA graph", "torch.compile"])
@torch.no_grad()
def test_captured(op, finish, graph):
    inputs, options = given(op, finish, "Bamba", torch.bfloat16)
    plain, captured = cuda(inputs), cuda(copy.deepcopy(inputs))
    truth = [run(op, plain, "cuda", **options) for _ in range(3)]
    if graph == "torch.compile":
        again = torch.compile(lambda: run(op, captured, "cuda", **options), fullgraph=True)
        found = [again() for _ in range(3)]
    else:
        recorded, output = graph_of(lambda: run(op, captured, "cuda", **options))
        found = []
        for _ in range(3):
            recorded.replay()
            found.append(output.clone())
    assert all(map(torch.equal, found, truth))
    assert torch.equal(captured["state"], plain["state"])
    assert torch.equal(captured["window"], plain["window"])


def graph_of(call):
    """Return a CUDA graph of a call, and its output. All graphs are captured on one stream."""
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        output = call()
    return recorded, output


@every_finish
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@torch.no_grad()
def test_two_streams_at_once(op, finish, captured):
    """The counters of two calls are separate: steps of two pools on two streams give the same results as alone. The
    graphs are captured on one stream and replayed on two others."""
    inputs, options = given(op, finish, "Bamba", torch.bfloat16, rows=8)
    alone, *pools = (cuda(copy.deepcopy(inputs)) for _ in range(3))
    truth = [run(op, alone, "cuda", **options) for _ in range(50)]
    calls = [lambda pool=pool: run(op, pool, "cuda", **options) for pool in pools]
    if captured:
        graphs = [graph_of(call) for call in calls]
        calls = [lambda graph=graph, output=output: (graph.replay(), output.clone())[1] for graph, output in graphs]
    streams, found = [torch.cuda.Stream() for _ in pools], [[] for _ in pools]
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**8)  # wait until all later work is in the queues
    for _ in truth:
        for stream, call, outputs in zip(streams, calls, found, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(call())
    torch.cuda.synchronize()
    for pool, outputs in zip(pools, found, strict=True):
        assert all(map(torch.equal, outputs, truth))
        assert torch.equal(pool["window"], alone["window"])
        assert torch.equal(pool["state"], alone["state"])


@every_finish
@torch.no_grad()
def test_more_rows_than_before_and_fewer_again(op, finish):
    """The workspace of the stream grows while kernels that use it are running."""
    problems = [given(op, finish, "three", torch.float32, rows=rows) for rows in (2, 2000, 2)]
    moved = [cuda(inputs) for inputs, _ in problems]
    found = []
    for pool, (_, options) in zip(moved, problems, strict=True):
        found.append([run(op, pool, "cuda", **options) for _ in range(20)][-1])
    for output, pool, (inputs, options) in zip(found, moved, problems, strict=True):
        exact = double(inputs)
        truth = [run(op, exact, "reference", **options) for _ in range(20)][-1]
        assert error(output.cpu(), truth) < 3e-6
        assert error(pool["state"].cpu(), exact["state"]) < 1e-5
        assert torch.equal(pool["window"].cpu().double(), exact["window"])


@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_a_pool_of_more_than_two_to_the_31_elements(op):
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GiB of memory")
    inputs, _ = given(op, FINISHES[op][0], "Falcon-H1-7B", torch.float32, rows=2)
    size = inputs["state"][0].numel()
    rows = 2**31 // size + 2
    moved = cuda(inputs)
    pool = {n: torch.zeros(rows, *moved[n].shape[1:], device="cuda") for n in ("window", "state")}
    for name, x in pool.items():
        x[-2:] = moved[name]
    index = torch.tensor([rows - 2, rows - 1], device="cuda")
    found = run(op, {**moved, **pool}, "cuda", state_indices=index)
    assert torch.equal(found, run(op, moved, "cuda"))
    assert torch.equal(pool["state"][-2:], moved["state"])
    assert not pool["state"][:2].any()


@every_model
@every_dtype
@torch.no_grad()
def test_a_token_is_the_untouched_mixers(name, dtype):
    if reason := fails_upstream(name):
        pytest.skip(reason)
    model = MODELS[name]().cuda().to(dtype)
    exact = mixers(copy.deepcopy(model).double())
    originals = mixers(copy.deepcopy(model))
    for truth, original, ours in zip(exact, originals, mixers(swap_modules(model)), strict=True):
        width = ours.out_proj.out_features
        x = torch.randn(4, 8, width, device="cuda", dtype=dtype)
        outputs = []
        for mixer_, inputs in ((truth, x.double()), (original, x), (ours, x)):
            cache = DynamicCache(config=model.config.get_text_config())
            mixer_(inputs[:, :5], cache)
            outputs.append(torch.cat([mixer_(inputs[:, t : t + 1], cache) for t in range(5, 8)], 1))
        if dtype == torch.float32:
            assert close(outputs[2], outputs[1])
        assert error(outputs[2], outputs[0]) <= 2 * error(outputs[1], outputs[0]) + 2 * ROUNDING[dtype]
