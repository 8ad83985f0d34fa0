"""The model families that can be swapped: a row each."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from s0kernels.modules.bamba import S0BambaMixer
from s0kernels.modules.gated_deltanet import S0GatedDeltaNet
from s0kernels.modules.mamba2 import S0Mamba2Mixer
from s0kernels.modules.mixer import S0Mixer
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


def _delta_state(mixer: Any) -> tuple[int, int, int]:
    return mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim


def _mamba_state(mixer: Any) -> tuple[int, int, int]:
    return mixer.num_heads, mixer.head_dim, mixer.ssm_state_size


FAMILIES = (
    Family("Qwen3.5", "Qwen3_5GatedDeltaNet", S0GatedDeltaNet, "gated_delta_net", _delta_state),
    Family("Qwen3.5-MoE", "Qwen3_5MoeGatedDeltaNet", S0GatedDeltaNet, "gated_delta_net", _delta_state),
    Family("Qwen3-Next", "Qwen3NextGatedDeltaNet", S0Qwen3NextGatedDeltaNet, "gated_delta_net", _delta_state),
    Family("Falcon-H1", "FalconH1Mixer", S0Mamba2Mixer, "mamba2", _mamba_state),
    Family("Bamba", "BambaMixer", S0BambaMixer, "mamba2", _mamba_state),
)

#: Scale at which trained states are used unless told otherwise (defaults of the S0-tuning paper)
DEFAULT_ALPHA = {"gated_delta_net": 0.07, "mamba2": 0.65}


def family_of(module: nn.Module) -> Family | None:
    names = {cls.__name__ for cls in type(module).__mro__}
    return next((family for family in FAMILIES if family.mixer in names), None)


def supported() -> str:
    return ", ".join(family.name for family in FAMILIES)
