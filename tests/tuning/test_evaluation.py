"""Evaluation by a checker: base and S0, samples, tasks and scales, intervals, interruptions; the command line."""

import itertools
import json
import math

import pytest
from models import MODELS, every_family, random_states, tokenizer
from test_collect import PROBLEMS, check
from trainers import OTHERS, PAIRS, trainer

from s0kernels import S0Trainer
from s0kernels.cli import main
from s0kernels.tuning.evaluation import Evaluation, interval, pass_at_k, sign_test
from s0kernels.tuning.sampling import Sampler

OPTIONS = {"max_new_tokens": 6, "progress": False}


def learned(name="falcon", **config) -> S0Trainer:
    one = trainer(name, **config)
    one._states = random_states(one.model, size=2.0)
    return one


@every_family
def test_base_and_s0_are_what_generate_gives(name):
    one = learned(name)
    found = one.evaluate(PROBLEMS, check=check, **OPTIONS)
    prompts = [problem["prompt"] for problem in PROBLEMS]
    texts = {"base": one.generate(prompts, 6, do_sample=False)}
    one.activate()
    texts["s0"] = one.generate(prompts, 6, do_sample=False)
    assert texts["base"] != texts["s0"]
    for side, answers in texts.items():
        assert [row[side] for row in found.answers] == [[text] for text in answers]
        right = [float(check(*pair)) for pair in zip(PROBLEMS, answers, strict=True)]
        assert [row[side] for row in found.rows] == right
        assert getattr(found, side) == pytest.approx(sum(right) / len(right))
    assert [row["id"] for row in found.rows] == [problem["id"] for problem in PROBLEMS]
    assert found.alpha == one.alpha
    assert one.evaluate(PROBLEMS, check=check, **OPTIONS) == found, "it does not matter that S0 is active"
    assert one.active
    one.deactivate()
    assert one.evaluate(PROBLEMS, check=check, rows=2, **OPTIONS) == found
    assert not one.active


def test_without_states_there_is_the_base_alone():
    found = trainer("falcon").evaluate(PROBLEMS, check=check, **OPTIONS)
    assert found.s0 is found.alpha is None
    assert found.base == learned().evaluate(PROBLEMS, check=check, **OPTIONS).base
    assert {row["s0"] for row in found.rows} == {row["s0"] for row in found.answers} == {None}
    assert found.pass_at_k == {1: {"base": found.base, "s0": None}}
    assert found.table()[1][0][0] == "base"
    assert len(found.table()[1]) == 1
    assert found.notes() == []


def test_several_samples_are_sampled():
    one = learned()
    found = one.evaluate(PROBLEMS, check=check, samples=5, temperature=1.5, **OPTIONS)
    for answers, row in zip(found.answers, found.rows, strict=True):
        for side in ("base", "s0"):
            assert len(answers[side]) == 5
            problem = next(p for p in PROBLEMS if p["id"] == row["id"])
            assert row[side] == sum(check(problem, text) for text in answers[side]) / 5
    assert any(len(set(row["base"])) > 1 for row in found.answers)
    assert found.pass_at_k[1] == {"base": pytest.approx(found.base), "s0": pytest.approx(found.s0)}
    assert found.pass_at_k[5]["base"] == sum(row["base"] > 0 for row in found.rows) / len(PROBLEMS)
    assert found.table()[0] == ["12 problems", "pass@1", "pass@5"]
    again = one.evaluate(PROBLEMS, check=check, samples=5, temperature=1.5, rows=3, **OPTIONS)
    assert again == found
    collected = one.collect(PROBLEMS, check, samples=5, temperature=1.5, **OPTIONS)
    firsts = {row["id"]: row["base"] for row in found.answers}
    assert all(record["completion"] in firsts[record["id"]] for record in collected), "the same noise"


