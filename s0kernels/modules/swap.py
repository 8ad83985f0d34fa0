"""Putting the replacements into a model, and the originals back."""

import hashlib
from typing import Any, TypeVar

import torch
from torch import nn

from s0kernels.modules.arguments import Arguments, named
from s0kernels.modules.families import Family, family_of, what_is_missing
from s0kernels.modules.injection import BindStates, RefusePacked, Site
from s0kernels.modules.mixer import S0Mixer
from s0kernels.modules.self_check import Place, Refused, SelfCheck, SwapReport
from s0kernels.versions import installed, warn_untested

_Module = TypeVar("_Module", bound=nn.Module)
#: name of the module inside a mixer that holds the states of adapters, which are no part of the base model
ADAPTERS = "initial_state"
#: mixers of transformers by their names; which attributes they have only their class knows
_Found = dict[str, tuple[Any, Family]]


def swap_modules(model: _Module, check: bool = True) -> _Module:
    """Replace every supported mixer of `model` by one that can start from a learned state. In place; gives `model`.

    Parameters, buffers and submodules stay the same objects under the same names, so `state_dict()`, optimizers and
    sharding do not notice. A model that is swapped already is left as it is.

    Args:
        model: a model of transformers.
        check: run the first mixer of each kind on a few tokens, beside its original and then from a random S0 through
            the model's own decoder, and refuse the swap where they differ. No layer after that mixer runs: for one of
            Qwen3.5-4B it takes .2 to .4 s on a core. It takes no lasting memory and leaves torch's random state alone;
            forward hooks on what comes before that mixer see these tokens. `swap_report` says what was found,
            or why a mixer could not be run. The names of the arguments of mixers and decoder are looked at in any case.

    Raises:
        TypeError: `model` is not a torch module.
        ValueError: it holds no mixer of a supported family, one that cannot be replaced, or some that are replaced
            already and some that are not; or this version of transformers does something that the replacements do
            not. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap_modules: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(check, bool):
        raise TypeError(f"swap_modules: check must be True or False, got {check!r}")
    found: _Found = {n: (module, family) for n, module in model.named_modules() if (family := family_of(module))}
    if find_site(model) is not None:
        if found:
            raise ValueError(f"swap_modules: {next(iter(found))} is not swapped, but others are; restore_modules first")
        return model
    if not found:
        raise ValueError(f"swap_modules: {type(model).__name__} has {what_is_missing(model)}")
    _check(model, found)
    warn_untested()
    try:
        _swap(model, found, check)
    except Refused as why:
        said = ", ".join(f"{name} {version}" for name, version in installed("transformers", "torch").items())
        raise ValueError(f"swap_modules: {why} ({said})") from why
    return model


def _swap(model: nn.Module, found: _Found, check: bool) -> None:
    """Raises Refused, and leaves the model as it was, where the replacements do not do what the originals do."""
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
    """What `swap_modules` replaced in `model`, and what it found out by running it; `print` shows it.

    Raises:
        TypeError: `model` is not a torch module.
        ValueError: it is not swapped.
    """
    return swapped_site(model, "swap_report").report


def restore_modules(model: _Module) -> _Module:
    """Put the original mixers back, with the parameters as they are now. In place; gives `model`.

    Attached states have no effect afterwards. A model that is not swapped is left as it is.
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
    """Where states are attached to a swapped model; None if it is not swapped."""
    return next((module.site for module in model.modules() if isinstance(module, S0Mixer)), None)


def swapped_site(model: nn.Module, who: str) -> Site:
    """`find_site`, or an error that says what to do."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be a torch.nn.Module, got {type(model).__name__}")
    site = find_site(model)
    if site is None:
        raise ValueError(f"{who}: the model is not swapped; call s0kernels.swap_modules(model) first")
    missing = sorted(set(site.shapes) - set(layer_devices(model)))
    if missing:
        raise ValueError(f"{who}: the mixers of layers {missing} are not swapped any more; restore_modules, then swap")
    return site


def layer_devices(model: nn.Module) -> dict[int, torch.device]:
    """Where each swapped mixer computes: its weights' device, or the one that offloaded weights are brought to."""
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
    """Which model this is: `name`, where it was loaded from, and `weights`, a hash of the parameters of its swapped
    mixers that are not matrices.

    Quantisation leaves those few alone, training hardly ever does. They are hashed in bf16 and without the smallest,
    so that it does not matter which dtype a bf16 checkpoint was loaded in. None where the weights are not at hand.
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
            raise ValueError(f"swap_modules: {name} is a {type(mixer).__name__} with a forward of its own")
        activation = getattr(mixer, "activation", None)
        if activation not in ("silu", "swish"):
            raise ValueError(f"swap_modules: {name} convolves with activation {activation!r}; only silu is supported")


def _place(model: nn.Module, mixer_name: str) -> Place:
    """The decoder is the module whose `layers` the mixer is in: the one that passes keyword arguments on to it."""
    *path, attribute = mixer_name.split(".")
    depth = len(path) - 1 - path[::-1].index("layers") if "layers" in path[:-1] else None
    if depth is None:  # a layer that was swapped alone
        return Place(model, [], [], model.get_submodule(".".join(path)), attribute)
    decoder = model.get_submodule(".".join(path[:depth]))
    way = [model.get_submodule(".".join(path[:end])) for end in range(depth + 2, len(path) + 1)]
    layers: Any = decoder.layers
    return Place(decoder, list(layers)[: int(path[depth + 1]) + 1], way, way[-1], attribute)


def _initialisers(model: nn.Module, mixer_name: str) -> list[nn.Module]:
    """The models of transformers around the mixers, each of which may be asked to initialise its weights."""
    around = [name for name, _ in model.named_modules() if not name or mixer_name.startswith(f"{name}.")]
    return [module for name in around if hasattr(type(module := model.get_submodule(name)), "_init_weights")]


class InitialiseOriginals:
    """`_init_weights` of a swapped model. transformers initialises by the class of a mixer, so it is shown the
    original, whose parameters are the same."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, module: nn.Module) -> None:
        original = module.original if isinstance(module, S0Mixer) else module
        type(self.model)._init_weights(self.model, original)


def _shapes(found: _Found) -> dict[int, tuple[int, int, int]]:
    """Of each layer's state. Raises Refused where a mixer does not have the attributes that its row reads."""
    try:
        return {mixer.layer_idx: family.state_shape(mixer) for mixer, family in found.values()}
    except AttributeError as error:
        raise Refused(f"the shape of a state cannot be read: {error}") from error


def _called(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules of a class, by its name, and of classes made from it."""
    return [module for module in model.modules() if name in {cls.__name__ for cls in type(module).__mro__}]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _with_accelerate_hook(replacement: _Module, original: nn.Module) -> _Module:
    """A model spread over devices moves a mixer's own parameters by a hook on it, which has to come along."""
    hook = getattr(original, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(replacement, hook)
    return replacement
