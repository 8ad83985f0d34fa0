"""Forwards with PEFT adapters, compared with states attached without PEFT."""

import copy

import pytest
import torch
from adapters import IDS, adapted, add, fill, layers_of, learned, logits
from models import MODELS, checkpoint_layers, close, every_family, random_states
from peft import LoraConfig, PeftModel, get_peft_model

from s0kernels import swap_modules
from s0kernels.peft import S0PeftConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT still asks for it
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]


@every_family
def test_an_adapter_for_each_row(name):
    model = adapted(name)
    add(model, "other", seed=1, scale=0.5, layers_to_transform=[1])
    rows = ["other", "__base__", "default"]
    alone = []
    for i, row in enumerate(rows):
        if row == "__base__":
            with model.disable_adapter():
                alone.append(model.generate(input_ids=IDS[i : i + 1], max_new_tokens=5, do_sample=False))
        else:
            model.set_adapter(row)
            alone.append(model.generate(input_ids=IDS[i : i + 1], max_new_tokens=5, do_sample=False))
    together = model.generate(input_ids=IDS, adapter_names=rows, max_new_tokens=5, do_sample=False)
    assert torch.equal(together, torch.cat(alone))
    assert len({tuple(row[-5:].tolist()) for row in together}) == 3
    model.set_adapter("default")
    mixed = logits(model, adapter_names=rows)
    assert torch.equal(mixed[2], logits(model, adapter_names=["default"] * 3)[2])
    assert not close(mixed[0], logits(model)[0], 1e-2)


