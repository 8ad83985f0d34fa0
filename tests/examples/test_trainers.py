"""The examples of examples/peft, started like a user does, with a few steps each."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from surroundings import ROOT

from s0kernels import S0States

pytest.importorskip("peft")
TRL, EVAL = ROOT / ".deps" / "trl", ROOT / ".deps" / "eval"
pytestmark = pytest.mark.slow
needs_trl = pytest.mark.skipif(not TRL.is_dir(), reason="TRL is not in .deps/trl; `make test-more` puts it there")
FEW = ("--steps", "4", "--examples", "16", "--heldout", "6")


def run(script: str, *arguments: object, processes: int = 1) -> str:
    launch = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    )
    command = [sys.executable, *launch, str(ROOT / "examples" / "peft" / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TRL, EVAL))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"\{'loss': '([^']+)'", output)]


def states(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_trainer_of_transformers(tmp_path):
    """It learns, resumes from a checkpoint with the same bits, and gives the same result in two processes."""
    output = run("hf_trainer.py", tmp_path / "one", *FEW)
    assert re.search(r"before: \d of 6 right\n[\s\S]*after: \d of 6 right", output)
    assert losses(output)[-1] < losses(output)[0] / 2
    found = S0States.load(tmp_path / "one")
    assert all(float(norm) > 0 for norm in found.norms().values())

    shutil.copytree(tmp_path / "one" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert len(losses(run("hf_trainer.py", tmp_path / "resumed", *FEW, "--resume"))) == 2
    truth = states(tmp_path / "one")
    for name, state in states(tmp_path / "resumed").items():
        assert torch.equal(state, truth[name])

    run("hf_trainer.py", tmp_path / "two", *FEW, processes=2)
    for name, state in states(tmp_path / "two").items():
        assert (state - truth[name]).norm() < 0.01 * truth[name].norm()


@needs_trl
@pytest.mark.parametrize("options", [(), ("--packing",), ("--assistant-only-loss",)])
def test_sft(options, tmp_path):
    output = run("trl_sft.py", tmp_path, *FEW, *options)
    assert losses(output)[-1] < losses(output)[0] / 2
    assert "after:" in output
    assert all(float(norm) > 0 for norm in S0States.load(tmp_path).norms().values())
