"""The trainer: API and defaults of the method, training in batches, refusals."""

import json
import math

import pytest
import torch
from cases import error
from models import MODELS, checkpoint_layers, tokenizer

from s0kernels import S0Config, S0States, S0Trainer, restore_modules
from s0kernels.modules.swap import find_site

every_family = pytest.mark.parametrize("name", ["qwen", "falcon"])
ALPHA = {"qwen": 0.07, "falcon": 0.65}
TEXTS = [("Q: 2+2?\nA:", " 4"), ("Q: 10-3?\nA:", " 7, and no more"), ("def f(x):\n", "    return x + 1"), ("a", "bc")]


def data(tok, pairs=TEXTS):
    return [(prompt + answer, len(tok(prompt)["input_ids"])) for prompt, answer in pairs]


def trainer(name, **config) -> S0Trainer:
    return S0Trainer(MODELS[name](), tokenizer(), S0Config(**config))


@pytest.fixture(params=["qwen", "falcon"])
def checkpoint(request, tmp_path):
    """A model of either family on disk."""
    MODELS[request.param]().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_usage_of_the_package_page(checkpoint, tmp_path, monkeypatch):
    """Both listings, with the import and the model's path replaced."""
    monkeypatch.chdir(tmp_path)
    trainer = S0Trainer.from_pretrained(str(checkpoint))

    prompt = "Q: What is 2+2?\nA:"
    answer = " 4"
    full_text = prompt + answer

    tokens = trainer.tokenizer(prompt)
    prompt_length = len(tokens["input_ids"])

    data = [(full_text, prompt_length)]
    trainer.train(data)
    trainer.activate()

    output = trainer.generate("Q: What is 2+2?\nA:", max_new_tokens=20)
    assert isinstance(output, str)

    trainer.save("./my_s0_states")

    trainer = S0Trainer.from_pretrained(str(checkpoint))
    trainer.load("./my_s0_states")
    trainer.activate()
    assert trainer.generate("Q: What is 2+2?\nA:", max_new_tokens=20) == output


def test_config_table(tmp_path):
    config = S0Config()
    assert config.to_dict() == {
        "n_steps": 20,
        "lr": 1e-3,
        "l2_lambda": 5e-4,
        "alpha": None,
        "normalize": False,
        "grad_clip": 1.0,
        "max_length": 2048,
    }
    changed = S0Config(n_steps=3, alpha=0.5, normalize=True)
    changed.save(tmp_path / "config.json")
    assert S0Config.load(tmp_path / "config.json") == changed
    assert S0Config.from_dict(changed.to_dict()) == changed
    with pytest.raises(ValueError, match=r"unknown keys \['steps'\]"):
        S0Config.from_dict({"steps": 3})
    for name, value, kind in (
        ("n_steps", -1, ValueError),
        ("n_steps", 2.5, TypeError),
        ("lr", "1e-3", TypeError),
        ("lr", math.nan, ValueError),
        ("l2_lambda", -1.0, ValueError),
        ("grad_clip", None, TypeError),
        ("max_length", 0, ValueError),
        ("normalize", 1, TypeError),
        ("alpha", math.inf, ValueError),
        ("grad_clip", 0, ValueError),
    ):
        with pytest.raises(kind, match=name):
            S0Config(**{name: value})


