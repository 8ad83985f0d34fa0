"""Files with other processes, and on file systems that refuse some operations; checks before the work."""

import contextlib
import errno
import math
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import MODELS, tokenizer
from surroundings import ROOT

from s0kernels import S0Config, S0States, S0Trainer, swap_modules
from s0kernels.cli import main
from s0kernels.files import check_output, read_tensors, replace_file
from s0kernels.modules.swap import find_site
from s0kernels.states import states_size

WRITER = """
import sys, time, torch
from s0kernels import S0Config, S0States

end = time.monotonic() + 3
number = 0
while time.monotonic() < end:
    number += 1  # of two models, with different layers and sizes: the files differ in length
    states = {layer: torch.full((1, 2, 8 + 8 * (number % 2), 64), float(number)) for layer in range(4 + number % 2)}
    S0States(states, "mamba2").save(sys.argv[1], config=S0Config(alpha=float(number)))
"""


def test_loading_beside_a_save_gives_one_save(tmp_path):
    S0States({0: torch.zeros(1, 2, 8, 64)}, "mamba2").save(tmp_path, config=S0Config(alpha=0.0))
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT)
    seen = []
    while writer.poll() is None:
        states, config = S0States.load_with_config(tmp_path)
        values = {float(x) for layer in states for x in (states[layer].detach().min(), states[layer].detach().max())}
        assert values == {config["alpha"]}
        seen += values
    assert writer.returncode == 0
    assert len(set(seen)) > 5, "the two did not meet"


def refuse(function, code, *, unless=lambda *arguments: False):
    def refusing(*arguments, **options):
        if unless(*arguments):
            return function(*arguments, **options)
        raise OSError(code, os.strerror(code))

    return refusing


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["chmod", "fsync", "replace"])
def test_a_mount_that_refuses_gets_the_states_and_a_warning(tmp_path, monkeypatch, call, code):
    old, new = (S0States({0: torch.randn(1, 2, 8, 64)}, "mamba2") for _ in range(2))
    old.save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse(getattr(os, call), code))
        with pytest.warns(match=str(tmp_path)) if call != "chmod" else contextlib.nullcontext():
            new.save(tmp_path, config=S0Config(alpha=0.3))
    states, config = S0States.load_with_config(tmp_path)
    assert torch.equal(states[0], new[0])
    assert config["alpha"] == 0.3
    assert sorted(os.listdir(tmp_path)) == ["config.json", "meta.json", "states.safetensors"]


def test_files_have_the_permissions_of_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        S0States({0: torch.zeros(1, 2, 8, 64)}, "mamba2").save(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}


def test_a_failure_names_the_file_and_loses_nothing(tmp_path, monkeypatch):
    states = S0States({0: torch.randn(1, 2, 8, 64)}, "mamba2")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse(os.fsync, errno.ENOSPC))
        with pytest.raises(OSError, match=r"No space left.*config\.json"):
            states.save(tmp_path)
        assert not os.listdir(tmp_path)
    with monkeypatch.context() as patch:  # neither a move nor a write works: the content stays beside it
        patch.setattr(os, "replace", refuse(os.replace, errno.EPERM))
        patch.setattr(Path, "write_bytes", refuse(Path.write_bytes, errno.EACCES))
        with pytest.raises(PermissionError, match=r"the new content is in .*\.tmp.*states.safetensors"):
            states.save(tmp_path)
    (left,) = tmp_path.glob(".states.safetensors.*.tmp")
    assert torch.equal(read_tensors(left)[0]["0"], states[0][0])


def test_a_config_of_somebody_elses_does_not_cost_the_states(tmp_path, monkeypatch):
    states = S0States({0: torch.randn(1, 2, 8, 64)}, "mamba2")
    theirs = refuse(os.open, errno.EACCES, unless=lambda path, *_: "config.json" not in str(path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", theirs)
        with pytest.warns(match=r"config\.json'?; the states beside it were written"):
            states.save(tmp_path, config=S0Config(alpha=0.2))
    loaded, config = S0States.load_with_config(tmp_path)
    assert torch.equal(loaded[0], states[0])
    assert config["alpha"] == 0.2


def test_names_that_are_patterns_are_swept(tmp_path):
    leftover = tmp_path / ".run[1].ckpt.0123.tmp"
    leftover.write_bytes(b"")
    os.utime(leftover, (0, 0))
    replace_file(tmp_path / "run[1].ckpt", b"new")
    assert os.listdir(tmp_path) == ["run[1].ckpt"]


def test_whether_a_directory_takes_the_states_is_known_first(tmp_path, monkeypatch):
    check_output(tmp_path / "new", 1000)
    assert os.listdir(tmp_path / "new") == []
    with pytest.raises(OSError, match=r"need 1000000000.0 MB.*new"):
        check_output(tmp_path / "new", 10**15)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        check_output(tmp_path / "file", 0)
    monkeypatch.setattr(os, "open", refuse(os.open, errno.EROFS))
    with pytest.raises(OSError, match=r"Read-only.*new"):
        check_output(tmp_path / "new", 0)


@pytest.mark.parametrize("problem", ["room", "writing"])
def test_tune_asks_before_it_loads_the_model(tmp_path, monkeypatch, capsys, problem):
    model = MODELS["falcon"]()
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    wanted = sum(4 * math.prod(shape) for shape in find_site(swap_modules(model)).shapes.values())
    assert states_size(str(tmp_path / "model"), 3) == 3 * wanted
    if problem == "room":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=wanted - 1))
    else:
        monkeypatch.setattr(os, "open", refuse(os.open, errno.EROFS, unless=lambda path, *_: "out" not in str(path)))
    monkeypatch.setattr(S0Trainer, "from_pretrained", lambda *_: pytest.fail("the model was loaded"))
    assert main(["tune", *(str(tmp_path / name) for name in ("model", "data.jsonl", "out"))]) == 1
    assert str(tmp_path / "out") in capsys.readouterr().err
