"""Choose the backend of a call, and explain why other backends cannot run it.

`backend=None` takes the first entry of `ORDER` that supports the call. A named backend never falls back: if it cannot
run the call, the error says why. A backend is a module with a function for each op and direction that it implements,
and with `supports(call)`, which returns None or the reason why it cannot run the call.
"""

import contextlib
import functools
import hashlib
import importlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from s0kernels.calls import Call
from s0kernels.ops.transforms import constant_in_graphs

OPS = ("gated_delta_rule", "ssd", "gated_delta_rule_step", "ssd_step", "gated_delta_mixer_step", "ssd_mixer_step")
#: Fastest first. `reference` needs no module: it stands beside each op.
ORDER = ("cuda", "triton", "cpu", "torch", "reference")
_OF_GPUS = ("cuda", "triton")
MODULES = {
    "cpu": "s0kernels.backends.cpu",
    "cuda": "s0kernels.backends.cuda",
    "triton": "s0kernels.backends.triton",
    "torch": "s0kernels.backends.torch_chunked",
}


@functools.cache
def load(name: str) -> ModuleType:
    return importlib.import_module(MODULES[name])


def ready(name: str) -> ModuleType:
    """Return the module of a chosen backend. A program may have been exported, and its backend chosen, in another
    process.

    Raises:
        RuntimeError: the backend's library is not installed here.
    """
    module = load(name)
    reason = module.missing() if hasattr(module, "missing") else None
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was chosen for this call, but it {reason}")
    return module


def unusable(name: str, call: Call) -> str | None:
    """Return None if backend `name` can run `call`, else the reason why it cannot."""
    if name == "reference":
        return None
    try:
        module = load(name)
    except ImportError as error:
        return f"cannot be imported: {error}"
    if not hasattr(module, call.op if call.op.endswith("_step") else f"{call.op}_forward"):
        return f"has no {call.op}"
    return module.supports(call)


#: what the innermost `recompute` says
_recompute: bool | None = None


@contextlib.contextmanager
def recompute(on: bool = True) -> Iterator[None]:
    """Save memory: a forward inside this context keeps its inputs alone, and the backward recomputes the rest. That
    takes more time and gives the same bits. It matters for backend "triton", whose delta rule keeps intermediate
    results otherwise.

    The context holds for all threads of the process. If layers are checkpointed, put the backward inside it, too,
    because it runs their forwards again. S0KERNELS_RECOMPUTE=1 in the environment recomputes everywhere;
    `recompute(False)` overrides it."""
    global _recompute
    if not isinstance(on, bool):
        raise TypeError(f"recompute: on must be a bool, got {type(on).__name__}")
    before, _recompute = _recompute, on
    try:
        yield
    finally:
        _recompute = before


def keeps(backend: str, op: str) -> bool:
    """Whether forwards of `op` leave something for their backward."""
    if _recompute is not None:  # which graphs are guarded by
        return not _recompute and _can_keep(backend, op)
    return _can_keep(backend, op) and not _environment_recomputes()


@constant_in_graphs
def _can_keep(backend: str, op: str) -> bool:
    return hasattr(load(backend), f"{op}_keep")


@constant_in_graphs
def _environment_recomputes() -> bool:
    return os.environ.get("S0KERNELS_RECOMPUTE") == "1"


@constant_in_graphs
def code() -> str:
    """Return a digest of the code that a graph depends on where it calls an operator: shapes, strides, schemas and the
    formulas of gradients."""
    return _digest()


@functools.cache
def _digest() -> str:
    package = Path(__file__).parent.parent
    files = sorted([package / "calls.py", *(package / "ops").glob("*.py"), *(package / "backends").rglob("*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def explain(call: Call) -> dict[str, str | None]:
    """Return, for each backend, None if it can run `call`, else the reason why it cannot. The fastest backend comes
    first, and the first one that can run the call is the default. Triton's interpreter on a CPU is for tests: it runs
    only if it is named.

        explain(Call("ssd", torch.device("cpu"), torch.bfloat16))
    """
    found = {name: unusable(name, call) for name in ORDER}
    if call.device.type == "cpu" and found.get("triton", "") is None:
        found["triton"] = "its interpreter runs only if backend='triton' is named"
    return found


@constant_in_graphs  # it depends on no tensor, and it imports modules
def choose(
    backend: str | None,
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    size: int = 0,
    width: int = 0,
    transform: str | None = None,
) -> str:
    """Return the backend of a call. The fields of the call are separate arguments because torch.compile cannot pass a
    record. `transform` names a transform of torch that the call takes part in and that only the references support.
    Callers convert sizes to ints by `operator.index`, which specialises a graph of dynamic sizes to these values."""
    call = Call(op, device, dtype, size, width)
    if transform is not None and backend in (None, "reference"):
        return "reference"
    if backend is None:
        name = next(name for name in ORDER if _takes(name, call))
        if name == "torch" and device.type == "cpu" and (missing := load("cpu").missing()) is not None:
            say_once(
                f"s0kernels: the compiled kernels for a CPU cannot be used; PyTorch is 5 to 16 times slower: {missing}"
            )
        return name
    if backend not in ORDER:
        raise ValueError(f"{op}: backend must be one of {', '.join(ORDER)} or None, got {backend!r}")
    reason = unusable(backend, call)
    if reason is not None:
        raise ValueError(f"{op}: backend {backend!r} cannot run this call: {reason}")
    if transform is not None:
        raise NotImplementedError(
            f"{op}: backend {backend!r} does not support {transform}; backend='reference' does, and "
            "backend=None then chooses it"
        )
    return backend


def _takes(name: str, call: Call) -> bool:
    return (call.device.type != "cpu" or name not in _OF_GPUS) and unusable(name, call) is None


@constant_in_graphs
def rows_that_pay(name: str, op: str, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest number of rows at which a backend's fused kernel is faster than the separate operations."""
    if name == "reference":
        return 0
    module = load(name)
    return module.rows_that_pay(Call(op, device, dtype)) if hasattr(module, "rows_that_pay") else float("inf")


@functools.cache
def say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Turn autocast off, so that matrix products keep the dtypes of the contract."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