@every_family
@pytest.mark.parametrize("tokens_per_batch", [4096, 40, 1])
def test_training_is_the_methods_loop(name, tokens_per_batch):
    """Compare with the published loop: one example per forward, transformers' own loss, L2, clip, Adam."""
    tuned = trainer(name, n_steps=3, lr=1e-2, l2_lambda=0.1, grad_clip=0.5)
    examples = data(tuned.tokenizer)
    result = tuned.train(examples, tokens_per_batch=tokens_per_batch, progress=False)

    model = tuned.model.requires_grad_(False)
    states = S0States.for_model(model)
    optimizer = torch.optim.Adam(states.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        total = 0.0
        for text, prompt_length in examples:
            ids = tuned.tokenizer(text, return_tensors="pt")["input_ids"]
            labels = ids.clone()
            labels[0, :prompt_length] = -100
            with states.attached(model):
                loss = model(input_ids=ids, labels=labels).loss
            (loss / len(examples)).backward()
            total += float(loss.detach()) / len(examples)
        (0.1 * sum(state.square().sum() for state in states.parameters())).backward()
        torch.nn.utils.clip_grad_norm_(states.parameters(), 0.5)
        optimizer.step()
    assert abs(result["final_loss"] - total) < 1e-5 * total
    assert [entry["step"] for entry in tuned.history] == [0, 1, 2]
    for layer in states:  # compare norms: Adam makes full steps for entries whose gradient is only rounding
        assert error(tuned.states[layer], states[layer]) < 1e-3
    norms = [float(state.detach().norm()) for state in states.parameters()]
    assert abs(result["avg_state_norm"] - sum(norms) / len(norms)) < 1e-4


@every_family
def test_weights_do_not_change(name):
    tuned = trainer(name, n_steps=2)
    tuned.model.train()
    frozen = next(tuned.model.parameters()).requires_grad_(False)
    before = {key: value.clone() for key, value in tuned.model.state_dict().items()}
    tuned.train(data(tuned.tokenizer), progress=False)
    for key, value in tuned.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in tuned.model.parameters())
    assert all(p.requires_grad == (p is not frozen) for p in tuned.model.parameters())
    assert all(module.training for module in tuned.model.modules())
    assert all(float(state.detach().norm()) > 0 for state in tuned.states.parameters())


@every_family
def test_training_lowers_the_loss_and_activation_scales_by_alpha(name):
    tuned = trainer(name, lr=1e-2)
    examples = data(tuned.tokenizer)
    base = tuned.evaluate(examples)
    result = tuned.train(examples, progress=False)
    assert abs(tuned.history[0]["loss"] - base) < 1e-5
    assert result["final_loss"] < base
    assert tuned.alpha == ALPHA[name]
    assert tuned.evaluate(examples) == base, "training leaves nothing attached"

    tuned.activate()
    tuned.activate()  # once is enough
    active = tuned.evaluate(examples)
    tuned.deactivate()
    with tuned.states.attached(tuned.model, scale=ALPHA[name]):
        assert abs(tuned.evaluate(examples) - active) < 1e-6
    assert active != base
    assert tuned.evaluate(examples) == base

    tuned.config = S0Config(alpha=2.0, normalize=True)
    tuned.activate()
    unit = {layer: 2.0 * tuned.states[layer].detach() / tuned.states[layer].detach().norm() for layer in tuned.states}
    normalized = tuned.evaluate(examples)
    tuned.deactivate()
    with S0States(unit, tuned.states.arch).attached(tuned.model):
        assert abs(tuned.evaluate(examples) - normalized) < 1e-6


@every_family
def test_training_again_while_active_keeps_the_new_states_active(name):
    tuned = trainer(name, n_steps=2, lr=1e-2)
    examples = data(tuned.tokenizer)
    tuned.train(examples, progress=False)
    tuned.activate()
    tuned.config = S0Config(n_steps=6, lr=1e-2)
    tuned.train(examples, progress=False)
    assert tuned.active
    found = tuned.evaluate(examples)
    with tuned.states.attached(tuned.model, scale=tuned.alpha):
        assert tuned.evaluate(examples) == found
    assert find_site(tuned.model).attachment.owner is tuned.states


@every_family
def test_generate(name):
    tuned = trainer(name, n_steps=1)
    prompts = [prompt for prompt, _ in TEXTS]
    tuned.train(data(tuned.tokenizer), progress=False)
    tuned.activate()
    together = tuned.generate(prompts, max_new_tokens=6, do_sample=False)
    assert together == [tuned.generate(prompt, max_new_tokens=6, do_sample=False) for prompt in prompts]
    several = tuned.generate(prompts[:1], max_new_tokens=6, do_sample=False, num_beams=2, num_return_sequences=2)
    assert len(several) == 2
    tuned.tokenizer.pad_token = None
    assert tuned.generate(prompts, max_new_tokens=6, do_sample=False) == together


