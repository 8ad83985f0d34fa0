"""Register a recurrence as torch operators. They are differentiable, and opaque to torch.compile.

The schema of an operator consists of the fields of the records. These helpers are the only layer between the public
functions and the backends.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from s0kernels.backends.shared import as_gradient
from s0kernels.calls import Grads, Start, Wanted, state_dtype
from s0kernels.ops import registry, sequences, transforms

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", bool: "bool", int: "int"}
_START = "Tensor? initial_state, Tensor? state_indices, Tensor? cu_seqlens"
#: the last argument of every operator: what the code that traced it is known by (see `_traced`)
_CODE = 'str code=""'
#: steps are not registered by custom_op, whose wrappers would take as long as the step of a small model
_library = torch.library.Library("s0kernels", "FRAGMENT")


class Recurrence(NamedTuple):
    """The description of one recurrence. For it a backend has some or all of `<name>_forward(inputs, start, options,
    output_final_state)`, `<name>_backward(grads, inputs, start, options, wanted)` and `<name>_step(inputs, pool,
    options)`.
    With `<name>_keep(inputs, start, options, names)` a backend gives memory for what a forward keeps for the
    backward that computes the gradients `names`. It is a record `kept`, which both get as their last argument.
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
    #: the record of what forwards may leave for their backwards
    kept: type | None = None


def _fields(record: type, optional: bool = False) -> str:
    hints = get_type_hints(record)
    tensors = {Tensor: "Tensor?"} if optional else {}
    return ", ".join(f"{tensors.get(hints[name]) or _TYPES[hints[name]]} {name}" for name in record._fields)


