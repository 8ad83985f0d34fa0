"""The learned initial states of a model: held, attached, saved, loaded."""

import contextlib
import json
import math
import numbers
import os
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from s0kernels import __version__
from s0kernels._files import replace_file
from s0kernels.config import S0Config
from s0kernels.modules.injection import Attachment, Site
from s0kernels.modules.swap import layer_devices, swapped_site

_STATES, _CONFIG, _META = "states.safetensors", "config.json", "meta.json"


class S0States(nn.Module):
    """The initial states S0 of a model: for each recurrent layer one fp32 parameter [tasks, *state].

    A state is [HV, K, V] for the gated delta rule and [H, P, N] for Mamba-2. The module lies outside the model; it is
    what an optimizer trains. For DDP or FSDP put both into one module, whose forward calls the model.
    `states[layer_index]` is the parameter of a layer.

    Args:
        states: [tasks, *state] tensors by layer index; copied, to fp32.
        arch: "gated_delta_net" or "mamba2".
    """

    def __init__(self, states: Mapping[int, Tensor], arch: str):
        super().__init__()
        if not states:
            raise ValueError("S0States: states must hold at least one layer")
        shapes = {tuple(state.shape[:1]) for state in states.values()}
        if len(shapes) != 1 or any(state.dim() != 4 for state in states.values()):
            raise ValueError(
                "S0States: states must be [tasks, ...] tensors of four dimensions with equally many tasks, got "
                f"{ ({layer: list(state.shape) for layer, state in states.items()}) }"
            )
        self.arch = arch
        self._by_layer = nn.ParameterDict(
            {
                str(layer): nn.Parameter(state.detach().to(torch.float32, copy=True))
                for layer, state in sorted(states.items())
            }
        )
        self._sites: weakref.WeakSet[Site] = weakref.WeakSet()

    @classmethod
    def for_model(cls, model: nn.Module, tasks: int = 1) -> "S0States":
        """Zero states for every recurrent layer of a swapped model, each on its layer's device."""
        if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1:
            raise ValueError(f"S0States.for_model: tasks must be a positive int, got {tasks!r}")
        site = swapped_site(model, "S0States.for_model")
        devices = layer_devices(model)
        return cls(
            {
                layer: torch.zeros(tasks, *shape, dtype=torch.float32, device=devices[layer])
                for layer, shape in site.shapes.items()
            },
            site.arch,
        )

    @property
    def layers(self) -> list[int]:
        """Indices of the recurrent layers, ascending."""
        return sorted(int(key) for key in self._by_layer)

    @property
    def tasks(self) -> int:
        return self[self.layers[0]].shape[0]

    def __getitem__(self, layer_index: int) -> nn.Parameter:
        if str(layer_index) not in self._by_layer:
            raise KeyError(f"layer {layer_index} has no initial state; the layers are {self.layers}")
        return self._by_layer[str(layer_index)]

    def __len__(self) -> int:
        return len(self._by_layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def extra_repr(self) -> str:
        return f"{self.arch}, {self.tasks} task(s), layers {self.layers}"

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_sites"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._sites = weakref.WeakSet()  # a copy is not attached to anything

    # Attaching

    def attach(self, model: nn.Module, scale: float = 1.0, tasks: int | Sequence[int] | Tensor | None = None) -> None:
        """Make the swapped `model` start from these states, in every thread, until `detach`.

        Args:
            model: a model after `swap_modules`. States attached to it before are replaced.
            scale: factor alpha. At 1 the parameters themselves are used. Any other value is multiplied in once, here,
                and again only when the parameters have changed or a gradient is to flow.
            tasks: which task the rows start from: one index for all, or one per row of the batch (list or tensor), -1
                for the zero state. None means task 0. Where `generate` multiplies the rows (beams, several returned
                sequences) the tasks follow.
        """
        site = swapped_site(model, "S0States.attach")
        site.attachment = self._attachment(site, scale, tasks)
        self._sites.add(site)

    def detach(self) -> None:
        """Undo `attach`, on every model where these states are still the attached ones."""
        for site in self._sites:
            if site.attachment is not None and site.attachment.owner is self:
                site.attachment = None
        self._sites.clear()

    @contextlib.contextmanager
    def attached(
        self, model: nn.Module, scale: float = 1.0, tasks: int | Sequence[int] | Tensor | None = None
    ) -> Iterator["S0States"]:
        """Like `attach`, for the body of a with statement and the calling thread (or task) alone."""
        site = swapped_site(model, "S0States.attached")
        with site.override(self._attachment(site, scale, tasks)):
            yield self

    def _attachment(self, site: Site, scale: float, tasks) -> Attachment:
        if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
            raise TypeError(f"S0States: scale must be a number, got {type(scale).__name__}")
        if not math.isfinite(scale):
            raise ValueError(f"S0States: scale must be finite, got {scale}")
        self.check_fits(site)
        return Attachment(self, {layer: self[layer] for layer in self}, float(scale), self._check_tasks(tasks))

    def _check_tasks(self, tasks) -> int | Tensor:
        if tasks is None:
            return 0
        try:
            rows = torch.as_tensor(tasks)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"S0States: tasks must be an index or one per row, got {tasks!r}") from error
        if rows.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"S0States: tasks must be integers, got {rows.dtype}")
        if rows.dim() > 1:
            raise ValueError(f"S0States: tasks must be an index or one per row, got shape {list(rows.shape)}")
        if any(not -1 <= row < self.tasks for row in rows.reshape(-1).tolist()):
            raise ValueError(f"S0States: tasks must lie in [-1, {self.tasks - 1}], got {rows.tolist()}")
        return int(rows) if rows.dim() == 0 else rows.to(torch.int64, copy=True)

    def check_fits(self, site: Site) -> None:
        """Raise ValueError, with both sides named, if these states are for another model."""
        ours = {layer: tuple(self[layer].shape[1:]) for layer in self.layers}
        if self.arch != site.arch:
            raise ValueError(f"S0States: the states are for arch {self.arch!r}, the model has {site.arch!r}")
        if sorted(ours) != sorted(site.shapes):
            raise ValueError(
                f"S0States: the states are for layers {sorted(ours)}, "
                f"the model's recurrent layers are {sorted(site.shapes)}"
            )
        for layer, shape in ours.items():
            if shape != tuple(site.shapes[layer]):
                raise ValueError(
                    f"S0States: the state of layer {layer} has shape {list(shape)}, the model's has "
                    f"{list(site.shapes[layer])}"
                )

    # Files

    def save(self, path: str | os.PathLike, *, task: int = 0, config: S0Config | None = None) -> None:
        """Write one task to the directory `path`, in the layout of the `s0-tuning` package 0.1.2.

        Files: `states.safetensors` with one tensor [*state] per layer, named by the layer's index; `config.json` with
        the fields of `S0Config`; `meta.json` with `arch`, `recurrent_layers`, `state_shape` and keys of ours. The
        tensors' file repeats what is needed to load it in its header and is replaced last, each file in one move:
        a crash leaves the old states or the new ones.
        """
        if isinstance(task, bool) or not isinstance(task, int):
            raise TypeError(f"S0States.save: task must be an int, got {task!r}")
        if not 0 <= task < self.tasks:
            raise ValueError(f"S0States.save: task must lie in [0, {self.tasks - 1}], got {task}")
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {str(layer): self[layer].detach()[task].cpu().contiguous() for layer in self.layers}
        meta = {
            "arch": self.arch,
            "recurrent_layers": self.layers,
            "state_shape": list(next(iter(tensors.values())).shape),
            "s0kernels_version": __version__,
        }
        config = S0Config() if config is None else config
        header = {"format": "pt", "s0": json.dumps({"meta": meta, "config": config.to_dict()})}
        replace_file(folder / _CONFIG, json.dumps(config.to_dict(), indent=2).encode())
        replace_file(folder / _META, json.dumps(meta, indent=2).encode())
        replace_file(folder / _STATES, save(tensors, metadata=header))

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module | None = None) -> "S0States":
        """Read a directory written by `save` or by `s0-tuning`, as one task.

        With a swapped `model` the states are checked against it and put on its layers' devices; a file for another
        architecture, shape or set of layers is refused with both sides named.

        Raises:
            FileNotFoundError: no `states.safetensors` there.
            ValueError: the files are damaged, contradict each other, or do not fit the model.
        """
        site = None if model is None else swapped_site(model, "S0States.load")
        tensors, meta, _ = read_directory(path, None if site is None else site.arch)
        states = cls({layer: tensor[None] for layer, tensor in tensors.items()}, meta["arch"])
        if site is not None:
            states.check_fits(site)
            devices = layer_devices(model)
            for layer in states.layers:
                states[layer].data = states[layer].data.to(devices[layer])
        return states


