"""The checks of a swap against the installed transformers: what passes and what is refused."""

import copy
import gc
import inspect
import warnings

import pytest
import torch
import transformers
from models import (
    MODELS,
    cached,
    close,
    every_family,
    every_model,
    fails_upstream,
    falcon,
    mixers,
    random_states,
    tokens,
)
from surroundings import python
from transformers import DynamicCache
from transformers.cache_utils import Cache, LinearAttentionLayer

from s0kernels import S0States, restore_modules, swap_modules, swap_report
from s0kernels.modules.arguments import CACHES
from s0kernels.modules.injection import BindStates
from s0kernels.modules.mixer import S0Mixer
from s0kernels.modules.swap import find_site


def mixer_of(model):
    return next(module for module in model.modules() if hasattr(module, "A_log"))


def decoder_of(model):
    return next(module for module in model.modules() if hasattr(module, "layers") and hasattr(module, "embed_tokens"))


# Swaps that pass


@every_model
def test_every_family_passes_and_the_report_says_how_closely(name):
    model = MODELS[name]().train()
    ids = tokens(1, 6)
    with torch.no_grad():
        before = model.eval()(ids).logits
    model.train()
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    report = swap_report(swap_modules(model))
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert len(report.checks) == 4
    for check in report.checks[:1] + report.checks[2:]:
        assert 0 <= check.difference <= check.tolerance == 1e-4
    if reason := fails_upstream(name):
        assert report.checks[1].reason is not None, reason
    else:
        assert report.checked
    assert f"transformers {transformers.__version__}" in str(report)
    with torch.no_grad():
        assert close(model.eval()(ids).logits, before)


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_pass(name, dtype):
    assert swap_report(swap_modules(MODELS[name]().to(dtype))).checked


def test_no_memory_stays():
    models = [MODELS["qwen"]() for _ in range(2)]
    swap_modules(models[0])  # loads and caches everything that is loaded only once

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    before = tensors()
    swap_modules(models[1])
    assert tensors() == before


def test_without_the_check_nothing_is_run(monkeypatch):
    model = MODELS["falcon"]()
    decoder = type(decoder_of(model))

    def forward(*_, **__):
        pytest.fail("it was run")

    forward.__signature__ = inspect.signature(decoder.forward)
    monkeypatch.setattr(decoder, "forward", forward)
    assert swap_report(swap_modules(model, check=False)).checks == ()
    with pytest.raises(TypeError, match="check must be True or False, got 'yes'"):
        swap_modules(model, check="yes")
    with pytest.raises(ValueError, match="not swapped"):
        swap_report(restore_modules(model))


@every_family
def test_neither_hooks_of_mixers_nor_compiled_ones_see_the_check(name):
    model = MODELS[name]()
    mixer, calls = mixer_of(model), []
    mixer.register_forward_pre_hook(lambda *_: calls.append("before"))
    mixer.register_forward_hook(lambda *_: calls.append("after"))
    mixer.compile(backend=lambda *_: pytest.fail("it was compiled"))
    decoder_of(model).layers[0].compile(backend=lambda *_: pytest.fail("it was compiled"))
    swap_modules(model)
    assert calls == []


def test_inside_autocast_and_inference_mode():
    with torch.autocast("cpu", torch.bfloat16):
        assert swap_report(swap_modules(MODELS["qwen"]())).checked
    with torch.inference_mode():
        assert swap_report(swap_modules(MODELS["falcon"]())).checked


def test_an_original_that_contradicts_itself_is_reported():
    """Falcon-H1's one-token step ignores `time_step_limit`, which its prefill applies."""
    model = falcon()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.5, 0.6)
    report = swap_report(swap_modules(model))
    assert report.checked
    assert "the replacement follows the prefill" in report.checks[1].reason


# Swaps that are refused


def renamed(function, old, new):
    """Return `function` with one argument renamed."""
    parameters = inspect.signature(function).parameters.values()

    def forward(self, *arguments, **keywords):
        if new in keywords:
            keywords[old] = keywords.pop(new)
        return function(self, *arguments, **keywords)

    forward.__signature__ = inspect.Signature(
        [parameter.replace(name=new) if parameter.name == old else parameter for parameter in parameters]
    )
    return forward


