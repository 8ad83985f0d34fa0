"""Put the replacements into a model, and put the originals back."""

import hashlib
from typing import Any, TypeVar

import torch
from torch import nn

from s0kernels.modules.arguments import Arguments, named
from s0kernels.modules.families import Family, family_of, unsupported_reason
from s0kernels.modules.injection import BindStates, RefusePacked, Site
from s0kernels.modules.mixer import S0Mixer
from s0kernels.modules.self_check import Place, Refused, SelfCheck, SwapReport
from s0kernels.versions import installed, warn_untested

_Module = TypeVar("_Module", bound=nn.Module)
#: name of the module inside a mixer that holds the states of PEFT adapters, which do not belong to the base model
ADAPTERS = "initial_state"
#: mixers of transformers by name, with their families. They have type Any because their attributes depend on the class
_Found = dict[str, tuple[Any, Family]]


def swap_modules(model: _Module, check: bool = True) -> _Module:
    """Replace every supported mixer of `model` by one that can start from a learned state. Works in place, and returns
    `model`.

    Parameters, buffers and submodules stay the same objects under the same names, so `state_dict()`, optimizers and
    sharding are not affected. A swapped model is left unchanged.

    Args:
        model: a model of transformers.
        check: run the first mixer of each kind on a few tokens, beside its original and then from a random S0 through
            the model's own decoder, and refuse the swap if the results differ. Layers after that mixer do not run: for
            a layer of Qwen3.5-4B the check takes .2 to .4 s on a core. It uses no lasting memory and does not change
            torch's random state. Forward hooks on modules before that mixer see these tokens. `swap_report` returns the
            results, or why a mixer could not be run. The names of the arguments of mixers and decoder are checked in
            any case.

    Raises:
        TypeError: `model` is not a torch module.
        ValueError: `model` has no mixer of a supported family, has one that cannot be replaced, or has both replaced
            and original mixers; or this version of transformers differs from the replacements. The model is then
            unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap_modules: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(check, bool):
        raise TypeError(f"swap_modules: check must be True or False, got {check!r}")
    found: _Found = {n: (module, family) for n, module in model.named_modules() if (family := family_of(module))}
    if find_site(model) is not None:
        if found:
            raise ValueError(
                f"swap_modules: {next(iter(found))} is not swapped, but others are; call restore_modules first"
            )
        return model
    if not found:
        raise ValueError(f"swap_modules: {type(model).__name__} has {unsupported_reason(model)}")
    _check(model, found)
    warn_untested()
    try:
        _swap(model, found, check)
    except Refused as why:
        said = ", ".join(f"{name} {version}" for name, version in installed("transformers", "torch").items())
        raise ValueError(f"swap_modules: {why} ({said})") from why
    return model


def _swap(model: nn.Module, found: _Found, check: bool) -> None:
    """Swap the mixers. If the replacements and the originals differ, leave the model unchanged and raise Refused."""
    places = {name: _place(model, name) for name in found}
    (first, place), (mixer, family) = next(iter(places.items())), next(iter(found.values()))
    try:
        arguments = Arguments(place.decoder if place.layers else None, mixer, place.way, family.harmless)
    except ValueError as error:
        raise Refused(str(error)) from error
    unpackable = {m: f"{name}, which {why}" for name, why in family.cannot_pack.items() for m in _called(model, name)}
    cannot_pack = next(iter(unpackable.values()), None)
    site = Site(_shapes(found), family.arch, arguments, cannot_pack)
    replacements = {name: _with_accelerate_hook(family.replacement(m, site), m) for name, (m, _) in found.items()}
    kinds: dict[type, SelfCheck] = {}
    for name, (m, _) in sorted(found.items(), key=lambda item: item[1][0].layer_idx) if check else ():
        kinds.setdefault(type(m), SelfCheck(places[name], m, replacements[name], site))
    checks = [result for kind in kinds.values() for result in kind.beside_original()]
    for name, replacement in replacements.items():
        _replace(model, name, replacement)
    for module in unpackable:
        module.register_forward_pre_hook(RefusePacked(site, named(module)), with_kwargs=True)
    place.decoder.register_forward_pre_hook(BindStates(site), with_kwargs=True)
    for module in _initialisers(model, first):
        module.__dict__["_init_weights"] = InitialiseOriginals(module)
    try:
        checks += [result for kind in kinds.values() for result in kind.through_decoder()]
    except BaseException:
        restore_modules(model)
        raise
    versions = installed("transformers", "torch")
    site.report = SwapReport(family.name, len(found), versions, tuple(checks), cannot_pack)


def swap_report(model: nn.Module) -> SwapReport:
    """Return the report of `swap_modules` on `model`: the mixers replaced, and the results of the checks. `print` shows
    it.

    Raises:
        TypeError: `model` is not a torch module.
        ValueError: `model` is not swapped.
    """
    return swapped_site(model, "swap_report").report


def restore_modules(model: _Module) -> _Module:
    """Put the original mixers back, with their current parameters. Works in place, and returns `model`.

    Attached states have no effect afterwards. A model that is not swapped is left unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore_modules: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, mixer in [(n, m) for n, m in model.named_modules() if isinstance(m, S0Mixer)]:
        mixer.original.training = mixer.training
        if not hasattr(mixer.original, "_hf_hook"):
            _with_accelerate_hook(mixer.original, mixer)
        _replace(model, name, mixer.original)
    for module in model.modules():
        hooks = module._forward_pre_hooks.items()
        for key in [key for key, hook in hooks if isinstance(hook, (BindStates, RefusePacked))]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        if isinstance(module.__dict__.get("_init_weights"), InitialiseOriginals):
            del module._init_weights
    return model


