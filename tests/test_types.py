"""Type checking: the package has no errors, and public functions have exact types."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import s0kernels

ROOT = Path(s0kernels.__file__).parents[1]
USES = """
import torch
from transformers import Qwen3_5ForCausalLM
from s0kernels import S0Config, S0States, S0Trainer, restore_modules, swap_modules, swap_report, verify
from s0kernels.compat.fla import chunk_gated_delta_rule
from s0kernels.compat.mamba_ssm import mamba_chunk_scan_combined, selective_state_update
from s0kernels.data import read_examples
from s0kernels.ops import gated_delta_rule, gated_delta_rule_step, ssd, ssd_step

def uses(model: Qwen3_5ForCausalLM, x: torch.Tensor) -> None:
    trainer = S0Trainer.from_pretrained("name", S0Config(n_steps=3))
    reveal_type(trainer)  # S0Trainer
    reveal_type(trainer.config)  # S0Config
    reveal_type(trainer.tokenizer)  # PreTrainedTokenizerBase
    reveal_type(trainer.train([("text", 1)]))  # dict[str, float]
    trainer.train({"one": "file.jsonl", "other": [{"prompt": "text", "completion": "text"}, ["text", 1]]})
    reveal_type(trainer.evaluate("file.jsonl"))  # float | dict[str, float]
    reveal_type(trainer.evaluate("file.jsonl", check=verify.python, samples=4))  # Evaluation
    reveal_type(trainer.evaluate("file.jsonl", check=verify.answer, alpha=[0.1, 0.2]))  # dict[float, Evaluation]
    reveal_type(trainer.collect("file.jsonl", verify.python))  # list[dict[str, Any]]
    reveal_type(trainer.generate(["prompt"]))  # str | list[str]
    reveal_type(trainer.states)  # S0States | None
    reveal_type(trainer.tasks)  # list[str] | None
    reveal_type(trainer.device)  # device
    reveal_type(trainer.alpha)  # float
    reveal_type(swap_modules(model))  # Qwen3_5ForCausalLM
    reveal_type(restore_modules(model))  # Qwen3_5ForCausalLM
    reveal_type(swap_report(model))  # SwapReport
    reveal_type(swap_report(model).checks[0].difference)  # float | None
    states = S0States.for_model(model, ["one", "other"])
    reveal_type(states)  # S0States
    reveal_type(states[0])  # Parameter
    reveal_type(states.task("one"))  # S0States
    reveal_type(S0States.stack({"one": states}))  # S0States
    reveal_type(S0States.load("folder", model))  # S0States
    reveal_type(S0States.load_many({"one": "folder"}))  # dict[str, tuple[S0States, dict[str, Any] | None]]
    reveal_type(S0States.attached_to(model))  # S0States | None
    reveal_type(S0Config().alpha)  # float | None
    reveal_type(gated_delta_rule(x, x, x, x, x))  # ScanOutput
    reveal_type(ssd(x, x, x, x, x, initial_state=x).final_state)  # Tensor | None
    reveal_type(gated_delta_rule_step(x, x, x, x, x, x))  # Tensor
    reveal_type(ssd_step(x, x, x, x, x, x))  # Tensor
    reveal_type(chunk_gated_delta_rule(x, x, x, x, x))  # tuple[Tensor, Tensor | None]
    reveal_type(mamba_chunk_scan_combined(x, x, x, x, x, 64))  # Tensor | tuple[Tensor, ...]
    reveal_type(selective_state_update(x, x, x, x, x, x))  # Tensor
    reveal_type(read_examples([("text", 1)], trainer.tokenizer, 64)[0].ids)  # list[int]
"""
WRONG = """
from s0kernels import S0Config, S0Trainer

def wrong(trainer: S0Trainer) -> None:
    S0Config(n_steps="three")
    trainer.train([("text", 1)], max_memory="4 GiB")
    trainer.train([("text", "1")])
    trainer.states.save("folder")
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed"),
]


def check(project: Path) -> list[dict]:
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "--project", project]
    quiet = {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}  # it would ask PyPI for a newer version
    done = subprocess.run(command, capture_output=True, text=True, cwd=project, env=os.environ | quiet)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] > 0, done.stderr
    return found["generalDiagnostics"]


def check_file(folder: Path, text: str) -> list[dict]:
    (folder / "uses.py").write_text(text)
    settings = {"include": ["uses.py"], "extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    return check(folder)


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="the settings lie in the source tree")
def test_the_package_is_clean():
    wrong = [f"{d['file']}:{d['range']['start']['line'] + 1}: {d['message']}" for d in check(ROOT)]
    assert not wrong, "\n".join(wrong)


def test_what_users_call_has_exact_types(tmp_path):
    found = {d["range"]["start"]["line"]: d for d in check_file(tmp_path, USES)}
    assert [d["message"] for d in found.values() if d["severity"] != "information"] == []
    for number, line in enumerate(USES.splitlines()):
        if "reveal_type" in line:
            truth = line.partition("  # ")[2]
            assert found[number]["message"].rpartition(" is ")[2] == f'"{truth}"', line


def test_a_wrong_use_is_seen(tmp_path):
    found = check_file(tmp_path, WRONG)
    assert [d["range"]["start"]["line"] for d in found] == [4, 5, 6, 7]
    assert {d["severity"] for d in found} == {"error"}
