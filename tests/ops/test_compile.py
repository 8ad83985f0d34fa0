"""Both scans under torch.compile: one graph, the strides that it expects, and its cache on disk."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import MAKERS, delta_problem, error

import s0kernels

OPS = sorted(MAKERS)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("state", [None, "bank"])
def test_compiles_in_one_graph(op, state):
    problem = MAKERS[op](9, state=state).to(torch.float32)
    names = list(problem.tensors)

    def call(*values):
        result = type(problem)(op, dict(zip(names, values, strict=True)), problem.options).run(None)
        return result.output * 2, result.final_state + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = [problem.tensors[name].clone().requires_grad_() for name in names]
    results = [function(*inputs) for function in (call, compiled)]
    grads = [torch.autograd.grad(a.sum() + b.sum(), inputs) for a, b in results]
    for eager, traced in zip([*results[0], *grads[0]], [*results[1], *grads[1]], strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_compiles_with_inductor_whatever_the_strides(op):
    """Outputs and gradients have the strides that the compiler expects, for permuted inputs and gradients too."""
    problem = MAKERS[op](9, state="each").to(torch.float32)
    problem.tensors["initial_state"] = problem.tensors["initial_state"].mT.contiguous().mT
    rows = "g" if op == "gated_delta_rule" else "dt"
    problem.tensors[rows] = problem.tensors[rows].transpose(1, 2).contiguous().transpose(1, 2)
    names = list(problem.tensors)

    def call(*values):
        result = type(problem)(op, dict(zip(names, values, strict=True)), problem.options).run(None)
        return result.output.transpose(1, 2).contiguous(), result.final_state.mT.contiguous()

    inputs = [problem.tensors[name].detach().requires_grad_() for name in names]
    weights = [torch.randn_like(x) for x in call(*inputs)]
    grads = []
    for function in (call, torch.compile(call, fullgraph=True)):
        results = function(*inputs)
        grads.append(torch.autograd.grad(results, inputs, weights))
    for eager, compiled in zip(*grads, strict=True):
        assert error(compiled, eager) < 1e-6


@pytest.mark.slow
def test_a_changed_gradient_is_not_taken_from_a_cache(tmp_path):
    """Compiled graphs are cached on disk. Those of another version of this package are not taken."""
    shutil.copytree(Path(s0kernels.__file__).parent, tmp_path / "s0kernels", ignore=shutil.ignore_patterns("*.so"))
    registration = tmp_path / "s0kernels/ops/registration.py"
    script = """
import torch
from s0kernels.ops import ssd
B = torch.ones(1, 3, 1, 2)
x = torch.ones(1, 3, 1, 4, requires_grad=True)
call = torch.compile(lambda x: ssd(x, x.new_ones(1, 3, 1), -x.new_ones(1), B, B).output.sum())
hits = torch._dynamo.utils.counters["aot_autograd"]
print(torch.autograd.grad(call(x), x)[0].sum().item(), hits["autograd_cache_hit"])
"""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}

    def run() -> tuple[float, int]:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | caches,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        grad, hits = done.stdout.split()
        return float(grad), int(hits)

    grad, _ = run()
    assert run() == (grad, 1)  # the cache works
    text = registration.read_text()
    changed = text.replace("next(found) if need", "next(found) * 2 if need")
    assert changed != text
    registration.write_text(changed)
    assert run() == (2 * grad, 0)


def test_a_scale_that_changes_compiles_in_one_graph():
    problem = delta_problem(5).to(torch.float32)
    compiled = torch.compile(lambda scale: problem.run(None, scale=scale).output, fullgraph=True, backend="aot_eager")
    for scale in (0.3, 0.4, 0.5):
        assert torch.equal(compiled(scale), problem.run(None, scale=scale).output)
