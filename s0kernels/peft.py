"""S0 as a method of PEFT: importing this module registers `"S0"`, beside `"LORA"` and the others.

An adapter has one state per recurrent layer, S0 = scale * s0_state. The states of adapters that are active at once are
added. A state lies in its own module inside the mixer of the layer. Forwards use it like `S0States`: it is bound once,
at the start of a sequence, and each row of a mixed batch has an index. An adapter cannot be merged, because no weight
holds an initial state.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import PeftType, register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from s0kernels.config import check_number
from s0kernels.messages import some
from s0kernels.modules.injection import Attachment, Site
from s0kernels.modules.mixer import S0Mixer
from s0kernels.modules.swap import (
    ADAPTERS,
    base_model,
    find_site,
    layer_devices,
    restore_modules,
    swap_modules,
    swapped_site,
)
from s0kernels.states import warn_of_another_base
from s0kernels.states.files import ADAPTER_KEY

_BASE = "__base__"  # PEFT's name for no adapter in `adapter_names`
_CANNOT_MERGE = (
    "S0 cannot be merged: it is the state in which a sequence starts, and no weight holds such a state. Use the "
    "adapter unmerged, which costs no time; unload() returns the model without it"
)


def _add_peft_type(name: str) -> PeftType:
    """Add a name to PEFT's enum of methods, because its registry accepts no others. Only this function changes the
    enum."""
    if name in PeftType.__members__:
        return PeftType[name]
    member: Any = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    member._sort_order_ = len(PeftType)
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


_S0 = _add_peft_type("S0")


@dataclass
class S0PeftConfig(PeftConfig):
    """Settings of an S0 adapter.

    Args:
        scale: factor that multiplies the states in training and in use. The model's `set_scale` changes it later.
        layers_to_transform: indices of the layers that get a state; None means every recurrent layer.
        target_modules: names of the mixers, as PEFT matches them; None means all mixers.
        exclude_modules: names of mixers that get no state.
        modules_to_save: other modules to train and save as a whole, as with LoRA.
        arch: "gated_delta_net" or "mamba2"; filled in from the model.
        base_weights: hash of some weights of the model that the states belong to; filled in from the model. A different
            hash gives a warning.
        recurrent_layers: indices of all layers with a state; filled in from the model.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
    """

    scale: float = 1.0
    layers_to_transform: list[int] | int | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    arch: str | None = field(default=None, metadata={"help": "filled in from the model"})
    base_weights: str | None = field(default=None, metadata={"help": "filled in from the model"})
    recurrent_layers: list[int] | None = field(default=None, metadata={"help": "filled in from the model"})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = _S0
        self.scale = _check_scale(self.scale)
        layers = self.layers_to_transform
        if layers is not None:
            layers = [layers] if isinstance(layers, int) else layers
            if not isinstance(layers, (list, tuple, set, range)) or not all(type(layer) is int for layer in layers):
                raise TypeError(f"S0PeftConfig: layers_to_transform must be a list of ints, got {layers!r}")
            self.layers_to_transform = sorted(layers)
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is None or (isinstance(value, str) and name != "modules_to_save"):
                continue
            if not isinstance(value, (list, tuple, set)) or not all(isinstance(each, str) for each in value):
                raise TypeError(f"S0PeftConfig: {name} must be a list of strings, got {value!r}")
            setattr(self, name, sorted(value))


class _State(nn.Module):
    """The state of one adapter. It is a module because trainers look for `.default.` in the names of parameters."""

    def __init__(self, state: Tensor):
        super().__init__()
        self.weight = nn.Parameter(state)


class S0Layer(nn.Module, BaseTunerLayer):
    """The states of one recurrent layer, by adapter. It is a submodule of the layer's mixer and is never called."""

    mixer: S0Mixer
    adapter_layer_names = ("s0_state",)
    other_param_names = ("scale", "scaling")

    def __init__(self, mixer: S0Mixer):
        super().__init__()
        object.__setattr__(self, "mixer", mixer)  # not a submodule: this module is inside the mixer
        self.s0_state = nn.ModuleDict()
        #: by adapter: the scale of its config, and the scale in use
        self.scale: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self._made: dict[tuple[tuple[str, ...], ...], tuple[list, Tensor]] = {}

    def add(self, adapter: str, scale: float) -> None:
        """Add an adapter with a zero state [*state] in fp32."""
        shape = self.mixer.site.shapes[self.mixer.layer_idx]
        with torch.inference_mode(False):  # tensors made in inference mode cannot be trained
            state = torch.zeros(shape, dtype=torch.float32, device=self._device())
            self.s0_state[adapter] = _State(state)
        self.scale[adapter] = self.scaling[adapter] = scale

    def state(self, adapter: str) -> nn.Parameter:
        """Return the parameter of an adapter, [*state]."""
        module: Any = self.s0_state[adapter]
        return module.weight

    def _device(self) -> torch.device:
        return layer_devices(self.mixer)[self.mixer.layer_idx]

    def get_base_layer(self) -> nn.Module:
        return self.mixer

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.s0_state:
            self.s0_state[adapter_name].to(self._device() if device is None else device)

    def delete_adapter(self, adapter_name: str) -> None:
        self._made.clear()
        super().delete_adapter(adapter_name)

    def bank(self, rows: Sequence[Sequence[str]]) -> Tensor | None:
        """Return [rows, *state], where each row is the scaled sum of some adapters, or None if this layer has none of
        them.

        A single adapter at scale 1 is its parameter. A computed result is kept until a parameter or a scale changes. It
        is not kept while a parameter requires grad, because fused optimizers do not change its version, nor in compiled
        graphs.
        """
        names = [[name for name in row if name in self.s0_state] for row in rows]
        if not any(names):
            return None
        if len(names) == 1 and len(names[0]) == 1 and self.scaling[names[0][0]] == 1.0:
            return self.state(names[0][0])[None]
        used = [(self.state(name), self.scaling[name]) for row in names for name in row]
        if torch.compiler.is_compiling():
            return self._make(names)
        if any(x.requires_grad for x, _ in used):
            self._made.clear()
            return self._make(names)
        key = tuple(map(tuple, names))
        stamp = [(x, x._version, x.data_ptr(), scale) for x, scale in used]
        old, bank = self._made.get(key, (None, None))
        if bank is None or not _same(old, stamp):
            with torch.inference_mode(False), torch.no_grad():  # the result may be used outside inference mode
                bank = self._make(names)
            self._made[key] = stamp, bank
        return bank

    def _make(self, names: Sequence[Sequence[str]]) -> Tensor:
        """Compute the rows of a bank. They are fp32, even if a trainer has cast the states to bf16."""
        sums = [sum(_in_fp32(self.state(name)) * self.scaling[name] for name in row) for row in names]
        zero = next(torch.zeros_like(each) for each in sums if isinstance(each, Tensor))
        return torch.stack([each if isinstance(each, Tensor) else zero for each in sums])

    # The methods of LoRA's layers that change scales, for code that works with any kind of adapter. Changes are not
    # saved

    def set_scale(self, adapter: str, scale: float) -> None:
        """Use an adapter at `scale` times the scale of its config."""
        if adapter in self.scaling:
            self.scaling[adapter] = check_number(scale, "S0Layer.set_scale: scale") * self.scale[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= check_number(scale, "S0Layer.scale_layer: scale")

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`. None undoes all changes of the scale."""
        if scale is not None and check_number(scale, "S0Layer.unscale_layer: scale") == 0:
            raise ValueError("S0Layer.unscale_layer: scale must not be 0")
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] = self.scale[adapter] if scale is None else self.scaling[adapter] / scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        asked = self.active_adapters if adapter_names is None else adapter_names
        if any(name in self.s0_state for name in asked):
            raise ValueError(_CANNOT_MERGE)

    def unmerge(self) -> None:
        """Do nothing: adapters are never merged."""


class AdapterStates(Attachment):
    """The states that forwards start from: those of the active adapters, or of one adapter for each row.

    Args:
        layers: the states by layer index; layers may be added later.
        adapters: the names that `tasks` indexes; None: the adapters that are active when a forward begins.
        tasks: the index of an adapter for each row, or -1 for none.
    """

    def __init__(self, layers: dict[int, S0Layer], adapters: Sequence[str] | None = None, tasks: int | Tensor = 0):
        super().__init__(None, {}, 1.0, tasks)
        self.layers = layers
        self._adapters = adapters
        #: whether adding an adapter has swapped the model
        self.swapped = False

    def choose(self) -> Callable[[int], Tensor | None]:
        layers = self.layers
        first = next(iter(layers.values()), None)
        if first is None or first.disable_adapters:
            return lambda _: None
        adapters = [first.active_adapters] if self._adapters is None else [[name] for name in self._adapters]
        rows = [tuple(row) for row in adapters]
        return lambda layer_index: layers[layer_index].bank(rows) if layer_index in layers else None


class S0Model(BaseTuner):
    """PEFT's tuner for S0, which adds states to the mixers of a model. A model that is not swapped is swapped."""

    prefix = "s0_"
    tuner_layer_cls = S0Layer

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Use an adapter at `scale` from now on, in training too. The scale is saved with the adapter.

        Raises:
            ValueError: there is no such adapter, or `scale` is zero or not finite.
        """
        self._check_names([adapter_name], "S0Model.set_scale: adapter_name")
        config: Any = self.peft_config[adapter_name]
        config.scale = _check_scale(scale)
        for layer in self._layers().values():
            if adapter_name in layer.scale:
                layer.scale[adapter_name] = layer.scaling[adapter_name] = float(scale)

    def _layers(self) -> dict[int, S0Layer]:
        attachment = swapped_site(self.model, "S0Model").attachment
        return attachment.layers if isinstance(attachment, AdapterStates) else {}

    def _check_names(self, names: Sequence[str], argument: str) -> None:
        known = {name for layer in self._layers().values() for name in layer.s0_state}
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(f"{argument}: no S0 adapter is called {unknown[0]!r}; there are {some(sorted(known))}")

    # Creating adapters

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config  # no list of names is needed to mean all recurrent layers

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        swapped = find_site(model) is None
        site = swapped_site(swap_modules(model), "S0PeftConfig")
        try:
            self._check_model(peft_config, model, site)
        except BaseException:
            if swapped:
                restore_modules(model)
            raise
        if site.attachment is None:
            site.attachment = AdapterStates({})
            site.attachment.swapped = swapped

    def _check_model(self, config: S0PeftConfig, model: nn.Module, site: Site) -> None:
        """Check everything before an adapter is created."""
        if site.attachment is not None and not isinstance(site.attachment, AdapterStates):
            raise ValueError("S0PeftConfig: S0States are attached to the model; call detach() on them first")
        if config.arch not in (None, site.arch):
            raise ValueError(f"S0PeftConfig: arch: the states are for {config.arch!r}, the model has {site.arch!r}")
        layers: Any = config.layers_to_transform or []
        unknown = [layer for layer in layers if layer not in site.shapes]
        if unknown or config.layers_to_transform == []:
            named = f"{unknown[0]} has no state" if unknown else "names none"
            raise ValueError(
                f"S0PeftConfig: layers_to_transform: {named}; the layers with a state are {list(site.shapes)}"
            )
        mixers = [name for name, module in model.named_modules() if isinstance(module, S0Mixer)]
        if not any(self._check_target_module_exists(config, name) for name in mixers):
            raise ValueError(
                f"S0PeftConfig: target_modules {config.target_modules}, exclude_modules {config.exclude_modules} and "
                f"modules_to_save {config.modules_to_save} leave no recurrent layer; they are called {some(mixers)}"
            )
        names = config.target_modules if isinstance(config.target_modules, list) else []
        strange = [n for n in names if not any(mixer == n or mixer.endswith(f".{n}") for mixer in mixers)]
        if strange:
            raise ValueError(
                f"S0PeftConfig: target_modules: no recurrent layer is called {strange[0]!r}; they are {some(mixers)}"
            )
        found = base_model(model)
        warn_of_another_base("S0PeftConfig", config.base_model_name_or_path, config.base_weights, found)
        config.arch, config.recurrent_layers = site.arch, sorted(site.shapes)
        config.base_weights = config.base_weights or found["weights"]

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        """Match mixers only, by the index of their layer."""
        mixer = self.model.get_submodule(key)
        if not isinstance(mixer, S0Mixer):
            return False
        if peft_config.layers_to_transform is not None and mixer.layer_idx not in peft_config.layers_to_transform:
            return False
        targets = [key] if peft_config.target_modules is None else peft_config.target_modules
        excluded, kept = peft_config.exclude_modules, peft_config.modules_to_save
        asked = SimpleNamespace(target_modules=targets, exclude_modules=excluded, modules_to_save=kept)
        return check_target_module_exists(asked, key)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not isinstance(target, S0Mixer):
            raise ValueError(f"S0Model: {current_key} is not a recurrent layer")
        layers, index = self._layers(), target.layer_idx
        if index not in layers:
            layers[index] = S0Layer(target)
            target.add_module(ADAPTERS, layers[index])
        layers[index].add(adapter_name, peft_config.scale)
        layers[index].set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("state_dict", None)  # PEFT would choose modules by it; here the config always does
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return the name of a state in a file. It depends on the layer alone, not on the path to the layer in the
        model."""
        if match := re.fullmatch(rf".*\.layers\.(\d+)\..*{ADAPTERS}\.s0_state\.{re.escape(adapter_name)}\.weight", key):
            return ADAPTER_KEY.format(match[1])
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Remap a state dict as PEFT does. Raise ValueError for states of other layers or shapes; the message names
        both sides."""
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        ours = {k: v.shape for k, v in model.state_dict().items() if k.endswith(f".s0_state.{adapter_name}.weight")}
        theirs = {
            k: v.shape for k, v in renamed.items() if k.endswith((".s0_state", f".s0_state.{adapter_name}.weight"))
        }
        if ours != theirs:
            both = [_layers_and_shapes(found) for found in (theirs, ours)]
            raise ValueError(f"S0Model: the loaded states are {both[0]}, but the model has {both[1]}")
        return renamed

    # Using adapters

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names: only the active adapter can be trained; call eval() first")
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"adapter_names must be a list of strings, one for each row, got {names!r}")
        self._check_names([name for name in names if name != _BASE], "adapter_names")
        layers = self._layers()
        known = sorted({name for layer in layers.values() for name in layer.s0_state})
        tasks = torch.tensor([-1 if name == _BASE else known.index(name) for name in names])
        beams = kwargs.get("num_beams")
        repeated = [name for name in names for _ in range(beams if isinstance(beams, int) else 1)]
        with contextlib.ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    handle = module.register_forward_pre_hook(_Names(repeated), with_kwargs=True)
                    stack.callback(handle.remove)
            site = swapped_site(self.model, "S0Model")
            stack.enter_context(site.override(AdapterStates(layers, known, tasks)))
            yield

    # Removing adapters

    def _check_merge_allowed(self) -> None:
        raise ValueError(_CANNOT_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        super()._unload_and_optionally_merge(merge, *args, **kwargs)
        model = self.model
        site = swapped_site(model, "S0Model.unload")
        attachment, site.attachment = site.attachment, None
        for mixer in model.modules():
            if isinstance(mixer, S0Mixer):
                mixer._modules.pop(ADAPTERS, None)
        return restore_modules(model) if isinstance(attachment, AdapterStates) and attachment.swapped else model


class _Names:
    """Forward pre-hook that passes a module the adapter of each row."""

    def __init__(self, names: list[str]):
        self.names = names

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "adapter_names": self.names}


def _in_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _same(old: list | None, new: list) -> bool:
    return old is not None and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(old, new, strict=True))


def _check_scale(scale: float) -> float:
    if check_number(scale, "S0PeftConfig: scale") == 0:
        raise ValueError("S0PeftConfig: scale must not be 0: nothing would be learned; disable_adapter() turns S0 off")
    return float(scale)


def _layers_and_shapes(states: Mapping[str, Sequence[int]]) -> str:
    shapes = sorted({str(list(shape)) for shape in states.values()})
    names = sorted(re.sub(rf"(\.{ADAPTERS})?\.s0_state.*", "", key).removeprefix("base_model.model.") for key in states)
    return f"{len(names)} of shape {' and '.join(shapes)} for {some(names)}" if names else "none"


if _S0 not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="s0", config_cls=S0PeftConfig, model_cls=S0Model)