def test_rows_follow_beams_and_returned_sequences():
    model, rows = adapted("qwen"), ["other", "__base__", "default"]
    add(model, "other", seed=1)
    for options in ({"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}):
        found = model.generate(input_ids=IDS, adapter_names=rows, max_new_tokens=4, do_sample=False, **options)
        copies = options.get("num_return_sequences", 1)
        for i, row in enumerate(rows):
            single = model.generate(
                input_ids=IDS[i : i + 1], adapter_names=[row], max_new_tokens=4, do_sample=False, **options
            )
            assert torch.equal(found[i * copies : (i + 1) * copies], single)


def test_the_bank_is_made_once_and_again_after_a_change():
    model = adapted("qwen")
    add(model, "other", seed=1)
    model.set_requires_grad(["default", "other"], False)
    layer = layers_of(model)[0]
    rows, one = [("default",), ("other",)], [("default",)]
    with torch.no_grad():
        assert layer.bank(one).data_ptr() == layer.state("default").data_ptr()  # no copy at scale 1
        bank = layer.bank(rows)
        assert layer.bank(rows) is bank
        layer.state("other").mul_(2)
        assert layer.bank(rows) is not bank
        assert torch.equal(layer.bank(rows)[1], layer.state("other"))
        layer.state("other").data = layer.state("other").data * 3  # like a move to another device does
        assert torch.equal(layer.bank(rows)[1], layer.state("other"))
        layer.set_scale("other", 0.5)
        assert torch.equal(layer.bank(rows)[1], 0.5 * layer.state("other"))
        model.delete_adapter("other")
        add(model, "other", seed=3)
        assert torch.equal(layer.bank(rows)[1], layer.state("other"))


def test_what_a_fused_optimizer_changes_is_seen():
    """It does not change the version of a parameter. Before and after training the adapter is frozen."""
    model = adapted("qwen", scale=0.5)
    model.set_requires_grad("default", False)
    before = logits(model)
    model.set_requires_grad("default", True)
    optimizer = torch.optim.Adam(learned(model).values(), lr=0.5, fused=True)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = logits(model)
    assert not close(after, before, 1e-2)
    model.set_requires_grad("default", False)
    assert torch.equal(logits(model), after)


@pytest.mark.parametrize("target", ["q_proj", "in_proj_qkv"])
@pytest.mark.parametrize("order", [("S0", "LoRA"), ("LoRA", "S0")])
def test_lora_beside_it(order, target, tmp_path):
    """In either order there is one forward with gradients for both, and both are saved. LoRA can be merged
    separately."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[target], init_lora_weights=False)
    configs = {"S0": S0PeftConfig(task_type="CAUSAL_LM", scale=0.5), "LoRA": lora}
    torch.manual_seed(0)
    plain = get_peft_model(MODELS["qwen"](), copy.deepcopy(lora), adapter_name="LoRA").eval()
    weights = {name: parameter for name, parameter in plain.named_parameters() if "lora_" in name}
    swap_modules(plain)
    random_states(plain).attach(plain, 0.5)

    first = get_peft_model(MODELS["qwen"](), configs[order[0]], adapter_name=order[0])
    model = get_peft_model(first.get_base_model(), configs[order[1]], adapter_name=order[1]).eval()
    fill(model, "S0", 0)
    for name, parameter in weights.items():
        model.get_parameter(name).data.copy_(parameter)
    assert {name for name in learned(model) if "s0_state" not in name} == set(weights)
    assert torch.equal(logits(model), logits(plain))
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad.norm() > 0 for parameter in learned(model).values())
    with model.disable_adapter():
        assert close(logits(model), logits(MODELS["qwen"]()), 2e-5)

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MODELS["qwen"](), tmp_path / order[0], adapter_name=order[0])
    again = PeftModel.from_pretrained(again.get_base_model(), tmp_path / order[1], adapter_name=order[1])
    assert torch.equal(logits(again), logits(plain))
    if order[1] == "LoRA":
        merged = model.merge_and_unload()
        assert close(logits(merged), logits(plain), 1e-4)
        assert layers_of(merged)
    else:
        with pytest.raises(ValueError, match="S0 cannot be merged"):
            model.merge_and_unload()
        assert torch.equal(logits(model), logits(plain))
        assert close(logits(model.unload()), logits(MODELS["qwen"]()), 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, other = adapted("qwen", scale=0.5).train(), adapted("qwen", scale=0.5).train()
    if reentrant:
        other.enable_input_require_grads()
    checkpoint_layers(other.base_model.model, use_reentrant=reentrant)
    for each in (model, other):
        each(IDS, labels=IDS, use_cache=False).loss.backward()
    for a, b in zip(learned(model).values(), learned(other).values(), strict=True):
        assert a.grad.norm() > 0
        assert close(a.grad, b.grad, 1e-6)


def test_what_was_bound_is_recomputed():
    """The backward uses the adapter that was active when its forward began."""
    model = adapted("qwen").train()
    model.base_model.set_adapter(["default"])
    model(IDS, labels=IDS).loss.backward()
    truth = {name: parameter.grad.clone() for name, parameter in learned(model).items()}
    model.zero_grad()
    checkpoint_layers(model.base_model.model, use_reentrant=False)
    loss = model(IDS, labels=IDS, use_cache=False).loss
    add(model, "other", seed=1)
    for layer in layers_of(model):
        layer._active_adapter, layer._disable_adapters = ["other"], True
    loss.backward()
    for name, grad in truth.items():
        assert close(model.get_parameter(name).grad, grad, 1e-6)


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_compiled(name, scale):
    model = adapted(name, scale=scale)
    truth = logits(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert close(logits(compiled), truth)
    compiled(IDS, labels=IDS, use_cache=False).loss.backward()
    grads = [parameter.grad.clone() for parameter in learned(model).values()]
    model.zero_grad()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(close(a, b.grad) for a, b in zip(grads, learned(model).values(), strict=True))
    with torch.no_grad():
        for parameter in learned(model).values():
            parameter.mul_(-1)
    assert close(logits(compiled), logits(model))
    assert not close(logits(compiled), truth, 1e-2)


def test_a_state_that_a_trainer_has_cast_is_scaled_in_fp32():
    model, other = adapted("qwen", scale=0.3), swap_modules(MODELS["qwen"]())
    states = random_states(other)
    for parameter in [*learned(model).values(), *states.parameters()]:
        parameter.data = parameter.data.bfloat16()
    for parameter in states.parameters():
        parameter.data = parameter.data.float()
    states.attach(other, 0.3)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_quantised_linear_layers():
    def quantised():
        return torch.ao.quantization.quantize_dynamic(MODELS["qwen"](), {torch.nn.Linear}, torch.qint8)

    model = get_peft_model(quantised(), S0PeftConfig(task_type="CAUSAL_LM", scale=0.5)).eval()
    fill(model, "default", 0)
    other = swap_modules(quantised())
    zero = logits(other)
    random_states(other).attach(other, 0.5)
    assert torch.equal(logits(model), logits(other))
    assert not close(logits(model), zero, 1e-2)


def test_copies_start_from_copies():
    model = adapted("qwen", scale=0.5)
    truth, other = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(other), truth)
    with torch.no_grad():
        for parameter in learned(other).values():
            parameter.mul_(-1)
    assert torch.equal(logits(model), truth)
    assert not close(logits(other), truth, 1e-2)
