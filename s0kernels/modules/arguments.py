"""Check the arguments that a decoder passes to its mixers: an argument is understood, harmless, or an error.

Versions of transformers rename arguments, and mixers take `**kwargs`. A cache under an unknown name would be ignored,
and everything generated with it would be wrong.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: names of the cache argument in the versions of transformers, for mixers and decoders; the first is the newest
CACHES = ("cache", "past_key_values", "cache_params")
#: name of the argument that carries the bound states from the decoder to its mixers
KEYWORD = "s0_states"
#: arguments that mixers and decoders read, the cache included
_UNDERSTOOD = {*CACHES, KEYWORD, "attention_mask", "cu_seq_lens_q", "position_ids", "seq_idx"}
#: arguments that do not concern a recurrence, whatever their value; `cu_seq_lens_k` and the lengths repeat
#: `cu_seq_lens_q`
_HARMLESS = {
    "cu_seq_lens_k",
    "is_causal",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "tokenizer",
    "use_cache",
}
_TOKENS = ("hidden_states", "input_ids", "inputs_embeds")
_SUSPECT = ("mask", "cache", "past", "state", "seq", "segment")


class Arguments:
    """The arguments that the decoder and the mixers of a swapped model accept in this version of transformers.

    Args:
        decoder: the module that passes its keyword arguments to the mixers; None if they are in no decoder.
        mixer: an original mixer.
        between: the modules on the path from the decoder to the mixer.
        harmless: further harmless names, from the row of the family.

    Raises:
        ValueError: the decoder or the mixer has no cache argument with a known name, or the mixer has an unknown
            argument.
    """

    def __init__(
        self, decoder: nn.Module | None, mixer: nn.Module, between: Iterable[nn.Module], harmless: Iterable[str]
    ):
        #: names of the positional arguments, in order
        self.decoder = () if decoder is None else named(decoder)
        self.mixer = named(mixer)
        self._harmless = _HARMLESS | set(harmless)
        known = set().union(self.decoder, self.mixer, *map(named, between), _keys_of_transformers(), _TOKENS)
        self._known = known | _UNDERSTOOD | self._harmless
        #: the name of the decoder's cache argument; without a decoder, that of the mixer
        self.cache = cache_argument(mixer if decoder is None else decoder)
        cache_argument(mixer)
        strange = [n for n in self.mixer if n not in {"hidden_states"} | _UNDERSTOOD | self._harmless]
        order = [n if n not in CACHES else CACHES[0] for n in self.mixer[:3]]
        if strange or order != ["hidden_states", CACHES[0], "attention_mask"][: len(order)]:
            raise ValueError(
                f"{type(mixer).__name__}.forward takes {', '.join(self.mixer)}; s0kernels knows a mixer that takes "
                f"hidden_states, a cache and attention_mask"
            )

    def check(self, who: str, given: Mapping[str, Any]) -> None:
        """Raise TypeError if `given` holds an argument that is neither understood nor known to be harmless."""
        for name, value in given.items():
            if name in _UNDERSTOOD or name in self._harmless or value is None:
                continue
            if name not in self._known:
                raise TypeError(f"{who} got an argument that s0kernels does not know: {name} ({_kind(value)})")
            if name not in _TOKENS and not _is_harmless(name, value):
                raise TypeError(
                    f"{who} got {name} ({_kind(value)}), which may be a cache, a mask or sequence boundaries, and "
                    f"s0kernels does not know what it means"
                )


def find_cache(given: Mapping[str, Any], who: str) -> Any:
    """Return the cache among the arguments, under any of its names, or None."""
    found = [(name, given[name]) for name in CACHES if given.get(name) is not None]
    if len(found) > 1 and any(cache is not found[0][1] for _, cache in found):
        raise TypeError(f"{who} got two caches: {' and '.join(name for name, _ in found)}")
    return found[0][1] if found else None


def cache_argument(module: nn.Module) -> str:
    """Return the name of the cache argument of `module.forward`.

    Raises:
        ValueError: it has no argument with a known name of a cache.
    """
    names = named(module)
    found = [name for name in CACHES if name in names]
    if not found:
        raise ValueError(
            f"{type(module).__name__}.forward takes {', '.join(names)}, and none of them is a cache under a name that "
            f"s0kernels knows ({', '.join(CACHES)})"
        )
    return found[0]


def takes_cache(module: nn.Module) -> bool:
    """Whether `cache_argument` finds a name."""
    return any(name in named(module) for name in CACHES)


def cache_of(output: Mapping[str, Any]) -> Any:
    """Return the cache in the output of a model of transformers, or None."""
    return next((output[name] for name in CACHES if name in output), None)


def named(module: nn.Module) -> tuple[str, ...]:
    """Return the named parameters of `module.forward`, in order."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind not in variable)[1:]


def _keys_of_transformers() -> set[str]:
    from transformers.utils import generic

    keywords = getattr(generic, "TransformersKwargs", None)
    return set() if keywords is None else set(inspect.get_annotations(keywords))


def _is_harmless(name: str, value: Any) -> bool:
    """Whether the value of an argument of unknown meaning cannot be a cache, a mask or boundaries of sequences."""
    if isinstance(value, (list, tuple)):
        return all(_is_harmless(name, item) for item in value)
    if isinstance(value, Tensor):
        return value.is_floating_point() and not any(part in name for part in _SUSPECT)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