def register_scan(recurrence: Recurrence) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register the operators of a scan. Return `scan(inputs, start, options, output_final_state, backend)`, which gives
    the output and the final state; the final state is empty if it is not requested. It calls `s0kernels::<name>`, or
    `s0kernels::<name>_keeping` if a gradient is needed and the backend keeps results for it."""
    name, backward = recurrence.name, _register_backward(recurrence)
    plain, keeping = _traced(_register_forward(recurrence, backward, False)), None
    if recurrence.kept is not None:
        keeping = _traced(_register_forward(recurrence, backward, True))

    def scan(inputs, start, options, output_final_state, chosen):
        arguments = (*inputs, *start, *options, output_final_state, chosen)
        if keeping is not None and torch.is_grad_enabled() and registry.keeps(chosen, name):
            needs = [x is not None and x.requires_grad for x in (*inputs, start.state)]
            if any(needs):
                output, final_state, *_ = keeping(*arguments, needs)
                return output, final_state
        output, final_state = plain(*arguments)
        return output, final_state

    return scan


def _start(state: Tensor | None, indices: Tensor | None, cu_seqlens: Tensor | None) -> Start:
    return Start(state, _contiguous(indices), _contiguous(cu_seqlens))


def _contiguous(indices: Tensor | None) -> Tensor | None:
    """Kernels take no strides of indices, which may be a column of a table."""
    return None if indices is None else indices.contiguous()


def _traced(op: Callable[..., Any]) -> Callable[..., Any]:
    """Return `op` such that its calls in compiled graphs name the code that they were traced with. PyTorch's caches on
    disk know an operator by its name and arguments alone (pytorch/pytorch#144344): without that name they would return
    the graphs of another version of this package."""

    def call(*arguments):
        return op(*arguments, registry.code()) if torch.compiler.is_compiling() else op(*arguments)

    return call


def _register_forward(recurrence: Recurrence, backward: Callable, keeping: bool) -> Callable[..., tuple[Tensor, ...]]:
    """Register the operator `s0kernels::<name>`. It maps `(*inputs, *start, *options, output_final_state, backend)` to
    the output and the final state. `keeping` registers `s0kernels::<name>_keeping` instead. One argument more says what
    needs gradients, and it also returns the fields of `recurrence.kept`, empty where they are None."""
    name, n, m = recurrence.name, len(recurrence.inputs._fields), len(recurrence.options._fields)
    full_name = f"{name}_keeping" if keeping else name

    def records(arguments: tuple):
        inputs, start = recurrence.inputs(*arguments[:n]), _start(*arguments[n : n + 3])
        return inputs, start, recurrence.options(*arguments[n + 3 : n + 3 + m]), *arguments[n + 3 + m :]

    def memory(inputs, start, options, chosen: str, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        return getattr(registry.load(chosen), f"{name}_keep")(inputs, start, options, _asked(recurrence, needs))

    def run(*arguments):
        inputs, start, options, output_final_state, chosen, *more = records(arguments)
        like = getattr(inputs, recurrence.like)
        sequences.check_values(like.shape[1], start.cu_seqlens, start.indices, start.state)
        forward = getattr(registry.ready(chosen), f"{name}_forward")
        with registry.without_autocast(like.device):
            if not keeping:
                return forward(inputs, start, options, output_final_state)
            kept = memory(inputs, start, options, chosen, more[0])
            return *forward(inputs, start, options, output_final_state, kept), *_filled(kept, like)

    schema = f"{_fields(recurrence.inputs)}, {_START}, {_fields(recurrence.options)}, bool output_final_state, "
    schema += f"str backend, bool[] needs, {_CODE}" if keeping else f"str backend, {_CODE}"
    returned = 2 + (len(recurrence.kept._fields) if keeping and recurrence.kept else 0)
    schema = f"({schema}) -> ({', '.join(['Tensor'] * returned)})"
    op = torch.library.custom_op(f"s0kernels::{full_name}", run, mutates_args=(), schema=schema)

    @op.register_fake
    def _(*arguments):
        inputs, start, options, output_final_state, chosen, *more = records(arguments)
        like = getattr(inputs, recurrence.like)
        count = start.sequences(like.shape[0]) if output_final_state else 0
        final = like.new_empty((count, *recurrence.state_shape(inputs)), dtype=state_dtype(like.dtype))
        kept = _filled(memory(inputs, start, options, chosen, more[0]), like) if keeping else ()
        return like.new_empty(like.shape), final, *kept

    _register_autograd(recurrence, op, backward)
    op.register_vmap(transforms.one_by_one(op))
    return getattr(torch.ops.s0kernels, full_name).default


def _register_autograd(recurrence: Recurrence, op: Any, backward: Callable) -> None:
    """Of either operator of `_register_forward`."""
    name, n, m = recurrence.name, len(recurrence.inputs._fields), len(recurrence.options._fields)
    of_kept = len(recurrence.kept._fields) if recurrence.kept else 0

    def keep(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.needs = list(ctx.needs_input_grad[: n + 1])
        ctx.arguments, ctx.options, ctx.backend = len(inputs), inputs[n + 3 : n + 3 + m], inputs[n + 4 + m]
        ctx.code = inputs[-1]
        state = inputs[n]
        ctx.state_shape = [] if state is None else list(state.shape)
        saved = list(inputs[: n + 3])
        if not any(ctx.needs[:-1]):  # the initial state alone requires grad
            for unneeded in (*recurrence.unneeded, "initial_state"):
                saved[(*recurrence.inputs._fields, "initial_state").index(unneeded)] = None
        kept = output[2:] or [None] * of_kept
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*saved, *kept)

    def differentiate(ctx, doutput, dfinal_state, *_):
        if doutput is None and dfinal_state is None:
            return (None,) * ctx.arguments
        transforms.check_gradients(name, doutput, dfinal_state)
        more = (ctx.state_shape, *ctx.options, ctx.backend, ctx.needs, ctx.code)
        found = iter(backward(doutput, dfinal_state, *ctx.saved_tensors, *more))
        grads = [next(found) if need else None for need in ctx.needs]
        return (*grads, *[None] * (ctx.arguments - len(grads)))

    op.register_autograd(differentiate, setup_context=keep)


def _filled(kept: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors alone: empty ones for None."""
    return tuple(like.new_empty(0) if x is None else x for x in kept)


def _asked(recurrence: Recurrence, needs: Sequence[bool]) -> frozenset[str]:
    names = (*recurrence.inputs._fields, "initial_state")
    return frozenset(name for name, need in zip(names, needs, strict=True) if need)


def _register_backward(recurrence: Recurrence) -> Callable[..., list[Tensor]]:
    """Register the operator `s0kernels::<name>_backward`. It maps `(doutput, dfinal_state, *inputs, *start, *kept,
    state_shape, *options, backend, needs, code)` to the gradients that `needs` requests: those of the inputs, then that
    of the initial state."""
    name, n = recurrence.name, len(recurrence.inputs._fields)
    names = (*recurrence.inputs._fields, "initial_state")
    m = n + 5 + (len(recurrence.kept._fields) if recurrence.kept else 0)  # of what comes before state_shape
    end = m + 1 + len(recurrence.options._fields)  # of the options

    def run(*arguments):
        inputs, start = recurrence.inputs(*arguments[2 : n + 2]), _start(*arguments[n + 2 : n + 5])
        kept = [x if x is not None and x.numel() else None for x in arguments[n + 5 : m]]
        options = recurrence.options(*arguments[m + 1 : end])
        backend, needs = arguments[end : end + 2]
        wanted = Wanted(_asked(recurrence, needs), tuple(arguments[m]))
        records = [Grads(*arguments[:2]), inputs, start, options, wanted]
        if recurrence.kept is not None and any(x is not None for x in kept):
            records.append(recurrence.kept(*kept))
        with registry.without_autocast(getattr(inputs, recurrence.always).device):
            found = getattr(registry.ready(backend), f"{name}_backward")(*records)
        return [as_gradient(found[one], getattr(inputs, one, None)) for one in names if one in wanted.names]

    schema = f"(Tensor? doutput, Tensor? dfinal_state, {_fields(recurrence.inputs, optional=True)}, {_START}, "
    schema += f"{_fields(recurrence.kept, optional=True)}, " if recurrence.kept is not None else ""
    schema += f"int[] state_shape, {_fields(recurrence.options)}, str backend, bool[] needs, {_CODE}) -> Tensor[]"
    op = torch.library.custom_op(f"s0kernels::{name}_backward", run, mutates_args=(), schema=schema)

    @op.register_fake
    def _(*arguments):
        inputs, needs = arguments[2 : n + 2], arguments[end + 1]
        grads = [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=False) if need]
        if needs[-1]:
            like = getattr(recurrence.inputs(*inputs), recurrence.always)
            grads.append(like.new_empty(arguments[m], dtype=state_dtype(like.dtype)))
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
    n, m, of = len(of_inputs._fields), len(of_pool._fields), len(of_options._fields)
    written = of_pool._fields.index("state") + 1  # windows come first; autograd does not see these writes

    def split(arguments: tuple):
        pool = of_pool(*arguments[n : n + m])
        pool = pool._replace(indices=_contiguous(pool.indices))
        return of_inputs(*arguments[:n]), pool, of_options(*arguments[n + m : n + m + of])

    def run(*arguments):
        inputs, pool, options = split(arguments)
        sequences.check_values(1, None, pool.indices, pool.state, unique=True)
        increment_version(pool[:written])
        backend = arguments[n + m + of]
        step = reference if backend == "reference" else getattr(registry.ready(backend), name)
        with registry.without_autocast(pool.state.device):
            return step(inputs, pool, options)

    schema = ", ".join((_fields(of_inputs), _pool_fields(of_pool), _fields(of_options), "str backend", _CODE))
    _library.define(f"{name}({schema}) -> Tensor")
    _library.impl(name, run, "CompositeExplicitAutograd")

    @torch.library.register_fake(f"s0kernels::{name}")
    def _(*arguments):
        inputs, pool, _ = split(arguments)
        return output(inputs, pool)

    return _traced(getattr(torch.ops.s0kernels, name).default)


def _pool_fields(pool: type) -> str:
    kinds = {"window": "Tensor(a!)", "state": "Tensor(b!)", "indices": "Tensor?"}
    return ", ".join(f"{kinds[name]} {name}" for name in pool._fields)
