"""Putting the replacements into a model, and the originals back."""

import hashlib
import importlib.metadata
import warnings

import torch
from torch import nn

from s0kernels.modules.families import family_of, supported
from s0kernels.modules.injection import BindStates, Site
from s0kernels.modules.mixer import S0Mixer

#: versions of transformers that the tests run on, and outside which nothing is known
TESTED = ("5.17.0", "5.23.0")


def swap_modules(model: nn.Module) -> nn.Module:
    """Replace every supported mixer of `model` by one that can start from a learned state. In place; gives `model`.

    Parameters, buffers and submodules stay the same objects under the same names, so `state_dict()`, optimizers and
    sharding do not notice. A model that is swapped already is left as it is.

    Raises:
        TypeError: `model` is not a torch module.
        ValueError: it holds no mixer of a supported family, one that cannot be replaced, or some that are replaced
            already and some that are not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap_modules: model must be a torch.nn.Module, got {type(model).__name__}")
    found = {name: (module, family) for name, module in model.named_modules() if (family := family_of(module))}
    if find_site(model) is not None:
        if found:
            raise ValueError(f"swap_modules: {next(iter(found))} is not swapped, but others are; restore_modules first")
        return model
    if not found:
        raise ValueError(
            f"swap_modules: {type(model).__name__} has no recurrent mixer of a supported family ({supported()})"
        )
    _check(model, found)
    _check_version()
    site = Site(
        {mixer.layer_idx: tuple(family.state_shape(mixer)) for mixer, family in found.values()},
        next(iter(found.values()))[1].arch,
    )
    for name, (mixer, family) in found.items():
        _replace(model, name, _with_accelerate_hook(family.replacement(mixer, site), mixer))
    decoder = model.get_submodule(_decoder_name(next(iter(found))))
    decoder.register_forward_pre_hook(BindStates(site), with_kwargs=True)
    return model


def restore_modules(model: nn.Module) -> nn.Module:
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
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, BindStates)]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
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
    parameters = [p for m in model.modules() if isinstance(m, S0Mixer) for p in m.parameters() if p.dim() != 2]
    for parameter in parameters:
        if type(parameter.data) is not torch.Tensor or parameter.device.type == "meta":
            return {"name": getattr(model, "name_or_path", None) or None, "weights": None}
        rounded = parameter.bfloat16()
        rounded = rounded.masked_fill(rounded.abs() < 2**-10, 0.0)
        digest.update(rounded.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"name": getattr(model, "name_or_path", None) or None, "weights": digest.hexdigest()[:16]}


def _check(model: nn.Module, found: dict) -> None:
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
        if mixer.activation not in ("silu", "swish"):
            raise ValueError(
                f"swap_modules: {name} convolves with activation {mixer.activation!r}; only silu is supported"
            )


def _check_version() -> None:
    version = importlib.metadata.version("transformers")
    oldest, newest = ([int(part) for part in tested.split(".")[:2]] for tested in TESTED)
    if not oldest <= [int(part) for part in version.split(".")[:2]] <= newest:
        warnings.warn(
            f"s0kernels was tested with transformers {TESTED[0]} and {TESTED[1]}, not {version}", stacklevel=3
        )


def _decoder_name(mixer_name: str) -> str:
    """The module whose `layers` the mixer is in: the one that passes keyword arguments on to it."""
    return "" if mixer_name.startswith("layers.") else mixer_name.rpartition(".layers.")[0]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _with_accelerate_hook(replacement: nn.Module, original: nn.Module) -> nn.Module:
    """A model spread over devices moves a mixer's own parameters by a hook on it, which has to come along."""
    hook = getattr(original, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(replacement, hook)
    return replacement
