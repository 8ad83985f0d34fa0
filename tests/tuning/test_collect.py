"""Collecting solutions: those that are kept, independence of everything but the seed, interruptions, refusals."""

import itertools
import json
import math
import threading

import pytest
import torch
from models import EOS, MODELS, every_family, every_model, random_states, tokenizer
from trainers import trainer

from s0kernels import S0Config, S0Trainer, swap_modules
from s0kernels.tuning.data import read_examples
from s0kernels.tuning.sampling import Row, Sampler, _Draw, cut, end_tokens, noise
from s0kernels.tuning.settings import Sampling

PROBLEMS = [{"prompt": f"{'ab' * (i % 4)}Q {i}:", "id": f"p{i}"} for i in range(12)]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}.<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is not defined or enable_thinking %}(think)"
    "{% endif %}{% endif %}"
)
OPTIONS = {"samples": 4, "max_new_tokens": 6, "temperature": 1.5, "top_p": 1.0, "progress": False}


def check(problem, answer):
    """An arbitrary check that accepts about one answer in six."""
    return bool(answer) and ord(answer[0]) % 6 == len(problem["prompt"]) % 3


def collect(one, problems=PROBLEMS, checker=check, **options):
    return one.collect(problems, checker, **{**OPTIONS, **options})


# Sampling


@every_model
def test_samples_do_not_depend_on_how_they_are_batched(name):
    tok, model = tokenizer(), swap_modules(MODELS[name]())
    ids = {text: tok(text)["input_ids"] for text in ("Q: 2+2?", "a", "def f(x):\n    return", "bc")}
    rows = [Row(text, i, text, tokens) for text, tokens in ids.items() for i in range(3)]
    sampler = Sampler(model, tok, Sampling(max_new_tokens=8, temperature=1.0), end_tokens(model, tok), 0)
    found = []
    for most, order in ((99, rows), (1, rows), (5, rows), (99, rows[3:][::-1] + rows[:3])):
        sampler.rows(30, most, torch.device("cpu"))
        with torch.no_grad():
            found.append(dict(zip([row[:2] for row in order], sampler.sample(order), strict=True)))
    sampler.rows(30, 99, torch.device("cpu"))
    with torch.no_grad():  # prompts of two tokens or more, so that the prefill can be shared
        longer = dict(zip([row[:2] for row in rows[6:]], sampler.sample(rows[6:]), strict=True))
    assert all(found[0][row] == made for row, made in longer.items())
    assert all(other == found[0] for other in found[1:])
    assert len(set(found[0].values())) > 9, "the samples are to differ"


def test_the_work_on_a_prompt_is_shared(monkeypatch):
    tok, model = tokenizer(), swap_modules(MODELS["falcon"]())
    widths = []
    model.register_forward_pre_hook(lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True)
    text = "a long prompt"
    rows = [Row(text, i, text, ids) for ids in [tok(text)["input_ids"]] for i in range(5)]
    sampler = Sampler(model, tok, Sampling(max_new_tokens=2), end_tokens(model, tok), 0)
    sampler.sample(rows)
    assert [tuple(shape) for shape in widths] == [(1, len(text) - 1), (5, 1), (5, 1)]


def test_draws_follow_the_distribution():
    logits = torch.tensor([1.0, -math.inf, 0.0, 2.0, -1.0])
    count = 4000
    drawn = _Draw(3, [Row("a", i, "", [0]) for i in range(count)], 1)(torch.zeros(count, 4), logits.expand(count, -1))
    assert ((drawn == 0).sum(1) == 1).all()
    assert (drawn.isinf().sum(1) == 4).all()
    shares, truth = (drawn == 0).float().mean(0), logits.softmax(0)
    assert shares[1] == 0
    assert float((shares - truth).abs().max()) < 4 * math.sqrt(0.25 / count)


def test_noise_belongs_to_seed_problem_sample_and_place():
    found = [noise(*each) for each in itertools.product((1, 2), ("a", "b"), (0, 1), (0, 1, 2))]
    assert len(set(found)) == 24
    assert all(0 < x < 1 for x in found)
    assert noise(42, "a", 3, 5) == noise(42, "a", 3, 5)