def test_scales_and_tasks():
    one = learned()
    several = one.evaluate(PROBLEMS, check=check, alpha=[0.1, 1.0, 0.1], **OPTIONS)
    assert list(several) == [0.1, 1.0]
    for alpha, found in several.items():
        assert found == one.evaluate(PROBLEMS, check=check, alpha=alpha, **OPTIONS)
    assert several[0.1].answers != several[1.0].answers
    assert one.alpha == 0.65
    many = trainer("falcon", n_steps=1, lr=2.0)
    many.train({"a": PAIRS, "b": OTHERS}, progress=False)
    with pytest.raises(ValueError, match=r"S0Trainer\.evaluate: task must name one of \['a', 'b'\]"):
        many.evaluate(PROBLEMS, check=check, **OPTIONS)
    found = {task: many.evaluate(PROBLEMS, check=check, task=task, **OPTIONS) for task in ("a", "b")}
    assert found["a"].answers != found["b"].answers
    assert not many.active
    for options, error, message in (
        ({"task": "c"}, ValueError, "none is called 'c'"),
        ({"task": ["a"]}, TypeError, "task must be a name"),
        ({"task": "a", "alpha": []}, TypeError, "alpha must be a number or a list"),
        ({"task": "a", "alpha": math.nan}, ValueError, "alpha must be a finite number"),
        ({"task": "a", "packed": True}, ValueError, "tokens_per_batch and packed must not be given with check"),
        ({"check": None, "task": "a"}, ValueError, "the arguments of sampling need check"),
        ({"check": None, "samples": 2}, ValueError, "the arguments of sampling need check"),
    ):
        with pytest.raises(error, match=message):
            many.evaluate(PROBLEMS, **{"check": check, **options})


