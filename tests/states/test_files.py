"""Files of learned states: the layout of `s0-tuning`, refusals, and files changed at random."""

import contextlib
import copy
import json
import os
import struct
import time
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import MODELS, every_family, falcon, qwen, random_states
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from surroundings import ROOT, python

from s0kernels import S0Config, S0States, swap_modules
from s0kernels.states.files import read_directory

METHOD = ROOT / ".deps" / "s0-tuning"


def test_the_layout_is_that_of_s0_tuning(tmp_path):
    model = swap_modules(qwen())
    states = random_states(model, tasks=2)
    states.save(tmp_path / "deep" / "a", task=1, config=S0Config(alpha=0.2))
    folder = tmp_path / "deep" / "a"
    assert sorted(os.listdir(folder)) == ["config.json", "meta.json", "states.safetensors"]
    tensors = load_file(folder / "states.safetensors")
    assert sorted(tensors) == ["0", "1", "3"]
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, states[int(key)][1])
    config = json.loads((folder / "config.json").read_text())
    assert config == S0Config(alpha=0.2).to_dict()
    assert len(config) == 7
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["arch"] == "gated_delta_net"
    assert meta["recurrent_layers"] == [0, 1, 3]
    assert meta["state_shape"] == [4, 8, 12]
    assert meta["base_model"] == states.base_model
    assert list(meta["versions"]) == ["s0kernels", "torch", "transformers"]
    with safe_open(folder / "states.safetensors", "pt") as reader:
        header = json.loads(reader.metadata()["s0"])
    assert header == {"meta": meta, "config": config}

    for target in (None, model):
        loaded = S0States.load(folder, target)
        assert loaded.tasks == 1
        assert all(torch.equal(loaded[layer][0], states[layer][1]) for layer in states)
    (folder / "meta.json").unlink()
    (folder / "config.json").unlink()
    assert read_directory(folder)[1:] == (meta, config), "the tensors' file is enough"


def test_reads_what_s0_tuning_writes(tmp_path):
    """Files as that package writes them: no header of ours."""
    model = swap_modules(falcon())
    tensors = {str(i): torch.randn(6, 8, 12) for i in range(3)}
    save_file(tensors, tmp_path / "states.safetensors")
    meta = {"arch": "mamba2", "recurrent_layers": [0, 1, 2], "state_shape": [6, 8, 12]}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "config.json").write_text(json.dumps(S0Config().to_dict()))
    states = S0States.load(tmp_path, model)
    assert all(torch.equal(states[i][0], tensors[str(i)]) for i in range(3))
    (tmp_path / "meta.json").unlink()  # that package does not need it
    assert S0States.load(tmp_path, model).arch == "mamba2"
    with pytest.raises(ValueError, match="names no arch"):
        S0States.load(tmp_path)


