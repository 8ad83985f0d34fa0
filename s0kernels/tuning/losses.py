"""Compute the loss of examples, with the states that are attached."""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from s0kernels.modules.swap import find_site
from s0kernels.states import S0States
from s0kernels.tuning.batches import Batch
from s0kernels.tuning.data import Example
from s0kernels.tuning.loop import EvalMode
from s0kernels.tuning.memory import Make, Sizes, for_each, halved


def mean_losses(
    model: nn.Module, tasks: Sequence[str] | None, examples: Sequence[Example], make: Make, tokens: int, training: bool
) -> list[float]:
    """Return the mean loss of each task, or of the single task without a name. See `S0Trainer.evaluate`."""
    site = find_site(model)
    current = None if site is None else site.current()
    states, scale = (current.owner, current.scale) if current is not None else (None, 1.0)
    states = states if isinstance(states, S0States) else None
    named = states if states is not None and states.names is not None and tasks is not None else None
    several = current is not None and isinstance(current.tasks, Tensor)
    several = several or (training and states is not None and states.tasks > 1)
    if several and named is None:
        raise ValueError("S0Trainer.evaluate: data must be a mapping from names if several tasks are active")
    sizes, head = Sizes(tokens), None
    losses = torch.zeros(len(tasks or [None]), dtype=torch.float64)

    def add(batch: Batch) -> None:
        nonlocal head
        names = [tasks[task] for task in batch.tasks] if tasks else None
        with contextlib.nullcontext() if named is None else named.attached(model, scale, names):
            head = batch.head(model) if head is None else head
            losses.add_(batch.losses(model, len(losses), head).cpu())

    def less(batch: Batch) -> Callable[[list[Example]], list[Batch]] | None:
        nonlocal sizes
        found = halved(sizes, batch, make, False)
        sizes = found or sizes
        return None if found is None else lambda examples: make(examples, found.tokens)

    with EvalMode(model), torch.no_grad():
        for_each(make(examples, tokens), add, less)
    losses /= torch.bincount(torch.tensor([example.task for example in examples]))
    return losses.tolist()
