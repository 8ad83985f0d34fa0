"""Read and write directories of learned states.

The directory of one task holds `states.safetensors`, `config.json` and `meta.json`, as the `s0-tuning` package writes
them. The directory of several tasks holds one such directory per task, named after it, and `tasks.json`, which lists
the names in order. PEFT adapters are read and written too: they hold `adapter_model.safetensors` and
`adapter_config.json`.
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
#: name of a layer's state in an adapter. It has the layer's index, so it does not depend on the names of mixers
ADAPTER_KEY = "base_model.model.layers.{}.s0_state"
#: files that contradict each other are read again after this many seconds, until they no longer change, and for at
#: most this many seconds
_SETTLED, _PATIENCE = 0.1, 5.0


def can_be_task(name: str) -> bool:
    """Whether `name` can be the name of a task's directory, without clashing with another file beside it."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:  # a lone surrogate
        return False
    free = name not in ("..", STATES, CONFIG, META, TASKS) and name == Path(name).name and "\0" not in name
    return free and 0 < length <= 255


def write_directory(folder: Path, tensors: Mapping[int, Tensor], meta: dict, config: dict) -> None:
    """Write one task. The header of `states.safetensors` repeats the two other files, and it is replaced last: a crash
    leaves the old states or the new ones.

    Raises:
        OSError: the states cannot be written; the message names the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header, refused = {"s0": json.dumps({"meta": meta, "config": config})}, []
    for name, value in ((CONFIG, config), (META, meta)):
        try:
            replace_file(folder / name, json.dumps(value, indent=2).encode())
        except PermissionError as error:  # the file belongs to another user; the header of the states repeats it
            refused.append(error)
    replace_file(folder / STATES, save({str(layer): x for layer, x in tensors.items()}, metadata=header))
    for error in refused:
        warnings.warn(f"{error}; the states beside it were written", stacklevel=3)


def write_tasks(folder: Path, names: Sequence[str] | None) -> None:
    """Write `tasks.json` after the directories of several tasks, and remove the files of an earlier save of one task
    without a name. With None, remove `tasks.json` instead."""
    if names is None:
        (folder / TASKS).unlink(missing_ok=True)
        return
    replace_file(folder / TASKS, json.dumps({"tasks": list(names)}, indent=2).encode())
    for name in (STATES, CONFIG, META):
        (folder / name).unlink(missing_ok=True)


def find_tasks(folder: Path) -> dict[str | None, Path]:
    """Return the directories of states by task, in order. The key of a single task without a name is None."""
    if (folder / TASKS).is_file():
        names = parse_json((folder / TASKS).read_text(encoding="utf-8"), folder / TASKS).get("tasks")
        if not isinstance(names, list) or not names:
            raise ValueError(f"{folder / TASKS} names no tasks")
        for name in names:
            if not isinstance(name, str) or not can_be_task(name):
                raise ValueError(f"{folder / TASKS} names a task {name!r}, which cannot be the name of a directory")
        return {name: folder / name for name in names}
    inner = sorted({file.parent for name in (STATES, ADAPTER_CONFIG) for file in folder.glob(f"*/{name}")})
    if (folder / STATES).exists() or (folder / ADAPTER_CONFIG).exists() or not inner:
        return {None: folder}
    return {each.name: each for each in inner}


def read_directory(
    path: str | os.PathLike[str], default_arch: str | None = None
) -> tuple[dict[int, Tensor], dict, dict | None]:
    """Read a directory of learned states, or a PEFT adapter, and check that its files agree. Return (state by layer,
    meta, config or None). All come from the same save, even if another process saves at the same time.

    `default_arch` is used if the file has no header of ours and `meta.json` is missing, which `s0-tuning` accepts as
    well.
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
        under_way = stamps != before or any(folder.glob(f".{STATES}.*.tmp"))  # a save begins with these
        if not differing or not under_way or time.monotonic() > end:
            break
        before = stamps
        time.sleep(_SETTLED)
    for name in differing:
        warnings.warn(f"{folder / name} differs from the header of {STATES}, which is used", stacklevel=3)
    return _check_tensors(tensors, own.get("meta"), file), own["meta"], own.get("config")


def write_adapter(folder: Path, tensors: Mapping[int, Tensor], config: dict) -> None:
    """Write one task as a PEFT adapter. PEFT reads the two files without comparing them, so an old config is removed
    first and the new config is written last. A crash leaves the old adapter, the new one, or files that are not read.

    Raises:
        OSError: the adapter cannot be written; the message names the file.
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
    """Return (state by layer, meta, config) of a PEFT adapter. The states of recurrent layers that it leaves out are
    zero."""
    if (folder / STATES).exists():
        raise ValueError(f"{folder} holds both {STATES} and an adapter of PEFT; give each a directory of its own")
    file, where, end = folder / ADAPTER, folder / ADAPTER_CONFIG, time.monotonic() + _PATIENCE
    while True:
        stamp = _stamp(where)
        found = _read_json(where)
        tensors = read_tensors(file)[0]
        if (found is not None and stamp == _stamp(where)) or time.monotonic() > end:
            break
        time.sleep(_SETTLED)  # another process is writing it
    if found is None or found.get("peft_type") != "S0":
        raise ValueError(f"{where}: peft_type must be S0, got {found and found.get('peft_type')}")
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
    """Return values that change when the file is replaced."""
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
