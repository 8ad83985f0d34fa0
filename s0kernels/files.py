"""Write files atomically, and validate files when they are read."""

import errno
import glob
import json
import os
import secrets
import shutil
import time
import warnings
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

#: errors by which a file system says that it does not support an operation, as opposed to a failure of the operation
_REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def replace_file(file: Path, content: bytes) -> None:
    """Replace a file atomically: write a temporary file beside it and move that over it. Readers see the old file or
    the new one, also after a crash.

    Some mounts (S3, GCS, CIFS) refuse to flush a file or to move one over another. Then the content is written all the
    same, with a warning. An OSError names the file.
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


def append(file: Path, content: bytes) -> None:
    """Append to a file, and flush it. A crash may leave a part of `content`."""
    with open(file, "ab", buffering=0) as stream:
        stream.write(content)
        try:
            os.fsync(stream.fileno())
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise _naming(file, error) from error


def _write_new(file: Path, content: bytes) -> Path:
    """Write a temporary file beside `file`, flush it, and give it the permissions of a new file."""
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
    """Write the file in place. If that fails as well, the content stays in `temporary`, and the error says so."""
    try:
        file.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; the new content is in {temporary}", str(file)) from refusal
    temporary.unlink(missing_ok=True)
    warnings.warn(
        f"{file}: cannot be replaced in one move ({refusal}); it was written in place, and a reader or a crash may "
        "have seen a part",
        stacklevel=4,
    )


def _naming(file: Path, error: OSError) -> OSError:
    """Return the same error with the name of `file`."""
    return OSError(error.errno, error.strerror, str(file)) if error.errno else OSError(f"{file}: {error}")


def check_output(folder: str | os.PathLike[str], size: int) -> None:
    """Create the directory, and check before the work starts that `size` bytes can be written to it.

    Raises:
        OSError: the directory cannot be created, is not writable or has too little space; the message names it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_new(folder / "probe", b"0").unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _naming(folder, error) from error
    if free < size and free > 0:  # a mount without limits may say 0
        message = f"too little space: the states need {size / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, message, str(folder))


def _sweep(file: Path, age: float = 3600.0) -> None:
    """Remove temporary files older than `age` seconds that killed writers have left beside `file`."""
    for leftover in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
        try:
            if time.time() - leftover.stat().st_mtime > age:
                leftover.unlink()
        except OSError:  # another process may remove it at the same time
            continue


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, header) of a safetensors file. Raise ValueError if it is not one. Reading it cannot run code.

    The file is opened once and read whole. safetensors would open it a second time by name, and by then another process
    may have replaced it.
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


def parse_json(text: str, where: object) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(value).__name__}")
    return value
