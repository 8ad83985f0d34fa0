"""The forwards of a training step: choose their size, and recover if memory runs out."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from s0kernels.states import S0States
from s0kernels.tuning import memory
from s0kernels.tuning.batches import Batch
from s0kernels.tuning.data import Example
from s0kernels.tuning.memory import Choice, Make, Needs, Sizes
from s0kernels.tuning.processes import Processes

#: bytes per trained value: its gradient, Adam's two moments, and the sum in fp64
BYTES_PER_VALUE = 4 + 8 + 8
#: seconds up to which a forward and backward of one example is short
_SHORT = 0.5


class Asked(NamedTuple):
    """The size of forwards that the user asks for. None means that it is measured."""

    tokens: int | None
    #: number of bytes to use beyond the model
    memory: int | None

    @property
    def sizes(self) -> Sizes | None:
        """The sizes, if nothing has to be measured; else None."""
        return None if self.tokens is None or self.memory is not None else Sizes(self.tokens)


class Forwards:
    """Runs examples through a frozen model for losses and gradients of S0. The states are attached at `scale`."""

    #: the sizes of forwards, set by `cut`
    sizes: Sizes

    def __init__(self, model: nn.Module, states: S0States, examples: Sequence[Example], make: Make, scale: float):
        self._model, self._states, self._make, self._scale = model, states, make, scale
        self._examples = list(examples)
        self._longest = make([max(examples, key=lambda example: len(example.ids))], 1)[0]
        self._first = make(examples[:1], 1)[0]
        self._head = self._longest.head(model)
        self._layers = Layers(model)
        self._processes = Processes()
        self._batches: list[Batch] = []
        self._cut_for: int | None = None
        self._told = False

    @property
    def lengths(self) -> list[int]:
        return [len(example.ids) for example in self._examples]

    def hidden(self) -> Tensor:
        """Return the input of the head for the first example."""
        with self._attached(self._first):
            return self._first.hidden(self._head)

    def losses(self, batch: Batch) -> Tensor:
        """Return the sum of the losses of the batch's examples for each task, [tasks]."""
        with self._attached(batch), self._layers.recomputed():
            return batch.losses(self._model, self._states.tasks, self._head)

    def each(self, work: Callable[[Batch], object], *, share: bool) -> dict[str, Any]:
        """Call `work(batch)` for every batch, or for this process's share of them. A batch that runs out of memory is
        cut in half, and so are all later ones. Return the fields to add to the history."""
        place = self._processes
        mine = self._batches[place.index :: place.count] if share else self._batches
        before = self.sizes
        memory.for_each(mine, work, self._less)
        if share:
            self._agree()
        else:
            self._cut_again()
        return self.note() if self.sizes != before else {}

    def note(self) -> dict[str, Any]:
        return {"tokens_per_batch": self.sizes.tokens, "layers_checkpointed": self.sizes.checkpointed}

    def _less(self, batch: Batch) -> Callable[[list[Example]], list[Batch]] | None:
        self._forget_gradients()
        less = memory.halved(self.sizes, batch, self._make, self._layers.can)
        if less is None:
            return None
        if not self._told:
            self._told = True
            how = "with layers checkpointed" if less.checkpointed else f"with up to {less.tokens} tokens"
            warnings.warn(
                f"S0Trainer: a forward of {batch.tokens} tokens ran out of memory; it is repeated {how}, and so "
                "are later ones. The history records further repetitions.",
                stacklevel=7,
            )
        self.sizes = less
        self._layers.checkpoint(less.checkpointed)
        return lambda examples: self._make(examples, less.tokens)

    def _attached(self, batch: Batch) -> contextlib.AbstractContextManager:
        return self._states.attached(self._model, self._scale, batch.tasks if self._states.tasks > 1 else 0)

    def _forget_gradients(self) -> None:
        for state in self._states.parameters():
            state.grad = None

    # Sizes

    @contextlib.contextmanager
    def cut(
        self, asked: Asked, before: Sizes | None, tell: Callable[[str], None] | None, steps: int
    ) -> Iterator[dict[str, Any]]:
        """Choose the size of a forward, unless it was chosen `before`, and report the expected cost of `steps` steps by
        `tell`. Yield the fields to add to the history. On exit the layers' checkpointing is restored."""
        try:
            given = before or asked.sizes
            if given is None:
                choice = self._choose(asked)
                self.sizes = choice.sizes
                note = self.note()
            else:
                choice = self._foreseen(given) if tell else None
                self.sizes, note = given, {}
            self._agree()
            if tell:
                allowed = memory.allowed(self._longest.device, asked.memory)
                tell(self._expected(self._timed_anew(choice), allowed, steps))
            yield note
        finally:
            self._layers.checkpoint(False)

    def _cut_into(self, tokens: int) -> list[Batch]:
        return self._make(self._examples, tokens)

    def _foreseen(self, sizes: Sizes) -> Choice | None:
        """Return the expected memory and time of these sizes, or None if they could not be measured."""
        needs = self._measured(sizes.checkpointed)
        return None if needs is None else memory.expected(needs, sizes, self._cut_into)

    def _choose(self, asked: Asked) -> Choice:
        device = self._longest.device
        most = asked.tokens or memory.most_tokens(self._model, device)
        timed = None if device.type == "cpu" or asked.tokens is not None else self._timed
        choice = memory.choose(self._measured, self._cut_into, memory.allowed(device, asked.memory), most, timed)
        if asked.memory is not None and self._processes.any(choice is not None and not choice.fits):
            peak = None if choice is None else choice.peak  # unknown if another process measured it
            raise ValueError(
                f"S0Trainer.train: max_memory is {memory.in_words(asked.memory)}, and the longest example "
                f"({self._longest.tokens} tokens) needs {'more' if peak is None else memory.in_words(peak)}"
            )
        return choice or Choice(Sizes(1, self._layers.can), None, None, False)

    def _measured(self, checkpointed: bool) -> Needs | None:
        """Measure the memory of the longest example. Return None if memory runs out."""
        if not self._layers.checkpoint(checkpointed):
            return None
        try:
            with self._attached(self._longest), self._layers.recomputed():
                if self._longest.device.type != "cpu":
                    memory.measure(self._longest, self._head)  # the first call compiles kernels
                needs = memory.measure(self._longest, self._head)
                return needs._replace(
                    beside=BYTES_PER_VALUE * sum(p.numel() for p in self._states.parameters() if p.requires_grad)
                )
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
        finally:
            self._forget_gradients()
        memory.release()
        return None

    def _timed(self, sizes: Sizes) -> float:
        """Return the seconds per token of the largest forward."""
        self._layers.checkpoint(sizes.checkpointed)
        batch = max(self._cut_into(sizes.tokens), key=lambda batch: batch.tokens)
        self._seconds(batch)  # the first call compiles kernels
        return self._seconds(batch) / batch.tokens

    def _timed_anew(self, choice: Choice | None) -> Choice | None:
        """Replace the expected time on a CPU, where the meter of memory takes time for every operation. A batch may
        take less per token than one example, so the largest is timed, too, unless that would take long."""
        if choice is None or choice.seconds is None or self._longest.device.type != "cpu":
            return choice
        largest = max(self._batches, key=lambda batch: batch.tokens)
        seconds = min(self._seconds(self._longest) for _ in range(2))
        per_token = seconds / self._longest.tokens
        if seconds < _SHORT:
            self._seconds(largest)  # the first one waits for memory
            per_token = min(per_token, self._seconds(largest) / largest.tokens)
        return choice._replace(seconds=min(choice.seconds, per_token * sum(batch.tokens for batch in self._batches)))

    def _seconds(self, batch: Batch) -> float:
        """Return the time of a forward and backward, infinite if memory runs out."""
        began = time.perf_counter()
        try:
            self.losses(batch).sum().backward()
            if batch.device.type != "cpu":
                torch.accelerator.synchronize()
            return time.perf_counter() - began
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            return float("inf")
        finally:
            self._forget_gradients()

    def _agree(self) -> None:
        """Let all processes use the smallest sizes that any of them chose, and make the batches."""
        tokens, kept = self._processes.least([self.sizes.tokens, int(not self.sizes.checkpointed)])
        self.sizes = Sizes(tokens, not kept)
        self._layers.checkpoint(self.sizes.checkpointed)
        self._cut_again()

    def _cut_again(self) -> None:
        if self._cut_for != self.sizes.tokens:
            self._batches = self._cut_into(self.sizes.tokens)
            self._cut_for = self.sizes.tokens

    def _expected(self, choice: Choice | None, limit: int | None, steps: int) -> str:
        text = (
            f"S0 tuning: {len(self._examples)} examples, {sum(self.lengths)} tokens, {len(self._batches)} forwards a "
            f"step of up to {max(batch.tokens for batch in self._batches)} tokens"
            f"{' with layers checkpointed' if self.sizes.checkpointed else ''}"
        )
        if choice is None or choice.peak is None or choice.seconds is None:
            return text
        peak = memory.in_words(choice.peak)
        of = "" if limit is None else f" (allowed: {memory.in_words(limit)})"
        minutes = choice.seconds * steps / self._processes.count / 60
        time = f"{minutes:.1f} minutes" if minutes >= 1 else f"{60 * minutes:.0f} seconds"
        return f"{text}; expected: {peak} beyond the model{of}, about {time}"


