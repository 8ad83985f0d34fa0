"""States are saved as a PEFT adapter and loaded again, and generate the same tokens."""

import json
import os

import pytest
import torch
from models import MODELS, every_family, every_model, qwen, random_states, tokenizer, tokens
from safetensors.torch import load_file, save_file

from s0kernels import S0Config, S0States, S0Trainer, swap_modules

peft = pytest.importorskip("peft")
from s0kernels.peft import S0Layer, S0PeftConfig  # noqa: E402
from s0kernels.states import files  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
IDS = tokens(2, 12)
PROMPT = "def f(x):"


def generated(model) -> torch.Tensor:
    return model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def adapter(name: str, **options) -> torch.nn.Module:
    model = peft.get_peft_model(MODELS[name](), S0PeftConfig(task_type="CAUSAL_LM", **options)).eval()
    values = random_states(model)
    for layer in model.modules():
        if isinstance(layer, S0Layer):
            layer.state("default").data.copy_(values[layer.mixer.layer_idx][0])
    return model


@every_model
def test_states_become_an_adapter(name, tmp_path):
    model = swap_modules(MODELS[name]())
    states = random_states(model, tasks=2)
    states.save_peft(tmp_path, scale=0.4, task=1)
    states.attach(model, 0.4, tasks=1)
    again = peft.PeftModel.from_pretrained(MODELS[name](), tmp_path)
    assert torch.equal(logits(again), logits(model))
    if name in ("qwen", "falcon"):
        assert torch.equal(generated(again), generated(model))
        assert not torch.equal(generated(again), generated(MODELS[name]()))
    back, config = S0States.load_with_config(tmp_path, model)
    assert S0Config(**config) == S0Config(alpha=0.4)
    assert all(torch.equal(back[layer][0], states[layer][1]) for layer in states)
    assert back.base_model == {"name": None, "weights": states.base_model["weights"]}
    assert back.layers == states.layers


@every_family
def test_an_adapter_becomes_states(name, tmp_path):
    model = adapter(name, scale=0.4)
    model.save_pretrained(tmp_path)
    trainer = S0Trainer(MODELS[name](), tokenizer())
    trainer.load(tmp_path)
    assert trainer.alpha == trainer.config.alpha == 0.4
    trainer.activate()
    assert torch.equal(generated(trainer.model), generated(model))
    before = trainer.generate(PROMPT, max_new_tokens=8, do_sample=False)
    trainer.states.save_peft(tmp_path / "again", scale=trainer.alpha)
    assert load_file(tmp_path / "again" / files.ADAPTER).keys() == load_file(tmp_path / files.ADAPTER).keys()
    trainer.save(tmp_path / "s0")
    other = S0Trainer(MODELS[name](), tokenizer())
    for folder in ("again", "s0"):
        other.load(tmp_path / folder)
        other.activate()
        assert other.generate(PROMPT, max_new_tokens=8, do_sample=False) == before


def test_layers_that_an_adapter_leaves_out_are_zero(tmp_path):
    model = adapter("qwen", layers_to_transform=[1])
    model.save_pretrained(tmp_path)
    other = swap_modules(qwen())
    states = S0States.load(tmp_path)
    assert states.layers == [0, 1, 3]
    states.attach(other)
    assert torch.equal(logits(other), logits(model))
    assert [float(norm) > 0 for norm in states.norms().values()] == [False, True, False]


def test_several_adapters_are_several_tasks(tmp_path):
    model = swap_modules(qwen())
    states = random_states(model, tasks=2)
    for task, name in enumerate(("one", "two")):
        states.save_peft(tmp_path / name, scale=0.3, task=task)
    trainer = S0Trainer(model, tokenizer())
    trainer.load(tmp_path)
    assert (trainer.tasks, trainer.alpha) == (["one", "two"], 0.3)
    states.save_peft(tmp_path / "two", scale=0.5)
    with pytest.raises(ValueError, match=r"'one' is to be used with alpha 0.3 .* task 'two' with 0.5"):
        trainer.load(tmp_path)