def test_it_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    one, out, sampled, real = learned(), tmp_path / "found.jsonl", [], Sampler.sample
    expected = one.evaluate(PROBLEMS, check=check, **OPTIONS)
    monkeypatch.setattr(Sampler, "sample", lambda self, rows: sampled.extend(r.key for r in rows) or real(self, rows))
    calls = itertools.count()

    def breaks(problem, answer):
        if next(calls) == 16:
            raise ZeroDivisionError
        return check(problem, answer)

    with pytest.raises(RuntimeError, match="the checker failed on problem 'p4'"):
        one.evaluate(PROBLEMS, check=breaks, out=out, rows=2, **OPTIONS)
    sampled.clear()
    assert one.evaluate(PROBLEMS, check=check, out=out, rows=2, **OPTIONS) == expected
    assert sorted(set(sampled)) == sorted(f"p{i}" for i in range(4, 12)), "of S0 alone, and what was not judged yet"
    assert len(sampled) == 8
    sampled.clear()
    assert one.evaluate(PROBLEMS, check=check, out=out, **OPTIONS) == expected
    assert not sampled
    one._states = random_states(one.model, size=1.0)
    one.evaluate(PROBLEMS, check=check, out=out, **OPTIONS)
    assert len(sampled) == len(PROBLEMS), "other states are evaluated anew, the base is not"
    with pytest.raises(ValueError, match="max_new_tokens: 6 there, 7 here"):
        one.evaluate(PROBLEMS, check=check, out=out, max_new_tokens=7)


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_sample():
    for samples, right, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (7, 3, 7)):
        draws = list(itertools.combinations([True] * right + [False] * (samples - right), k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    with pytest.raises(ValueError, match="right and k must lie within the samples"):
        pass_at_k(5, 2, 6)


def test_intervals_and_chance():
    stats = pytest.importorskip("scipy.stats")
    for right, count in ((0, 5), (3, 7), (44, 84), (84, 84)):
        truth = stats.binomtest(right, count).proportion_ci(method="wilson")
        assert interval(right / count, count) == pytest.approx((truth.low, truth.high), abs=1e-6)
    for more, less in ((0, 0), (3, 3), (21, 0), (2, 9)):
        truth = stats.binomtest(more, more + less).pvalue if more + less else 1.0
        assert sign_test(more, less) == pytest.approx(truth)


def test_what_is_printed():
    rows = [{"id": i, "base": float(i < 2), "s0": float(i > 0)} for i in range(4)]
    found = Evaluation(rows, [], 1, 0.07)
    assert (found.base, found.s0) == (0.5, 0.75)
    assert found.table() == (
        ["4 problems", "pass@1"],
        [["base", "50.0 % (15.0 to 85.0)"], ["S0, alpha 0.07", "75.0 % (30.1 to 95.4)"]],
    )
    assert str(found) == "pass@1 of 4 problems: base 50.0 % (15.0 to 85.0), S0, alpha 0.07 75.0 % (30.1 to 95.4)"
    assert found.notes() == [
        "S0 solves 2 more: 2, 3",
        "S0 loses 1: 0",
        "the p-value of this difference is 1 (two-sided sign test)",
    ]
    assert json.loads(json.dumps(found.to_dict()))["changed"] == {"solved": [2, 3], "lost": [0]}


# The command line


@pytest.fixture
def place(tmp_path):
    MODELS["falcon"]().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    one = learned()
    one.save(tmp_path / "states")
    text = "\n".join(json.dumps({**problem, "answer": "x"}) for problem in PROBLEMS)
    (tmp_path / "problems.jsonl").write_text(text)
    return tmp_path


PROGRAM = "grep -q ^[a-z]"


def run(place, command, *options) -> int:
    files = ["problems.jsonl", "found.jsonl"] if command == "collect" else ["problems.jsonl"]
    return main([command, *(str(place / name) for name in ("model", *files)), "--max-new-tokens", "6", *options])


def test_commands_collect_and_evaluate(place, capsys):
    options = ["--command", PROGRAM, "--temperature", "1.5", "--samples", "4", "--seed", "3", "--top-p", "1"]
    assert run(place, "collect", *options, "--solutions", "4", "--rows", "8") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"4 solutions in {place / 'found.jsonl'}, ")
    assert "4/4 solutions, solved" in captured.err
    found = [json.loads(line) for line in (place / "found.jsonl").read_text().splitlines()]
    one = S0Trainer.from_pretrained(str(place / "model"))
    right = lambda problem, answer: any(line[:1].islower() for line in answer.split("\n"))  # noqa: E731
    sampling = {"samples": 4, "temperature": 1.5, "top_p": 1.0, "seed": 3}
    assert found == one.collect(PROBLEMS, right, solutions=4, **sampling, **OPTIONS)
    assert main(["tune", str(place / "model"), str(place / "found.jsonl"), str(place / "out"), "--steps", "1"]) == 0
    capsys.readouterr()
    one.load(place / "states")
    expected = one.evaluate(PROBLEMS, check=right, **OPTIONS)
    evaluated = ["--states", str(place / "states"), "--command", PROGRAM]
    assert run(place, "evaluate", *evaluated, "--json", "--out", str(place / "decided.jsonl")) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(expected.to_dict()))
    assert (place / "decided.jsonl").is_file()
    assert run(place, "evaluate", *evaluated) == 0
    out = capsys.readouterr().out
    assert f"base            {100 * expected.base:.1f} %" in out
    assert f"S0, alpha 0.65  {100 * expected.s0:.1f} %" in out
    assert "sign test" in out


