"""Hybrid models with random weights: a small model of every family, and two models at published sizes.

Decays are made slow, like those of trained models: with the standard initialisation most heads forget their initial
state within a few tokens. Otherwise the values of weights do not affect time or memory.
"""

import importlib

import torch
from torch import nn

#: class names in transformers, by family
_CLASSES = {
    "Qwen3.5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
    "Qwen3.5-MoE": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
    "Qwen3-Next": ("Qwen3NextConfig", "Qwen3NextForCausalLM"),
    "Falcon-H1": ("FalconH1Config", "FalconH1ForCausalLM"),
    "Bamba": ("BambaConfig", "BambaForCausalLM"),
}
_COMMON = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}

#: Qwen/Qwen3.5-4B, text model, from a secondary source: the shapes of its tensors in github.com/quantumaikr/quant.cpp
#: issue 94. Not compared with https://huggingface.co/Qwen/Qwen3.5-4B/blob/main/config.json.
QWEN3_5_4B = {
    "vocab_size": 248320,
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
#: tiiuae/Falcon-H1-7B-Base, from a secondary source: layers, width and heads in transformers' page on FalconH1. Not
#: compared with https://huggingface.co/tiiuae/Falcon-H1-7B-Base/blob/main/config.json. Its multipliers scale
#: activations and are left at 1.
FALCON_H1_7B = {
    "vocab_size": 130049,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 44,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_d_ssm": 3072,
    "mamba_n_heads": 24,
    "mamba_d_head": 128,
    "mamba_d_state": 256,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
PUBLISHED = {"Qwen3.5-4B": ("Qwen3.5", QWEN3_5_4B), "Falcon-H1-7B": ("Falcon-H1", FALCON_H1_7B)}

_SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
_SMALL_DELTA = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_SMALL_MAMBA = {
    "num_hidden_layers": 3,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 64,
    "mamba_chunk_size": 64,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
SMALL = {
    "Qwen3.5": {**_SMALL, **_SMALL_DELTA},
    "Qwen3.5-MoE": {**_SMALL, **_SMALL_DELTA, **_EXPERTS},
    "Qwen3-Next": {**_SMALL, **_SMALL_DELTA, **_EXPERTS},
    "Falcon-H1": {**_SMALL, **_SMALL_MAMBA, "mamba_d_ssm": 256},
    "Bamba": {**_SMALL, **_SMALL_MAMBA, "attn_layer_indices": [1]},
}


def build(
    family: str, settings: dict, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Build the causal language model of a family with these settings of its config, in evaluation mode."""
    transformers = importlib.import_module("transformers")
    config_class, model_class = (getattr(transformers, name) for name in _CLASSES[family])
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = model_class(config_class(**{**_COMMON, **settings}))
    finally:
        torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.uniform_(-6, -3)
        elif name.endswith("dt_bias"):
            parameter.data.fill_(-1.0)
    return model.eval().requires_grad_(False)


def random_states(model: nn.Module, tasks: int = 1, size: float = 0.1):
    """Return frozen random S0 for a swapped model."""
    from s0kernels import S0States

    states = S0States.for_model(model, tasks).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for layer in states:
        one = torch.randn(states[layer].shape[1:], generator=generator)
        states[layer].copy_(size * one.to(states[layer].device))  # the tasks may be alike
    return states
