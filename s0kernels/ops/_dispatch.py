"""Which backend runs a call.

`backend=None` takes the first entry of `ORDER` that supports the call. A named backend never falls back: if it cannot
run the call, the error says why. A backend module offers `supports(op, device, dtype)`, which gives None or the reason
why not, and one function per op and direction.
"""

import contextlib
import importlib
from types import ModuleType

import torch

OPS = ("gated_delta_rule", "ssd", "gated_delta_rule_step", "ssd_step")
#: Fastest first. `reference` needs no module: it stands beside each op.
ORDER = ("triton", "cpu", "torch", "reference")
_MODULES = {
    "cpu": "s0kernels.backends.cpu",
    "triton": "s0kernels.backends.triton",
    "torch": "s0kernels.backends.torch_chunked",
}


def load(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


def unusable(name: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where backend `name` can run `op`, else the reason why not."""
    if name == "reference":
        return None
    try:
        module = load(name)
    except ImportError as error:
        return f"cannot be imported: {error}"
    return module.supports(op, device, dtype)


@torch.compiler.assume_constant_result  # nothing in it depends on tensors, and it imports modules
def choose(op: str, backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    if backend is None:
        reasons = {}
        for name in ORDER:
            if name == "triton" and device.type == "cpu":
                continue  # its interpreter is for tests, which name it
            reasons[name] = unusable(name, op, device, dtype)
            if reasons[name] is None:
                return name
        raise ValueError(f"{op}: no backend can run this call: {reasons}")
    if backend not in ORDER:
        raise ValueError(f"{op}: backend must be one of {', '.join(ORDER)} or None, got {backend!r}")
    reason = unusable(backend, op, device, dtype)
    if reason is not None:
        raise ValueError(f"{op}: backend {backend!r} cannot run this call: {reason}")
    return backend


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """The dtypes of the contract hold inside autocast too: matrix products keep theirs."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
