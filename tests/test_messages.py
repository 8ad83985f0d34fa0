"""Messages say what is wrong, where, and what to do. Also: behaviour that must not depend on circumstances."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from cases import BACKENDS, MAKERS
from models import EOS, MODELS, every_family, random_states, tokenizer, tokens
from surroundings import ROOT, python
from torch import nn

from s0kernels import S0Config, S0States, S0Trainer, swap_modules
from s0kernels.cli import main
from s0kernels.tuning.batches import make_batches
from s0kernels.tuning.data import Example, read_examples

PAIRS = [{"prompt": "Q: 2+2?\nA:", "completion": " 4"}, {"prompt": "a", "completion": "bc"}]


def ending():
    """A tokenizer that appends an end token to every text."""
    from tokenizers.processors import TemplateProcessing

    tok = tokenizer()
    tok.backend_tokenizer.post_processor = TemplateProcessing("$A <eos>", special_tokens=[("<eos>", EOS)])
    assert tok("a")["input_ids"][-1] == EOS
    return tok


def test_an_end_token_is_not_learned_and_not_read_before_going_on(monkeypatch):
    assert read_examples(PAIRS, ending(), 100) == read_examples(PAIRS, tokenizer(), 100)
    pair = ("Q: 1\nA: 2", 6)
    assert read_examples([pair], ending(), 100) == read_examples([pair], tokenizer(), 100)
    written = ("ends itself<eos>", 4)  # an end token written by the user is an ordinary token
    ids = read_examples([written], ending(), 100)[0].ids
    assert ids == tokenizer()(written[0])["input_ids"]
    plain, other = (S0Trainer(MODELS["falcon"](), tok) for tok in (tokenizer(), ending()))
    options = {"max_new_tokens": 8, "do_sample": False}
    assert other.generate(["Q: 1", "ab"], **options) == plain.generate(["Q: 1", "ab"], **options)


def test_a_begin_token_stays():
    from tokenizers.processors import TemplateProcessing

    tok = tokenizer()
    special = [("<pad>", 0), ("<eos>", EOS)]
    tok.backend_tokenizer.post_processor = TemplateProcessing("<pad> $A <eos>", special_tokens=special)
    expected = [0, *tokenizer()("abc")["input_ids"]]
    assert read_examples([{"prompt": "ab", "completion": "c"}], tok, 100) == [Example(expected, 3)]


def test_the_subfolder_is_the_tokenizers_too(tmp_path):
    MODELS["falcon"]().save_pretrained(tmp_path / "inner")
    tokenizer().save_pretrained(tmp_path / "inner")
    trainer = S0Trainer.from_pretrained(str(tmp_path), subfolder="inner")
    assert trainer.tokenizer("ab")["input_ids"] == tokenizer()("ab")["input_ids"]


@every_family
def test_nothing_depends_on_the_default_dtype(name):
    def learned():
        trainer = S0Trainer(model, tokenizer(), S0Config(n_steps=3))
        trainer.train(PAIRS, progress=False)
        return trainer

    model = MODELS[name]()
    expected = learned()
    for dtype in (torch.bfloat16, torch.float64):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            found = learned()
        finally:
            torch.set_default_dtype(before)
        assert [entry["loss"] for entry in found.history] == [entry["loss"] for entry in expected.history]
        for layer in expected.states:
            assert found.states[layer].dtype == torch.float32
            assert torch.equal(found.states[layer], expected.states[layer])


@pytest.mark.parametrize("op", sorted(MAKERS))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [None, [3, 0, 8]], ids=["dense", "packed"])
def test_scans_do_not_depend_on_the_default_device_or_dtype(op, backend, lengths):
    problem = MAKERS[op](11, state="bank", lengths=lengths).to(torch.float32)
    weights = problem.weights()
    expected = problem.gradients(backend, weights)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = problem.gradients(backend, weights)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, truth in expected.items():
        assert torch.equal(found[name], truth), name


def test_states_and_batches_do_not_depend_on_the_default_device(tmp_path):
    model = swap_modules(MODELS["falcon"]())
    states, ids = random_states(model, tasks=2), tokens(2, 9)
    examples = read_examples(PAIRS, tokenizer(), 100)
    states.attach(model, tasks=1)
    losses = [float(b.losses(model).detach()) for b in make_batches(examples, 1, False, model, 0, torch.device("cpu"))]
    states.attach(model, tasks=[1, 0])
    expected = model(ids).logits
    states.save(tmp_path)
    with torch.device("meta"):
        states.attach(model, tasks=[1, 0])
        assert S0States.for_model(model)[states.layers[0]].device.type == "cpu"
        batches = make_batches(examples, 1, False, model, 0, torch.device("cpu"))
        loaded = S0States.load(tmp_path, model)
    assert torch.equal(model(ids).logits, expected)
    states.attach(model, tasks=1)
    assert [float(batch.losses(model).detach()) for batch in batches] == losses
    assert torch.equal(loaded[states.layers[0]][0], states[states.layers[0]][0])


class Cut(nn.Module):
    """A layer without a gradient, like some 4-bit or 8-bit layers on a CPU."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments, **options):
        with torch.no_grad():
            return self.inner(*arguments, **options)