def test_a_completion_ends_at_a_stop_string_or_at_an_end_token():
    tok, model = tokenizer(), swap_modules(MODELS["qwen"]())
    rows = [Row("k", i, "ab", tok("ab")["input_ids"]) for i in range(40)]

    def sample(**options):
        return Sampler(model, tok, Sampling(max_new_tokens=40, temperature=2.0, **options), [EOS], 0).sample(rows)

    free = sample()
    assert {completion.ended for completion in free} == {True, False}
    assert all(len(text) < 40 for text, ended in free if ended)
    stopped = sample(stop=["a", "e3"])
    for (text, ended), (short, short_ended) in zip(free, stopped, strict=True):
        assert short == cut(text, ["a", "e3"])
        assert short_ended == (ended and short == text)
    assert cut("one\ntwo# three", ["#", "\n"]) == "one"
    assert cut("one", []) == "one"


def test_a_models_own_settings_of_generation_play_no_part():
    tok, plain, other = tokenizer(), *(swap_modules(MODELS["qwen"]()) for _ in range(2))
    other.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, top_k=1, do_sample=True, min_p=0.9)
    rows = [Row("k", i, "ab", tok("ab")["input_ids"]) for i in range(4)]
    for greedy in (True, False):
        one, two = (
            Sampler(m, tok, Sampling(max_new_tokens=12, greedy=greedy), [EOS], 0).sample(rows) for m in (plain, other)
        )
        assert one == two


def test_less_rows_where_memory_runs_out(monkeypatch):
    tok, model = tokenizer(), swap_modules(MODELS["qwen"]())
    rows = [Row("k", i, "ab", tok("ab")["input_ids"]) for i in range(6)]
    sampler = Sampler(model, tok, Sampling(max_new_tokens=3), [EOS], 0)
    expected, real, seen = sampler.sample(rows), Sampler._batch, []

    def little(self, batch):
        seen.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(Sampler, "_batch", little)
    assert sampler.sample(rows) == expected
    assert seen == [6, 3, 1, 1, 1, 1, 1, 1]
    monkeypatch.setattr(
        Sampler, "_batch", lambda self, batch: exec("raise torch.OutOfMemoryError('x')", {"torch": torch})
    )
    with pytest.raises(torch.OutOfMemoryError):
        sampler.sample(rows)


def test_rows_are_chosen_from_memory(monkeypatch):
    tok, model = tokenizer(), swap_modules(MODELS["falcon"]())
    sampler, cpu = Sampler(model, tok, Sampling(max_new_tokens=50), [EOS], 0), torch.device("cpu")
    need = sampler._bytes(100, cpu)
    for there, rows in ((need / 2, 1), (need * 3.5, 2), (need * 70, 64), (need * 1e6, 256)):
        monkeypatch.setattr("s0kernels.tuning.sampling.allowed", lambda *_, there=there: int(there))
        assert sampler.rows(100, None, cpu) == rows
    assert sampler.rows(100, 7, cpu) == 7


# The solutions that are kept


@every_family
def test_the_same_seed_finds_the_same(name, tmp_path):
    one = trainer(name)
    found = collect(one)
    assert 3 < len(found) < len(PROBLEMS), "this shows little"
    assert [x["id"] for x in found] == [p["id"] for p in PROBLEMS if p["id"] in {x["id"] for x in found}]
    for record in found:
        assert set(record) == {"id", "prompt", "completion", "ended"}
        assert check(record, record["completion"])
    for rows in (1, 9, 1000):
        assert collect(one, rows=rows) == found
    for wanted in (2, len(found)):
        assert collect(one, solutions=wanted, rows=4) == found[:wanted]
    assert collect(one, PROBLEMS[5:] + PROBLEMS[:5]) == found[-len([x for x in found if int(x["id"][1:]) >= 5]) :] + [
        x for x in found if int(x["id"][1:]) < 5
    ]
    assert collect(one, seed=7) != found


def test_the_first_right_sample_is_kept_and_no_more_is_looked_at():
    one, seen = trainer(), []

    def spy(problem, answer):
        seen.append((problem["id"], answer))
        return check(problem, answer)

    found = collect(one, checker=spy, samples=16, solutions=3, rows=16)
    all_of = {}
    for problem, answer in seen:
        all_of.setdefault(problem, []).append(answer)
    for record in found:
        assert record["completion"] == all_of[record["id"]][-1]
        assert not any(check(record, answer) for answer in all_of[record["id"]][:-1])
    assert all(len(set(answers)) == len(answers) for answers in all_of.values()), "the same answer is looked at once"
    last = int(found[-1]["id"][1:])
    assert max(int(name[1:]) for name in all_of) <= last + 1, "it goes on when all is decided"


