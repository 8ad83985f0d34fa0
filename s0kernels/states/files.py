"""Directories of learned states: what lies in one, how it is written and how it is read.

A directory of one task holds `states.safetensors`, `config.json` and `meta.json`, as the `s0-tuning` package writes
them; one of several holds such directories by name, and `tasks.json`, their order. An adapter of PEFT, which is read
and written too, holds `adapter_model.safetensors` and `adapter_config.json`.
"""

import json
import math
import os
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from s0kernels.config import S0Config
from s0kernels.files import parse_json, read_tensors, replace_file
from s0kernels.messages import some

STATES, CONFIG, META, TASKS = "states.safetensors", "config.json", "meta.json", "tasks.json"
ADAPTER, ADAPTER_CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
#: name of a layer's state in an adapter: by the layer's index, so that it does not matter what a mixer is called
ADAPTER_KEY = "base_model.model.layers.{}.s0_state"
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
    inner = sorted({file.parent for name in (STATES, ADAPTER_CONFIG) for file in folder.glob(f"*/{name}")})
    if (folder / STATES).exists() or (folder / ADAPTER_CONFIG).exists() or not inner:
        return {None: folder}
    return {each.name: each for each in inner}


def read_directory(
    path: str | os.PathLike[str], default_arch: str | None = None
) -> tuple[dict[int, Tensor], dict, dict | None]:
    """(state by layer, meta, config or None) of a directory of learned states, or of an adapter of PEFT, checked for
    consistency. They are of one save, also where another process saves meanwhile.

    `default_arch` stands in for a `meta.json` that is missing beside tensors without a header of ours, which
    `s0-tuning` accepts as well.
    """
    folder = Path(path)
    if (folder / ADAPTER_CONFIG).exists():
        return _read_adapter(folder)
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


def write_adapter(folder: Path, tensors: Mapping[int, Tensor], config: dict) -> None:
    """One task as an adapter of PEFT, which reads its two files without comparing them: so an old config is removed
    first and the new one is written last. A crash leaves the old adapter, the new one, or one that nobody reads.

    Raises:
        OSError: it cannot be written; the file is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {ADAPTER_KEY.format(layer): x for layer, x in tensors.items()}
    (folder / ADAPTER_CONFIG).unlink(missing_ok=True)
    replace_file(folder / ADAPTER, save(named, metadata={"format": "pt"}))
    if not (folder / CARD).exists():
        model = config["base_model_name_or_path"]
        lines = ["---", "library_name: peft", *([f"base_model: {json.dumps(model)}"] if model else []), "---", ""]
        replace_file(folder / CARD, "\n".join([*lines, "Initial states (S0), for `s0kernels.peft`.", ""]).encode())
    replace_file(folder / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())


def _read_adapter(folder: Path) -> tuple[dict[int, Tensor], dict, dict]:
    """(state by layer, meta, config) of an adapter of PEFT. Recurrent layers that it leaves out are zero."""
    if (folder / STATES).exists():
        raise ValueError(f"{folder} holds both {STATES} and an adapter of PEFT; give each a directory of its own")
    file, where, end = folder / ADAPTER, folder / ADAPTER_CONFIG, time.monotonic() + _PATIENCE
    while True:
        stamp = _stamp(where)
        found = _read_json(where)
        tensors = read_tensors(file)[0]
        if (found is not None and stamp == _stamp(where)) or time.monotonic() > end:
            break
        time.sleep(_SETTLED)  # somebody writes it
    if found is None or found.get("peft_type") != "S0":
        raise ValueError(f"{where}: an adapter of {found and found.get('peft_type')}, and S0 is wanted")
    scale = found.get("scale")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"{where}: scale must be a finite number, got {scale!r}")
    pattern = re.escape(ADAPTER_KEY).replace(r"\{\}", "(0|[1-9][0-9]{0,5})")
    layers = {name: match[1] for name in tensors if (match := re.fullmatch(pattern, name))}
    others = sorted(tensors.keys() - layers.keys())
    if others:
        raise ValueError(f"{file}: holds {some(others)} beside the states of layers, which S0States cannot keep")
    weights, recurrent = found.get("base_weights"), _integers(found, "recurrent_layers", where) or []
    meta = {"arch": found.get("arch"), "base_model": {"name": found.get("base_model_name_or_path"), "weights": weights}}
    states = _check_tensors({layers[name]: tensor for name, tensor in tensors.items()}, meta, file)
    zero = torch.zeros_like(next(iter(states.values())))
    whole = {layer: states.get(layer, zero) for layer in sorted({*states, *recurrent})}
    return whole, meta, S0Config(alpha=float(scale)).to_dict()


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
