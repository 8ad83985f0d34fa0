"""Which backend runs a call.

`backend=None` takes the first entry of `ORDER` that supports the call. A named backend never falls back: if it cannot
run the call, the error says why. A backend module offers `supports(op, device, dtype)`, which gives None or the reason
why not, one function per op and direction, and `too_large(op, size, width)` where not every size will do.
"""

import contextlib
import functools
import importlib
import warnings
from types import ModuleType

import torch

OPS = ("gated_delta_rule", "ssd", "gated_delta_rule_step", "ssd_step", "gated_delta_mixer_step", "ssd_mixer_step")
#: Fastest first. `reference` needs no module: it stands beside each op.
ORDER = ("cuda", "triton", "cpu", "torch", "reference")
_MODULES = {
    "cpu": "s0kernels.backends.cpu",
    "cuda": "s0kernels.backends.cuda",
    "triton": "s0kernels.backends.triton",
    "torch": "s0kernels.backends.torch_chunked",
}


def load(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


def ready(name: str) -> ModuleType:
    """The module of a backend that was chosen, perhaps in another process, by which a program was exported.

    Raises:
        RuntimeError: its library is not here.
    """
    module = load(name)
    reason = module.missing() if hasattr(module, "missing") else None
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was chosen for this call, and {reason}")
    return module


def unusable(name: str, op: str, device: torch.device, dtype: torch.dtype, size: int = 0, width: int = 0) -> str | None:
    """None where backend `name` can run `op`, else the reason why not.

    `size` is the largest dimension of a head, `width` that of a convolution, where they matter. A caller makes ints of
    them by `operator.index`, by which a graph of dynamic sizes holds for these alone.
    """
    if name == "reference":
        return None
    try:
        module = load(name)
    except ImportError as error:
        return f"cannot be imported: {error}"
    if not hasattr(module, op if op.endswith("_step") else f"{op}_forward"):
        return f"has no {op}"
    reason = module.supports(op, device, dtype)
    if reason is None and hasattr(module, "too_large"):
        reason = module.too_large(op, size, width)
    return reason


@torch.compiler.assume_constant_result  # nothing in it depends on tensors, and it imports modules
def choose(
    op: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    size: int = 0,
    width: int = 0,
    transform: str | None = None,
) -> str:
    """`transform` is one that the call takes part in and that the references alone can be put through."""
    if transform is not None and backend in (None, "reference"):
        return "reference"
    if backend is None:
        reasons = {}
        for name in ORDER:
            if name == "triton" and device.type == "cpu":
                continue  # its interpreter is for tests, which name it
            reasons[name] = unusable(name, op, device, dtype, size, width)
            if reasons[name] is None:
                if name == "torch" and device.type == "cpu" and (missing := load("cpu").missing()) is not None:
                    say_once(
                        f"s0kernels: the compiled kernels for a CPU cannot be used, PyTorch is 5 to 16 times "
                        f"slower: {missing}"
                    )
                return name
        raise ValueError(f"{op}: no backend can run this call: {reasons}")
    if backend not in ORDER:
        raise ValueError(f"{op}: backend must be one of {', '.join(ORDER)} or None, got {backend!r}")
    reason = unusable(backend, op, device, dtype, size, width)
    if reason is not None:
        raise ValueError(f"{op}: backend {backend!r} cannot run this call: {reason}")
    if transform is not None:
        raise NotImplementedError(
            f"{op}: backend {backend!r} does not support {transform}; backend='reference' does, and is what "
            "backend=None then takes"
        )
    return backend


@functools.cache
def say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """The dtypes of the contract hold inside autocast too: matrix products keep theirs."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
