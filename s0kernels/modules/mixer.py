"""The base class of the replacements: the parameters of the original, the cache, and the choice of the initial
state."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from s0kernels.calls import state_dtype
from s0kernels.modules.arguments import KEYWORD, find_cache
from s0kernels.modules.convolution import causal_conv, next_window, packed_causal_conv
from s0kernels.modules.injection import BoundStates, Site
from s0kernels.modules.padding import Padding
from s0kernels.ops import registry, transforms

_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
#: the norms that a fused step can compute: class name to the attribute that holds eps
_NORMS = {
    "BambaRMSNormGated": "variance_epsilon",
    "FalconH1RMSNormGated": "variance_epsilon",
    "FusedRMSNormGated": "eps",  # from flash-linear-attention, used by older versions of transformers
    "GraniteMoeHybridRMSNormGated": "variance_epsilon",
    "LaraMiniRMSNormGated": "variance_epsilon",
    "MambaRMSNormGated": "variance_epsilon",
    "NemotronHRMSNormGated": "variance_epsilon",
    "OlmoHybridRMSNormGated": "variance_epsilon",
    "Qwen3NextRMSNormGated": "variance_epsilon",
    "Qwen3_5MoeRMSNormGated": "variance_epsilon",
    "Qwen3_5RMSNormGated": "variance_epsilon",
    "Zamba2RMSNormGated": "variance_epsilon",
}
_NOT_COPIED = ("forward", "_hf_hook", "_old_forward", "_compiled_call_impl")


class S0Mixer(nn.Module):
    """Takes the place of a mixer of transformers and works on that mixer's own parameters and submodules.

    It shares the registries of parameters, buffers, submodules and hooks with the original. So a change of them
    (loading, moving, wrapping) affects both, and the original can be put back at any time.
    """

    # attributes of the original
    layer_idx: int
    conv_kernel_size: int
    conv1d: nn.Conv1d
    A_log: Tensor
    dt_bias: Tensor
    norm: nn.Module
    out_proj: nn.Module
    # attributes of the replacement
    original: nn.Module
    site: Site

    def __init__(self, original: nn.Module, site: Site):
        super().__init__()
        for name in _SHARED:
            self.__dict__[name] = original.__dict__[name]
        for name, value in original.__dict__.items():
            if name not in self.__dict__ and name not in _NOT_COPIED:
                self.__dict__[name] = value
        self.training = original.training
        # in __dict__, not as a submodule: the parameters of the original must be counted once
        self.__dict__["original"] = original
        self.__dict__["site"] = site

    def extra_repr(self) -> str:
        return f"layer {self.layer_idx}, initial state {list(self.site.shapes[self.layer_idx])}"

    def forward(
        self, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Map [B, T, hidden] to [B, T, hidden].

        Args:
            cache: a cache of transformers, or None; older versions call the argument `cache_params`.
            attention_mask: [B, T], 0 at pads, None where there are none.
            kwargs: other arguments of the decoder; see `s0kernels.modules.arguments`.
        """
        who = type(self.original).__name__
        self.site.arguments.check(who, kwargs)
        cache = find_cache({"cache": cache, **kwargs}, who)
        bound = kwargs.get(KEYWORD)
        if bound is None:  # called outside a decoder
            bound = self.site.bind(hidden_states, {**kwargs, "cache": cache})
        rows = Rows(bound, MixerCache.of(cache, self.layer_idx, self.conv_kernel_size), hidden_states, attention_mask)
        return rows.leave(self._forward(rows.enter(hidden_states), rows))

    def _forward(self, hidden_states: Tensor, rows: "Rows") -> Tensor:
        """Map [B, T, hidden] to [B, T, hidden]. Pads are at the end of the rows."""
        raise NotImplementedError

    def _convolve(self, x: Tensor, rows: "Rows") -> Tensor:
        """Compute the convolution of [B, T, C]. The window is read from the cache and updated there."""
        # accelerate loads offloaded weights by a hook on their module, but this module is never called
        hook = getattr(self.conv1d, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self.conv1d)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if rows.cu_seqlens is not None:
            output = packed_causal_conv(x, weight, bias, rows.cu_seqlens)
        else:
            previous = rows.cache.window if isinstance(rows.cache, LiveCache) else None
            output = causal_conv(x, weight, bias, previous)
            rows.cache.store_window(x, previous, rows.padding)  # overwrites `previous`, so it comes last
        return output if hook is None else hook.post_forward(self.conv1d, output)

    def fused_backend(self, op: str, cache: "LiveCache", mixed: Tensor, *tensors: Tensor | None) -> str | None:
        """Return the backend whose fused kernel computes everything between the projections for one token, or None if
        the parts have to run one by one. `tensors` are the other inputs, parameters included."""
        if mixed.shape[1] != 1 or not cache.can_step(mixed, *tensors, cache.window):
            return None
        size, width = operator.index(max(cache.state.shape[2:])), operator.index(cache.window.shape[2])
        if cache.recording or width != self.conv_kernel_size or type(self.conv1d) is not nn.Conv1d:
            return None
        given = [x for x in (*tensors, cache.window, cache.state) if x is not None]
        if any(x.dtype == torch.float64 or x.device != mixed.device for x in given):
            return None
        if cache.state.dtype != torch.float32 or not _is_plain(self.conv1d):
            return None
        name = registry.choose(None, op, mixed.device, mixed.dtype, size, width)
        return name if mixed.shape[0] <= registry.rows_that_pay(name, op, mixed.device, mixed.dtype) else None

    def _start(self, rows: "Rows", device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Return the op's arguments for the initial state: the state in a live cache, else S0."""
        if isinstance(rows.cache, LiveCache):
            return {"initial_state": rows.cache.starting_state(dtype)}
        initial_state, indices = rows.bound.for_layer(self.layer_idx, device, dtype)
        return {"initial_state": initial_state, "state_indices": indices, "cu_seqlens": rows.cu_seqlens}


class Rows:
    """The rows of one forward through a mixer: padded, packed, or neither, with the layer's cache."""

    def __init__(self, bound: BoundStates, cache: "MixerCache", x: Tensor, attention_mask: Tensor | None):
        self.bound, self.cache = bound, cache
        self.cu_seqlens = bound.cu_seqlens
        self._batch = x.shape[0]
        packed = self.cu_seqlens is not None
        if packed and (cache.present or attention_mask is not None):
            raise ValueError("packed sequences cannot be used with a cache or an attention_mask")
        self.padding = (
            None if packed else Padding.of(bound.mask if attention_mask is None else attention_mask, x.shape[1])
        )

    def enter(self, x: Tensor) -> Tensor:
        """Move pads to the end of the rows of [B, T, hidden], or lay packed rows end to end."""
        if self.cu_seqlens is not None:
            return x.reshape(1, -1, x.shape[-1])
        return x if self.padding is None else self.padding.compact(x)

    def leave(self, x: Tensor) -> Tensor:
        """The inverse of `enter`."""
        if self.cu_seqlens is not None:
            return x.reshape(self._batch, -1, x.shape[-1])
        return x if self.padding is None else self.padding.expand(x)


class MixerCache:
    """The part of one layer in a cache of transformers that holds no state yet, or in no cache.

    The attributes that it uses exist since transformers 5.15.
    """

    def __init__(self, cache: Any, layer_index: int, width: int):
        self._cache, self._layer, self._width = cache, layer_index, width
        self.present = cache is not None

    @staticmethod
    def of(cache: Any, layer_index: int, width: int) -> "MixerCache":
        live = cache is not None and cache.has_previous_state(layer_index)
        return (LiveCache if live else MixerCache)(cache, layer_index, width)

    @property
    def recording(self) -> bool:
        """Whether the cache keeps all inputs of the convolution, so that it can go back by a few tokens."""
        return getattr(self._cache.layers[self._layer], "record_past", False)

    def store_window(self, x: Tensor, previous: Tensor | None, padding: Padding | None) -> None:
        if not self.present:
            return
        if self.recording:
            self._cache.update_conv_state(x.transpose(1, 2), self._layer, conv_kernel_size=self._width)
            return
        window = next_window(x, previous, self._width, None if padding is None else padding.lengths)
        # the cache stores a window of exactly W columns as it is, first or not
        self._cache.update_conv_state(window, self._layer, conv_kernel_size=self._width)

    def store_state(self, state: Tensor | None) -> None:
        """Store the final state. It is None only without a cache."""
        if self.present:
            self._cache.update_recurrent_state(state, self._layer)


class LiveCache(MixerCache):
    """The part of one layer in a cache that already holds a state, which takes precedence over S0."""

    def __init__(self, cache: Any, layer_index: int, width: int):
        super().__init__(cache, layer_index, width)
        self.window: Tensor = cache.layers[layer_index].conv_states[0]
        self.state: Tensor = cache.layers[layer_index].recurrent_states[0]

    def can_step(self, *inputs: Tensor | None) -> bool:
        """Whether one token may update the state in place, because no gradient flows through it."""
        tensors = (*inputs, self.state)
        if transforms.find(*tensors) is not None:
            return False
        return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors)

    def starting_state(self, dtype: torch.dtype) -> Tensor:
        """Return the state for a scan. It is a copy if a backward may follow, because the cache is overwritten before
        that."""
        state = self.state.to(dtype)
        return state.clone() if torch.is_grad_enabled() and state is self.state else state

    def step(self, advance: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        """Process one token: `advance(state)` updates the state in place."""
        if self.state.dtype == dtype:
            return advance(self.state)
        state = self.state.to(dtype)
        output = advance(state)
        self.store_state(state)
        return output


def norm_eps(norm: nn.Module) -> float | None:
    """Return the eps of a gated RMS norm that a fused step can compute, else None."""
    name = type(norm).__name__
    return getattr(norm, _NORMS[name]) if name in _NORMS and _is_plain(norm) else None


def _is_plain(module: nn.Module) -> bool:
    """Whether a module has no hooks, wrappers or parametrizations, so that its class and parameters define its
    result."""
    hooked = module._forward_pre_hooks or module._forward_hooks or getattr(module, "_hf_hook", None) is not None
    return not hooked and type(module.weight) in (nn.Parameter, Tensor)


def as_scalar(parameter: Tensor, x: Tensor) -> Tensor:
    """Return a per-head parameter in a dtype that the scans accept together with x."""
    return parameter if parameter.dtype in (x.dtype, torch.float32) else parameter.to(state_dtype(x.dtype))