def test_the_scale_has_no_default(tmp_path):
    states = random_states(swap_modules(qwen()))
    with pytest.raises(TypeError, match="scale"):
        states.save_peft(tmp_path)
    for scale, error in (("1", TypeError), (0.0, ValueError), (float("inf"), ValueError)):
        with pytest.raises(error, match=r"S0States.save_peft: scale must"):
            states.save_peft(tmp_path, scale=scale)
    states[0].data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"save_peft: the states of layers \[0\] hold values"):
        states.save_peft(tmp_path, scale=1.0)
    assert not list(tmp_path.iterdir())


def test_what_is_no_s0_adapter_is_refused(tmp_path):
    def refused(message: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            S0States.load(tmp_path)

    states = random_states(swap_modules(qwen()))
    states.save_peft(tmp_path, scale=0.5)
    where, file = tmp_path / files.ADAPTER_CONFIG, tmp_path / files.ADAPTER
    config, tensors = json.loads(where.read_text()), load_file(file)
    for change, message in (
        ({"peft_type": "LORA"}, "peft_type must be S0, got LORA"),
        ({"scale": None}, "scale must be a finite number, got None"),
        ({"arch": None}, "meta names no arch"),
        ({"recurrent_layers": "0"}, "recurrent_layers in its meta must be a list of integers"),
    ):
        where.write_text(json.dumps(config | change))
        refused(message)
    where.write_text(json.dumps(config | {"arch": "mamba2"}))
    with pytest.raises(ValueError, match="for arch 'mamba2', the model has 'gated_delta_net'"):
        S0States.load(tmp_path, swap_modules(qwen()))
    where.write_text(json.dumps(config))
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}, file)
    refused(r"holds \['base_model.model.lm_head.weight'\] beside the states of layers")
    save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}, file)
    refused("values that are not finite numbers")
    file.write_bytes(b"no")
    refused("not a readable safetensors file")
    file.unlink()
    refused("no adapter_model.safetensors")
    states.save_peft(tmp_path, scale=0.5)
    states.save(tmp_path)
    refused("holds both states.safetensors and an adapter of PEFT")


@pytest.mark.parametrize("last", [files.ADAPTER, files.ADAPTER_CONFIG])
def test_a_crash_leaves_no_mixture(tmp_path, monkeypatch, last):
    model = swap_modules(qwen())
    random_states(model).save_peft(tmp_path, scale=0.5)
    write = files.replace_file

    def crash(file, content):
        if file.name == last:
            raise OSError("no space left")
        write(file, content)

    monkeypatch.setattr(files, "replace_file", crash)
    with pytest.raises(OSError, match="no space left"):
        random_states(model, seed=1).save_peft(tmp_path, scale=0.25)
    assert not (tmp_path / files.ADAPTER_CONFIG).exists()
    with pytest.raises(ValueError, match="Can't find 'adapter_config"):
        peft.PeftModel.from_pretrained(qwen(), str(tmp_path))
    with pytest.raises(FileNotFoundError):
        S0States.load(tmp_path)
    monkeypatch.undo()
    random_states(model, seed=1).save_peft(tmp_path, scale=0.25)
    assert S0States.load_with_config(tmp_path)[1]["alpha"] == 0.25


def test_the_card_of_a_user_stays(tmp_path):
    states = random_states(swap_modules(qwen()))
    states.base_model["name"] = "some/model"
    states.save_peft(tmp_path, scale=0.5)
    assert 'base_model: "some/model"' in (tmp_path / files.CARD).read_text()
    (tmp_path / files.CARD).write_text("mine")
    states.save_peft(tmp_path, scale=0.5)
    assert (tmp_path / files.CARD).read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == sorted([files.CARD, files.ADAPTER, files.ADAPTER_CONFIG])


@pytest.mark.filterwarnings("ignore:.*the states were learned on a model without a name")
def test_an_adapter_of_a_text_model_fits_the_multimodal_one(tmp_path):
    adapter("qwen", scale=0.4).save_pretrained(tmp_path)
    model, other = (MODELS["qwen_multimodal"]() for _ in range(2))
    random_states(swap_modules(other)).attach(other, 0.4)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(model, tmp_path)), logits(other))
