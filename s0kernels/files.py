"""Files written whole or not at all, and directories of learned states, which are read with suspicion."""

import errno
import glob
import json
import os
import re
import secrets
import shutil
import time
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

STATES, CONFIG, META = "states.safetensors", "config.json", "meta.json"
#: beside directories of several tasks: which ones, in order
TASKS = "tasks.json"
#: of what a file system says that does not do something, rather than has failed to do it
_REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
#: seconds after which files that contradict each other and do not change are taken as they are, and at most
_SETTLED, _PATIENCE = 0.1, 5.0


def replace_file(file: Path, content: bytes) -> None:
    """Write beside and move over, so that readers see the old file or the new one, also after a crash.

    What a mount does not do (S3, GCS, CIFS may refuse to flush or to move over a file) is warned about, and the content
    is written all the same. An OSError names the file.
    """
    _sweep(file)
    try:
        temporary = _write_new(file, content)
    except OSError as error:
        raise _naming(file, error) from error
    try:
        os.replace(temporary, file)
    except OSError as error:
        if error.errno not in _REFUSALS:
            temporary.unlink(missing_ok=True)
            raise _naming(file, error) from error
        _write_over(file, content, temporary, error)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_new(file: Path, content: bytes) -> Path:
    """A file beside `file`, flushed, with the permissions that a new one gets."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            try:
                os.fsync(stream.fileno())
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                warnings.warn(f"{file}: cannot be flushed to the disk ({error}); a crash may lose it", stacklevel=4)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _write_over(file: Path, content: bytes, temporary: Path, refusal: OSError) -> None:
    """In place; where that fails as well the content stays in `temporary`, and the error says so."""
    try:
        file.write_bytes(content)
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; what was to be written is in {temporary}", str(file)
        ) from refusal
    temporary.unlink(missing_ok=True)
    warnings.warn(
        f"{file}: cannot be replaced in one move ({refusal}); it was written in place, and a reader or a crash may "
        "have seen a part",
        stacklevel=4,
    )


def _naming(file: Path, error: OSError) -> OSError:
    """The same error, about `file`."""
    return OSError(error.errno, error.strerror, str(file)) if error.errno else OSError(f"{file}: {error}")


def check_output(folder: str | os.PathLike, size: int) -> None:
    """Make the directory and know, before the work and not after it, that `size` bytes can be written to it.

    Raises:
        OSError: they cannot; it names the directory.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_new(folder / "probe", b"0").unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _naming(folder, error) from error
    if free < size and free > 0:  # a mount without limits may say 0
        message = f"holds no {size / 1e6:.1f} MB, which the states need; {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, message, str(folder))


def _sweep(file: Path, age: float = 3600.0) -> None:
    """Remove what writers that were killed long ago have left beside `file`."""
    for leftover in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
        try:
            if time.time() - leftover.stat().st_mtime > age:
                leftover.unlink()
        except OSError:  # another process sweeps as well
            continue


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of a safetensors file, which cannot run code; ValueError if it is none.

    The file is opened once and read whole: what safetensors maps it opens again by name, and then it may be another.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no {file.name} in {file.parent}") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        return tensors, json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


def read_directory(
    path: str | os.PathLike, default_arch: str | None = None
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


def _read_json(file: Path) -> dict | None:
    try:
        return parse_json(file.read_text(encoding="utf-8"), file)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