def test_what_does_not_fit_the_model_is_refused_with_both_sides(tmp_path):
    models = {
        "qwen": qwen(),
        "falcon": falcon(),
        "wider": qwen(linear_value_head_dim=16),
        "fewer": qwen(layer_types=["linear_attention", "full_attention"], num_hidden_layers=2),
        "longer": falcon(mamba_d_state=20),
        "lower": falcon(num_hidden_layers=2),
    }
    for name, model in models.items():
        random_states(swap_modules(model)).save(tmp_path / name)
    for name, target, message in (
        ("falcon", "qwen", "'mamba2'.*'gated_delta_net'"),
        ("wider", "qwen", r"\[4, 8, 16\].*\[4, 8, 12\]"),
        ("fewer", "qwen", r"\[0\].*\[0, 1, 3\]"),
        ("qwen", "falcon", "'gated_delta_net'.*'mamba2'"),
        ("longer", "falcon", r"\[6, 8, 20\].*\[6, 8, 12\]"),
        ("lower", "falcon", r"\[0, 1\].*\[0, 1, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            S0States.load(tmp_path / name, models[target])
        with pytest.raises(ValueError, match=message):
            S0States.load(tmp_path / name).attach(models[target])


def test_damaged_files_are_refused(tmp_path):
    model = swap_modules(qwen())
    with pytest.raises(FileNotFoundError, match=r"states.safetensors"):
        S0States.load(tmp_path / "nothing", model)
    good = {str(i): torch.zeros(4, 8, 12) for i in (0, 1, 3)}
    meta = {"arch": "gated_delta_net", "recurrent_layers": [0, 1, 3], "state_shape": [4, 8, 12]}

    whole = json.dumps(meta)

    def write(tensors=good, meta=whole, cut=None):
        save_file(tensors, tmp_path / "states.safetensors")
        if cut is not None:
            content = (tmp_path / "states.safetensors").read_bytes()
            (tmp_path / "states.safetensors").write_bytes(content[:cut])
        (tmp_path / "meta.json").write_text(meta)

    write()
    S0States.load(tmp_path, model)
    for options, message in (
        ({"cut": 100}, "not a readable safetensors file"),
        ({"cut": 0}, "not a readable safetensors file"),
        ({"meta": "{"}, "not valid JSON"),
        ({"meta": "[]"}, "JSON object"),
        ({"meta": '{"arch": 3}'}, "names no arch"),
        ({"tensors": {"zero": torch.zeros(2)}}, "layer index"),
        ({"tensors": {**good, "3": torch.full((4, 8, 12), float("nan"))}}, "layer 3.*finite"),
        ({"tensors": {**good, "3": torch.zeros(4, 12, 8)}}, r"layer 3 has shape \[4, 12, 8\].*\[4, 8, 12\]"),
        ({"tensors": {"0": torch.zeros(4, 8, 12)}}, r"layers \[0\].*\[0, 1, 3\]"),
        ({"tensors": {**good, "03": torch.zeros(4, 8, 12)}}, "layer index"),
        ({"tensors": {"0": torch.zeros(4, 8, 12, dtype=torch.int32)}, "meta": '{"arch": "mamba2"}'}, "layer 0.*finite"),
        ({"meta": '{"arch": "gated_delta_net", "recurrent_layers": 3}'}, "recurrent_layers.*list of integers, got 3"),
        ({"meta": '{"arch": "gated_delta_net", "state_shape": ["a"]}'}, "state_shape.*list of integers"),
        ({"meta": "[" * 100_000}, "not valid JSON"),
        ({"meta": '{"arch": ' + "9" * 5000 + "}"}, "not valid JSON"),
        ({"meta": '{"arch": "lora"}'}, "arch must be one of.*got 'lora'"),
    ):
        write(**options)
        with pytest.raises(ValueError, match=message):
            S0States.load(tmp_path, model)


def test_what_killed_writers_left_is_swept_away_after_a_while(tmp_path):
    states = random_states(swap_modules(qwen()))
    for name, age in ((".states.safetensors.abc.tmp", 7200), (".states.safetensors.def.tmp", 60)):
        (tmp_path / name).write_bytes(b"half a file")
        then = time.time() - age
        os.utime(tmp_path / name, (then, then))
    states.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        ".states.safetensors.def.tmp",  # another process may be writing it
        "config.json",
        "meta.json",
        "states.safetensors",
    ]


@pytest.mark.parametrize("failing", ["config.json", "meta.json", "states.safetensors"])
def test_a_save_that_fails_leaves_the_old_states(tmp_path, monkeypatch, failing):
    model = swap_modules(qwen())
    old, new = random_states(model, seed=1), random_states(model, seed=2)
    old.save(tmp_path)
    replace = os.replace

    def fail(source, target):
        if os.path.basename(target) == failing:
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        new.save(tmp_path, config=S0Config(alpha=0.9))
    with pytest.warns(match="differs from the header") if failing != "config.json" else contextlib.nullcontext():
        tensors, _, config = read_directory(tmp_path)
    assert all(torch.equal(tensors[layer], old[layer][0]) for layer in old)
    assert config["alpha"] is None
    assert sorted(os.listdir(tmp_path)) == ["config.json", "meta.json", "states.safetensors"]


@every_family
def test_states_learned_on_another_model_get_a_warning(name, tmp_path):
    model, other = (swap_modules(MODELS[name]().bfloat16().float()) for _ in range(2))
    model.name_or_path = "some/model"  # like from_pretrained does
    states = random_states(model)
    states.save(tmp_path)
    assert states.base_model["name"] == "some/model"
    for same in (model, copy.deepcopy(model).bfloat16(), copy.deepcopy(model).half(), other, None):
        assert S0States.load(tmp_path, same).base_model == states.base_model
    next(module for module in other.modules() if hasattr(module, "conv1d")).conv1d.weight.data[0] *= 1.5
    with pytest.warns(UserWarning, match=r"learned on some/model \(weights \w{16}\).*one without a name \(weights \w"):
        S0States.load(tmp_path, other)


def test_headers_of_any_size(tmp_path):
    """Headers longer than the file, or longer than safetensors allows, or with tensors that are not in the file."""
    model = swap_modules(qwen())
    random_states(model).save(tmp_path)
    file = tmp_path / "states.safetensors"
    whole = file.read_bytes()
    for content in (
        struct.pack("<Q", 2**63) + whole[8:],
        struct.pack("<Q", 200_000_000) + whole[8:],
        struct.pack("<Q", 150_000_000) + b"{" + b" " * 150_000_000 + whole[8:],
        struct.pack("<Q", 2**20) + whole[8:],
        struct.pack("<Q", 0) + whole[8:],
        b'\x50\0\0\0\0\0\0\0{"0": {"dtype": "F32", "shape": [1000000, 1000000], "data_offsets": [0, 4000000000000]}}',
        b"PK\x03\x04" + whole,
        b"\x80\x04cos\nsystem\n(S'touch broken'\ntR.",  # a pickle that would run a command
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            S0States.load(tmp_path, model)


@pytest.mark.slow
@pytest.mark.skipif(not METHOD.is_dir(), reason="s0-tuning is not in .deps/s0-tuning; `make test` puts it there")
@every_family
def test_files_go_both_ways_between_s0_tuning_and_here(name, tmp_path):
    code = f"""
import torch
from models import MODELS, random_states
from s0.trainer import S0Trainer as Theirs
from s0kernels import S0Config, S0States, swap_modules
model = MODELS[{name!r}]()
theirs = Theirs(model, tokenizer=None)
states = random_states(swap_modules(MODELS[{name!r}]()))
states.save("ours", config=S0Config(alpha=0.25, n_steps=7))
theirs.load("ours")
assert theirs.config.to_dict() == S0Config(alpha=0.25, n_steps=7).to_dict()
assert sorted(theirs._states) == states.layers
assert all(torch.equal(theirs._states[layer], states[layer][0]) for layer in states)
theirs.save("theirs")
for target in (None, swap_modules(MODELS[{name!r}]())):
    loaded = S0States.load("theirs", target)
    assert all(torch.equal(loaded[layer], states[layer]) for layer in states)
    assert loaded.arch == states.arch
print("both ways")
"""
    done = python("-c", code, path=METHOD, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "both ways" in done.stdout


def test_a_save_that_is_killed_leaves_the_old_states_or_the_new(tmp_path):
    """Save two states in turn two hundred times, each in a process that is killed after a random time."""
    code = """
import os, random, signal, time
import torch
from s0kernels.config import S0Config
from s0kernels.states import S0States, files
torch.set_num_threads(1)
files._SETTLED, files._PATIENCE = 0.01, 0.05  # nobody else saves, so there is nothing to wait for
kinds = [S0States({layer: torch.full((1, 8, 32, 64), float(i)) for layer in (0, 3)}, "mamba2") for i in (1, 2)]
kinds[0].save("states", config=S0Config(alpha=1.0))

def start_saving(kind):
    child = os.fork()
    if not child:
        kinds[kind].save("states", config=S0Config(alpha=kind + 1.0))
        os._exit(0)
    return child

span = 0.01  # grows after every kill and shrinks after every save that got through, so that about half are killed
found, killed = [0, 0, 0], 0
random.seed(0)
for i in range(200):
    child = start_saving((i + 1) % 2)
    time.sleep(random.uniform(0, span))
    os.kill(child, signal.SIGKILL)
    dead = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    killed, span = killed + dead, span * (1.15 if dead else 0.87)
    tensors, meta, config = files.read_directory("states")
    value = float(tensors[0].flatten()[0])
    assert value in (1.0, 2.0) and all((tensor == value).all() for tensor in tensors.values())
    assert config["alpha"] == value
    found[int(value)] += 1
print(killed, found[1], found[2])
"""
    done = python("-W", "ignore", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    killed, first, second = map(int, done.stdout.split())
    assert 20 < killed < 180
    assert first > 10
    assert second > 10


WORD = st.sampled_from([b'"0"', b'"1"', b"F32", b"I64", b"F8_E4M3", b"BOOL", b"6,8,12", b"[", b"null"])
_written: dict[str, bytes] = {}


def _files(folder) -> dict[str, bytes]:
    if not _written:
        random_states(swap_modules(falcon())).save(folder)
        _written.update({name: (folder / name).read_bytes() for name in os.listdir(folder)})
    return _written


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(choices=st.data())
def test_files_changed_at_random_are_read_or_refused(tmp_path, fuzzed, choices):
    """The only error is ValueError, and no state has a wrong shape or values that are not finite."""
    files = dict(_files(tmp_path))
    name = choices.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[name])
    header = 8 + struct.unpack("<Q", content[:8])[0] if name == "states.safetensors" else len(content)
    for _ in range(choices.draw(st.integers(1, 4))):
        reach = choices.draw(st.sampled_from([min(8, len(content)), min(header, len(content)), len(content)]))
        place = choices.draw(st.integers(0, max(0, reach - 1)))
        kind = choices.draw(st.sampled_from(["set", "cut", "drop", "insert", "swap word"]))
        if kind == "set" and content:
            content[place] = choices.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place:]
        elif kind == "drop":
            del content[place : place + choices.draw(st.integers(1, 9))]
        elif kind == "insert":
            content[place:place] = choices.draw(st.binary(max_size=9))
        else:
            old, new = choices.draw(WORD), choices.draw(WORD)
            content = bytearray(bytes(content).replace(old, new, 1))
    for other, whole in files.items():
        (tmp_path / other).write_bytes(bytes(content) if other == name else whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a changed meta.json differs from the header
        try:
            states = S0States.load(tmp_path, fuzzed)
        except ValueError:
            return
    for layer in states:
        assert states[layer].shape == (1, 6, 8, 12)
        assert states[layer].isfinite().all()


@pytest.fixture(scope="module")
def fuzzed():
    return swap_modules(falcon())
