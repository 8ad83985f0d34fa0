"""The table of model families that can be swapped."""

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
    #: name of the recurrence in the files of the `s0-tuning` package
    arch: str
    #: returns the shape of a state from a mixer of transformers, whose attributes the replacement declares
    state_shape: Callable[[Any], tuple[int, int, int]]
    #: harmless arguments that decoders of this family pass to a mixer, in addition to those of `arguments.py`
    harmless: tuple[str, ...] = ()
    #: modules of transformers that packed sequences cannot go through: class name to reason
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
        cannot_pack={"Mamba2ForCausalLM": "does not pass their boundaries to its backbone"},
    ),
)

_KDA = "it has one decay per channel of a key (KDA), and the gated delta rule here has one decay per head"
_MAMBA_1 = "it is Mamba-1 with one decay per entry of the state, and the scan here has one decay per head"
_CONVOLUTION = "it is a short convolution, which has a window but no state that could be learned"
#: mixers of transformers that cannot be replaced: class name to reason
UNSUPPORTED = {
    **dict.fromkeys(("BailingHybridDeltaAttention", "Glm5NextTextLinearAttention", "KimiLinearDeltaAttention"), _KDA),
    **dict.fromkeys(("FalconMambaMixer", "JambaMambaMixer", "MambaMixer", "ZambaMambaMixer"), _MAMBA_1),
    **dict.fromkeys(("Lfm2MoeShortConv", "Lfm2ShortConv", "Lfm3ShortConv"), _CONVOLUTION),
    "MiniMaxLightningAttention": "a replacement is not written yet (its recurrence is that of ssd with dt = 1)",
    "Qwen4ExpTextGatedDeltaNet": "its recurrence is Qwen3.5's, but layers beside it keep further states in its cache, "
    "which were not tested",
    "RecurrentGemmaRecurrentBlock": "its state is a vector (RG-LRU), and the scans here carry a matrix per head",
    "RwkvSelfAttention": "its state is a vector per channel (RWKV-4), and the scans here carry a matrix per head",
}

#: default factor that multiplies trained states in use, from the S0 tuning paper
DEFAULT_ALPHA = {"gated_delta_net": 0.07, "mamba2": 0.65}


def family_of(module: nn.Module) -> Family | None:
    names = {cls.__name__ for cls in type(module).__mro__}
    return next((family for family in FAMILIES if family.mixer in names), None)


def supported() -> str:
    return ", ".join(family.name for family in FAMILIES)


def unsupported_reason(model: nn.Module) -> str:
    """Say why `model`, which has no mixer of a supported family, cannot be swapped. The text follows "which has"."""
    message = f"no recurrent mixer of a supported family ({supported()})"
    for module in model.modules():
        names = [cls.__name__ for cls in type(module).__mro__]
        known = next((name for name in names if name in UNSUPPORTED), None)
        if known is not None:
            return f"{message}; its {names[0]} cannot be replaced: {UNSUPPORTED[known]}"
        if isinstance(getattr(module, "A_log", None), nn.Parameter) and hasattr(module, "layer_idx"):
            return f"{message}; s0kernels does not know its {names[0]}: docs/adding-a-family.md says how to add it"
    return message
