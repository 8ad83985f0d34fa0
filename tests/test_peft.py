"""S0 as a method of PEFT: adapters are created, saved, loaded, switched and refused."""

import copy
import json
import pickle

import peft
import pytest
import torch
from adapters import IDS, adapted, add, attached, fill, layers_of, learned, logits
from models import MODELS, close, every_family, every_model, random_states
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.functional import delete_adapter
from peft.utils import PeftType

from s0kernels import S0States, swap_modules
from s0kernels.modules.mixer import S0Mixer
from s0kernels.modules.swap import base_model
from s0kernels.peft import S0Layer, S0Model, S0PeftConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT still asks for it
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]


def test_the_registry_knows_the_method():
    assert PeftType.S0 is PeftType("S0") is PeftType["S0"]
    assert (PeftType.S0, repr(PeftType.S0)) == ("S0", "<PeftType.S0: 'S0'>")
    assert PeftType.S0 in list(PeftType)
    assert hash(PeftType.S0) == hash("S0")
    assert pickle.loads(pickle.dumps(PeftType.S0)) is copy.deepcopy(PeftType.S0) is PeftType.S0
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["S0"] is S0PeftConfig
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING["S0"] is S0Model
    assert peft.get_peft_config({"peft_type": "S0", "scale": 0.5}).scale == 0.5


@every_model
def test_zero_states_change_nothing(name):
    untouched, swapped = MODELS[name](), swap_modules(MODELS[name]())
    model = get_peft_model(MODELS[name](), S0PeftConfig(task_type="CAUSAL_LM")).eval()
    assert torch.equal(logits(model), logits(swapped))
    assert close(logits(model), logits(untouched), 2e-5)
    assert all(".s0_state.default." in key for key in learned(model))  # TRL looks for ".default."
    assert len(learned(model)) == len(random_states(swapped).layers)
    assert all(parameter.dtype == torch.float32 for parameter in learned(model).values())


@every_family
def test_it_computes_what_attached_states_do(name):
    model, other = adapted(name, scale=0.3), swap_modules(MODELS[name]())
    other.requires_grad_(False)
    states = random_states(other)
    states.attach(other, 0.3)
    assert torch.equal(logits(model), logits(other))
    model(IDS, labels=IDS).loss.backward()
    other(IDS, labels=IDS).loss.backward()
    for layer in layers_of(model):
        found = layer.state("default").grad
        assert found.norm() > 0
        assert torch.equal(found, states[layer.mixer.layer_idx].grad[0])
    ours = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, other.generate(input_ids=IDS, max_new_tokens=6, do_sample=False))


@every_family
def test_saved_and_loaded(name, tmp_path):
    model = adapted(name, scale=0.3, layers_to_transform=[0, 1])
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["scale"], config["layers_to_transform"]) == ("S0", 0.3, [0, 1])
    assert (config["arch"], config["base_weights"]) == (
        "gated_delta_net" if name == "qwen" else "mamba2",
        base_model(model)["weights"],
    )
    truth = logits(model)
    again = PeftModel.from_pretrained(MODELS[name](), tmp_path)
    assert torch.equal(logits(again), truth)
    assert not learned(again)
    assert torch.equal(logits(PeftModel.from_pretrained(MODELS[name](), tmp_path, low_cpu_mem_usage=True)), truth)
    trainable = PeftModel.from_pretrained(MODELS[name](), tmp_path, is_trainable=True)
    assert len(learned(trainable)) == 2
    other = get_peft_model(MODELS[name](), S0PeftConfig(task_type="CAUSAL_LM")).eval()
    zero = logits(other)
    other.load_adapter(tmp_path, "second")
    assert torch.equal(logits(other), zero)
    other.set_adapter("second")
    assert torch.equal(logits(other), truth)


