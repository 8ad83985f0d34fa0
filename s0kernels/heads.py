"""The head sizes of published models. Kernels are compiled ahead of time, measured, and checked on a GPU for these.

Qwen3.5: "Number of Linear Attention Heads" and "Head Dimension" in the model cards of Qwen/Qwen3.5-0.8B and -4B; for 9B
the defaults of transformers' Qwen3_5TextConfig, which are documented as that model's. Falcon-H1: mamba_n_heads,
mamba_d_head, mamba_n_groups, mamba_d_state of tiiuae/Falcon-H1-*'s config.json. OLMo-Hybrid, Granite-4-H, Nemotron-H:
the defaults of transformers' configurations.
"""

#: by model: the op, and the sizes of its heads
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "qwen3.5-0.8b": ("gated_delta_rule", {"H": 16, "HV": 16, "K": 128, "V": 128}),
    "qwen3.5-4b": ("gated_delta_rule", {"H": 16, "HV": 32, "K": 128, "V": 128}),
    "qwen3.5-9b": ("gated_delta_rule", {"H": 16, "HV": 32, "K": 128, "V": 128}),
    "lara-mini": ("gated_delta_rule", {"H": 8, "HV": 16, "K": 128, "V": 128}),
    "olmo-hybrid": ("gated_delta_rule", {"H": 30, "HV": 30, "K": 96, "V": 192}),
    "falcon-h1-0.5b": ("ssd", {"H": 24, "P": 64, "G": 1, "N": 128}),
    "falcon-h1-1.5b": ("ssd", {"H": 48, "P": 64, "G": 1, "N": 256}),
    "falcon-h1-3b": ("ssd", {"H": 32, "P": 128, "G": 1, "N": 256}),
    "falcon-h1-7b": ("ssd", {"H": 24, "P": 128, "G": 1, "N": 256}),
    "falcon-h1-34b": ("ssd", {"H": 32, "P": 128, "G": 2, "N": 256}),
    "bamba": ("ssd", {"H": 128, "P": 64, "G": 1, "N": 128}),
    "granite-4-h": ("ssd", {"H": 128, "P": 64, "G": 1, "N": 256}),
    "nemotron-h": ("ssd", {"H": 128, "P": 64, "G": 8, "N": 128}),
    "zamba2-2.7b": ("ssd", {"H": 80, "P": 64, "G": 1, "N": 64}),
    "zamba2-7b": ("ssd", {"H": 112, "P": 64, "G": 2, "N": 64}),
    "mamba2-2.7b": ("ssd", {"H": 80, "P": 64, "G": 1, "N": 128}),
}
#: by op: the model whose heads represent the recurrence
FLAGSHIPS = {"gated_delta_rule": "qwen3.5-4b", "ssd": "falcon-h1-7b"}
