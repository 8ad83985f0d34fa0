"""Check a swap: compare the replacements with their originals, and run S0 through the model's own decoder.

Both parts run a few tokens through the real decoder, and stop as soon as the mixer under test is reached: only the
layers before it are computed. The first mixer of each kind is tested.

1. Without S0: the original and the replacement get the arguments that this version's decoder passes to the mixer, for
   a prefill and for one cached token. The outputs and the contents of the caches must agree.
2. With a random S0: a whole prefill, the same prefill in three pieces with a cache, and the same prefill after left
   padding must agree. They do so only if S0 enters once, before the first real token.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging

from s0kernels.modules.arguments import CACHES
from s0kernels.modules.injection import Attachment, Site
from s0kernels.modules.mixer import S0Mixer

#: by dtype: the relative Frobenius norm of a difference up to which two results count as equal
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
#: on a GPU a convolution in fp32 may be computed in tf32
_TF32 = 2e-3
_PREFILL, _PADS, _CHUNK = 5, 3, 16
_PIECES = ((0, 4), (4, 6), (6, 7))


@dataclass(frozen=True)
class Check:
    """One comparison: its relative difference and the tolerance, or the reason why it was not made."""

    what: str
    difference: float | None = None
    tolerance: float | None = None
    #: the reason why it was not made, or a remark
    reason: str | None = None

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.what}: not checked, {self.reason}"
        return f"{self.what}: {self.difference:.1e} of {self.tolerance:.0e} allowed" + (
            f" ({self.reason})" if self.reason else ""
        )


@dataclass(frozen=True)
class SwapReport:
    """The mixers that `swap_modules` replaced, and the results of its checks. `print` shows it as text."""

    family: str
    mixers: int
    #: versions of transformers and torch
    versions: Mapping[str, str | None]
    checks: tuple[Check, ...] = field(default=())
    #: the module that packed sequences cannot go through, and the reason; None if they can go through the model
    cannot_pack: str | None = None

    @property
    def checked(self) -> bool:
        """Whether every comparison was made."""
        return bool(self.checks) and all(check.difference is not None for check in self.checks)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        refused = [] if self.cannot_pack is None else [f"packed sequences cannot go through {self.cannot_pack}"]
        lines = [f"{self.mixers} mixers of {self.family}, {versions}", *map(str, self.checks), *refused]
        return "\n  ".join(lines)


class Refused(Exception):
    """The replacement and the original differ; the message says where."""


class _NotRun(Exception):
    """The comparison cannot be made; the message says why."""


class _Reached(BaseException):
    """Raised to leave the decoder. It is not an Exception, which other code might catch on the way."""

    def __init__(self, value: Any):
        self.value = value


class Place(NamedTuple):
    """The place of a mixer in a model."""

    #: the module that passes its arguments to the mixers; the model itself if they are in the `layers` of no decoder
    decoder: nn.Module
    #: the layers of the decoder up to and including the mixer's
    layers: list[nn.Module]
    #: modules on the path from the decoder to the mixer
    way: list[nn.Module]
    #: the module that has the mixer as an attribute
    parent: nn.Module
    attribute: str


class _Probe(nn.Module):
    """Takes the place of a mixer and leaves the decoder with the arguments that it gets, or with the result of
    `forward` for them. Hooks of the mixer do not run, and a compiled mixer is not changed."""

    def __init__(self, forward: Callable[..., Any]):
        super().__init__()
        self._forward = forward

    def forward(self, *args, **kwargs):
        raise _Reached(self._forward(*args, **kwargs))


class SelfCheck:
    """Both parts of the check for one mixer, the first of its kind.

    Args:
        place: the place of the mixer in the model.
        original: the mixer of transformers.
        replacement: the module that replaces it.
        site: the site of the swapped model.
    """

    def __init__(self, place: Place, original: nn.Module, replacement: S0Mixer, site: Site):
        self.place, self.original, self.replacement, self.site = place, original, replacement, site
        self.decoder = place.decoder
        self.name = type(original).__name__
        self.device = replacement.A_log.device
        self.dtype = next((p.dtype for p in original.parameters() if p.dim() > 1), replacement.A_log.dtype)
        self.tolerance = _TOLERANCES.get(self.dtype, math.nan)
        if self.dtype == torch.float32 and self.device.type != "cpu":
            self.tolerance = max(self.tolerance, _TF32)

    def beside_original(self) -> list[Check]:
        """Run part 1, with the original in the model."""
        what = [f"{self.name} beside its original, {part}" for part in ("prefill", "one cached token")]
        try:
            self._refuse_to_run()
            with _quiet(self.decoder):
                return [Check(w, *found) for w, found in zip(what, self._beside_original(), strict=True)]
        except (_NotRun, torch.OutOfMemoryError) as why:
            return [Check(w, reason=str(why)) for w in what]

    def through_decoder(self) -> list[Check]:
        """Run part 2, with the replacement in the model and the decoder bound to the site."""
        what = [f"{self.name} from S0, {part}" for part in ("in pieces with a cache", "behind pads")]
        try:
            self._refuse_to_run()
            with _quiet(self.decoder):
                return [Check(w, *found) for w, found in zip(what, self._through_decoder(), strict=True)]
        except (_NotRun, torch.OutOfMemoryError) as why:
            return [Check(w, reason=str(why)) for w in what]

    # Part 1

    def _beside_original(self) -> list[tuple]:
        x = self._embeddings(_PREFILL + 1)
        prompt, token = x[:, :_PREFILL], x[:, _PREFILL:]
        arguments, cache = self._handed_down(prompt, 0)
        own = copy.deepcopy(cache)
        truth = self._run_original(arguments, cache)
        found = self._run_replacement(arguments, own)
        results = [self._compare("prefill", found, truth)]
        self._compare_caches(own, cache, "a prefill")
        arguments, cache = self._handed_down(token, _PREFILL, cache)
        step = self._run_replacement(arguments, own)
        try:
            truth = self._run_original(arguments, cache)
        except _NotRun as why:
            return [*results, (None, None, str(why))]
        if self._difference(step, truth) > self.tolerance:
            return [*results, self._step_or_prefill(x, step, truth)]
        self._compare_caches(own, cache, "one token")
        return [*results, self._compare("one cached token", step, truth)]

    def _step_or_prefill(self, x: Tensor, step: Tensor, truth: Tensor) -> tuple:
        """Compare the step of the replacement with that of the original. If the original's step disagrees with its own
        prefill, the replacement must follow the prefill."""
        whole = self._run_original(*self._handed_down(x, 0))[:, _PREFILL:]
        own = self._difference(truth, whole)
        if own <= self.tolerance or self._difference(step, whole) > self.tolerance:
            self._compare("one cached token", step, truth)
        said = f"the original's step differs from its own prefill by {own:.1e}; the replacement follows the prefill"
        return self._difference(step, whole), self.tolerance, said

    def _handed_down(self, x: Tensor, start: int, cache: Any = None) -> tuple[dict[str, Any], Any]:
        """Return the arguments that the decoder passes to the mixer, by name, and the cache among them."""
        try:
            args, kwargs = self._enter(_Probe(lambda *args, **kwargs: (args, kwargs)), x, start, cache)
        except (Refused, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _NotRun(f"{type(self.decoder).__name__} itself fails here: {_line(error)}") from error
        given = dict(zip(self.site.arguments.mixer, args, strict=False)) | kwargs
        caches = [name for name, value in given.items() if _is_cache(name, value)]
        if len(caches) != 1:
            raise Refused(
                f"{type(self.decoder).__name__} passes {len(caches) or 'no'} cache to {self.name}; it passes "
                f"{', '.join(given)}"
            )
        return given, given[caches[0]]

    def _run_original(self, given: dict[str, Any], cache: Any) -> Tensor:
        chunk = getattr(self.original, "chunk_size", None)
        try:
            if chunk is not None:  # the original computes a whole chunk for a few tokens, which takes seconds on a CPU
                self.original.chunk_size = min(chunk, _CHUNK)
            output = self.original.forward(**_with_cache(given, cache))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _NotRun(f"{self.name} itself fails here: {_line(error)}") from error
        finally:
            if chunk is not None:
                self.original.chunk_size = chunk
        if not output.isfinite().all():
            raise _NotRun(f"{self.name} itself gives values that are not finite here")
        return output

    def _run_replacement(self, given: dict[str, Any], cache: Any) -> Tensor:
        try:
            return self.replacement.forward(**_with_cache(given, cache))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise Refused(
                f"the replacement of {self.name} fails with the arguments of its decoder ({', '.join(given)}): "
                f"{_line(error)}"
            ) from error

    def _compare_caches(self, own: Any, theirs: Any, after: str) -> None:
        layer = self.replacement.layer_idx
        own, theirs = (dict(_tensors(vars(cache.layers[layer]))) for cache in (own, theirs))
        for name in sorted(own.keys() | theirs.keys()):
            if name not in own or name not in theirs:
                who = "the replacement" if name in own else "the original"
                raise Refused(f"after {after} only {who} of {self.name} has left {name} in the cache")
            self._compare(f"{name} in the cache after {after}", own[name], theirs[name])

    # Part 2

    def _through_decoder(self) -> list[tuple]:
        layer = self.replacement.layer_idx
        x = self._embeddings(_PIECES[-1][1])
        state = self._random(1, *self.site.shapes[layer]).to(self.device)
        cache = self._handed_down(x, 0)[1]
        zero = self._output(x, 0)
        with self.site.override(Attachment(None, {layer: state}, 1.0, 0)):
            whole = self._output(x, 0)
            if self._difference(whole, zero) <= 2 * self.tolerance:
                raise _NotRun("a random S0 does not change the mixer's output")
            parts = [self._output(x[:, start:stop], start, cache) for start, stop in _PIECES]
            pads = self._embeddings(_PADS, seed=1)
            mask = torch.ones(1, _PADS + x.shape[1], dtype=torch.long, device=self.device)
            mask[:, :_PADS] = 0
            padded = self._output(torch.cat([pads, x], 1), 0, mask=mask)[:, _PADS:]
        return [
            self._compare("the prefill in pieces with a cache, from S0,", torch.cat(parts, 1), whole),
            self._compare("the prefill behind pads, from S0,", padded, whole),
        ]

    def _output(self, x: Tensor, start: int, cache: Any = None, mask: Tensor | None = None) -> Tensor:
        """Return the output of the mixer for `x` in its decoder."""
        try:
            return self._enter(_Probe(self.replacement.forward), x, start, cache, mask)
        except (Refused, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise Refused(f"the decoder fails with the replacement of {self.name}: {_line(error)}") from error

    # Both

    def _enter(self, probe: _Probe, x: Tensor, start: int, cache: Any = None, mask: Tensor | None = None) -> Any:
        """Run the decoder up to the probe, and return the probe's value. Without `cache` the decoder makes a new
        cache."""
        positions = torch.arange(start, start + x.shape[1], device=self.device)[None]
        options: dict[str, Any] = {"inputs_embeds": x, "position_ids": positions, "use_cache": True}
        if mask is not None:
            options |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        if cache is not None:
            options[self.site.arguments.cache] = cache
        mixer = getattr(self.place.parent, self.place.attribute)
        setattr(self.place.parent, self.place.attribute, probe)
        try:
            self.decoder(**options)
        except _Reached as reached:
            return reached.value
        finally:
            setattr(self.place.parent, self.place.attribute, mixer)
        raise Refused(f"{type(self.decoder).__name__} does not call {self.name}")

    def _compare(self, what: str, found: Tensor, truth: Tensor) -> tuple[float, float]:
        if found.shape != truth.shape:
            raise Refused(f"{what} of {self.name}: has shape {list(found.shape)} instead of {list(truth.shape)}")
        difference = self._difference(found, truth)
        if not difference <= self.tolerance:
            raise Refused(f"{what} of {self.name} differs by {difference:.1e}, {self.tolerance:.0e} is allowed")
        return difference, self.tolerance

    @staticmethod
    def _difference(found: Tensor, truth: Tensor) -> float:
        """Return the relative Frobenius norm of the difference; infinity if the shapes differ."""
        if found.shape != truth.shape:
            return math.inf
        norm = truth.double().norm()
        return float((found.double() - truth.double()).norm() / (norm if norm > 0 else 1.0))

    def _embeddings(self, length: int, seed: int = 0) -> Tensor:
        config: Any = self.decoder.config
        return self._random(1, length, config.hidden_size, seed=seed).to(self.device, self.dtype)

    @staticmethod
    def _random(*shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def _refuse_to_run(self) -> None:
        """Raise _NotRun if the weights of the layers involved are not plain tensors in memory."""
        if not self.place.layers:
            raise _NotRun("the mixer is in no decoder's layers")
        for layer in self.place.layers:
            for module in layer.modules():
                if getattr(getattr(module, "_hf_hook", None), "offload", False):
                    raise _NotRun("its weights are offloaded")
                weight = getattr(module, "weight", None)
                if weight is not None and not isinstance(weight, Tensor):
                    raise _NotRun(f"its weights are quantised ({type(module).__name__})")
            for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
                if tensor.device.type == "meta":
                    raise _NotRun("its weights are on the meta device")
                if type(tensor.data) is not Tensor or tensor.numel() == 0:
                    raise _NotRun(f"its weights are sharded or packed ({name} is a {type(tensor.data).__name__})")
                if tensor.dtype not in _TOLERANCES:
                    raise _NotRun(f"its weights are quantised ({name} is {tensor.dtype})")


@contextlib.contextmanager
def _quiet(decoder: nn.Module) -> Iterator[None]:
    """Run in evaluation mode, without gradients, autocast or compilation, and restore everything afterwards. The advice
    of transformers to install faster kernels for the originals is silenced, because they are replaced."""
    training = {module: module.training for module in decoder.modules()}
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in training)
    kinds = {p.device.type for p in decoder.parameters()} - {"meta"}
    verbosity = logging.get_verbosity()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in filter(torch.amp.is_autocast_available, kinds):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            logging.set_verbosity_error()
            decoder.eval()
            yield
        finally:
            logging.set_verbosity(verbosity)
            for module, was in training.items():
                module.training = was


def _is_cache(name: str, value: Any) -> bool:
    return value is not None and (name in CACHES or hasattr(value, "has_previous_state"))


def _with_cache(given: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    return {name: cache if _is_cache(name, value) else value for name, value in given.items()}


def _tensors(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among the attributes of a cache's layer, including those in lists and dicts."""
    for name, value in attributes.items():
        if isinstance(value, Mapping):
            yield from _tensors({f"{name}[{key}]": item for key, item in value.items()})
        elif isinstance(value, (list, tuple)):
            yield from _tensors({f"{name}[{key}]": item for key, item in enumerate(value)})
        elif isinstance(value, Tensor):
            yield name, value


def _line(error: Exception) -> str:
    """Return an error as one line of text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
