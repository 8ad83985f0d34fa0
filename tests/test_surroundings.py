"""The surroundings of the library: imports, other packages on the path, the command line, the package itself."""

import importlib
import io
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import NO_CPU_KERNELS
from models import MODELS, random_states, tokenizer
from surroundings import FLA, ROOT, python

import s0kernels
from s0kernels import S0Config, hardware, swap_modules, versions
from s0kernels.cli import main
from s0kernels.modules import FAMILIES


def test_ops_need_torch_alone():
    """They can be imported and run if no other dependency of the package can be imported."""
    code = """
import sys
for name in ("transformers", "triton", "safetensors", "accelerate", "tqdm"):
    sys.modules[name] = None  # importing it is an ImportError
import torch
from s0kernels.ops import gated_delta_rule, ssd
x = torch.randn(1, 3, 2, 4, requires_grad=True)
gated_delta_rule(x, x, x, -torch.rand(1, 3, 2), torch.rand(1, 3, 2)).output.sum().backward()
ssd(x, torch.rand(1, 3, 2), -torch.rand(2), x, x).output.sum().backward()
try:
    from s0kernels import S0Trainer
except ImportError as error:
    print("ran,", error)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ran,")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU, and there is one")
@pytest.mark.skipif(not FLA.is_dir(), reason="flash-linear-attention is not in .deps/fla; `make test` puts it there")
def test_flash_linear_attention_on_a_machine_without_a_gpu():
    """transformers binds its kernels at import and fails on the CPU. The swapped model works."""
    code = """
