"""`S0States`: the learned initial states of a model, which can be attached, saved and loaded."""

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from s0kernels import __version__
from s0kernels.config import S0Config, check_number
from s0kernels.messages import some
from s0kernels.modules.arguments import cache_of
from s0kernels.modules.families import DEFAULT_ALPHA
from s0kernels.modules.injection import Attachment, Site, all_sites
from s0kernels.modules.swap import base_model, layer_devices, swap_modules, swapped_site
from s0kernels.states import files
from s0kernels.versions import installed

#: the task that rows start from: one index or name for all rows, or one for each row
Tasks = int | str | Sequence[int | str] | Tensor | None
_Key = TypeVar("_Key")


class S0States(nn.Module):
    """The initial states S0 of a model: for each recurrent layer one fp32 parameter [tasks, *state].

    A state is [HV, K, V] for the gated delta rule and [H, P, N] for Mamba-2. The module lies outside the model, and an
    optimizer trains its parameters. For DistributedDataParallel put both into one module whose forward calls the model.
    `states[layer_index]` is the parameter of a layer.

    Args:
        states: [tasks, *state] tensors by layer index; copied, to fp32.
        arch: "gated_delta_net" or "mamba2".
        base_model: name and hash of the model that the states belong to, as `for_model` finds them. They are saved with
            the states.
        names: names of the tasks, which can then be used wherever an index can.
    """

    def __init__(
        self,
        states: Mapping[int, Tensor],
        arch: str,
        base_model: Mapping[str, str | None] | None = None,
        names: Sequence[str] | None = None,
    ):
        super().__init__()
        if not states:
            raise ValueError("S0States: states must hold at least one layer")
        if arch not in DEFAULT_ALPHA:
            raise ValueError(f"S0States: arch must be one of {sorted(DEFAULT_ALPHA)}, got {arch!r}")
        shapes = {tuple(state.shape[:1]) for state in states.values()}
        if len(shapes) != 1 or any(state.dim() != 4 for state in states.values()):
            raise ValueError(
                "S0States: states must be [tasks, ...] tensors of four dimensions with equally many tasks, got "
                f"{ ({layer: list(state.shape) for layer, state in states.items()}) }"
            )
        self.arch = arch
        self.base_model = None if base_model is None else dict(base_model)
        self.names = None if names is None else list(names)
        tasks = next(iter(shapes))[0]
        if self.names is not None and not (
            all(isinstance(name, str) for name in self.names) and len(self.names) == len(set(self.names)) == tasks
        ):
            raise ValueError(f"S0States: names must be {tasks} different strings, got {some(self.names)}")
        with torch.inference_mode(False):  # tensors made in inference mode cannot be trained
            self._by_layer = nn.ParameterDict(
                {
                    str(layer): nn.Parameter(state.detach().to(torch.float32, copy=True))
                    for layer, state in sorted(states.items())
                }
            )

    @classmethod
    def for_model(cls, model: nn.Module, tasks: int | Sequence[str] = 1) -> "S0States":
        """Make zero states for every recurrent layer of a swapped model, each on its layer's device. `tasks` is the
        number of tasks, or their names."""
        names = None
        if isinstance(tasks, (list, tuple)):
            tasks, names = len(tasks), tasks
        if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1:
            raise ValueError(f"S0States.for_model: tasks must be a positive int or names, got {tasks!r}")
        site = swapped_site(model, "S0States.for_model")
        devices = layer_devices(model)
        return cls(
            {
                layer: torch.zeros(tasks, *shape, dtype=torch.float32, device=devices[layer])
                for layer, shape in site.shapes.items()
            },
            site.arch,
            base_model(model),
            names,
        )

    @classmethod
    @torch.no_grad()
    def capture(cls, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> "S0States":
        """Run the model over prompts and return the final states of its recurrent layers as initial states, one task
        per prompt.

        Args:
            model: a swapped model. It starts from the states that are attached now.
            input_ids: [tasks, T].
            attention_mask: [tasks, T], 0 at pads, on either side.

        A sequence that starts from these states (attached at scale 1) has the prompt in its recurrent layers only. The
        keys and values of attention, the windows of the convolutions and the positions start from the beginning.
        """
        site = swapped_site(model, "S0States.capture")
        options = {}
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            options = {"attention_mask": attention_mask, "position_ids": positions}
        cache = cache_of(model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **options))
        return cls(
            {layer: cache.layers[layer].recurrent_states[0] for layer in site.shapes}, site.arch, base_model(model)
        )

    @classmethod
    def stack(cls, states: Sequence["S0States"] | Mapping[str, "S0States"]) -> "S0States":
        """Combine the tasks of several S0States, in their order, so that one batch can use a task per row.

        A mapping names the tasks; each of its values must hold one task. A sequence keeps the names if all have names.
        """
        names = list(states) if isinstance(states, Mapping) else None
        parts = list(states.values() if isinstance(states, Mapping) else states)
        if not parts:
            raise ValueError("S0States.stack: states is empty")
        for other in parts:
            parts[0]._check_alike(other, "S0States.stack")
        if names is None and all(part.names is not None for part in parts):
            names = [name for part in parts for name in part.names or ()]
        together = {
            layer: torch.cat([part[layer].detach().to(parts[0][layer].device) for part in parts]) for layer in parts[0]
        }
        return cls(together, parts[0].arch, parts[0].base_model, names)

    def task(self, task: int | str) -> "S0States":
        """Return a copy of one task."""
        index = self._one_task(task, "S0States.task")
        names = None if self.names is None else [self.names[index]]
        return S0States({layer: self[layer].detach()[index][None] for layer in self}, self.arch, self.base_model, names)

    def blend(self, other: "S0States", weight: float = 0.5) -> "S0States":
        """Return (1 - weight) * self + weight * other, task by task. `other` may have one task, which is used for
        all."""
        self._check_alike(other, "S0States.blend")
        if other.tasks not in (1, self.tasks):
            raise ValueError(f"S0States.blend: other must have 1 or {self.tasks} tasks, got {other.tasks}")
        check_number(weight, "S0States.blend: weight")
        mixed = {
            layer: (1 - weight) * self[layer].detach() + weight * other[layer].detach().to(self[layer].device)
            for layer in self
        }
        return S0States(mixed, self.arch, self.base_model, self.names)

    def check_gradients(self) -> None:
        """Check after a backward that every state that learns has a gradient.

        Raises:
            RuntimeError: some have none; the message names their layers.
        """
        missing = [layer for layer in self if self[layer].requires_grad and self[layer].grad is None]
        if missing:
            raise RuntimeError(
                f"S0Trainer.train: no gradient reaches the initial states of layers {missing}: something between them "
                "and the loss cuts it, as layers in 4 or 8 bits may on a CPU. Load the model without quantisation, or "
                "name other layers."
            )

    def norms(self) -> dict[int, Tensor]:
        """Return the Frobenius norms of the states by layer, each [tasks], at scale 1."""
        return {layer: self[layer].detach().flatten(1).norm(dim=1) for layer in self}

    @property
    def layers(self) -> list[int]:
        """The indices of the recurrent layers, ascending."""
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
        return f"{self.arch}, {self.tasks} task(s){f' {some(self.names)}' if self.names else ''}, layers {self.layers}"

    # Attaching

    @staticmethod
    def attached_to(model: nn.Module) -> "S0States | None":
        """Return the states that a swapped model starts from in the calling context, or None if it starts from zero.

        A copy of a model (deepcopy, pickle) starts from a copy of the states, and this function returns that copy.
        """
        current = swapped_site(model, "S0States.attached_to").current()
        return current.owner if current is not None and isinstance(current.owner, S0States) else None

    def attach(self, model: nn.Module, scale: float = 1.0, tasks: Tasks = None) -> None:
        """Make the swapped `model` start from these states, in every thread, until `detach`.

        Args:
            model: a model after `swap_modules`. States attached to it before are replaced.
            scale: factor alpha. At 1 the parameters themselves are used. With any other value the product is computed
                once, here. It is computed again only if the parameters have changed (writing through `.data` hides a
                change), if a gradient is needed, and in compiled graphs.
            tasks: the task that rows start from: one index or name for all rows, or one per row of the batch (list or
                tensor); -1 means the zero state. None means task 0. If `generate` multiplies the rows (beams, several
                returned sequences), it multiplies the tasks too.

        Raises:
            ValueError: the states are for another model, or the model starts from PEFT adapters.
        """
        site = swapped_site(model, "S0States.attach")
        if site.attachment is not None and not isinstance(site.attachment.owner, S0States):
            raise ValueError("S0States.attach: the model starts from PEFT adapters; unload() them, or use attached()")
        site.attachment = self._attachment(site, scale, tasks)

    def detach(self) -> None:
        """Undo `attach` on every model to which these states are still attached, copies of models included."""
        for site in all_sites():
            if site.attachment is not None and site.attachment.owner is self:
                site.attachment = None

    @contextlib.contextmanager
    def attached(self, model: nn.Module, scale: float = 1.0, tasks: Tasks = None) -> Iterator["S0States"]:
        """Like `attach`, but only for the body of a with statement and for the calling thread (or asyncio task)."""
        site = swapped_site(model, "S0States.attached")
        with site.override(self._attachment(site, scale, tasks)):
            yield self

    def _attachment(self, site: Site, scale: float, tasks: Tasks) -> Attachment:
        check_number(scale, "S0States: scale")
        self.check_fits(site)
        return Attachment(self, {layer: self[layer] for layer in self}, float(scale), self._check_tasks(tasks))

    def _check_tasks(self, tasks: Tasks) -> int | Tensor:
        if tasks is None:
            return 0
        if isinstance(tasks, str):
            return self._number(tasks)
        if isinstance(tasks, (list, tuple)):
            numbers = {name: number for number, name in enumerate(self.names or ())}
            tasks = [
                (numbers[task] if task in numbers else self._number(task)) if isinstance(task, str) else task
                for task in tasks
            ]
        try:
            rows = tasks if isinstance(tasks, Tensor) else torch.as_tensor(tasks, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"S0States: tasks must be an index or one per row, got {tasks!r}") from error
        if rows.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"S0States: tasks must be integers, got {rows.dtype}")
        if rows.dim() > 1:
            raise ValueError(f"S0States: tasks must be an index or one per row, got shape {list(rows.shape)}")
        if any(not -1 <= row < self.tasks for row in rows.reshape(-1).tolist()):
            wrong = next(row for row in rows.reshape(-1).tolist() if not -1 <= row < self.tasks)
            raise ValueError(f"S0States: tasks must lie in [-1, {self.tasks - 1}], got {wrong}")
        return int(rows) if rows.dim() == 0 else rows.to(torch.int64, copy=True)

    def check_fits(self, site: Site) -> None:
        """Raise ValueError if these states are for another model; the message names both sides."""
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

    def _number(self, name: str) -> int:
        if self.names is None or name not in self.names:
            have = "they have no names" if self.names is None else f"the names are {some(self.names)}"
            raise ValueError(f"S0States: tasks: none of the tasks is called {name!r}; {have}")
        return self.names.index(name)

    def _one_task(self, task: int | str, who: str) -> int:
        if isinstance(task, str):
            return self._number(task)
        if isinstance(task, bool) or not isinstance(task, int):
            raise TypeError(f"{who}: task must be an int or a name, got {task!r}")
        if not 0 <= task < self.tasks:
            raise ValueError(f"{who}: task must lie in [0, {self.tasks - 1}], got {task}")
        return task

    def _check_alike(self, other: "S0States", who: str) -> None:
        if not isinstance(other, S0States):
            raise TypeError(f"{who}: expected S0States, got {type(other).__name__}")
        ours, theirs = ((s.arch, {layer: list(s[layer].shape[1:]) for layer in s}) for s in (self, other))
        if ours != theirs:
            raise ValueError(f"{who}: the states are for different models, {ours} and {theirs}")

    # Files

    def save(self, path: str | os.PathLike[str], *, task: int | str = 0, config: S0Config | None = None) -> None:
        """Write one task to the directory `path`, in the file layout of the `s0-tuning` package 0.1.2.

        Files: `states.safetensors` with one tensor [*state] per layer, named by the layer's index; `config.json` with
        the fields of `S0Config`; `meta.json` with `arch`, `recurrent_layers`, `state_shape`, and, beyond that package,
        `base_model` (its name, and a hash of some weights) and `versions`. The header of `states.safetensors` repeats
        everything that loading needs. Each file is replaced in one move, and this file is the last: a crash leaves the
        old states or the new ones. On a mount that cannot do that, the files are written with a warning.

        Raises:
            OSError: the states cannot be written; the message names the file.
        """
        tensors = self._to_save(task, "S0States.save")
        meta = {
            "arch": self.arch,
            "recurrent_layers": self.layers,
            "state_shape": list(next(iter(tensors.values())).shape),
            "base_model": self.base_model,
            "versions": {"s0kernels": __version__, **{name: _version(name) for name in ("torch", "transformers")}},
        }
        config = S0Config() if config is None else config
        files.write_directory(Path(path), tensors, meta, config.to_dict())

    def save_peft(self, path: str | os.PathLike[str], *, scale: float, task: int | str = 0) -> None:
        """Write one task to the directory `path` as a PEFT adapter, in the format of `s0kernels.peft`.

        Args:
            scale: factor that multiplies the states in use. It is `trainer.alpha` for the states of a trainer, and the
                scale of `attach` for attached states. PEFT has no equivalent of `S0Config.normalize`: with it, divide
                the states by their norms first.

        An existing adapter is overwritten. A crash leaves the old adapter, the new one, or files that `load` refuses,
        never a mixture.

        Raises:
            ValueError: `scale` is zero or not finite.
            OSError: the states cannot be written; the message names the file.
        """
        if check_number(scale, "S0States.save_peft: scale") == 0:
            raise ValueError("S0States.save_peft: scale must not be 0: the states would have no effect")
        tensors, base = self._to_save(task, "S0States.save_peft"), self.base_model or {}
        config = {
            "peft_type": "S0",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "base_model_name_or_path": base.get("name"),
            "scale": float(scale),
            "arch": self.arch,
            "base_weights": base.get("weights"),
            "recurrent_layers": self.layers,
        }
        files.write_adapter(Path(path), tensors, config)

    def _to_save(self, task: int | str, who: str) -> dict[int, Tensor]:
        """Return the states of one task by layer, on the CPU. Raise ValueError if a value is not finite."""
        task = self._one_task(task, who)
        broken = [layer for layer in self.layers if not self[layer][task].isfinite().all()]
        if broken:
            raise ValueError(f"{who}: the states of layers {broken} hold values that are not finite numbers")
        return {layer: self[layer].detach()[task].cpu().contiguous() for layer in self.layers}

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> "S0States":
        """Read a directory written by `save` or by `s0-tuning`, or a PEFT adapter, as one task.

        With a swapped `model`, the states are checked against it and moved to the devices of its layers. A file for
        another architecture, shape or set of layers is refused, and the message names both sides. A file that was
        learned on a model with other weights gets a warning.

        Raises:
            FileNotFoundError: the directory holds neither `states.safetensors` nor an adapter.
            ValueError: the files are damaged, contradict each other, or do not fit the model.
        """
        return cls.load_with_config(path, model)[0]

    @classmethod
    def load_with_config(
        cls, path: str | os.PathLike[str], model: nn.Module | None = None
    ) -> tuple["S0States", dict[str, Any] | None]:
        """Like `load`, but also return the config saved with the states (the fields of `S0Config`), or None. For a PEFT
        adapter `alpha` is the adapter's scale."""
        return cls.load_many({None: path}, model)[None]

    @classmethod
    def load_many(
        cls, paths: Mapping[_Key, str | os.PathLike[str]], model: nn.Module | None = None
    ) -> dict[_Key, tuple["S0States", dict[str, Any] | None]]:
        """Call `load_with_config` for several directories, and return the results by the same keys. The model is
        examined once."""
        target = None
        if model is not None:
            target = swapped_site(model, "S0States.load"), base_model(model), layer_devices(model)
        found = {}
        for key, path in paths.items():
            tensors, meta, config = files.read_directory(path, None if target is None else target[0].arch)
            origin = meta.get("base_model")
            origin = origin if isinstance(origin, dict) else None
            states = cls({layer: tensor[None] for layer, tensor in tensors.items()}, meta["arch"], origin)
            if target is not None:
                site, base, devices = target
                states.check_fits(site)
                learned_on = states.base_model or {}
                warn_of_another_base(path, learned_on.get("name"), learned_on.get("weights"), base)
                with torch.inference_mode(False):
                    for layer in states.layers:
                        states[layer].data = states[layer].data.to(devices[layer])
            found[key] = states, config
        return found


def warn_of_another_base(what: object, name: str | None, weights: str | None, model: Mapping[str, str | None]) -> None:
    """Warn if states were learned on a model with other weights than those of `model`. Both are described as by
    `base_model`."""
    if weights and model["weights"] and weights != model["weights"]:
        warnings.warn(
            f"{what}: the states were learned on {name or 'a model without a name'} (weights {weights}), and the model "
            f"is {model['name'] or 'one without a name'} (weights {model['weights']})",
            stacklevel=3,
        )


def states_size(model_name: str, tasks: int = 1) -> int:
    """Return the number of bytes that the states of a model take in files, without loading its weights. Return 0 if the
    model cannot be found; loading it then reports the reason."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_name))
        shapes = swapped_site(swap_modules(model), "states_size").shapes.values()
    except Exception:
        return 0
    return tasks * sum(4 * math.prod(shape) for shape in shapes)


@functools.cache
def _version(package: str) -> str | None:
    return installed(package)[package]