def test_adapters_are_switched():
    model = adapted("qwen")
    first, zero = logits(model), logits(swap_modules(MODELS["qwen"]()))
    add(model, "other", seed=1, scale=0.5)
    assert torch.equal(logits(model), first)
    assert set(learned(model)) == {n for n, _ in model.named_parameters() if n.endswith("s0_state.default.weight")}
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(attached("qwen", 0.5, seed=1)))
    assert set(learned(model)) == {n for n, _ in model.named_parameters() if n.endswith("s0_state.other.weight")}
    with model.disable_adapter():
        assert torch.equal(logits(model), zero)
        assert not learned(model)
    both = swap_modules(MODELS["qwen"]())
    one, two = random_states(both, seed=0), random_states(both, seed=1)
    S0States({layer: one[layer] + 0.5 * two[layer] for layer in one}, one.arch).attach(both)
    model.base_model.set_adapter(["default", "other"])
    assert close(logits(model), logits(both))
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    assert list(layers_of(model)[0].scaling) == ["default"]
    add(model, "third", seed=2)
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), logits(attached("qwen", seed=2)))


def test_the_scale_is_changed_in_use_and_in_training(tmp_path):
    model = adapted("qwen")
    model.set_scale("default", 0.25)
    assert torch.equal(logits(model), logits(attached("qwen", 0.25)))
    other = attached("qwen", 0.25)
    other(IDS, labels=IDS).loss.backward()
    model(IDS, labels=IDS).loss.backward()
    states = S0States.attached_to(other)
    for layer in layers_of(model):
        assert torch.equal(layer.state("default").grad, states[layer.mixer.layer_idx].grad[0])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(MODELS["qwen"](), tmp_path)), logits(model))
    for layer in layers_of(model):  # PEFT does this with the layers of every method
        layer.set_scale("default", 2.0)
    assert torch.equal(logits(model), logits(attached("qwen", 0.5)))
    for layer in layers_of(model):
        layer.scale_layer(0.5)
    assert torch.equal(logits(model), logits(attached("qwen", 0.25)))
    for layer in layers_of(model):
        layer.scale_layer(4.0)
        layer.unscale_layer()
    assert torch.equal(logits(model), logits(attached("qwen", 0.25)))


def test_other_modules_are_trained_and_saved(tmp_path):
    model = adapted("qwen", modules_to_save=["lm_head"])
    assert {"s0_state" if "s0_state" in name else name.split(".")[2] for name in learned(model)} == {
        "s0_state",
        "lm_head",
    }
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(0.5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MODELS["qwen"](), tmp_path)
    assert torch.equal(logits(again), logits(model))
    with model.disable_adapter():
        base = logits(model)
    mixed = logits(model, adapter_names=["default", "__base__", "default"])
    assert close(mixed[0], logits(model)[0])
    assert close(mixed[1], base[1])


def test_injected_without_a_wrapper():
    """Inject the layers alone, like transformers and diffusers do, and use PEFT's functions for them."""
    model = inject_adapter_in_model(S0PeftConfig(scale=0.5), MODELS["qwen"]()).eval()
    fill(model, "default", 0)
    truth = logits(model)
    assert torch.equal(truth, logits(attached("qwen", 0.5)))
    found = peft.get_peft_model_state_dict(model)
    assert len(found) == 3
    again = inject_adapter_in_model(S0PeftConfig(scale=0.5), MODELS["qwen"](), state_dict=found).eval()
    peft.set_peft_model_state_dict(again, found)
    assert torch.equal(logits(again), truth)
    delete_adapter(again, "default", prefix="s0_")
    assert torch.equal(logits(again), logits(swap_modules(MODELS["qwen"]())))