import torch, fla
from models import MODELS, random_states, tokens
from s0kernels import swap_modules, swap_report
ids = tokens(2, 12)
for name in ("qwen", "falcon"):
    model = MODELS[name]()
    if name == "qwen":
        try:
            model(ids)
        except RuntimeError as error:
            assert "active drivers" in str(error), error
        else:
            raise SystemExit("the original ran: this test shows nothing")
    report = swap_report(swap_modules(model))
    print(report)
    states = random_states(model)
    with states.attached(model):
        model(ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        assert states[0].grad.abs().max() > 0
        print(name, model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape)
"""
    done = python("-c", code, path=FLA)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.Size([2, 15])") == 2
    assert "prefill: not checked, Qwen3_5GatedDeltaNet itself fails here: RuntimeError: 0 active drivers" in done.stdout
    assert "Qwen3_5GatedDeltaNet from S0, in pieces with a cache: " in done.stdout
    assert "FalconH1Mixer beside its original, prefill: " in done.stdout
    assert done.stdout.count("not checked") == 2


def test_untouched_mixers_of_the_tests_run_in_pytorch(tmp_path):
    """This holds even if kernel packages can be imported."""
    (tmp_path / "mamba_ssm").mkdir()
    package = (
        "class ops:\n class triton:\n  class selective_state_update:\n   def selective_state_update(*a, **k): 1 / 0\n"
    )
    package += "  class ssd_combined:\n   def mamba_chunk_scan_combined(*a, **k): 1 / 0\n"
    (tmp_path / "mamba_ssm" / "__init__.py").write_text(package)
    code = "{}\nfrom models import MODELS, tokens\nMODELS['falcon']().generate(tokens(2, 12), max_new_tokens=2)"
    done = python("-c", code.format("import conftest, mamba_ssm"), path=tmp_path)
    assert done.returncode == 0, done.stderr
    done = python("-c", code.format("import mamba_ssm"), path=tmp_path)
    assert "ZeroDivisionError" in done.stderr, "this test shows nothing"


def test_env_says_what_is_usable():
    done = python("-m", "s0kernels", "env")
    assert done.returncode == 0, done.stderr
    for word in (
        "torch",
        "transformers",
        "reference",
        "gated_delta_rule_step",
        "the default here",
        s0kernels.__version__,
    ):
        assert word in done.stdout


def test_the_console_script_is_the_module():
    script = Path(sys.executable).with_name("s0kernels")
    for command, name in (([script], "s0kernels"), ([sys.executable, "-m", "s0kernels"], "python -m s0kernels")):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: {name} [-h]")


def test_tune_and_generate(tmp_path, capsys, monkeypatch):
    MODELS["falcon"]().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    lines = [{"prompt": "Q: 1+1\nA:", "completion": " 2"}, {"prompt": "Q: 2+2\nA:", "completion": " 4"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    model, tune = str(tmp_path / "model"), ["tune", str(tmp_path / "model"), str(tmp_path / "data.jsonl")]
    done = python("-m", "s0kernels", *tune, str(tmp_path / "out"), "--steps", "2", "--lr", "0.01", "--alpha", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("loss ")
    assert S0Config.load(tmp_path / "out" / "config.json") == S0Config(n_steps=2, lr=0.01, alpha=1.0)

    def run(*arguments: str, standard_input: str = "") -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO(standard_input))
        code = main(arguments)
        return code, *capsys.readouterr()

    def generated(*arguments: str, **keywords) -> list[str]:
        code, out, err = run("generate", model, *arguments, "--json", "--max-new-tokens", "4", **keywords)
        assert code == 0, err
        return json.loads(out)

    states = ["--states", str(tmp_path / "out")]
    assert generated("Q: 3+3\nA:", *states) == generated(*states, standard_input=json.dumps(["Q: 3+3\nA:"]))
    assert len(generated("a", "b")) == 2

    random_states(swap_modules(MODELS["qwen"]())).save(tmp_path / "other")
    code, _, err = run("generate", model, "x", "--states", str(tmp_path / "other"))
    assert code == 1
    assert err.strip().splitlines()[-1].startswith("s0kernels generate: S0States: the states are for arch")
    (tmp_path / "file").touch()
    code, _, err = run(*tune, str(tmp_path / "file"))
    assert code == 1
    assert "file" in err
    assert "S0 tuning" not in err, "refused before the work is done"
    code, _, err = run("generate", model)
    assert code == 1
    assert "standard input must hold a JSON list" in err
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}\n')
    code, _, err = run(*tune, str(tmp_path / "out"))
    assert code == 1
    assert "data.jsonl:1 must have prompt and completion" in err


@pytest.mark.slow
def test_options_of_the_demonstration():
    """The options of the script are available, including --help."""
    for options, code, text in (
        (["--help"], 0, "--solutions"),
        (["--samples", "0"], 2, "--samples must be at least 1"),
    ):
        done = python(str(ROOT / "examples" / "tiny" / "demo.py"), *options)
        assert done.returncode == code
        assert text in done.stdout + done.stderr


def test_tune_and_generate_with_several_tasks_and_a_checkpoint(tmp_path, capsys):
    MODELS["qwen"]().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for task in ("math", "code"):
        (tmp_path / "data" / f"{task}.jsonl").write_text(json.dumps({"prompt": task, "completion": " 2"}))
    tune = ["tune", str(tmp_path / "model"), str(tmp_path / "data"), str(tmp_path / "out")]
    tune += ["--steps", "3", "--checkpoint", str(tmp_path / "run"), "--tokens-per-batch", "5"]
    outputs = []
    for _ in range(2):  # the second time there is nothing to do
        assert main(tune) == 0
        outputs.append(capsys.readouterr())
    assert outputs[0].out == outputs[1].out
    assert "3 of 3 steps" in outputs[1].err
    generate = ["generate", str(tmp_path / "model"), "a", "--max-new-tokens", "3"]
    states = ["--states", str(tmp_path / "out")]
    assert main([*generate, *states, "--task", "code"]) == 0
    for wrong, message in (
        ([*generate, *states], "task must name one of ['code', 'math']"),
        ([*generate, "--task", "code"], "--task names one of the tasks in --states, which is missing"),
        (["tune", str(tmp_path / "model"), str(tmp_path / "nothing"), str(tmp_path / "new")], "nothing"),
        (["tune", str(tmp_path / "model"), str(tmp_path / "out"), str(tmp_path / "new")], "no .jsonl files"),
    ):
        assert main(wrong) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_public_names():
    assert set(s0kernels.__all__) <= set(dir(s0kernels))
    for name in s0kernels.__all__:
        assert getattr(s0kernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'S1Trainer'"):
        _ = s0kernels.S1Trainer
    assert (Path(s0kernels.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("version", ["5.16.4", "5.25.0", "6.0.0.dev0"])
def test_untested_versions_of_transformers_get_a_warning_that_says_what_was_tested(version, monkeypatch):
    model = MODELS["qwen"]()
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.warns(UserWarning, match=rf"tested with transformers 5.17.0, 5.23.0, 5.24.0, not {version}"):
        swap_modules(model)


@pytest.fixture
def quick_check(monkeypatch):
    from s0kernels.bench import check
    from s0kernels.ops import registry

    backends = tuple(name for name in registry.ORDER if name != "triton")  # Triton's interpreter would take minutes
    monkeypatch.setattr(registry, "ORDER", backends)
    monkeypatch.setattr(check, "DRAWS", 1)
    monkeypatch.setattr(check, "DTYPES", (torch.float32,))


@pytest.mark.parametrize(
    ("module", "name", "results"),
    [
        (None, None, None),
        ("torch_chunked", "ssd_backward", "B"),
        ("torch_chunked", "gated_delta_rule_step", None),
        ("cpu", "ssd_mixer_step", None),
    ],
)
def test_check_finds_a_backend_that_computes_something_else(module, name, results, monkeypatch, capsys, quick_check):
    """Every op has a row with its public name."""
    from s0kernels.ops import registry

    if module == "cpu" and NO_CPU_KERNELS:
        pytest.skip(f"backend cpu {NO_CPU_KERNELS}")
    if module:
        module = importlib.import_module(f"s0kernels.backends.{module}")
        right = getattr(module, name)

        def wrong(*arguments, **options):
            found = right(*arguments, **options)
            return found * 1.001 if results is None else found | {results: 1.001 * found[results]}

        monkeypatch.setattr(module, name, wrong)
    assert main(["check"]) == (1 if module else 0)
    said = capsys.readouterr()
    rows = [line.replace(",", " ").split() for line in said.out.splitlines()[2:]]
    assert f"checking: {len(rows)} of {len(rows)} results" in said.err
    assert {row[1] for row in rows if row[-1] == "FAILED"} == ({name.replace("_backward", "")} if module else set())
    assert {row[1] for row in rows} >= {*registry.OPS[:4]}
    assert NO_CPU_KERNELS or {row[1] for row in rows} == {*registry.OPS}


def test_check_goes_on_after_a_backend_that_fails(monkeypatch, capsys, quick_check):
    from s0kernels.backends import torch_chunked

    def fails(*arguments, **options):
        raise RuntimeError("out of resources: shared memory")

    monkeypatch.setattr(torch_chunked, "ssd_step", fails)
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert (
        [line for line in lines if "FAILED" in line] == [line for line in lines if "shared memory  nan" in line] != []
    )
    failed = next(i for i, line in enumerate(lines) if "FAILED" in line)
    assert "gated_delta_rule, nearly equal keys" in lines[-1] != lines[failed], "what comes after it was checked, too"


def test_the_table_of_versions_is_what_everybody_reads():
    document, makefile = ((ROOT / name).read_text() for name in ("docs/supported.md", "Makefile"))
    for package, tested in versions.TESTED.items():
        assert f"| {package} | {', '.join(tested)} |" in document
        assert versions.PINNED.get(package, tested[0]) in tested
    pins = [f"{package}=={version}" for package, version in versions.PINNED.items()]
    assert ", ".join(pin.replace("==", " ") for pin in pins) in " ".join(document.split())
    done = python(str(ROOT / "s0kernels" / "versions.py"), "pins")
    assert done.stdout.split() == pins
    done = python(str(ROOT / "s0kernels" / "versions.py"), "others", "transformers")
    assert {*done.stdout.split(), versions.PINNED["transformers"]} == set(versions.TESTED["transformers"])
    assert "$(VERSIONS) pins" in makefile
    assert "$(VERSIONS) others transformers" in makefile
    requirements = (ROOT / "requirements.txt").read_text()
    assert not any(f"\n{package}=" in requirements for package in versions.PINNED), "pinned in two places"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={versions.TESTED['Python'][0]}"
    assert f"torch>={versions.TESTED['torch'][0].rpartition('.')[0]}" in project["dependencies"]
    assert versions.installed("transformers")["transformers"] in versions.TESTED["transformers"]


def test_the_documents_have_every_family():
    table = (ROOT / "docs" / "supported.md").read_text().partition("## Models")[2].partition("##")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row[1] for row in rows] == [f"`{family.mixer}`" for family in FAMILIES]
    for row, family in zip(rows, FAMILIES, strict=True):
        assert family.name.partition(" ")[0] in row[0]


def test_what_is_known_of_a_gpu():
    """`env` and `check` print it, also for a GPU that was never tried, and with a torch for ROCm."""
    nvidia, amd = SimpleNamespace(major=12, minor=0), SimpleNamespace(major=9, minor=4, gcnArchName="gfx942:sramecc+")
    assert hardware.target_name(nvidia, None) == "sm_120"
    assert hardware.target_name(amd, "7.1") == "gfx942"
    assert hardware.experience("sm_90") == "the kernels ran on a GPU of this kind (an H200)"
    assert "never run" in hardware.experience("sm_80")
    assert "nobody has tried" in hardware.experience("gfx90a")


@pytest.mark.parametrize("command", ["env", "check"])
def test_commands_say_what_is_known_of_a_gpu(command, monkeypatch, capsys, quick_check):
    from s0kernels import cli
    from s0kernels.bench import check

    monkeypatch.setattr(check, "rows", lambda: iter([check.Row("cuda:0", "ssd", "triton", "float32", 0.1, 0.2, "A")]))
    monkeypatch.setattr(cli, "_gpus", lambda: ["NVIDIA L4, sm_89: a word on it"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main([command]) == 0
    assert "NVIDIA L4, sm_89: a word on it" in capsys.readouterr().out
