"""benchmarks/quality: the protocol, its statistics, the methods, and the experiments on a few problems."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from models import MODELS, every_family, tokenizer

pytestmark = pytest.mark.slow  # tests of the benchmarks


pytest.importorskip("peft")
pytest.importorskip("scipy")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "quality"), str(ROOT / "examples" / "tiny")]

import experiments  # noqa: E402
import methods  # noqa: E402
import protocol  # noqa: E402
import run  # noqa: E402
import tables  # noqa: E402
from methods import S0, LoRA, Nothing, Prompt, StateOffset  # noqa: E402
from tasks import Item, Task, get_task  # noqa: E402
from tasks.boundary import make_problems  # noqa: E402
from test_tasks import scores  # noqa: E402

from s0kernels import S0Config, S0States, S0Trainer  # noqa: E402


def test_comparison():
    """The values are Welch's formula by hand: t = 3 / sqrt(1/3 + 4/3), 2.94 degrees of freedom."""
    found = protocol.compare([5.0, 6.0, 7.0], [1.0, 3.0, 5.0])
    assert (found.mean, found.deviation, found.delta) == (6.0, 1.0, 3.0)
    assert found.p == pytest.approx(0.10448, abs=1e-4)
    assert protocol.compare([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]).p == pytest.approx(0.0742, abs=1e-4)
    assert protocol.compare([1.0, 1.0], [1.0, 1.0]).p is None
    assert protocol.compare([1.0], [0.0, 2.0]).p is None


def test_results_go_on_and_refuse_other_settings(tmp_path):
    file = tmp_path / "deep" / "main.json"
    results = protocol.Results(file, {"model": "a"}, {"machine": {}})
    assert results.get("x", lambda: {"n": 1}) == {"n": 1}
    again = protocol.Results(file, {"model": "a"}, {"machine": {}})
    assert again.get("x", lambda: pytest.fail("made again")) == {"n": 1}
    with pytest.raises(ValueError, match=r"main\.json was made with \{'model': 'a'\}, not with \{'model': 'b'\}"):
        protocol.Results(file, {"model": "b"}, {})


def test_thirds_of_the_layers():
    for count in range(3, 12):
        layers = list(range(10, 10 + count))
        thirds = [methods.part(layers, name) for name in ("early", "middle", "late")]
        assert [*itertools.chain(*thirds)] == layers == methods.part(layers, "all")
        assert max(map(len, thirds)) - min(map(len, thirds)) <= 1
    with pytest.raises(ValueError, match="layers must be one of early, middle, late, all, got 'first'"):
        methods.part([1, 2, 3], "first")


class Letters(Task):
    """A task that needs no sandbox: an answer is right if it begins with a vowel."""

    name, max_new_tokens, stop = "letters", 3, ("\n",)

    def load(self):
        items = [Item(f"{i}", f"{'ab' * i}say:", "a", {}) for i in range(1, 9)]
        return items[:4], items[4:]

    def right(self, item, completion):
        return completion[:1] in "aeiou" and completion != ""


def base(name: str) -> protocol.Base:
    torch.manual_seed(0)
    trainer = S0Trainer(MODELS[name](), tokenizer(), S0Config(n_steps=2))
    trainer.model.requires_grad_(False)
    return protocol.Base(name, trainer, Letters(), *Letters().load(), rows=3)


PAIRS = {
    seed: [{"prompt": prompt, "completion": text, "ended": True} for prompt, text in pairs]
    for seed, pairs in {42: [("abc:", "aa"), ("say:", "ea")], 7: [("xyz:", "ii")]}.items()
}
METHODS = {
    "nothing": Nothing(),
    "s0": S0(alpha=1.0),
    "s0 normalized": S0(alpha=1.0, normalize=True),
    "s0 at its scale": S0(at_alpha=True, layers="early"),
    "lora": LoRA(rank=2, lr=1e-2, steps=3),
    "prompt": Prompt(tokens=2, lr=1e-1, steps=3),
    "offset": StateOffset(steps=2),
}


@every_family
@pytest.mark.parametrize("method", METHODS)
def test_a_method_changes_the_answers_only_while_it_is_in_use(name, method):
    one, ids = base(name), torch.tensor([[5, 6, 7, 8]])
    before = one.model(input_ids=ids).logits
    seen = []
    for seed, model in METHODS[method].tune(one, PAIRS):
        with torch.no_grad():
            seen.append(model(input_ids=ids).logits[:, -4:])
        cell = protocol.evaluate(one, model, one.heldout, method, METHODS[method].padded)
        assert len(cell["completions"]) == len(cell["passed"]) == 4
        assert seed in PAIRS
    assert len(seen) == 2
    changed = [not torch.equal(logits, before) for logits in seen]
    assert changed == [method != "nothing"] * 2
    assert method == "nothing" or not torch.equal(seen[0], seen[1])
    assert torch.equal(one.model(input_ids=ids).logits, before)
    assert not any(parameter.requires_grad for parameter in one.model.parameters())
    assert (METHODS[method].parameters(one) == 0) == (method == "nothing")