@every_family
def test_files(name, tmp_path):
    tuned = trainer(name, n_steps=2, alpha=0.3)
    tuned.train(data(tuned.tokenizer), progress=False)
    tuned.save(tmp_path / "states")
    assert json.loads((tmp_path / "states" / "config.json").read_text()) == tuned.config.to_dict()
    other = trainer(name)
    other.load(tmp_path / "states")
    assert other.config == tuned.config
    for layer in tuned.states:
        assert torch.equal(other.states[layer], tuned.states[layer])
    tuned.activate()
    active = tuned.evaluate(data(tuned.tokenizer))
    fresh = trainer(name, n_steps=1)
    fresh.train(data(tuned.tokenizer), progress=False)
    fresh.activate()
    fresh.load(tmp_path / "states")  # the task is switched while active
    assert fresh.evaluate(data(tuned.tokenizer)) == active


def test_refusals():
    tuned = trainer("qwen", n_steps=1)
    tok = tuned.tokenizer
    for call in (tuned.activate, lambda: tuned.save("nowhere")):
        with pytest.raises(RuntimeError, match="no states"):
            call()
    with pytest.raises(ValueError, match="data is empty"):
        tuned.train([])
    good = ("ab", 1)
    for bad, kind, message in (
        (("ab", 2), ValueError, r"data\[1\] has nothing to predict"),
        (("ab", 7), ValueError, r"data\[1\] has nothing to predict"),
        (("a", 0), ValueError, r"data\[1\] has nothing to predict"),
        (("ab", -1), ValueError, r"data\[1\].*negative"),
        (("ab", 1.0), TypeError, r"data\[1\]"),
        (("ab", True), TypeError, r"data\[1\]"),
        ((["ab"], 1), TypeError, r"data\[1\]"),
        ("ab", TypeError, r"data\[1\]"),
    ):
        with pytest.raises(kind, match=message):
            tuned.train([good, bad] if bad != "ab" else [good, "abc"])
    tuned.config = S0Config(max_length=3)
    with pytest.raises(ValueError, match=r"data\[0\].*max_length 3"):
        tuned.train([("abcdef", len(tok("abcd")["input_ids"]))])
    with pytest.raises(ValueError, match="tokens_per_batch"):
        tuned.train([good], tokens_per_batch=0)


@every_family
def test_two_trainers_on_one_model(name):
    """The trainer that was activated last is active, and only it reports that."""
    first = trainer(name, n_steps=2, lr=1e-2)
    second = S0Trainer(first.model, first.tokenizer, S0Config(n_steps=4, lr=1e-2))
    examples = data(first.tokenizer)
    losses = []
    for tuned in (first, second):
        tuned.train(examples, progress=False)
        tuned.activate()
        losses.append(tuned.evaluate(examples))
    assert (first.active, second.active) == (False, True)
    first.activate()
    assert (first.active, second.active) == (True, False)
    assert first.evaluate(examples) == losses[0] != losses[1]
    second.deactivate()
    assert first.active
    restore_modules(first.model)
    assert not first.active
    assert first.alpha == ALPHA[name]
    with pytest.raises(ValueError, match="swap_modules"):
        first.activate()