def cache_name(module):
    return next(name for name in CACHES if name in inspect.signature(type(module).forward).parameters)


def rename_the_mixers_cache(model, patch):
    mixer = mixer_of(model)
    patch.setattr(type(mixer), "forward", renamed(type(mixer).forward, cache_name(mixer), "memory"))
    return "takes hidden_states, memory, attention_mask, and none of them is a cache"


def rename_another_argument(model, patch):
    mixer = mixer_of(model)
    patch.setattr(type(mixer), "forward", renamed(type(mixer).forward, "attention_mask", "padding"))
    return f"takes hidden_states, {cache_name(mixer)}, padding; s0kernels knows a mixer that takes"


def rename_the_decoders_cache(model, patch):
    decoder = decoder_of(model)
    patch.setattr(type(decoder), "forward", renamed(type(decoder).forward, cache_name(decoder), "memory"))
    return "none of them is a cache under a name that s0kernels knows"


def hand_the_cache_down_under_another_name(model, patch):
    """The mixer's signature still has the old name, but it reads the cache from its keywords."""
    mixer, call = mixer_of(model), torch.nn.Module.__call__
    name, original = cache_name(mixer), type(mixer).forward

    def forward(self, *arguments, memory=None, **keywords):
        return original(self, *arguments, **{**keywords, name: memory})

    def hand(self, *arguments, **keywords):
        if self is getattr(place, attribute):
            keywords["memory"] = keywords.pop(name)
        return call(self, *arguments, **keywords)

    forward.__signature__ = inspect.signature(original)
    path = next(path for path, module in model.named_modules() if module is mixer)
    place, attribute = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    patch.setattr(type(mixer), "forward", forward)
    patch.setattr(torch.nn.Module, "__call__", hand)
    return "does not know: memory"


def transpose_the_cache(model, patch):
    """The cache holds states with the last two dimensions exchanged."""
    mixer = mixer_of(model)
    forward = type(mixer).forward

    def flip(layer):
        if layer.recurrent_states[0] is not None:
            layer.recurrent_states[0] = layer.recurrent_states[0].mT.contiguous()

    def flipped(self, hidden_states, cache=None, **keywords):
        cache = cache if cache is not None else keywords.pop("cache_params", None)
        flip(cache.layers[self.layer_idx])
        output = forward(self, hidden_states, cache, **keywords)
        flip(cache.layers[self.layer_idx])
        return output

    flipped.__signature__ = inspect.signature(forward)
    patch.setattr(type(mixer), "forward", flipped)
    return r"recurrent_states\[0\] in the cache after a prefill of .* instead of"


def transpose_a_square_state(model, patch):
    """Only the values show it."""
    transpose_the_cache(model, patch)
    return r"recurrent_states\[0\] in the cache after a prefill of .* differs by"


def reverse_the_heads(model, patch):
    mixer = mixer_of(model)
    forward = type(mixer).forward

    def reversed_heads(self, *arguments, **keywords):
        return forward(self, *arguments, **keywords).flip(-1)

    reversed_heads.__signature__ = inspect.signature(forward)
    patch.setattr(type(mixer), "forward", reversed_heads)
    return "prefill of .* differs by"