def test_collecting_starts_from_zero_states_and_leaves_what_is_active():
    one = trainer("falcon")
    found = collect(one)
    one._states = random_states(one.model, size=2.0)
    ids = torch.tensor([[5, 6, 7]])
    before = one.model(ids).logits
    one.activate()
    active = one.model(ids).logits
    assert not torch.equal(active, before)
    one.model.train()
    assert collect(one) == found
    assert one.active
    assert one.model.training
    assert torch.equal(one.model.eval()(ids).logits, active)


def test_a_checker_runs_while_the_model_samples():
    one, threads = trainer(), set()

    def spy(problem, answer):
        threads.add(threading.current_thread())
        return False

    with pytest.raises(
        RuntimeError,
        match=r"of 4 samples for each of 12 problems none is correct; the first answers:\nproblem 'p0': '.+'\n",
    ):
        collect(one, checker=spy, rows=4)
    assert threading.main_thread() not in threads


# Files


def test_what_is_interrupted_goes_on_and_repeats_nothing(tmp_path, monkeypatch):
    one = trainer()
    expected = collect(one)
    out, state = tmp_path / "deep" / "found.jsonl", tmp_path / "deep" / "found.state.jsonl"
    sampled, real = [], Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda self, rows: sampled.extend(r.key for r in rows) or real(self, rows))

    def breaks(problem, answer):
        if problem["id"] == "p7":
            raise ZeroDivisionError("broken")
        return check(problem, answer)

    with pytest.raises(RuntimeError, match="the checker failed on problem 'p7': ZeroDivisionError: broken"):
        collect(one, checker=breaks, out=out, rows=4)
    done = [json.loads(line) for line in state.read_text().splitlines()]
    assert done[0]["settings"]["seed"] == 42
    assert [entry["id"] for entry in done[1:]] == [f"p{i}" for i in range(7)]
    assert [json.loads(line) for line in out.read_text().splitlines()] == [x for x in expected if int(x["id"][1:]) < 7]
    with open(state, "a") as file:
        file.write('{"run": "collect", "id": "p8", "pro')  # after a crash
    sampled.clear()
    assert collect(one, out=out, rows=4) == expected
    assert set(sampled) == {f"p{i}" for i in range(7, 12)}
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    assert {p.name for p in out.parent.iterdir()} == {"found.jsonl", "found.state.jsonl"}
    sampled.clear()
    out.unlink()
    assert collect(one, out=out) == expected, "decided, it is written again"
    assert not sampled
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    assert collect(one, out=out, solutions=2) == expected[:2]
    assert len(out.read_text().splitlines()) == 2
    assert collect(one, [*PROBLEMS, {"prompt": "new", "id": "new"}], out=out)[: len(expected)] == expected
    assert set(sampled) == {"new"}


def test_what_is_judged_at_once_is_written_at_once(tmp_path):
    """If the samples of a problem do not fit into a batch, an interruption costs one problem."""
    out = tmp_path / "found.jsonl"

    def breaks(problem, answer):
        if problem["id"] == "p3":
            raise ZeroDivisionError
        return True

    with pytest.raises(RuntimeError, match="problem 'p3'"):
        collect(trainer(), checker=breaks, out=out, rows=2)
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["p0", "p1", "p2"]


def test_files_of_other_runs_are_refused(tmp_path):
    one, out = trainer(), tmp_path / "found.jsonl"
    collect(one, out=out)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for options, message in (
        ({"seed": 1}, "begun with other settings .seed: 42 there, 1 here"),
        ({"temperature": 1.0, "stop": ["x"]}, r"temperature: 1.5 there, 1.0 here; stop: \[\] there, \['x'\] here"),
        ({"samples": 5}, "samples: 4 there, 5 here"),
    ):
        with pytest.raises(ValueError, match=message):
            collect(one, out=out, **options)
    with pytest.raises(ValueError, match="model: "):
        collect(trainer("falcon"), out=out)
    with pytest.raises(ValueError, match="the prompt of problem 'p3' has changed since it was decided"):
        collect(one, [{**p, "prompt": p["prompt"] + "!" * (p["id"] == "p3")} for p in PROBLEMS], out=out)
    with pytest.raises(ValueError, match="belongs to other problems: 'p0' is not among these"):
        collect(one, PROBLEMS[1:], out=out)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    collect(one, checker=lambda problem, answer: True, out=out)  # the checker is not recorded
    (tmp_path / "found.state.jsonl").write_text("[3]\n")
    with pytest.raises(ValueError, match=r"found\.state\.jsonl is not a file of results of problems"):
        collect(one, out=out)
    (tmp_path / "x.state.jsonl").mkdir()
    with pytest.raises(ValueError, match="is a directory"):
        collect(one, out=tmp_path / "x.jsonl")