def test_merging_is_refused_and_unloading_gives_the_model_back():
    model, untouched = adapted("qwen"), logits(MODELS["qwen"]())
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="S0 cannot be merged: it is the state in which a sequence starts"):
            merge()
    assert torch.equal(logits(model), logits(attached("qwen")))
    plain = model.unload()
    assert torch.equal(logits(plain), untouched)
    assert not any(isinstance(module, (S0Mixer, S0Layer)) for module in plain.modules())
    swapped = swap_modules(MODELS["qwen"]())
    names = set(swapped.state_dict())
    plain = get_peft_model(swapped, S0PeftConfig()).unload()
    assert any(isinstance(module, S0Mixer) for module in plain.modules())  # it was swapped before
    assert set(plain.state_dict()) == names
    assert torch.equal(logits(get_peft_model(plain, S0PeftConfig())), logits(swapped))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"scale": 0.0}, ValueError, "scale must not be 0"),
        ({"layers_to_transform": ["0"]}, TypeError, "layers_to_transform must be a list of ints"),
        ({"target_modules": [1]}, TypeError, "target_modules must be a list of strings"),
        ({"modules_to_save": "lm_head"}, TypeError, "modules_to_save must be a list of strings"),
        ({"layers_to_transform": [0, 2]}, ValueError, r"layers_to_transform: 2 has no state; .* \[0, 1, 3\]"),
        ({"layers_to_transform": []}, ValueError, "layers_to_transform: names none"),
        ({"target_modules": ["linear_attn", "q_proj"]}, ValueError, "no recurrent layer is called 'q_proj'"),
        ({"target_modules": "all-linear"}, ValueError, "target_modules all-linear.* leave no recurrent layer"),
        ({"exclude_modules": ["linear_attn"]}, ValueError, "leave no recurrent layer"),
        ({"arch": "mamba2"}, ValueError, "arch: the states are for 'mamba2', the model has 'gated_delta_net'"),
    ],
)
def test_bad_configs_are_refused_and_the_model_stays(options, error, message):
    model = MODELS["qwen"]()
    with pytest.raises(error, match=message):
        get_peft_model(model, S0PeftConfig(**options))
    assert not any(isinstance(module, (S0Mixer, S0Layer)) for module in model.modules())


def test_targets():
    def names(**options):
        return {layer.mixer.layer_idx for layer in layers_of(adapted("qwen", **options))}

    assert names(target_modules=["linear_attn"]) == names(target_modules=r".*linear_attn") == {0, 1, 3}
    assert names(layers_to_transform=1) == {1}
    assert names(exclude_modules=["layers.0.linear_attn"]) == {1, 3}
    assert names(target_modules=["layers.0.linear_attn", "layers.3.linear_attn"], layers_to_transform=[3]) == {3}


def test_misuse_is_refused(tmp_path):
    model = adapted("qwen")
    with pytest.raises(ValueError, match="starts from PEFT adapters"):
        random_states(model).attach(model)
    with random_states(model, seed=1).attached(model):
        assert torch.equal(logits(model), logits(attached("qwen", seed=1)))
    with pytest.raises(ValueError, match="S0States are attached to the model"):
        get_peft_model(attached("qwen"), S0PeftConfig())
    with pytest.raises(ValueError, match="no S0 adapter is called 'nobody'"):
        logits(model, adapter_names=["nobody"] * 3)
    with pytest.raises(ValueError, match="tasks names 2 rows, but the batch has 3"):
        logits(model, adapter_names=["default"] * 2)
    with pytest.raises(TypeError, match="adapter_names must be a list"):
        logits(model, adapter_names="default")
    with pytest.raises(ValueError, match="only the active adapter can be trained"):
        model.train()(IDS, adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="scale must not be 0"):
        model.set_scale("default", 0)
    with pytest.raises(ValueError, match="no S0 adapter is called 'other'"):
        model.set_scale("other", 1.0)


def test_files_for_another_model_are_refused(tmp_path):
    adapted("qwen").save_pretrained(tmp_path / "all")
    with pytest.raises(ValueError, match="the states are for 'gated_delta_net', the model has 'mamba2'"):
        PeftModel.from_pretrained(MODELS["falcon"](), tmp_path / "all")
    with (
        pytest.raises(ValueError, match=r"states are 3 of shape \[4, 8, 12\].* the model has 3 of shape \[4, 8, 10\]"),
        pytest.warns(UserWarning, match="the states were learned on"),
    ):
        PeftModel.from_pretrained(MODELS["qwen"](linear_value_head_dim=10), tmp_path / "all")
    adapted("qwen", layers_to_transform=[0]).save_pretrained(tmp_path / "some")
    config = json.loads((tmp_path / "some" / "adapter_config.json").read_text())
    (tmp_path / "some" / "adapter_config.json").write_text(json.dumps(config | {"layers_to_transform": None}))
    with pytest.raises(ValueError, match=r"states are 1 of shape .* for \['model.layers.0.linear_attn'\], .* has 3"):
        PeftModel.from_pretrained(MODELS["qwen"](), tmp_path / "some")


def test_states_of_adapters_are_no_part_of_the_base():
    swapped = swap_modules(MODELS["qwen"]())
    before = base_model(swapped)
    assert base_model(adapted("qwen")) == before
