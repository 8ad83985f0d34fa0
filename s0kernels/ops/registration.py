"""Register a recurrence as torch operators. They are differentiable, and opaque to torch.compile.

The schema of an operator consists of the fields of the records. These helpers are the only layer between the public
functions and the backends.
"""

from collections.abc import Callable
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from s0kernels.backends.shared import as_gradient
from s0kernels.calls import Grads, Start, Wanted, state_dtype
from s0kernels.ops import registry, sequences, transforms

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", bool: "bool", int: "int"}
_START = "Tensor? initial_state, Tensor? state_indices, Tensor? cu_seqlens"
#: steps are not registered by custom_op, whose wrappers would take as long as the step of a small model
_library = torch.library.Library("s0kernels", "FRAGMENT")


class Recurrence(NamedTuple):
    """The description of one recurrence. For it a backend has some or all of `<name>_forward(inputs, start, options,
    output_final_state)`, `<name>_backward(grads, inputs, start, options, wanted)` and `<name>_step(inputs, pool,
    options)`.
    """

    name: str
    inputs: type  # the records of its calls
    options: type
    #: the input whose shape and dtype the output has, and an input of the same dtype that is never None
    like: str
    always: str
    #: returns the shape of one state for the given inputs
    state_shape: Callable[..., tuple[int, ...]]
    #: the inputs that the gradient of the initial state does not depend on
    unneeded: tuple[str, ...]


def _fields(record: type, optional: bool = False) -> str:
    hints = get_type_hints(record)
    tensors = {Tensor: "Tensor?"} if optional else {}
    return ", ".join(f"{tensors.get(hints[name]) or _TYPES[hints[name]]} {name}" for name in record._fields)


