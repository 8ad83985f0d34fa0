"""The model families that can be swapped: a row each."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from s0kernels.modules.bamba import S0BambaMixer
from s0kernels.modules.gated_deltanet import S0GatedDeltaNet
from s0kernels.modules.mamba2 import S0Mamba2Mixer
from s0kernels.modules.mixer import S0Mixer
from s0kernels.modules.olmo_hybrid import S0OlmoHybridGatedDeltaNet
from s0kernels.modules.qwen3_next import S0Qwen3NextGatedDeltaNet


class Family(NamedTuple):
    name: str
    #: class name of the mixer in transformers
    mixer: str
    replacement: type[S0Mixer]
    #: the recurrence, as the `s0-tuning` package spells it in its files
    arch: str
    #: of a mixer of transformers, whose attributes the replacement declares
    state_shape: Callable[[Any], tuple[int, int, int]]
    #: arguments beyond those of `arguments.py` that decoders of this family hand to a mixer and that say nothing to it
    harmless: tuple[str, ...] = ()
    #: modules of transformers that packed sequences cannot go through, by class name: what each does
    cannot_pack: Mapping[str, str] = {}


def _delta_state(mixer: Any) -> tuple[int, int, int]:
    return mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim


def _mamba_state(mixer: Any) -> tuple[int, int, int]:
    return mixer.num_heads, mixer.head_dim, mixer.ssm_state_size


FAMILIES = (
    Family("Qwen3.5 (3.6, 3.8)", "Qwen3_5GatedDeltaNet", S0GatedDeltaNet, "gated_delta_net", _delta_state),
    Family("Qwen3.5-MoE (3.6, 3.8)", "Qwen3_5MoeGatedDeltaNet", S0GatedDeltaNet, "gated_delta_net", _delta_state),
    Family("Qwen3-Next", "Qwen3NextGatedDeltaNet", S0Qwen3NextGatedDeltaNet, "gated_delta_net", _delta_state),
    Family("Lara-mini", "LaraMiniGatedDeltaNet", S0GatedDeltaNet, "gated_delta_net", _delta_state),
    Family("OLMo-Hybrid", "OlmoHybridGatedDeltaNet", S0OlmoHybridGatedDeltaNet, "gated_delta_net", _delta_state),
    Family("Falcon-H1", "FalconH1Mixer", S0Mamba2Mixer, "mamba2", _mamba_state),
    Family("Bamba", "BambaMixer", S0BambaMixer, "mamba2", _mamba_state),
    Family(
        "Granite-4-H",
        "GraniteMoeHybridMambaLayer",
        S0BambaMixer,
        "mamba2",
        _mamba_state,
        cannot_pack={"GraniteMoeHybridModel": "makes its attention mask without position_ids"},
    ),
    Family("Nemotron-H", "NemotronHMamba2Mixer", S0BambaMixer, "mamba2", _mamba_state),
    Family("Zamba2", "Zamba2MambaMixer", S0BambaMixer, "mamba2", _mamba_state, ("position_embeddings",)),
    Family(
        "Mamba2",
        "Mamba2Mixer",
        S0BambaMixer,
        "mamba2",
        _mamba_state,
        cannot_pack={"Mamba2ForCausalLM": "does not tell its backbone where they begin"},
    ),
)

_KDA = "it decays every channel of a key by itself (KDA), and the gated delta rule here has one decay per head"
_MAMBA_1 = "it is Mamba-1, which decays every entry of the state by itself, and the scan here has one decay per head"
_CONVOLUTION = "it is a short convolution, which has a window and no state that could be learned"
#: mixers of transformers that cannot be replaced, by class name: what is missing
UNSUPPORTED = {
    **dict.fromkeys(("BailingHybridDeltaAttention", "Glm5NextTextLinearAttention", "KimiLinearDeltaAttention"), _KDA),
    **dict.fromkeys(("FalconMambaMixer", "JambaMambaMixer", "MambaMixer", "ZambaMambaMixer"), _MAMBA_1),
    **dict.fromkeys(("Lfm2MoeShortConv", "Lfm2ShortConv", "Lfm3ShortConv"), _CONVOLUTION),
    "MiniMaxLightningAttention": "nobody has written a replacement (its recurrence is that of ssd with dt = 1)",
    "Qwen4ExpTextGatedDeltaNet": "its recurrence is Qwen3.5's, but layers beside it keep further states in its cache, "
    "and nothing was tested with them",
    "RecurrentGemmaRecurrentBlock": "its state is a vector (RG-LRU), and the scans here carry a matrix per head",
    "RwkvSelfAttention": "its state is a vector per channel (RWKV-4), and the scans here carry a matrix per head",
}

#: Scale at which trained states are used unless told otherwise (defaults of the S0-tuning paper)
DEFAULT_ALPHA = {"gated_delta_net": 0.07, "mamba2": 0.65}


def family_of(module: nn.Module) -> Family | None:
    names = {cls.__name__ for cls in type(module).__mro__}
    return next((family for family in FAMILIES if family.mixer in names), None)


def supported() -> str:
    return ", ".join(family.name for family in FAMILIES)


def what_is_missing(model: nn.Module) -> str:
    """Why `model`, which holds no mixer of a supported family, cannot be swapped: in words behind "which has"."""
    message = f"no recurrent mixer of a supported family ({supported()})"
    for module in model.modules():
        names = [cls.__name__ for cls in type(module).__mro__]
        known = next((name for name in names if name in UNSUPPORTED), None)
        if known is not None:
            return f"{message}; its {names[0]} cannot be replaced: {UNSUPPORTED[known]}"
        if isinstance(getattr(module, "A_log", None), nn.Parameter) and hasattr(module, "layer_idx"):
            return f"{message}; its {names[0]} is none that s0kernels knows: docs/adding-a-family.md has what it needs"
    return message
