"""The protocol between the two sides of the sandbox: frames on pipes, and plain Python values as text.

Values are read without pickle, so that data written by a child cannot run code or fill memory in the reader. `dumps` is
bound at import, because a solution may replace that of json.
"""

import itertools
import json
import math
import os
import select
import struct
import time
import types
from collections import Counter, OrderedDict, defaultdict
from typing import Any, NamedTuple

SOLVE, PROGRAM = 0, 1  # requests
TIMED_OUT, FLOOD, NO_VERDICT = 1001, 1002, 1003  # beyond any exit code or negated signal number
REASON_LIMIT = 300  # characters
FRAME = struct.Struct("<iI")  # the kind of frame, or the exit code of the child; the number of payload bytes
_DICTS = (dict, Counter, OrderedDict, defaultdict)  # equal if their items are equal
_HASHED = ("dict", "set", "frozenset")
_COLLISIONS = 10_000  # maximum number of pairs of keys with equal hashes; honest values have few
_CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class Limits(NamedTuple):
    """The settings of a launcher, passed on its command line."""

    timeout: float  # seconds
    memory_mb: int
    result_bytes: int  # maximum size of a child's results
    namespaces: int  # whether to try to enter new ones


def send(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def receive(fd: int, deadline: float = math.inf, limit: float = math.inf) -> tuple[int | None, bytes]:
    """Read one frame. Return (None, b"") at end of file or at the deadline. Raise OverflowError if it is larger than
    `limit`."""
    poller = select.poll()  # not select(): the caller may have more than 1024 descriptors
    poller.register(fd, select.POLLIN)
    data, size = bytearray(), FRAME.size
    while len(data) < size:
        ready = deadline == math.inf or poller.poll(max(deadline - time.monotonic(), 0) * 1000)
        chunk = os.read(fd, min(size - len(data), 1 << 16)) if ready else b""
        if not chunk:
            return None, b""
        data += chunk
        if len(data) == FRAME.size == size:
            size += FRAME.unpack(data)[1]
            if size > limit:
                raise OverflowError
    return FRAME.unpack_from(data)[0], bytes(data[FRAME.size :])


def frame(code: int, payload: bytes) -> bytes:
    return FRAME.pack(code, len(payload)) + payload


def is_json(value) -> bool:
    """Exact types only: a subclass may lie in __eq__, and JSON would turn int keys into strings."""
    stack = [value]
    while stack:
        item = stack.pop()
        if type(item) is dict:
            stack.extend(item.values())
            if any(type(key) is not str for key in item):
                return False
        elif type(item) in (list, tuple):
            stack.extend(item)
        elif type(item) not in (str, int, float, bool, types.NoneType):
            return False
    return True


def to_json(value, dumps=json.dumps) -> str:
    """Return a value as JSON. Raise ValueError or TypeError unless `is_json(value)`."""
    text = dumps(value)  # refuses cycles
    if not is_json(value):
        raise TypeError("the result is not plain JSON")
    return text


def encode(value, dumps=json.dumps) -> str:
    """Encode a plain Python value as JSON that keeps its types: a container is a list that begins with its type. Raise
    TypeError for other values."""
    try:
        return dumps(_tagged(value))
    except RecursionError:
        raise ValueError("the value is cyclic or nested too deeply") from None


def decode(text: str | bytes) -> Any:
    """The inverse of `encode`. Raise ValueError for text that `encode` cannot have written. It builds plain values and
    runs no code."""
    try:
        return _untagged(json.loads(text))
    except (TypeError, KeyError, IndexError, RecursionError):
        raise ValueError("garbled value") from None


def _tagged(value):
    kind = type(value)
    if value is None or kind in (bool, float, str) or (kind is int and -(1 << 63) <= value < 1 << 63):
        return value
    if kind is int:  # Python refuses decimal numbers of thousands of digits, and they are slow
        return ["int", hex(value)]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind in _DICTS:
        return ["dict", *(_tagged(item) for pair in value.items() for item in pair)]
    if _CONTAINERS.get(kind.__name__) is kind:
        return [kind.__name__, *map(_tagged, value)]
    raise TypeError(f"not a plain value: {kind.__name__}")


def _untagged(value) -> Any:
    if type(value) is not list:
        if type(value) is dict:
            raise TypeError
        return value
    kind, items = value[0], value[1:]
    if kind == "int":
        return int(items[0], 16)
    if kind == "bytes":
        return bytes.fromhex(items[0])
    if kind == "complex":
        return complex(*items)
    items = [_untagged(item) for item in items]
    if kind in _HASHED:
        _refuse_collisions(items[::2] if kind == "dict" else items)
    if kind == "dict":
        return dict(zip(items[::2], items[1::2], strict=True))
    return _CONTAINERS[kind](items)


def _refuse_collisions(keys: list) -> None:
    """Raise ValueError if many keys have equal hashes: building a table of them takes quadratic time, and numbers can
    be chosen that way."""
    hashes = sorted(map(hash, keys))  # sorted, because a table of hashes would be as slow
    pairs = run = 0
    for one, following in itertools.pairwise(hashes):
        run = run + 1 if one == following else 0
        pairs += run
        if pairs > _COLLISIONS:
            raise ValueError("garbled value")
