"""What the two replacements share: the original's parameters, the cache, and where the initial state comes from."""

import torch
from torch import Tensor, nn

from s0kernels.modules.convolution import causal_conv, next_window
from s0kernels.modules.injection import KEYWORD, BoundStates, Site
from s0kernels.modules.padding import Padding

_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_NOT_COPIED = ("forward", "_hf_hook", "_old_forward")


class S0Mixer(nn.Module):
    """Takes the place of a mixer of transformers and works on that mixer's own parameters and submodules.

    The registries of parameters, buffers and submodules are the original's own objects, so that whatever happens to
    them (loading, moving, wrapping) happens to both, and the original can be put back at any time.
    """

    def __init__(self, original: nn.Module, site: Site):
        super().__init__()
        for name in _SHARED:
            self.__dict__[name] = original.__dict__[name]
        for name, value in original.__dict__.items():
            if name not in self.__dict__ and name not in _NOT_COPIED:
                self.__dict__[name] = value
        self.training = original.training
        # in __dict__, not as a submodule: the original's parameters must be counted once
        self.__dict__["original"] = original
        self.__dict__["site"] = site

    def extra_repr(self) -> str:
        return f"layer {self.layer_idx}, initial state {list(self.site.shapes[self.layer_idx])}"

    def _bound_states(self, kwargs: dict, batch: int) -> BoundStates:
        bound = kwargs.get(KEYWORD)
        return self.site.bind(batch) if bound is None else bound

    def _reject_packed(self, kwargs: dict) -> None:
        for name in ("cu_seq_lens_q", "seq_idx"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{type(self).__name__} does not take packed sequences ({name}) yet; pad them instead")

    def _convolve(self, x: Tensor, cache: "MixerCache", padding: Padding | None) -> Tensor:
        """Convolution of [B, T, C], window taken from and left in the cache."""
        output = causal_conv(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, cache.window)
        cache.store_window(x, padding)  # in place, so after its last use
        return output


class MixerCache:
    """One layer's part of a transformers cache, or of none. Where `live`, it holds a state already, which wins over S0.

    The attributes used exist from transformers 5.15 on.
    """

    def __init__(self, cache, layer_index: int, width: int):
        self._cache, self._layer, self._width = cache, layer_index, width
        self.present = cache is not None
        self.live = self.present and cache.has_previous_state(layer_index)
        self.window = cache.layers[layer_index].conv_states[0] if self.live else None
        self.state = cache.layers[layer_index].recurrent_states[0] if self.live else None

    def store_window(self, x: Tensor, padding: Padding | None) -> None:
        if not self.present:
            return
        if getattr(self._cache.layers[self._layer], "record_past", False):
            self._cache.update_conv_state(x.transpose(1, 2), self._layer, conv_kernel_size=self._width)
            return
        window = next_window(x, self.window, self._width, None if padding is None else padding.lengths)
        # a window of exactly W columns is what the cache keeps, whether it is its first or not
        self._cache.update_conv_state(window, self._layer, conv_kernel_size=self._width)

    def can_step(self, *inputs: Tensor | None) -> bool:
        """Whether one token may update the live state in place: nothing waits for a gradient through it."""
        if not self.live:
            return False
        tensors = (*inputs, self.state)
        return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors)

    def starting_state(self, dtype: torch.dtype) -> Tensor:
        """The live state for a scan, which must not see it overwritten while its backward is to come."""
        state = self.state.to(dtype)
        return state.clone() if torch.is_grad_enabled() and state is self.state else state

    def store_state(self, state: Tensor) -> None:
        if self.present:
            self._cache.update_recurrent_state(state, self._layer)

    def step(self, advance, dtype: torch.dtype) -> Tensor:
        """One token: `advance(state)` updates the live state in place."""
        if self.state.dtype == dtype:
            return advance(self.state)
        state = self.state.to(dtype)
        output = advance(state)
        self.store_state(state)
        return output


def state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_scalar(parameter: Tensor, x: Tensor) -> Tensor:
    """A per-head parameter in a dtype that the scans take beside x."""
    return parameter if parameter.dtype in (x.dtype, torch.float32) else parameter.to(state_dtype(x))