def keep_states_elsewhere(model, patch):
    """The states of the cache have another name."""
    init = LinearAttentionLayer.__init__

    def renamed_states(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        self.states = self.__dict__.pop("recurrent_states")

    patch.setattr(LinearAttentionLayer, "__init__", renamed_states)
    return "the decoder fails with the replacement of .* no attribute 'recurrent_states'"


def always_hold_a_state(model, patch):
    patch.setattr(Cache, "has_previous_state", lambda *_, **__: True)
    return "the replacement of .* fails with the arguments of its decoder"


def never_hold_a_state(model, patch):
    patch.setattr(Cache, "has_previous_state", lambda *_, **__: False)
    return "differs by"


def hold_a_state_after_two_calls(model, patch):
    """The first continuation ignores the cache."""
    holds, calls = Cache.has_previous_state, []

    def late(self, *arguments, **keywords):
        found = holds(self, *arguments, **keywords)
        calls.append(found)
        return found and sum(calls) > 4

    patch.setattr(Cache, "has_previous_state", late)
    return "differs by"


def keep_the_mask_to_itself(model, patch):
    """The decoder passes no mask down, so pads are unknown."""
    module = inspect.getmodule(type(decoder_of(model)))
    patch.setattr(module, "create_recurrent_attention_mask", lambda *_, **__: None)
    return "the prefill behind pads, from S0, of .* differs by"


def leave_the_mixer_out(model, patch):
    decoder = decoder_of(model)
    parameters = inspect.signature(type(decoder).forward)

    def forward(self, *arguments, **keywords):
        return None

    forward.__signature__ = parameters
    patch.setattr(type(decoder), "forward", forward)
    return "does not call"


def rename_what_a_row_reads(model, patch):
    for mixer in mixers(model):
        name = "head_v_dim" if hasattr(mixer, "head_v_dim") else "ssm_state_size"
        patch.setitem(vars(mixer), f"{name}_", vars(mixer)[name])
        patch.delitem(vars(mixer), name)
    return f"the shape of a state cannot be read: .* no attribute '{name}'"


REFUSED = (
    rename_what_a_row_reads,
    rename_the_mixers_cache,
    rename_another_argument,
    rename_the_decoders_cache,
    hand_the_cache_down_under_another_name,
    transpose_the_cache,
    reverse_the_heads,
    keep_states_elsewhere,
    always_hold_a_state,
    never_hold_a_state,
    hold_a_state_after_two_calls,
    keep_the_mask_to_itself,
    leave_the_mixer_out,
)


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
@every_family
def test_a_changed_transformers_is_refused(name, change, monkeypatch):
    model = MODELS[name]()
    with monkeypatch.context() as patch:
        message = change(model, patch)
        with pytest.raises(ValueError, match=message) as refused:
            swap_modules(model)
    assert f"transformers {transformers.__version__}" in str(refused.value)
    assert find_site(model) is None
    assert not any(isinstance(module, S0Mixer) for module in model.modules())
    assert not any(isinstance(h, BindStates) for m in model.modules() for h in m._forward_pre_hooks.values())
    assert "_init_weights" not in vars(model)
    assert swap_report(swap_modules(model)).checked, "the model was not left as it was"


def test_a_square_state_hides_no_transpose(monkeypatch):
    model = MODELS["qwen"](linear_value_head_dim=8)
    with monkeypatch.context() as patch:
        message = transpose_a_square_state(model, patch)
        with pytest.raises(ValueError, match=message):
            swap_modules(model)


# Checks that cannot be run


def test_meta_offloaded_and_quantised_models_say_why():
    from accelerate import cpu_offload

    with torch.device("meta"):
        meta = MODELS["qwen"]()
    report = swap_report(swap_modules(meta))
    assert [check.reason for check in report.checks] == ["its weights are on the meta device"] * 4
    assert not report.checked
    assert "not checked, its weights are on the meta device" in str(report)

    report = swap_report(swap_modules(cpu_offload(MODELS["falcon"](), torch.device("cpu"))))
    assert [check.reason for check in report.checks] == ["its weights are offloaded"] * 4

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends torchao instead
        quantised = torch.ao.quantization.quantize_dynamic(MODELS["qwen"](), {torch.nn.Linear}, torch.qint8)
    report = swap_report(swap_modules(quantised))
    assert all(check.reason.startswith("its weights are quantised") for check in report.checks)


def test_sharded_models_say_why():
    code = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from models import MODELS
from s0kernels import swap_modules, swap_report
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = MODELS["qwen"]()
for layer in model.model.layers:
    fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
print({check.reason for check in swap_report(swap_modules(model)).checks})
dist.destroy_process_group()
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "its weights are sharded or packed" in done.stdout
    assert "DTensor" in done.stdout


def test_what_a_missing_layer_says():
    layer = decoder_of(MODELS["qwen"]()).layers[0]
    assert {c.reason for c in swap_report(swap_modules(layer)).checks} == {"the mixer is in no decoder's layers"}


# Arguments while it runs


@every_family
@torch.no_grad()
def test_unknown_arguments_are_errors(name):
    model = swap_modules(MODELS[name]())
    ids = tokens(2, 7)
    decoder = type(decoder_of(model)).__name__
    with pytest.raises(TypeError, match=f"{decoder} got an argument that s0kernels does not know: memory"):
        model(ids, memory=DynamicCache(config=model.config))
    with pytest.raises(TypeError, match=r"does not know: segment_ids \(torch.int64 \[2, 7\]\)"):
        model(ids, segment_ids=torch.zeros(2, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="cu_seq_lens_k needs cu_seq_lens_q"):
        model(ids[:1], cu_seq_lens_k=torch.tensor([0, 3, 7]))
    known = {"num_items_in_batch": torch.tensor(3), "output_hidden_states": True, "use_cache": True, "nothing": None}
    model(ids, **known)


@every_family
@torch.no_grad()
def test_a_mixer_takes_what_says_nothing_to_it(name):
    model = swap_modules(MODELS[name]())
    mixer, x = mixer_of(model), torch.randn(1, 5, model.config.hidden_size)
    cosines = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    truth = mixer(x)
    assert torch.equal(mixer(x, use_cache=True, position_embeddings=cosines), truth)
    with pytest.raises(TypeError, match=r"position_embeddings .* may be a cache, a mask or sequence boundaries"):
        mixer(x, position_embeddings=torch.arange(5))
    with pytest.raises(TypeError, match="got two caches: cache and cache_params"):
        mixer(x, DynamicCache(config=model.config), cache_params=DynamicCache(config=model.config))
    for cache in CACHES:  # the name in every version, with a state
        held = DynamicCache(config=model.config)
        mixer(x, **{cache: held})
        assert held.has_previous_state(mixer.layer_idx)


@every_family
def test_weights_are_initialised_as_in_the_original(name):
    models = [MODELS[name]() for _ in range(2)]
    swap_modules(models[1])
    for model in models:
        for module in model.modules():
            module._is_hf_initialized = False
            original = getattr(module, "original", None)
            if original is not None:
                original._is_hf_initialized = False
        for parameter in model.parameters():
            parameter.data.fill_(3.0)
            parameter._is_hf_initialized = False
        torch.manual_seed(0)
        model.init_weights()
    truth, found = (model.state_dict() for model in models)
    assert not any(bool((truth[key] == 3.0).all()) for key in truth if key.endswith(("A_log", "dt_bias", "mixer.D")))
    assert all(torch.equal(truth[key], found[key]) for key in truth)
    assert "_init_weights" not in vars(restore_modules(models[1]))
    copy.deepcopy(swap_modules(models[1])).init_weights()


@every_family
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_tasks_follow_multiplied_rows_without_a_cache(name, options):
    """Without a cache every forward starts from S0, and has the prompts with the generated tokens."""
    model = swap_modules(MODELS[name]())
    states, ids = random_states(model, tasks=2), tokens(2, 6)
    found = []
    for use_cache in (False, True):
        with states.attached(model, tasks=[1, 0]):
            torch.manual_seed(0)
            call = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | options
            found.append(model.generate(ids, use_cache=use_cache, **call))
    assert torch.equal(*found)
    with states.attached(model, tasks=[1, 0]), torch.no_grad():
        model(ids.repeat_interleave(2, 0))
        with pytest.raises(ValueError, match="tasks names 2 rows, but the batch has 4"):
            model(tokens(4, 9, seed=3))


@every_family
def test_capture_under_this_versions_name(name):
    model = swap_modules(MODELS[name]())
    captured = S0States.capture(model, tokens(2, 9))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(2, 9), **cached(model, cache))
    assert all(torch.equal(captured[layer], cache.layers[layer].recurrent_states[0]) for layer in captured)