@every_family
@pytest.mark.parametrize("where", ["above the first", "above all"])
def test_a_state_without_a_gradient_is_named_before_the_first_step(name, where):
    model = MODELS[name]()
    trainer = S0Trainer(model, tokenizer(), S0Config(n_steps=2))
    layers = S0States.for_model(model).layers
    if where == "above all":
        model.set_output_embeddings(Cut(model.get_output_embeddings()))
        missing = layers
    else:
        mixer = next(
            module
            for module in model.modules()
            if getattr(module, "layer_idx", None) == layers[0] and hasattr(module, "A_log")
        )
        mixer.out_proj = Cut(mixer.out_proj)
        missing = layers[:1]
    seen = []
    with pytest.raises(RuntimeError, match=rf"no gradient reaches .* layers \[{', '.join(map(str, missing))}\]"):
        trainer.train(PAIRS, progress=False, callbacks=[lambda *entry: seen.append(entry)])
    assert not seen
    assert trainer.states is None


def test_a_model_without_a_tokenizer_is_no_fault_of_the_data(tmp_path):
    model = MODELS["falcon"]()
    with pytest.raises(TypeError, match=r"^S0Trainer: tokenizer must be the model's tokenizer, got None$"):
        S0Trainer(model, None).train(PAIRS)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model: cannot load a tokenizer from there .*S0Trainer\(model, tokenizer\)"):
        S0Trainer.from_pretrained(str(tmp_path / "model"))


def test_a_path_that_is_no_model_is_called_so(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path, "is not a model: it is a directory without config.json"),
        (tmp_path / "file", "is not a model: it is a file"),
        (tmp_path / "none", "no such directory"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            S0Trainer.from_pretrained(str(path))
        assert main(["generate", str(path), "a"]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert str(path) in error


MISSING = "import sys; sys.modules[{0!r}] = None; {1}"


@pytest.mark.parametrize(
    ("library", "code", "extra"),
    [
        ("tqdm", "import s0kernels; s0kernels.S0Trainer", "hf"),
        ("tqdm", "from s0kernels.cli import main; sys.exit(main(['tune', 'm', '.', 'o']))", "hf"),
        ("tqdm", "from s0kernels.cli import main; sys.exit(main(['evaluate', 'm', 'p']))", "hf"),
        ("triton", "from s0kernels.cli import main; sys.exit(main(['aot']))", "dev"),
    ],
)
def test_what_is_not_installed_is_named_with_a_command_that_helps(library, code, extra, tmp_path):
    (tmp_path / "data.jsonl").touch()
    done = python("-c", MISSING.format(library, code), cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"{library} is not installed; pip install " in last
    assert f"[{extra}]" in last
    if (ROOT / "pyproject.toml").is_file():  # from the source tree, in any current directory
        assert f"--no-build-isolation -e '{ROOT}[{extra}]'" in last


INTERRUPTED = """
import os, signal, sys
from s0kernels import S0Trainer, cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
train = S0Trainer.train


def interrupted(self, data, **options):
    def stop(entry, states):
        if entry["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    return train(self, data, **options, callbacks=[stop])


S0Trainer.train = interrupted
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("checkpoint", [True, False])
def test_an_interruption_ends_in_one_line_that_says_how_to_go_on(tmp_path, checkpoint):
    MODELS["falcon"]().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    command = ["tune", "model", "data.jsonl", "out", *(["--checkpoint", "run.ckpt"] if checkpoint else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("s0kernels tune: interrupted; ")
    expected = "the same command goes on from run.ckpt" if checkpoint else "--checkpoint FILE"
    assert expected in last
