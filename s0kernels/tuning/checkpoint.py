"""Save a training run to disk, and resume it with the same result as without the interruption."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import save
from torch import Tensor

from s0kernels.config import S0Config
from s0kernels.files import check_output, parse_json, read_tensors, replace_file
from s0kernels.messages import some
from s0kernels.states import S0States
from s0kernels.tuning.data import Example

#: settings that identify a run; the others decide how long it is or how its states are used
_SETTINGS = ("lr", "l2_lambda", "grad_clip")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def describe_run(
    examples: Sequence[Example], tasks: Sequence[str] | None, config: S0Config, states: S0States, scale: float
) -> dict[str, Any]:
    """Return the properties that must agree when a run is resumed, and in all processes of a run."""
    text = json.dumps([tuple(example) for example in examples])
    learning = _learning(states)
    return {
        "examples": f"{len(examples)}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}",
        "tasks": None if tasks is None else list(tasks),
        "config": {name: getattr(config, name) for name in _SETTINGS},
        "states": {str(layer): list(states[layer].shape) for layer in states},
        "weights": None if states.base_model is None else states.base_model["weights"],
        **({} if scale == 1 else {"scale": scale}),
        **({} if learning == list(states) else {"layers": learning}),
    }


def _learning(states: S0States) -> list[int]:
    return [layer for layer in states if states[layer].requires_grad]


class Checkpoint:
    """The states, Adam's moments and the history of a run, in one safetensors file that is replaced atomically."""

    def __init__(self, file: str | os.PathLike[str], run: Mapping[str, Any]):
        if not isinstance(file, (str, os.PathLike)):
            raise TypeError(f"S0Trainer: checkpoint must be a path, got {type(file).__name__}")
        self._file, self._run = Path(file), dict(run)
        if self._file.is_dir():
            raise ValueError(f"S0Trainer: checkpoint must name a file, and {file} is a directory")
        numbers = sum(math.prod(shape) for shape in run.get("states", {}).values())
        check_output(self._file.parent, 4 * (1 + len(_MOMENTS)) * numbers)

    def write(
        self,
        states: S0States,
        optimizer: torch.optim.Adam,
        history: Sequence[Mapping],
        ended: bool,
        sizes: Mapping[str, Any],
    ) -> None:
        """Write the run. `ended` says that a callback has ended it. `sizes` are the sizes of its forwards, and the
        arguments that they follow from."""
        tensors: dict[str, Tensor] = {}
        for layer in _learning(states):
            tensors[f"{layer}.state"] = states[layer].detach()
            for moment in _MOMENTS:
                tensors[f"{layer}.{moment}"] = optimizer.state[states[layer]][moment]
        content = {"run": self._run, "history": list(history), "ended": ended, "sizes": dict(sizes)}
        content = json.dumps(content, default=_plain)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        replace_file(self._file, save(tensors, metadata={"s0_run": content}))

    def read(
        self, states: S0States, optimizer: torch.optim.Adam
    ) -> tuple[list[dict[str, Any]], bool, dict[str, Any] | None]:
        """Restore states and optimizer. Return the history, whether the run has ended, and the sizes of its forwards or
        None. The history is empty if there is no file yet.

        Raises:
            ValueError: the file belongs to another run (the message has the differences), or is not a checkpoint.
        """
        if not self._file.exists():
            return [], False, None
        tensors, header = read_tensors(self._file)
        content = parse_json(header.get("s0_run", "{}"), f"the header of {self._file}")
        run, history = content.get("run"), content.get("history")
        if not isinstance(run, dict) or not _is_history(history):
            raise ValueError(f"{self._file} is not a checkpoint of a training run")
        both = {key: (run.get(key), self._run.get(key)) for key in {**self._run, **run}}
        differing = {key: pair for key, pair in both.items() if pair[0] != pair[1]}
        if None in differing.get("weights", ()):  # the weights of an offloaded model cannot be read
            del differing["weights"]
        if differing:
            text = "; ".join(f"{key}: {_short(a)} there, {_short(b)} here" for key, (a, b) in differing.items())
            raise ValueError(f"{self._file} is the checkpoint of another run ({text}); name another file or remove it")
        with torch.no_grad():
            for layer in _learning(states):
                parameter = states[layer]
                found = [tensors.get(f"{layer}.{name}") for name in ("state", *_MOMENTS)]
                fitting = [tensor for tensor in found if tensor is not None and _fits(tensor, parameter)]
                if len(fitting) != len(found):
                    raise ValueError(f"{self._file} does not hold what layer {layer} needs")
                parameter.copy_(fitting[0])
                if history:
                    moments = {name: t.to(parameter.device) for name, t in zip(_MOMENTS, fitting[1:], strict=True)}
                    optimizer.state[parameter] = {
                        "step": torch.tensor(len(history), dtype=torch.float32, device="cpu"),
                        **moments,
                    }
        sizes = content.get("sizes")
        return history, content.get("ended") is True, sizes if _are_sizes(sizes) else None


def _fits(tensor: Tensor, parameter: Tensor) -> bool:
    alike = (tensor.shape, tensor.dtype) == (parameter.shape, parameter.dtype)
    return alike and bool(tensor.isfinite().all())


def _short(value: Any) -> str:
    return some(value) if isinstance(value, list) else str(value)


def _is_history(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether `value` is a history: an entry for every step, in order, with a loss."""
    return isinstance(value, list) and all(
        isinstance(entry, dict) and entry.get("step") == number and isinstance(entry.get("loss"), (int, float))
        for number, entry in enumerate(value)
    )


def _are_sizes(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether `value` holds sizes of forwards. Files of earlier versions have none."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("asked"), list)
        and type(value.get("tokens")) is int
        and value["tokens"] > 0
        and isinstance(value.get("checkpointed"), bool)
    )


def _plain(value: Any) -> Any:
    """Convert a scalar of numpy or torch to a Python number, for JSON. Raise TypeError for anything else."""
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):
        message = (
            f"S0Trainer: a callback put a {type(value).__name__} into the history; a checkpoint can hold numbers only"
        )
        raise TypeError(message) from None