@every_family
def test_the_other_methods_learn(name):
    one = base(name)
    parameters = LoRA(rank=2).parameters(one)
    assert parameters == 2 * LoRA(rank=1).parameters(one)
    with methods._adapted(one, LoRA(rank=2).config(one), 0) as model:
        trained = methods._trainable(model)
        assert sum(p.numel() for p in trained) == parameters
        losses = methods.fit(one, model, trained, PAIRS[42], 5, 1e-2, "")
    assert losses[-1] < losses[0]
    with methods.offset(one.model) as offsets:
        losses = methods.fit(one, one.model, offsets, PAIRS[42], 5, 1e-2, "", 1e-4)
    assert losses[-1] < losses[0]
    trainer = S0Trainer(one.model, one.tokenizer, S0Config(n_steps=1))
    trainer.train(PAIRS[42], progress=False)
    assert trainer.history[0]["loss"] == pytest.approx(losses[0], rel=1e-5)


@every_family
def test_an_offset_is_a_state_that_does_not_fade(name):
    """If nothing decays and nothing is written, S0 is read at every token too, so both give the same results."""
    one = base(name)
    silence = lambda module, args, output: output * 0 - 1e4  # noqa: E731
    for module in one.model.modules():
        if hasattr(module, "A_log"):
            module.A_log.fill_(-1e4)
        if hasattr(module, "in_proj_b"):
            module.in_proj_b.register_forward_hook(silence)
        elif hasattr(module, "dt_bias"):
            module.dt_bias.fill_(-1e4)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    states = S0States.for_model(one.model)
    with torch.no_grad(), methods.offset(one.model) as offsets:
        without = one.model(input_ids=ids).logits
        for layer, x in zip(states, offsets, strict=True):
            x.copy_(torch.randn(x.shape))
            states[layer].copy_(x[None])
        found = one.model(input_ids=ids).logits
        for x in offsets:
            x.zero_()
        with states.attached(one.model):
            truth = one.model(input_ids=ids).logits
    assert not torch.allclose(found, without, atol=1e-3)
    assert torch.allclose(found, truth, atol=1e-5)


def test_answers_are_those_of_the_trainer():
    one = base("qwen")
    found = protocol.answers(one, one.model, one.heldout, "", True)
    assert found == protocol.answers(one, one.model, one.heldout, "", False)
    problems = [one.problem(item) for item in one.heldout]
    expected = one.trainer.evaluate(problems, check=one.check, max_new_tokens=3, stop=["\n"], progress=False)
    assert [entry["answers"] for entry in found] == [row["base"] for row in expected.answers]
    assert [entry["right"] for entry in found] == [[row["base"] == 1.0] for row in expected.rows]
    several = protocol.answers(one, one.model, one.heldout, "", True, samples=3, greedy=False, seed=1)
    assert [len(entry["answers"]) for entry in several] == [3] * 4


def test_a_seed_decides_the_solutions_and_their_order():
    one = base("falcon")
    found = protocol.solutions(one, 42)
    assert found == protocol.solutions(one, 42)
    assert {record["id"] for record in found} <= {item.name for item in one.tune}
    assert found != protocol.solutions(one, 7)
    assert all(one.check(record, record["completion"]) for record in found)


def small_run(folder: Path, experiment: str) -> experiments.Run:
    one = base("qwen")
    results = protocol.Results(folder / f"{experiment}-qwen-letters.json", {"model": "qwen", "task": "letters"}, {})
    found = protocol.Results(folder / "cache" / "found.json", {"model": "qwen"}, {})
    for seed in (42, 7):
        written = [{**one.problem(one.tune[i]), "completion": "aa", "ended": True} for i in range(2)]
        found.get(str(seed), lambda written=written: {"solutions": written})
    return experiments.Run(one, (42, 7), results, found, folder / "cache")