def find_site(model: nn.Module) -> Site | None:
    """Return the site where states are attached to a swapped model, or None if the model is not swapped."""
    return next((module.site for module in model.modules() if isinstance(module, S0Mixer)), None)


def swapped_site(model: nn.Module, who: str) -> Site:
    """Return `find_site(model)`. Raise an error that names `who` if the model is not swapped."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be a torch.nn.Module, got {type(model).__name__}")
    site = find_site(model)
    if site is None:
        raise ValueError(f"{who}: the model is not swapped; call s0kernels.swap_modules(model) first")
    missing = sorted(set(site.shapes) - set(layer_devices(model)))
    if missing:
        raise ValueError(
            f"{who}: the mixers of layers {missing} are no longer swapped; call restore_modules, then swap"
        )
    return site


def layer_devices(model: nn.Module) -> dict[int, torch.device]:
    """Return the device of each swapped mixer: that of its weights, or the one that offloaded weights are loaded to."""
    devices = {}
    for mixer in model.modules():
        if isinstance(mixer, S0Mixer):
            device = mixer.A_log.device
            if device.type == "meta":
                hook = getattr(mixer, "_hf_hook", None)
                device = torch.device(getattr(hook, "execution_device", None) or "cpu")
            devices[mixer.layer_idx] = device
    return devices


@torch.no_grad()
def base_model(model: nn.Module) -> dict[str, str | None]:
    """Identify a model by `name`, from which it was loaded, and `weights`, a hash of those parameters of its swapped
    mixers that are not matrices.

    Quantisation does not change these parameters, and training nearly always does. They are hashed in bf16 without the
    smallest values, so that the dtype in which a bf16 checkpoint was loaded does not matter. The hash is None if the
    weights cannot be read.
    """
    digest = hashlib.sha256()
    mixers = [module for module in model.modules() if isinstance(module, S0Mixer)]
    named_parameters = [pair for mixer in mixers for pair in mixer.named_parameters()]
    for name, parameter in named_parameters:
        if parameter.dim() == 2 or name.startswith(f"{ADAPTERS}."):
            continue
        if type(parameter.data) is not torch.Tensor or parameter.device.type == "meta":
            return {"name": getattr(model, "name_or_path", None) or None, "weights": None}
        rounded = parameter.bfloat16()
        rounded = rounded.masked_fill(rounded.abs() < 2**-10, 0.0)
        digest.update(rounded.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"name": getattr(model, "name_or_path", None) or None, "weights": digest.hexdigest()[:16]}


def _check(model: nn.Module, found: _Found) -> None:
    layers = [mixer.layer_idx for mixer, _ in found.values()]
    if len(set(layers)) != len(layers):
        raise ValueError(
            f"swap_modules: {type(model).__name__} has two recurrent mixers in one layer: {sorted(layers)}"
        )
    families = {family.name for _, family in found.values()}
    if len(families) > 1:
        raise ValueError(f"swap_modules: {type(model).__name__} mixes families: {', '.join(sorted(families))}")
    for name, (mixer, family) in found.items():
        if type(mixer).forward is not next(c for c in type(mixer).__mro__ if c.__name__ == family.mixer).forward:
            raise ValueError(f"swap_modules: {name} is a {type(mixer).__name__} whose forward was overridden")
        activation = getattr(mixer, "activation", None)
        if activation not in ("silu", "swish"):
            raise ValueError(f"swap_modules: {name} convolves with activation {activation!r}; only silu is supported")


def _place(model: nn.Module, mixer_name: str) -> Place:
    """Find a mixer in a model. The decoder is the module whose `layers` contain the mixer: it passes keyword arguments
    to it."""
    *path, attribute = mixer_name.split(".")
    depth = len(path) - 1 - path[::-1].index("layers") if "layers" in path[:-1] else None
    if depth is None:  # a single layer was swapped
        return Place(model, [], [], model.get_submodule(".".join(path)), attribute)
    decoder = model.get_submodule(".".join(path[:depth]))
    way = [model.get_submodule(".".join(path[:end])) for end in range(depth + 2, len(path) + 1)]
    layers: Any = decoder.layers
    return Place(decoder, list(layers)[: int(path[depth + 1]) + 1], way, way[-1], attribute)


def _initialisers(model: nn.Module, mixer_name: str) -> list[nn.Module]:
    """Return the models of transformers that contain the mixers. Each may be asked to initialise its weights."""
    around = [name for name, _ in model.named_modules() if not name or mixer_name.startswith(f"{name}.")]
    return [module for name in around if hasattr(type(module := model.get_submodule(name)), "_init_weights")]


class InitialiseOriginals:
    """Replaces `_init_weights` of a swapped model. transformers initialises by the class of a mixer, so it gets the
    original, which has the same parameters."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, module: nn.Module) -> None:
        original = module.original if isinstance(module, S0Mixer) else module
        type(self.model)._init_weights(self.model, original)


def _shapes(found: _Found) -> dict[int, tuple[int, int, int]]:
    """Return the shape of each layer's state. Raise Refused if a mixer lacks an attribute that the row of its family
    reads."""
    try:
        return {mixer.layer_idx: family.state_shape(mixer) for mixer, family in found.values()}
    except AttributeError as error:
        raise Refused(f"the shape of a state cannot be read: {error}") from error


def _called(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules whose class, or a base class, has this name."""
    return [module for module in model.modules() if name in {cls.__name__ for cls in type(module).__mro__}]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _with_accelerate_hook(replacement: _Module, original: nn.Module) -> _Module:
    """Give the replacement the hook of accelerate by which a model spread over devices moves the parameters of the
    original."""
    hook = getattr(original, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(replacement, hook)
    return replacement
