"""Directories of learned states: what lies in one, how it is written and how it is read.

A directory of one task holds `states.safetensors`, `config.json` and `meta.json`, as the `s0-tuning` package writes
them; one of several holds such directories by name, and `tasks.json`, their order.
"""

import json
import os
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from s0kernels.files import parse_json, read_tensors, replace_file

STATES, CONFIG, META, TASKS = "states.safetensors", "config.json", "meta.json", "tasks.json"
#: seconds after which files that contradict each other and do not change are taken as they are, and at most
_SETTLED, _PATIENCE = 0.1, 5.0


def can_be_task(name: str) -> bool:
    """Whether a directory can have that name, and not be taken for something else beside it."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    free = name not in ("..", STATES, CONFIG, META, TASKS) and name == Path(name).name and "\0" not in name
    return free and 0 < length <= 255


def write_directory(folder: Path, tensors: Mapping[int, Tensor], meta: dict, config: dict) -> None:
    """One task. The header of the tensors' file repeats the two others, and that file is replaced last: a crash leaves
    the old states or the new ones.

    Raises:
        OSError: the states cannot be written; it names the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header, refused = {"s0": json.dumps({"meta": meta, "config": config})}, []
    for name, value in ((CONFIG, config), (META, meta)):
        try:
            replace_file(folder / name, json.dumps(value, indent=2).encode())
        except PermissionError as error:  # somebody else's file; the header of the states says the same
            refused.append(error)
    replace_file(folder / STATES, save({str(layer): x for layer, x in tensors.items()}, metadata=header))
    for error in refused:
        warnings.warn(f"{error}; the states beside it were written", stacklevel=3)


def write_tasks(folder: Path, names: Sequence[str] | None) -> None:
    """After the directories of several tasks: their names. What one task without a name has left gives way, or with
    None the names do."""
    if names is None:
        (folder / TASKS).unlink(missing_ok=True)
        return
    replace_file(folder / TASKS, json.dumps({"tasks": list(names)}, indent=2).encode())
    for name in (STATES, CONFIG, META):
        (folder / name).unlink(missing_ok=True)


def find_tasks(folder: Path) -> dict[str | None, Path]:
    """Directories of states by task, in order; None is the name of a single one."""
    if (folder / TASKS).is_file():
        names = parse_json((folder / TASKS).read_text(encoding="utf-8"), folder / TASKS).get("tasks")
        if not isinstance(names, list) or not names:
            raise ValueError(f"{folder / TASKS} names no tasks")
        for name in names:
            if not isinstance(name, str) or not can_be_task(name):
                raise ValueError(f"{folder / TASKS} names a task that cannot be a directory, {name!r}")
        return {name: folder / name for name in names}
    inner = sorted(file.parent for file in folder.glob(f"*/{STATES}"))
    if (folder / STATES).exists() or not inner:
        return {None: folder}
    return {each.name: each for each in inner}


def read_directory(
    path: str | os.PathLike[str], default_arch: str | None = None
) -> tuple[dict[int, Tensor], dict, dict | None]:
    """(state by layer, meta, config or None) of a directory of learned states, checked for consistency. They are of one
    save, also where another process saves meanwhile.

    `default_arch` stands in for a `meta.json` that is missing beside tensors without a header of ours, which
    `s0-tuning` accepts as well.
    """
    folder = Path(path)
    file, before, end = folder / STATES, None, time.monotonic() + _PATIENCE
    while True:
        stamps = [_stamp(folder / name) for name in (STATES, META, CONFIG)]
        tensors, header = read_tensors(file)
        meta, config = (_read_json(folder / name) for name in (META, CONFIG))
        if "s0" not in header:
            meta = {"arch": default_arch} if meta is None else meta
            return _check_tensors(tensors, meta, file), meta, config
        own = parse_json(header["s0"], f"the header of {file}")
        beside = {META: (meta, own.get("meta")), CONFIG: (config, own.get("config"))}
        differing = [name for name, (there, here) in beside.items() if there is not None and there != here]
        under_way = stamps != before or any(folder.glob(f".{STATES}.*.tmp"))  # a save writes those beside first
        if not differing or not under_way or time.monotonic() > end:
            break
        before = stamps
        time.sleep(_SETTLED)
    for name in differing:
        warnings.warn(f"{folder / name} differs from the header of {STATES}, which is used", stacklevel=3)
    return _check_tensors(tensors, own.get("meta"), file), own["meta"], own.get("config")


def _stamp(file: Path) -> tuple[int, ...] | None:
    """What changes when a file is replaced."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _check_tensors(tensors: dict[str, Tensor], meta: object, file: Path) -> dict[int, Tensor]:
    if not isinstance(meta, dict) or not isinstance(meta.get("arch"), str):
        raise ValueError(f"{file}: meta names no arch, and no model was given to take it from")
    if not tensors or not all(re.fullmatch("0|[1-9][0-9]{0,5}", name) for name in tensors):
        raise ValueError(f"{file}: tensors must be named by layer index, got {sorted(tensors)[:8]}")
    states = {int(name): tensor for name, tensor in tensors.items()}
    layers, shape = _integers(meta, "recurrent_layers", file), _integers(meta, "state_shape", file)
    if layers is not None and sorted(layers) != sorted(states):
        raise ValueError(f"{file}: holds layers {sorted(states)}, but its meta names {sorted(layers)}")
    for layer, state in sorted(states.items()):
        if state.dim() != 3 or (shape is not None and list(state.shape) != shape):
            raise ValueError(f"{file}: the state of layer {layer} has shape {list(state.shape)}, its meta says {shape}")
        if not state.is_floating_point() or not torch.isfinite(state.float()).all():
            raise ValueError(f"{file}: the state of layer {layer} holds values that are not finite numbers")
    return states


def _integers(meta: dict, key: str, file: Path) -> list[int] | None:
    value = meta.get(key)
    if value is not None and not (isinstance(value, list) and all(type(entry) is int for entry in value)):
        raise ValueError(f"{file}: {key} in its meta must be a list of integers, got {value!r}")
    return value


def _read_json(file: Path) -> dict | None:
    try:
        return parse_json(file.read_text(encoding="utf-8"), file)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
