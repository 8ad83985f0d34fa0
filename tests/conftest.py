import contextlib
import importlib
import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("S0KERNELS_POISON", "1")  # fills the scratch memory of the compiled kernels with NaN

import pytest
import torch

if not torch.cuda.is_available():  # set before triton is imported: its interpreter runs the kernels
    os.environ["TRITON_INTERPRET"] = "1"

# Tests compare with transformers' PyTorch functions. If these packages can be imported, transformers' modules use their
# kernels instead, which fail on a CPU and do not support fp64.
hidden = [name for name in ("causal_conv1d", "fla", "mamba_ssm") if sys.modules.setdefault(name) is None]
for family in ("bamba", "falcon_h1", "qwen3_5", "qwen3_5_moe", "qwen3_next"):
    with contextlib.suppress(ImportError):  # without transformers, tests that need it report it
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
for name in hidden:
    del sys.modules[name]

# The matrices are few and small: a second thread costs more than it gains, even more on a busy machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties:
            if name == "to be said":
                terminalreporter.write_line(text, yellow=True)


@pytest.fixture
def poisoned(monkeypatch):
    """Fill uninitialised memory with NaN."""
    empty = torch.empty

    def poison(*arguments, **options):
        x = empty(*arguments, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def swapped(request):
    """Return a swapped model with attached states that affect its last token."""
    from models import MODELS, fails_upstream, random_states, tokens

    from s0kernels import swap_modules

    if reason := fails_upstream(request.getfixturevalue("name")):
        pytest.skip(reason)
    model = swap_modules(MODELS[request.getfixturevalue("name")]())
    states = random_states(model)
    ids = tokens(2, 30)
    with torch.no_grad():
        before = model(ids).logits
        states.attach(model)
        difference = (model(ids).logits - before).abs().amax((0, 2))
    assert difference[0] > 0.1
    assert difference[-1] > 0.01, "S0 does not survive the prompt, so these tests would show nothing"
    return model, states