@pytest.mark.slow
def test_every_experiment_runs_once_and_can_be_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "LEARNING_RATES", (1e-3, 1e-2))
    monkeypatch.setattr(experiments, "ALPHAS", {"gated_delta_net": (0.5, 1.0)})
    for name, experiment in experiments.ALL.items():
        experiment(small_run(tmp_path, name))
        with monkeypatch.context() as patch:
            again = lambda *_, **__: pytest.fail("generated again")  # noqa: E731
            patch.setattr(protocol, "answers", again)
            patch.setattr(experiments, "answers", again)
            patch.setattr(experiments, "_log_probabilities", again)
            experiment(small_run(tmp_path, name))
        text = tables.table(name, tmp_path)
        assert "qwen, letters" in text
        assert text.count("|") > 5
        plot = tables.plot(name, tmp_path)
        assert plot is None if name == "first" else plot.stat().st_size > 1000
    document = "before\n<!-- quality: main -->\nold\n<!-- end -->\nafter <!-- quality: none -->\nkept\n<!-- end -->"
    filled = tables.filled(document, tmp_path)
    assert tables.table("main", tmp_path).strip() in filled
    assert filled.startswith("before\n")
    assert "old" not in filled
    assert "kept" in filled


def test_settings_are_chosen_where_every_problem_was_learned_from(tmp_path):
    run_ = small_run(tmp_path, "main")
    every = [{**run_.base.problem(item), "completion": "aa", "ended": True} for item in run_.base.tune]
    run_.found.cells["42"] = {"solutions": every}
    assert experiments.best(run_, "S0", run_.s0, "alpha", (0.5,)).alpha == 0.5


def test_first_names_the_seeds_that_main_lacks(tmp_path):
    small_run(tmp_path, "main").results.put("S0/42", {})
    with pytest.raises(RuntimeError, match=r"first needs the answers of main: run main with seeds \[7\]"):
        experiments.first(small_run(tmp_path, "first"))


def test_boundary_problems_have_right_references():
    task = get_task("boundary")
    tune, heldout = task.load()
    assert len(tune) == len(heldout) == 48
    problems = make_problems()
    assert len({problem.key for problem in problems}) == len(problems)
    for items in (tune, heldout):
        assert all(scores(task, items, [item.reference for item in items]))
    assert not any(scores(task, tune, [problem.bodies["mistake"] for problem in problems[::2]]))


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "main", "--seeds", "11"])
    with pytest.raises(SystemExit):
        run.main()
    assert "--seeds must be from 1 to 10, got 11" in capsys.readouterr().err
    assert run.model_folder("qwen3_5", tmp_path) == str(ROOT / "examples" / "tiny" / "qwen3_5")
    assert run.model_folder("Qwen/Qwen3.5-4B", tmp_path) == "Qwen/Qwen3.5-4B"


def test_a_try_stays_out_of_the_results(tmp_path, monkeypatch, capsys):
    """`report` makes tables and plots of the results, and names the task and its limit."""
    monkeypatch.setattr(run, "RESULTS", tmp_path / "quality")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run.tables, "write", lambda folder: pytest.fail("the document is that of other results"))
    monkeypatch.setattr(experiments, "ALL", {"count": lambda run: run.results.put("0/42", {"pass@1": 0.5})})
    monkeypatch.setattr(
        sys, "argv", ["run.py", "all", "--models", str(ROOT / "examples/tiny/qwen3_5") + "/", "--limit", "8"]
    )
    run.main()
    folder = tmp_path / "quality" / "cache" / "limit-8"
    assert [file.name for file in folder.glob("*.json")] == ["count-qwen3_5-tiny.json"]
    (folder / "count.svg").unlink()
    monkeypatch.setattr(sys, "argv", ["run.py", "report", "--limit", "8"])
    capsys.readouterr()
    run.main()
    assert "qwen3_5/, 8 problems, 1 seeds" in capsys.readouterr().out
    assert (folder / "count.svg").is_file()


def test_mistakes_are_told_without_a_traceback(tmp_path, monkeypatch):
    for options, message in (
        (["--task", "spider"], "run.py: spider needs databases=FOLDER"),
        (["--task-option", "data=x"], "run.py: tiny has no options; got 'data'"),
        (["--task", "gsm8k", "--task-option", f"tune={tmp_path}/x.json"], "run.py: no data at .*x.json"),
        (["--models", "qwen3_5", "--limit", "4", "--output", str(run.RESULTS)], "run.py: .* was made with"),
    ):
        monkeypatch.setattr(sys, "argv", ["run.py", "main", *options])
        with pytest.raises(SystemExit, match=message):
            run.main()


def test_the_tables_of_the_document_are_those_of_the_results():
    text = tables.DOCUMENT.read_text(encoding="utf-8")
    assert text.count("<!-- quality: ") >= len(experiments.ALL)
    assert tables.filled(text, run.RESULTS) == text, "python benchmarks/quality/run.py report"
