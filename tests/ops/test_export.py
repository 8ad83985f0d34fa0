"""torch.compile with dynamic sizes, and torch.export: attached states are part of the program, which loads anywhere."""

import pytest
import torch
from models import MODELS, close, every_family, random_states, tokens
from surroundings import python
from torch import nn

from s0kernels import ops, swap_modules
from s0kernels.ops import transforms

pytestmark = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # from transformers


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@every_family
@pytest.mark.parametrize(
    ("strict", "scale"),
    [(False, 0.5), *(pytest.param(*how, marks=pytest.mark.slow) for how in ((True, 1.0), (True, 0.5)))],
)
def test_exported_with_what_is_attached(name, strict, scale):
    model, ids = swap_modules(MODELS[name]()), tokens(2, 9)
    states = random_states(model, tasks=2)
    with torch.no_grad():
        truths = []
        for tasks in (0, [1, 0]):
            states.attach(model, scale, tasks)
            truths.append(model(ids).logits)
            attached = torch.export.export(Logits(model), (ids,), strict=strict).module()
            states.detach()
            with states.attached(model, scale, tasks):
                inside = torch.export.export(Logits(model), (ids,), strict=strict).module()
            zero = model(ids).logits
            for program in (attached, inside):
                assert close(program(ids), truths[-1])
            assert not close(truths[-1], zero, 0.01)
    assert not close(*truths, 0.01)


@pytest.mark.slow
@every_family
def test_states_changed_after_attaching_are_exported_as_they_are(name):
    model, ids = swap_modules(MODELS[name]()), tokens(1, 7)
    states = random_states(model)
    states.attach(model)
    for layer in states:
        states[layer].data = -states[layer].data
    with torch.no_grad():
        program = torch.export.export(Logits(model), (ids,), strict=True).module()
        assert close(program(ids), model(ids).logits)


LOAD = """
import sys, torch, s0kernels
assert "transformers" not in sys.modules
program = torch.export.load(sys.argv[1])
given, truth = torch.load(sys.argv[2])
found = program.module()(*given)
found = found if isinstance(found, (tuple, list)) else (found,)
assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, truth)), "other values"
print("loaded")
"""


class Step(nn.Module):
    """One token of both recurrences, and of a mixer."""

    def forward(self, x, state):
        g, beta = -x[..., 0].abs(), x[..., 0].sigmoid()
        state = state.clone()
        delta = ops.gated_delta_rule_step(x, x, x, g, beta, state, use_qk_l2norm=True)
        return delta, ops.ssd_step(x, beta, g[0], x, x, state), state


@pytest.mark.slow
@pytest.mark.parametrize("what", ["qwen", "falcon", "steps"])
def test_a_saved_program_loads_where_nothing_but_the_package_was_imported(what, tmp_path):
    if what == "steps":
        module, given = Step(), (torch.randn(2, 3, 8), torch.randn(2, 3, 8, 8))
    else:
        model = swap_modules(MODELS[what]())
        random_states(model).attach(model)
        module, given = Logits(model), (tokens(2, 9),)
    with torch.no_grad():
        truth = module(*given)
        torch.export.save(torch.export.export(module, given), tmp_path / "program.pt2")
    torch.save((given, truth if isinstance(truth, tuple) else (truth,)), tmp_path / "values.pt")
    code = (
        LOAD
        if what == "steps"
        else LOAD.replace("found = program.module()(*given)", "found = [program.module()(*given)]")
    )
    done = python("-c", code, str(tmp_path / "program.pt2"), str(tmp_path / "values.pt"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "loaded\n"


def delta_step(x, state):
    return ops.gated_delta_rule_step(x, x, x, -x[..., 0].abs(), x[..., 0].sigmoid(), state, use_qk_l2norm=True)


def ssd_step(x, state):
    return ops.ssd_step(x, x[..., 0].abs(), -torch.ones(x.shape[1]), x, x, state)


@pytest.mark.parametrize("step", [delta_step, ssd_step])
def test_steps_compile_with_dynamic_sizes(step):
    compiled = torch.compile(step, dynamic=True, fullgraph=True, backend="aot_eager")
    for batch, heads in ((2, 3), (5, 4), (1, 3)):
        x, state = torch.randn(batch, heads, 8), torch.randn(batch, heads, 8, 8)
        own = state.clone()
        assert torch.equal(compiled(x, own), step(x, state))
        assert torch.equal(own, state)


def delta_scan(x, state):
    gates = -x[..., 0].abs(), x[..., 0].sigmoid()
    return ops.gated_delta_rule(x, x, x, *gates, initial_state=state, use_qk_l2norm=True)


def ssd_scan(x, state):
    return ops.ssd(x, x[..., 0].abs(), -torch.ones(x.shape[2]), x, x, initial_state=state)


@pytest.mark.parametrize("scan", [delta_scan, ssd_scan])
def test_scans_compile_with_dynamic_sizes(scan):
    compiled = torch.compile(scan, dynamic=True, fullgraph=True, backend="aot_eager")
    for batch, length in ((2, 5), (3, 70), (4, 1)):
        x, state = torch.randn(batch, length, 3, 8, requires_grad=True), torch.randn(3, 8, 8, requires_grad=True)
        found, truth = compiled(x, state), scan(x, state)
        for a, b in zip(found, truth, strict=True):
            assert close(a, b)
        results = [torch.autograd.grad(o.output.sum() + o.final_state.sum(), (x, state)) for o in (found, truth)]
        for a, b in zip(*results, strict=True):
            assert close(a, b)


@every_family
@torch.no_grad()
def test_a_mixers_step_compiles_with_dynamic_sizes(name):
    from transformers import DynamicCache

    model = swap_modules(MODELS[name]())
    mixer = next(module for module in model.modules() if hasattr(module, "A_log"))
    x = torch.randn(1, 6, model.config.hidden_size)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        mixer(x, cache)
    step = torch.compile(lambda x, cache: mixer(x, cache), dynamic=True, fullgraph=True, backend="aot_eager")
    for token in range(3):
        assert close(step(x[:, token : token + 1], caches[0]), mixer(x[:, token : token + 1], caches[1]))


def test_importing_does_not_import_the_compiler():
    """Importing the compiler takes a second. Functions are marked as constant all the same."""
    done = python("-c", "import sys, s0kernels.ops, s0kernels.modules; sys.exit('torch._dynamo' in sys.modules)")
    assert done.returncode == 0, done.stderr

    def torchs(): ...

    def ours(): ...

    assert vars(torch.compiler.assume_constant_result(torchs)) == vars(transforms.constant_in_graphs(ours))
    assert vars(ours)