def test_solutions_of_others_are_not_written_over(tmp_path):
    out = tmp_path / "found.jsonl"
    out.write_text("mine\n")
    with pytest.raises(ValueError, match=r"found\.jsonl exists, but not found\.state\.jsonl beside it"):
        collect(trainer(), out=out)
    assert out.read_text() == "mine\n"
    with pytest.raises(ValueError, match="out must name a file"):
        collect(trainer(), out=tmp_path)


# Problems


def test_problems_are_checked_before_anything_is_sampled(tmp_path, monkeypatch):
    one = trainer()
    monkeypatch.setattr(Sampler, "sample", lambda *_: pytest.fail("sampled"))

    class Needs:
        def __call__(self, problem, answer):
            return True

        def check_problem(self, problem):
            if "answer" not in problem:
                raise ValueError("answer is missing")

    good = {"prompt": "a", "answer": "b"}
    for problems, error, message in (
        ([], ValueError, "there are no problems"),
        (good, TypeError, "put one into a list"),
        ([good, 3], TypeError, r"problems\[1\] must be a mapping with prompt or messages, got int"),
        ([good, {"answer": "b"}], ValueError, r"problems\[1\] must have either prompt or messages"),
        ([{**good, "messages": []}], ValueError, "either prompt or messages"),
        ([{**good, "prompt": 3}], TypeError, "prompt must be a text, got int"),
        ([{**good, "prompt": ""}], ValueError, r"problems\[0\]: the prompt has no tokens"),
        ([{**good, "id": 1.5}], TypeError, "id must be a string or an int, got 1.5"),
        (
            [{**good, "id": "x"}, good, {**good, "id": "x"}],
            ValueError,
            r"problems\[2\] has the id 'x', which .*\[0\] has too",
        ),
        ([good, {**good, "id": "0"}], ValueError, r"problems\[1\] has the id '0', which .*\[0\] has too"),
        ([good, {"prompt": "a", "answer": None}], ValueError, r"problems\[1\], id 1: answer is missing"),
        ([{"messages": [], "answer": "b"}], TypeError, "messages must be a list of mappings"),
        (
            [{"messages": [{"role": "user", "content": "a"}], "answer": "b"}],
            ValueError,
            "cannot write the messages as a conv",
        ),
    ):
        with pytest.raises(error, match=message):
            collect(one, problems, Needs())
    file = tmp_path / "problems.jsonl"
    file.write_text(f"{json.dumps(good)}\n\n{json.dumps({'prompt': 'a'})}\n")
    with pytest.raises(ValueError, match=r"problems\.jsonl:3, id 1: answer is missing"):
        collect(one, file, Needs())
    for options, error, message in (
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"solutions": 0}, ValueError, "solutions must be a positive int"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens must be an int"),
        ({"temperature": 0}, ValueError, "temperature must be positive, got 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be positive"),
        ({"top_p": 1.1}, ValueError, r"top_p must be in \(0, 1\], got 1.1"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0"),
        ({"stop": "x"}, TypeError, "stop must be a list of texts, got 'x'"),
        ({"stop": [""]}, TypeError, "stop must be a list of texts"),
        ({"rows": 0}, ValueError, "rows must be a positive int"),
        ({"seed": "1"}, TypeError, "seed must be an int"),
        ({"chat_template_kwargs": []}, TypeError, "chat_template_kwargs must be a mapping"),
        ({"checker": "python"}, TypeError, "check must be a function of a problem and an answer, got 'python'"),
    ):
        with pytest.raises(error, match=message):
            collect(one, **options)


def test_a_checker_says_true_or_false():
    with pytest.raises(TypeError, match="must return True or False, got None for problem 'p0'"):
        collect(trainer(), checker=lambda problem, answer: None)