def register_scan(recurrence: Recurrence) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register the operator `s0kernels::<name>`. It maps `(*inputs, *start, *options, output_final_state, backend)` to
    the output and the final state, which is empty if it is not requested."""
    name, n = recurrence.name, len(recurrence.inputs._fields)
    backward = _register_backward(recurrence)

    def records(arguments: tuple):
        return (
            recurrence.inputs(*arguments[:n]),
            Start(*arguments[n : n + 3]),
            recurrence.options(*arguments[n + 3 : -2]),
        )

    def run(*arguments):
        inputs, start, options = records(arguments)
        like = getattr(inputs, recurrence.like)
        sequences.check_values(like.shape[1], start.cu_seqlens, start.indices, start.state)
        with registry.without_autocast(like.device):
            forward = getattr(registry.ready(arguments[-1]), f"{name}_forward")
            return forward(inputs, start, options, arguments[-2])

    schema = (
        f"({_fields(recurrence.inputs)}, {_START}, {_fields(recurrence.options)}, bool output_final_state, str backend)"
    )
    op = torch.library.custom_op(f"s0kernels::{name}", run, mutates_args=(), schema=f"{schema} -> (Tensor, Tensor)")

    @op.register_fake
    def _(*arguments):
        inputs, start, _ = records(arguments)
        like = getattr(inputs, recurrence.like)
        count = start.sequences(like.shape[0]) if arguments[-2] else 0
        final = like.new_empty((count, *recurrence.state_shape(inputs)), dtype=state_dtype(like.dtype))
        return like.new_empty(like.shape), final

    def keep(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.needs = list(ctx.needs_input_grad[: n + 1])
        ctx.arguments, ctx.options = len(inputs), inputs[n + 3 :]
        state = inputs[n]
        ctx.state_shape = [] if state is None else list(state.shape)
        kept = list(inputs[: n + 3])
        if not any(ctx.needs[:-1]):  # the initial state alone requires grad
            for unneeded in (*recurrence.unneeded, "initial_state"):
                kept[(*recurrence.inputs._fields, "initial_state").index(unneeded)] = None
        ctx.save_for_backward(*kept)

    def differentiate(ctx, doutput, dfinal_state):
        if doutput is None and dfinal_state is None:
            return (None,) * ctx.arguments
        transforms.check_gradients(name, doutput, dfinal_state)
        *options, _, chosen = ctx.options
        found = iter(backward(doutput, dfinal_state, *ctx.saved_tensors, ctx.state_shape, *options, chosen, ctx.needs))
        grads = [next(found) if need else None for need in ctx.needs]
        return (*grads, *[None] * (ctx.arguments - len(grads)))

    op.register_autograd(differentiate, setup_context=keep)
    op.register_vmap(transforms.one_by_one(op))
    return getattr(torch.ops.s0kernels, name).default


def _register_backward(recurrence: Recurrence) -> Callable[..., list[Tensor]]:
    """Register the operator `s0kernels::<name>_backward`. It maps `(doutput, dfinal_state, *inputs, *start,
    state_shape, *options, backend, needs)` to the gradients that `needs` requests: those of the inputs, then that of
    the initial state."""
    name, n = recurrence.name, len(recurrence.inputs._fields)
    names = (*recurrence.inputs._fields, "initial_state")

    def run(*arguments):
        inputs, start = recurrence.inputs(*arguments[2 : n + 2]), Start(*arguments[n + 2 : n + 5])
        options = recurrence.options(*arguments[n + 6 : -2])
        asked = [one for one, need in zip(names, arguments[-1], strict=True) if need]
        wanted = Wanted(frozenset(asked), tuple(arguments[n + 5]))
        with registry.without_autocast(getattr(inputs, recurrence.always).device):
            backward = getattr(registry.ready(arguments[-2]), f"{name}_backward")
            found = backward(Grads(*arguments[:2]), inputs, start, options, wanted)
        return [as_gradient(found[one], getattr(inputs, one, None)) for one in asked]

    schema = f"(Tensor? doutput, Tensor? dfinal_state, {_fields(recurrence.inputs, optional=True)}, {_START}, "
    schema += f"int[] state_shape, {_fields(recurrence.options)}, str backend, bool[] needs) -> Tensor[]"
    op = torch.library.custom_op(f"s0kernels::{name}_backward", run, mutates_args=(), schema=schema)

    @op.register_fake
    def _(*arguments):
        inputs, needs = arguments[2 : n + 2], arguments[-1]
        grads = [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=False) if need]
        if needs[-1]:
            like = getattr(recurrence.inputs(*inputs), recurrence.always)
            grads.append(like.new_empty(arguments[n + 5], dtype=state_dtype(like.dtype)))
        return grads

    op.register_autograd(transforms.no_second_derivative(name))
    op.register_vmap(transforms.one_by_one(op))
    return getattr(torch.ops.s0kernels, f"{name}_backward").default


def register_step(
    name: str, records: tuple[type, type, type], reference: Callable[..., Tensor], output: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Register the operator `s0kernels::<name>`. It maps `(*inputs, *pool, *options, backend)` to an output and updates
    the tensors of the pool. `reference(inputs, pool, options)` is the recurrence; `output(inputs, pool)` makes an empty
    output."""
    of_inputs, of_pool, of_options = records
    n, m = len(of_inputs._fields), len(of_pool._fields)
    written = of_pool._fields.index("state") + 1  # windows come first; autograd does not see these writes

    def split(arguments: tuple):
        return of_inputs(*arguments[:n]), of_pool(*arguments[n : n + m]), of_options(*arguments[n + m : -1])

    def run(*arguments):
        inputs, pool, options = split(arguments)
        sequences.check_values(1, None, pool.indices, pool.state, unique=True)
        increment_version(pool[:written])
        backend = arguments[-1]
        step = reference if backend == "reference" else getattr(registry.ready(backend), name)
        with registry.without_autocast(pool.state.device):
            return step(inputs, pool, options)

    schema = ", ".join((_fields(of_inputs), _pool_fields(of_pool), _fields(of_options), "str backend"))
    _library.define(f"{name}({schema}) -> Tensor")
    _library.impl(name, run, "CompositeExplicitAutograd")

    @torch.library.register_fake(f"s0kernels::{name}")
    def _(*arguments):
        inputs, pool, _ = split(arguments)
        return output(inputs, pool)

    return getattr(torch.ops.s0kernels, name).default


def _pool_fields(pool: type) -> str:
    kinds = {"window": "Tensor(a!)", "state": "Tensor(b!)", "indices": "Tensor?"}
    return ", ".join(f"{kinds[name]} {name}" for name in pool._fields)