def test_a_failed_training_leaves_things_as_they_were():
    tuned = trainer("qwen", n_steps=2, lr=1e-2)
    examples = data(tuned.tokenizer)
    tuned.train(examples, progress=False)
    tuned.activate()
    states, history, loss = tuned.states, tuned.history, tuned.evaluate(examples)
    head, weight = tuned.model.lm_head, tuned.model.lm_head.weight.clone()

    def spoil(*_):
        head.weight.data.fill_(math.nan)

    with pytest.raises(RuntimeError, match="the loss is nan at step 1"):
        tuned.train(examples, progress=False, callbacks=[spoil])
    head.weight.data.copy_(weight)
    assert tuned.active
    assert (tuned.states, tuned.history) == (states, history)
    assert tuned.evaluate(examples) == loss
    assert not tuned.model.training


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [("", ValueError), ([], TypeError), (None, TypeError), (["a", 1], TypeError), (["a", ""], ValueError)],
)
def test_generate_refuses(prompt, kind):
    with pytest.raises(kind, match="prompt"):
        trainer("qwen").generate(prompt)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_with_layers_elsewhere(checkpoint, tmp_path, place):
    """`device_map` keeps layers in memory or on disk and loads them when they are called. Training works."""
    whole = S0Trainer.from_pretrained(str(checkpoint), S0Config(n_steps=3, lr=1e-2))
    devices = {"lm_head": "cpu"} | {f"model.{name}": "cpu" for name, _ in whole.model.model.named_children()}
    devices.pop("model.layers")
    devices |= {f"model.layers.{i}": place if i % 2 == 0 else "cpu" for i in range(len(whole.model.model.layers))}
    spread = S0Trainer.from_pretrained(
        str(checkpoint), S0Config(n_steps=3, lr=1e-2), device_map=devices, offload_folder=str(tmp_path / "offloaded")
    )
    examples = data(whole.tokenizer)
    assert ("meta" in {p.device.type for p in spread.model.parameters()}) == (place == "disk")
    for tuned in (whole, spread):
        tuned.train(examples, progress=False)
        tuned.activate()
        assert all(p.requires_grad for p in tuned.model.parameters())
    for layer in whole.states:
        assert error(spread.states[layer], whole.states[layer]) < 1e-3
    assert abs(whole.evaluate(examples) - spread.evaluate(examples)) < 1e-5
    prompt = TEXTS[0][0]
    assert spread.generate(prompt, max_new_tokens=5) == whole.generate(prompt, max_new_tokens=5)
    spread.save(tmp_path / "states")
    whole.load(tmp_path / "states")


@every_family
@pytest.mark.parametrize("checkpointed", [False, True])
def test_refuses_to_train_what_has_no_effect(name, checkpointed):
    tuned = S0Trainer(MODELS[name](attention_dropout=0.5), tokenizer())
    if checkpointed:  # in training mode, where dropout alone would change the logits
        checkpoint_layers(tuned.model, use_reentrant=False)
    for parameter_name, parameter in tuned.model.named_parameters():
        if parameter_name.endswith("A_log"):
            parameter.data.fill_(12.0)  # the state is forgotten before the first token
    with pytest.raises(RuntimeError, match="leaves the logits unchanged"):
        tuned.train(data(tuned.tokenizer))
    assert tuned.states is None
    assert find_site(tuned.model).attachment is None


def test_a_loss_that_is_not_finite_ends_the_run():
    tuned = trainer("qwen")
    tuned.model.lm_head.weight.data[5] = math.inf
    with pytest.raises(RuntimeError, match="the loss is"):
        tuned.train(data(tuned.tokenizer), progress=False)


def test_progress_bar(capfd):
    tuned = trainer("qwen", n_steps=2)
    tuned.train(data(tuned.tokenizer))
    shown = capfd.readouterr().err
    assert "S0 tuning: 2 of 2 steps, loss " in shown
    tuned.train(data(tuned.tokenizer), progress=False)
    assert capfd.readouterr().err == ""


@every_family
def test_gradient_checkpointing_trains_the_same(name):
    plain, checkpointed = trainer(name, n_steps=2), trainer(name, n_steps=2)
    checkpoint_layers(checkpointed.model, use_reentrant=False)
    for tuned in (plain, checkpointed):
        tuned.train(data(tuned.tokenizer), progress=False)
    for layer in plain.states:
        assert error(checkpointed.states[layer], plain.states[layer]) < 1e-3


def test_no_steps_evaluates_only():
    tuned = trainer("qwen", n_steps=0)
    examples = data(tuned.tokenizer)
    result = tuned.train(examples, progress=False)
    assert result == {"final_loss": tuned.evaluate(examples), "avg_state_norm": 0.0}
