"""Files written whole or not at all, and directories of learned states, which are read with suspicion."""

import json
import os
import re
import secrets
import time
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

STATES, CONFIG, META = "states.safetensors", "config.json", "meta.json"
#: beside directories of several tasks: which ones, in order
TASKS = "tasks.json"


def replace_file(file: Path, content: bytes) -> None:
    """Write beside and move over, so that readers see the old file or the new one."""
    _sweep(file)
    temporary = file.parent / f".{file.name}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as stream:  # with the rights of any new file; the umask is every thread's
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sweep(file: Path, age: float = 3600.0) -> None:
    """Remove what writers that were killed long ago have left beside `file`."""
    for leftover in file.parent.glob(f".{file.name}.*.tmp"):
        try:
            if time.time() - leftover.stat().st_mtime > age:
                leftover.unlink()
        except OSError:  # another process sweeps as well
            continue


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of a safetensors file, which cannot run code; ValueError if it is none."""
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {file.parent}")
    try:
        with safe_open(file, framework="pt") as reader:
            header = reader.metadata() or {}
            return {name: reader.get_tensor(name) for name in reader.keys()}, header  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


def read_directory(
    path: str | os.PathLike, default_arch: str | None = None
) -> tuple[dict[int, Tensor], dict, dict | None]:
    """(state by layer, meta, config or None) of a directory of learned states, checked for consistency.

    `default_arch` stands in for a `meta.json` that is missing beside tensors without a header of ours, which
    `s0-tuning` accepts as well.
    """
    folder = Path(path)
    file = folder / STATES
    tensors, header = read_tensors(file)
    beside = {name: _read_json(folder / name) for name in (META, CONFIG) if (folder / name).exists()}
    if "s0" in header:
        own = parse_json(header["s0"], f"the header of {file}")
        meta, config = own.get("meta"), own.get("config")
        for name, inside in ((META, meta), (CONFIG, config)):
            if name in beside and beside[name] != inside:
                warnings.warn(f"{folder / name} differs from the header of {STATES}, which is used", stacklevel=3)
    else:
        meta, config = beside.get(META), beside.get(CONFIG)
        meta = {"arch": default_arch} if meta is None else meta
    return _check_tensors(tensors, meta, file), meta, config


def parse_json(text: str, where: object) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(value).__name__}")
    return value


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


def _read_json(file: Path) -> dict:
    try:
        return parse_json(file.read_text(encoding="utf-8"), file)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