def read_directory(
    path: str | os.PathLike, default_arch: str | None = None
) -> tuple[dict[int, Tensor], dict, dict | None]:
    """(state by layer, meta, config or None) of a directory of learned states, checked for consistency.

    `default_arch` stands in for a `meta.json` that is missing beside tensors without a header of ours, which
    `s0-tuning` accepts as well.
    """
    folder = Path(path)
    file = folder / _STATES
    if not file.is_file():
        raise FileNotFoundError(f"no {_STATES} in {folder}")
    try:
        with safe_open(file, framework="pt") as reader:
            header = reader.metadata() or {}
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
    beside = {name: _read_json(folder / name) for name in (_META, _CONFIG) if (folder / name).exists()}
    if "s0" in header:
        own = _parse_json(header["s0"], f"the header of {file}")
        meta, config = own.get("meta"), own.get("config")
        for name, inside in ((_META, meta), (_CONFIG, config)):
            if name in beside and beside[name] != inside:
                warnings.warn(f"{folder / name} differs from the header of {_STATES}, which is used", stacklevel=3)
    else:
        meta, config = beside.get(_META), beside.get(_CONFIG)
        meta = {"arch": default_arch} if meta is None else meta
    return _check_tensors(tensors, meta, file), meta, config


def _check_tensors(tensors: dict[str, Tensor], meta, file: Path) -> dict[int, Tensor]:
    if not isinstance(meta, dict) or not isinstance(meta.get("arch"), str):
        raise ValueError(f"{file}: meta names no arch, and no model was given to take it from")
    if not tensors or any(not name.isdecimal() for name in tensors):
        raise ValueError(f"{file}: tensors must be named by layer index, got {sorted(tensors)[:8]}")
    states = {int(name): tensor for name, tensor in tensors.items()}
    layers, shape = meta.get("recurrent_layers"), meta.get("state_shape")
    if layers is not None and sorted(layers) != sorted(states):
        raise ValueError(f"{file}: holds layers {sorted(states)}, but its meta names {sorted(layers)}")
    for layer, state in sorted(states.items()):
        if state.dim() != 3 or (shape is not None and list(state.shape) != list(shape)):
            raise ValueError(f"{file}: the state of layer {layer} has shape {list(state.shape)}, its meta says {shape}")
        if not state.is_floating_point() or not torch.isfinite(state).all():
            raise ValueError(f"{file}: the state of layer {layer} holds values that are not finite numbers")
    return states


def _read_json(file: Path) -> dict:
    try:
        return _parse_json(file.read_text(encoding="utf-8"), file)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _parse_json(text: str, where) -> dict:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(value).__name__}")
    return value
