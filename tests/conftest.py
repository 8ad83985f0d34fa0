import contextlib
import importlib
import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("S0KERNELS_POISON", "1")  # the compiled kernels find NaN in their scratch memory

import pytest
import torch

if not torch.cuda.is_available():  # the Triton kernels then run in its interpreter, chosen before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

# What is compared with an untouched mixer is compared with transformers' PyTorch functions: where these packages can be
# imported its modules bind their kernels as they are imported, which die on a CPU and know no fp64.
hidden = [name for name in ("causal_conv1d", "fla", "mamba_ssm") if sys.modules.setdefault(name) is None]
for family in ("bamba", "falcon_h1", "qwen3_5", "qwen3_5_moe", "qwen3_next"):
    with contextlib.suppress(ImportError):  # no transformers; whoever needs it says so
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
for name in hidden:
    del sys.modules[name]

# Few and small matrices: a second thread costs more than it brings, and more so beside other work.
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
    """Memory that nothing was written to holds NaN."""
    empty = torch.empty

    def poison(*arguments, **options):
        x = empty(*arguments, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def swapped(request):
    """A swapped model with states attached that matter at its last token."""
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