def test_ids_are_places_where_there_are_none():
    found = collect(trainer(), [{"prompt": p["prompt"]} for p in PROBLEMS], checker=lambda problem, answer: True)
    assert [record["id"] for record in found] == list(range(12))


# Training on solutions


def chatting():
    tok = tokenizer()
    tok.chat_template = TEMPLATE
    return tok


def test_messages_go_through_the_template_and_train_takes_what_is_found():
    tok = chatting()
    one = S0Trainer(MODELS["qwen"](), tok, S0Config(n_steps=1))
    prompts = []
    one.model.register_forward_pre_hook(
        lambda _, args, kwargs: prompts.append(tok.batch_decode(kwargs["input_ids"])), with_kwargs=True
    )
    problems = [{"messages": [{"role": "user", "content": "Hi"}], "id": 7}]
    (found,) = collect(one, problems, checker=lambda problem, answer: True)
    assert prompts[1] == ["<user>Hi.<eos><assistant"], "all but the last token, without a thought; before it a trial"
    assert found == {"id": 7, "messages": problems[0]["messages"], "completion": found["completion"], "ended": False}
    (example,) = read_examples([found], tok, 99)
    assert tok.decode(example.ids) == "<user>Hi.<eos><assistant>" + found["completion"]
    assert tok.decode(example.ids[: example.prompt_length]) == "<user>Hi.<eos><assistant>"
    one.train([found], progress=False)
    options = {"enable_thinking": True}
    (found,) = collect(one, problems, checker=lambda problem, answer: True, chat_template_kwargs=options)
    assert found["chat_template_kwargs"] == options
    (example,) = read_examples([found], tok, 99)
    assert tok.decode(example.ids).startswith("<user>Hi.<eos><assistant>(think)")


def test_another_template_is_another_run(tmp_path):
    tok = chatting()
    one, out = S0Trainer(MODELS["qwen"](), tok, S0Config()), tmp_path / "found.jsonl"
    problems = [{"messages": [{"role": "user", "content": "Hi"}]}]
    collect(one, problems, checker=lambda problem, answer: True, out=out)
    tok.chat_template = TEMPLATE.replace("<{{", "({{")
    with pytest.raises(ValueError, match=r"prompt_format: 'template .*' there, 'template .*' here"):
        collect(one, problems, checker=lambda problem, answer: True, out=out)


def test_the_end_token_is_learned_where_a_completion_has_ended():
    tok, messages = chatting(), [{"role": "user", "content": "Hi"}]
    for record, end in (
        ({"prompt": "a", "completion": "b"}, []),
        ({"prompt": "a", "completion": "b", "ended": False}, []),
        ({"prompt": "a", "completion": "b", "ended": True}, [EOS]),
        ({"messages": messages, "completion": "b"}, []),
        ({"messages": messages, "completion": "b", "ended": True}, [EOS]),
    ):
        (example,) = read_examples([record], tok, 99)
        assert example.ids[-1 - len(end) :] == tok("b")["input_ids"] + end
    tok.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tok.chat_template = TEMPLATE.replace(".<eos>", "<turn>\n")
    (example,) = read_examples([{"messages": messages, "completion": "b", "ended": True}], tok, 99)
    assert tok.convert_ids_to_tokens(example.ids[-2:]) == ["b", "<turn>"]
    tok.eos_token = None
    with pytest.raises(ValueError, match=r"data\[0\]: ended is true, but the tokenizer has no end token"):
        read_examples([{"prompt": "a", "completion": "b", "ended": True}], tok, 99)
    for record, message in (
        ({"prompt": "a", "completion": "b", "ended": "yes"}, "ended must be true or false, got 'yes'"),
        ({"messages": messages, "completion": messages}, "the completion of messages must be a text, got list"),
    ):
        with pytest.raises(TypeError, match=message):
            read_examples([record], tokenizer(), 99) if "prompt" in record else read_examples([record], tok, 99)


def test_the_templates_end_of_turn_ends_a_completion():
    tok = chatting()
    tok.chat_template = TEMPLATE.replace(".<eos>", "<pad>")  # an end token that the model's config does not have
    one = S0Trainer(MODELS["qwen"](), tok, S0Config())
    problems = [{"messages": [{"role": "user", "content": "Hi"}]}]
    found = collect(
        one, problems, checker=lambda problem, answer: len(answer) < 60, samples=40, max_new_tokens=60, temperature=3.0
    )
    assert found[0]["ended"]