class Layers:
    """Switches the checkpointing of layers on and off, for models of transformers that support it."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._on = False
        # if the user has switched it on, it stays on
        theirs = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        self.can = not theirs and bool(getattr(model, "supports_gradient_checkpointing", False))

    def checkpoint(self, on: bool) -> bool:
        """Switch checkpointing on or off, if the model supports it. Return whether the state is now `on`."""
        if on == self._on or (on and not self.can):
            return on == self._on
        old, new = "gradient_checkpointing", "activation_checkpointing"  # transformers 5.23 renamed it
        name = new if hasattr(self._model, f"{new}_enable") else old
        if on:
            getattr(self._model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
        else:
            getattr(self._model, f"{name}_disable")()
        self._on = on
        return True

    @contextlib.contextmanager
    def recomputed(self) -> Iterator[None]:
        """Put the checkpointed layers into training mode, because transformers checkpoints layers only then. The
        modules inside them stay in evaluation mode, also if they are layers themselves (Zamba2). A layer must have the
        same mode when it is recomputed, which is after this context."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        flagged = [module for module in self._model.modules() if getattr(module, "gradient_checkpointing", False)]
        outer = [module for module in flagged if isinstance(module, GradientCheckpointingLayer)]
        inside = {inner for layer in outer for inner in layer.modules() if inner is not layer}
        layers = [module for module in flagged if module not in inside]
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False
