"""The compiled kernels: threads, processes, instruction sets, and missing or incompatible libraries."""

import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from cases import MAKERS, NO_CPU_KERNELS, error
from surroundings import python

from s0kernels.backends import cpu
from s0kernels.calls import Call
from s0kernels.hardware import compilers
from s0kernels.ops import registry

pytestmark = pytest.mark.skipif(NO_CPU_KERNELS is not None, reason=f"backend cpu {NO_CPU_KERNELS}")
every_op = pytest.mark.parametrize("op", sorted(MAKERS))


def problem_of(op, **options):
    return MAKERS[op](100, B=3, state="bank", **options).to(torch.float32)


def same(found: dict, truth: dict) -> bool:
    return all(torch.equal(found[name], truth[name]) for name in truth)


@every_op
def test_cpu_results_do_not_depend_on_the_number_of_threads(op):
    problem = problem_of(op)
    weights = problem.weights()
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5, 16):
            torch.set_num_threads(count)
            alone = problem.gradients("cpu", weights, ["initial_state"])
            found.append(problem.gradients("cpu", weights) | {"alone": alone["dinitial_state"]})
    finally:
        torch.set_num_threads(threads)
    assert all(same(results, found[0]) for results in found)


@every_op
def test_cpu_many_callers_at_once(op):
    problem = problem_of(op)
    weights = problem.weights()
    truth, results = problem.gradients("cpu", weights), []

    def work():
        results.extend(same(problem.gradients("cpu", weights), truth) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 40


class Outputs(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        problem = problem_of(("ssd", "gated_delta_rule")[index % 2], seed=index)
        return problem.gradients("cpu", problem.weights())


def test_cpu_kernels_in_the_worker_of_a_data_loader():
    """Forward and backward in a worker, after threads have run in the parent."""
    expected = [Outputs()[index] for index in range(4)]
    loader = torch.utils.data.DataLoader(Outputs(), batch_size=None, num_workers=2)
    for _ in range(2):
        for found, truth in zip(loader, expected, strict=True):
            assert same(found, truth)


@every_op
@pytest.mark.parametrize(
    "sizes",
    [{"K": 1, "V": 1, "P": 1, "N": 1}, {"K": 17, "V": 33, "P": 33, "N": 17}, {"K": 128, "V": 130, "P": 130, "N": 128}],
    ids=["1x1", "17x33", "128x130"],
)
def test_cpu_sizes_that_are_no_multiple_of_a_vector(op, sizes):
    names = ("K", "V") if op == "gated_delta_rule" else ("P", "N")
    problem = MAKERS[op](70, state="each", **{name: sizes[name] for name in names})
    weights = problem.weights()
    truth = problem.gradients("reference", weights)
    for name, value in problem.gradients("cpu", weights).items():
        assert error(value, truth[name]) < 1e-11, name


@every_op
def test_cpu_heads_of_a_group_in_several_parts(op):
    """The number of heads that share q and k is larger than a block of heads, and not a multiple of it."""
    groups = {"H": 2, "HV": 14} if op == "gated_delta_rule" else {"H": 14, "G": 2}
    problem = MAKERS[op](40, state="each", **groups)
    weights = problem.weights()
    truth = problem.gradients("reference", weights)
    for name, value in problem.gradients("cpu", weights).items():
        assert error(value, truth[name]) < 1e-11, name


@every_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cpu_inputs_of_any_strides_give_the_same_bits(op, dtype):
    """Inputs and incoming gradients are contiguous in time, as after a convolution, or spaced out, or transposed."""
    plain = {"extras": False} if op == "ssd" else {}  # D, z and dt_bias are PyTorch's, and its sums follow strides
    problem = problem_of(op, **plain).to(dtype)
    weights = problem.weights()

    def strided(x):
        if x.dim() == 4:
            return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return torch.stack([x, x], dim=-1)[..., 0]

    def gradients(change):
        leaves = {name: change(x).detach().requires_grad_() for name, x in problem.tensors.items()}
        result = type(problem)(op, leaves, problem.options).run("cpu")
        into = [change(w.to(x.dtype)) for w, x in zip(weights, result, strict=True)]
        grads = torch.autograd.grad(tuple(result), list(leaves.values()), into)
        return dict(zip(("output", "final_state", *leaves), (*result, *grads), strict=True))

    assert not strided(weights[0]).is_contiguous()
    assert same(gradients(strided), gradients(lambda x: x))


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["avx512", "avx2", "portable"])
def test_cpu_instruction_sets_agree(instructions):
    code = """
import os, sys
os.environ["S0KERNELS_CPU"] = sys.argv[1]
import torch
from cases import MAKERS, NO_CPU_KERNELS, error
if NO_CPU_KERNELS is not None:
    sys.exit(NO_CPU_KERNELS)
for op in MAKERS:
    for dtype, budget in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        problem = MAKERS[op](70).to(dtype)
        weights = problem.weights()
        truth = problem.gradients("torch", weights)
        for name, value in problem.gradients("cpu", weights).items():
            assert error(value, truth[name]) < budget, (op, dtype, name)
print(torch.ops.s0kernels_cpu.instructions())
"""
    done = python("-c", code, instructions)
    flag, bits = {"avx512": ("avx512dq", 512), "avx2": ("avx2", 256), "portable": ("", 128)}[instructions]
    if flag not in Path("/proc/cpuinfo").read_text():
        assert f"S0KERNELS_CPU is {instructions}: unknown, or not on this machine" in done.stderr
        pytest.skip(f"this machine has no {instructions}")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == bits


@pytest.mark.parametrize(("times", "chunk"), [(1, 32), (2, 16)])
def test_cpu_chunks_are_shorter_where_beta_passes_1(times, chunk):
    """Shorter chunks amplify rounding less."""
    problem = problem_of("gated_delta_rule").to(torch.float32)
    problem.tensors["beta"] *= times
    for found, truth in zip(problem.run("cpu"), problem.run("cpu", chunk_size=chunk), strict=True):
        assert torch.equal(found, truth)
    assert not torch.equal(problem.run("cpu").output, problem.run("cpu", chunk_size=64).output)


def through(values: torch.Tensor, dtype: torch.dtype, columns: int, *, spaced: bool = False) -> torch.Tensor:
    """Convert values to another dtype and back, by a step that computes v = 1 * v. Rows have a given length, and may be
    contiguous or not."""
    v = values.reshape(-1, 1, 1, columns)
    if spaced:
        v = torch.stack([v, torch.zeros_like(v)], dim=-1)[..., 0]
    rows = v.shape[0]
    one, output = torch.ones(rows, 1, 1, 1), torch.empty(rows, 1, columns, dtype=dtype)
    gates, zero = torch.ones(rows, 1, 1), torch.full((rows,), -1)
    state = torch.empty(1, 1, columns, 1)
    torch.ops.s0kernels_cpu.scan_step(one, one, v, gates, gates, None, state, zero, output, False, False, 1.0)
    return output.reshape(values.shape)


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return the bits of a tensor, with one representation of NaN."""
    return torch.where(x.isnan(), torch.nan, x).view({2: torch.int16, 4: torch.int32}[x.element_size()])


#: lengths of whole vectors of every width, of less than a vector, and of vectors with a remainder
every_width = pytest.mark.parametrize("columns", [64, 1, 37])
every_format = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(params=[False, True], ids=["", "subnormal floats are zero"])
def flushed(request):
    yield torch.set_flush_denormal(request.param) and request.param
    torch.set_flush_denormal(False)


@every_format
@every_width
@pytest.mark.parametrize("spaced", [False, True])
def test_cpu_reads_every_number_of_16_bits_exactly(dtype, columns, spaced, flushed):
    count = 65536 // columns * columns
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)[-count:]
    found = through(values, torch.float32, columns, spaced=spaced)
    if flushed and dtype == torch.bfloat16:  # subnormal numbers, which the machine flushes to zero
        small = values.float().abs() < torch.finfo(torch.float32).tiny
        values, found = values[~small], found[~small]
    assert torch.equal(bits(found), bits(values.float()))


@every_format
@every_width
def test_cpu_rounds_to_the_nearest_number_of_16_bits(dtype, columns, flushed):
    """Test every number, every midpoint of two neighbours, and the floats next to it; numbers beyond the largest;
    numbers near zero."""
    finite = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = finite[finite.isfinite()].double().sort().values
    largest, step = finite[-1], finite[-1] - finite[-2]
    edge = torch.stack(
        [largest + step / 2, -largest - step / 2]
    )  # the midpoint of the largest number and the next one there would be
    middles = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, edge]).float()
    up, down = (torch.nextafter(middles, torch.tensor(sign * torch.inf)) for sign in (1, -1))
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan, 3e38, -3e38, 1e-30, -1e-30, -0.0])
    values = torch.cat([middles, up, down, special])
    if flushed:
        values = values[(values.abs() >= torch.finfo(torch.float32).tiny) | (values == 0)]
    values = torch.cat([values, torch.zeros(-len(values) % columns)])
    assert torch.equal(bits(through(values, dtype, columns)), bits(values.to(dtype)))
    assert not flushed or torch.finfo(torch.float32).tiny / 2 * torch.ones(1) == 0


@every_op
@pytest.mark.parametrize("mixed", ["fp64 input", "fp64 gates"])
def test_cpu_operators_refuse_fp64_beside_other_dtypes(op, mixed):
    """No caller mixes them, but it would misread memory."""
    kinds = [torch.float64, torch.float32] if mixed == "fp64 input" else [torch.float32, torch.float64]
    x, output = torch.ones(1, 2, 1, 4, dtype=kinds[0]), torch.empty(1, 2, 1, 4, dtype=kinds[0])
    gates, delta = torch.ones(1, 2, 1, dtype=kinds[1]), op == "gated_delta_rule"
    arguments = (x, x, x, gates, gates, None, None, None, None, output, None, delta, False, 1.0, 32, 4)
    with pytest.raises(RuntimeError, match="fp64 and of other dtypes do not mix"):
        torch.ops.s0kernels_cpu.scan_forward(*arguments)


def refused(file: Path, message: str) -> None:
    """Check that there is a reason, not a crash, and that the default is the next backend, with one warning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S0KERNELS_CPU_LIBRARY", str(file))
        cpu.missing.cache_clear()
        registry.say_once.cache_clear()
        try:
            assert message in registry.unusable("cpu", Call("ssd", torch.device("cpu"), torch.float32))
            with pytest.warns(RuntimeWarning, match=f"compiled kernels .*{re.escape(message)}"):
                assert registry.choose(None, "ssd", torch.device("cpu"), torch.float32) == "torch"
            assert registry.choose(None, "ssd", torch.device("cpu"), torch.float32) == "torch"
            with pytest.raises(ValueError, match=f"backend 'cpu' cannot run this call: .*{re.escape(message)}"):
                problem_of("ssd").run("cpu")
        finally:
            cpu.missing.cache_clear()


def test_cpu_library_that_is_missing_or_is_none(tmp_path):
    refused(
        tmp_path / "library.so",
        f"was not built: install with --no-build-isolation, with torch and a C++ compiler: {compilers()}",
    )
    (tmp_path / "library.so").write_bytes(b"not a library")
    refused(tmp_path / "library.so", "cannot be used beside torch")


@pytest.mark.skipif(shutil.which("g++") is None, reason="makes a library with g++, which is not here")
def test_cpu_library_built_for_a_torch_that_has_more(tmp_path):
    """It needs a function that the running torch lacks. This is found when it is loaded, not when it is called."""
    source, file = tmp_path / "library.cpp", tmp_path / "library.so"
    source.write_text('extern "C" void torch_of_the_future(); void f() { torch_of_the_future(); }')
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(file)], check=True)
    refused(file, "undefined symbol: torch_of_the_future")


def test_cpu_backend_is_the_default_on_a_cpu_alone():
    for op in registry.OPS:
        assert registry.choose(None, op, torch.device("cpu"), torch.float32) == "cpu"
        assert "not on cuda" in registry.unusable("cpu", Call(op, torch.device("cuda"), torch.float32))