def test_an_alpha_is_chosen_on_other_problems(place, capsys):
    (place / "others.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "b"}))
    options = ["--states", str(place / "states"), "--command", PROGRAM, "--alpha", "0.1,0.65,2"]
    assert run(place, "evaluate", *options) == 0
    out = capsys.readouterr().out
    assert [line.split("  ")[0] for line in out.splitlines()[2:6]] == [
        *("base", "S0, alpha 0.1", "S0, alpha 0.65", "S0, alpha 2")
    ]
    assert "do not judge an alpha on the problems that chose it: give others by --development" in out
    assert run(place, "evaluate", *options, "--development", str(place / "others.jsonl")) == 0
    out = capsys.readouterr().out
    assert " is chosen\n" in out
    chosen = out.partition("alpha ")[2].split()[0]
    assert out.count("12 problems") == 1
    assert "2 problems" in out
    assert chosen


def test_mistakes_are_said_before_the_model_is_loaded(place, capsys, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for command, options, message in (
        ("collect", ["--check", "tests"], "problems.jsonl:1, id 'p0': tests must be code, got None"),
        ("collect", ["--check", "tests", "--command", "true"], "--check and --command must not both be given"),
        ("collect", ["--command", "no-such-program -x"], "there is no program 'no-such-program'"),
        ("collect", ["--samples", "0"], "samples must be at least 1, got 0"),
        ("collect", ["--chat-template-kwargs", "x"], "--chat-template-kwargs must be a JSON object"),
        ("evaluate", ["--task", "a"], "--task needs --states"),
        ("evaluate", ["--alpha", "1,x", "--states", "s"], "--alpha must be numbers such as 0.03,0.07, got '1,x'"),
        ("evaluate", ["--development", "d", "--states", "s"], "--development needs several --alpha"),
    ):
        assert run(place, command, *options) == 1
        assert message in capsys.readouterr().err
    assert main(["collect", str(place / "model"), str(place / "none.jsonl"), str(place / "out")]) == 1
    assert "none.jsonl" in capsys.readouterr().err


def test_tune_goes_from_problems_to_a_table(place, capsys, monkeypatch):
    options = ["--collect", "--command", PROGRAM, "--max-new-tokens", "6", "--steps", "1", "--temperature", "1.5"]
    files = [str(place / name) for name in ("model", "problems.jsonl", "out")]
    assert main(["tune", *files, *options]) == 0
    out = capsys.readouterr().out.splitlines()
    found = [json.loads(line) for line in (place / "out" / "solutions.jsonl").read_text().splitlines()]
    assert out[0].startswith(f"{len(found)} solutions in {place / 'out' / 'solutions.jsonl'}, ")
    assert out[1].startswith("loss ")
    assert out[3].split() == ["3", "problems", "pass@1"]
    assert out[-1] == f"states in {place / 'out'}"
    heldout = [json.loads(line) for line in (place / "out" / "heldout.jsonl").read_text().splitlines()][1:]
    assert {entry["id"] for entry in heldout} == {"p3", "p7", "p11"}
    assert not {record["id"] for record in found} & {"p3", "p7", "p11"}
    one = S0Trainer.from_pretrained(str(place / "model"))
    one.load(place / "out")
    monkeypatch.setattr(Sampler, "sample", lambda *_: pytest.fail("done again"))
    assert main(["tune", *files, *options]) == 0, "what is decided is not done again"
    assert capsys.readouterr().out.splitlines()[3:] == out[3:]


def test_tune_takes_problems_of_several_tasks(place, capsys):
    for folder in ("problems", "others"):
        (place / folder).mkdir()
        for name, part in (("a", PROBLEMS[:4]), ("b", PROBLEMS[4:8])):
            (place / folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    options = ["--collect", "--command", "true", "--max-new-tokens", "3", "--steps", "1", "--samples", "1"]
    files = [str(place / name) for name in ("model", "problems", "out")]
    assert main(["tune", *files, *options, "--heldout", str(place / "others"), "--solutions", "2"]) == 0
    out = capsys.readouterr().out
    assert len((place / "out" / "b" / "solutions.jsonl").read_text().splitlines()) == 2
    assert out.count("4 problems") == 2
    assert out.index("\na\n4 problems") < out.index("\nb\n4 problems")


def test_mistakes_of_tune_with_problems(place, capsys, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    (place / "few.jsonl").write_text("\n".join(map(json.dumps, PROBLEMS[:3])))
    for file, options, message in (
        ("problems.jsonl", ["--samples", "3"], "--samples needs --collect"),
        ("problems.jsonl", ["--command", "true"], "--command needs --collect"),
        ("problems.jsonl", ["--collect", "--check", "tests"], "problems.jsonl:1, id 'p0': tests must be code"),
        ("few.jsonl", ["--collect", "--command", "true"], "few.jsonl has 3 problems, too few to hold some out"),
        ("few.jsonl", ["--collect", "--command", "true", "--heldout", "nowhere.jsonl"], "no nowhere.jsonl"),
    ):
        assert main(["tune", str(place / "model"), str(place / file), str(place / "out"), *options]) == 1
        assert message in capsys.readouterr().err
    assert not (place / "out").exists()
