"""Measure the memory of a forward with its backward, find the free memory, and choose forwards that fit."""

import contextlib
import gc
import math
import os
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from s0kernels.tuning.batches import Batch
from s0kernels.tuning.data import Example
from s0kernels.tuning.head import Head, cross_entropy

#: from examples and the maximum number of tokens in a forward to batches
Make = Callable[[Sequence[Example], int], list[Batch]]

#: share of the free memory to use: the rest is for memory that is not counted, and on a CPU for other programs
_SHARE = {"cuda": 0.9, "cpu": 0.5}
#: maximum number of tokens in a chosen forward
_MOST = {"cuda": 2**15, "cpu": 4096}
#: fewer tokens than this leave a GPU partly idle, so checkpointing may save time if it lets more tokens fit
_FILLED = 2048
#: on a CPU a forward is large enough at this number of multiplications per layer: the cost of starting operators is
#: then negligible, and a larger forward would use more memory for nothing
_WORK_PER_LAYER = 2e9
#: ratio of resident memory to the memory counted on a CPU
UNCOUNTED = 1.4


class Sizes(NamedTuple):
    """The size of the forwards of a step."""

    #: maximum number of tokens in a forward, pads included; a longer example goes alone
    tokens: int
    #: layers are recomputed in the backward instead of being kept
    checkpointed: bool = False


class Needs(NamedTuple):
    """The memory and time of the forward and backward of one batch: bytes beyond those held before, and seconds."""

    tokens: int
    #: peak of the forward up to the last hidden states
    forward: int
    #: bytes kept for the backward
    kept: int
    #: further bytes for the head and the loss, and the number of predicted tokens
    head: int
    predicted: int
    #: maximum number of predicted tokens in a chunk of the head
    chunk: int
    #: peak of the backward
    backward: int
    seconds: float
    #: bytes that stay from step to step, whatever the batch
    beside: int = 0

    def of(self, batch: Batch) -> int:
        """Return the expected peak memory of a batch in bytes."""
        factor = batch.tokens / self.tokens
        head = self.head * min(len(batch.targets), self.chunk) / self.predicted
        return int(self.beside + max(factor * self.forward, factor * self.kept + head, factor * self.backward))


def measure(batch: Batch, head: Head) -> Needs:
    """Run and measure a batch with the states that are attached now. Gradients are left in place."""
    began = time.perf_counter()
    with _meter(batch.device) as meter:
        hidden = batch.hidden(head)
        forward, kept = meter.peak(), meter.now()
        loss = cross_entropy(head, hidden, batch.targets).sum()
        in_head = meter.peak() - kept
        del hidden
        if loss.requires_grad:
            loss.backward()
        backward = meter.peak()
    predicted = min(len(batch.targets), head.chunk)
    seconds = time.perf_counter() - began
    return Needs(batch.tokens, forward, kept, in_head, predicted, head.chunk, backward, seconds)


def _meter(device: torch.device) -> "_Allocator | _Counted":
    return _Allocator() if device.type == "cuda" else _Counted()


class _Allocator(contextlib.nullcontext):
    """Memory according to torch's allocator, on the GPU where it grows most."""

    def __init__(self):
        super().__init__(self)
        self._before = [torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count())]
        self.peak()

    def now(self) -> int:
        return max(torch.cuda.memory_allocated(index) - before for index, before in enumerate(self._before))

    def peak(self) -> int:
        """Return the peak since the last call."""
        found = [torch.cuda.max_memory_allocated(index) - before for index, before in enumerate(self._before)]
        for index in range(len(found)):
            torch.cuda.reset_peak_memory_stats(index)
        return max(found)


class _Counted(TorchDispatchMode):
    """Memory of the tensors created in this thread. Unlike resident memory, it is the same for the same work: malloc
    decides when it returns memory. Memory used inside operators is not counted."""

    def __init__(self):
        super().__init__()
        self._alive: dict[int, int] = {}
        self._now = self._peak = 0

    def now(self) -> int:
        return int(UNCOUNTED * self._now)

    def peak(self) -> int:
        """Return the peak since the last call."""
        found, self._peak = self._peak, self._now
        return int(UNCOUNTED * found)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._alive and id(storage) not in given:
                    self._alive[id(storage)] = storage.nbytes()
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._free, id(storage)).atexit = False
        self._peak = max(self._peak, self._now)
        return result

    def _free(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)


def free(device: torch.device) -> int | None:
    """Return the number of bytes that this process can still use on a device that several processes may share, or None
    if it is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    import psutil

    within = [psutil.virtual_memory().available, *_control_group(Path("/sys/fs/cgroup"))]
    return min(within) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _control_group(folder: Path) -> list[int]:
    """Return the free memory of a container, if it has a limit. Cached files count as free."""
    try:
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [max(limit - used + int(cached.get("inactive_file", 0)), 0)]
    except (OSError, ValueError):  # no such files, or "max"
        return []


def allowed(device: torch.device, memory: int | None) -> int | None:
    """Return the bytes that training may use beyond the model: `memory`, or a share of the free memory. None: no limit
    is known."""
    there = free(device) if memory is None else memory
    return int(there * _SHARE[device.type]) if memory is None and there is not None else there


def most_tokens(model: Any, device: torch.device) -> int:
    """Return the number of tokens beyond which a forward gets no faster per token: a power of two."""
    if device.type != "cpu":
        return _MOST["cuda"]
    unused = 0 if model.config.get_text_config().tie_word_embeddings else model.get_input_embeddings().weight.numel()
    weights = max(sum(parameter.numel() for parameter in model.parameters()) - unused, 1)
    enough = _WORK_PER_LAYER * model.config.get_text_config().num_hidden_layers / weights
    return min(1 << max(math.ceil(math.log2(enough)), 0), _MOST["cpu"])


class Choice(NamedTuple):
    sizes: Sizes
    #: peak bytes of the largest forward, and seconds for all forwards once; None: not known
    peak: int | None
    seconds: float | None
    fits: bool


def expected(needs: Needs, sizes: Sizes, cut: Callable[[int], list[Batch]], limit: int | None = None) -> Choice:
    """Predict the memory and time of forwards of these sizes from the measurement of one example."""
    batches = cut(sizes.tokens)
    peak = max(map(needs.of, batches))
    seconds = needs.seconds * sum(batch.tokens for batch in batches) / needs.tokens
    return Choice(sizes, peak, seconds, limit is None or peak <= limit)


def choose(
    measured: Callable[[bool], Needs | None],
    cut: Callable[[int], list[Batch]],
    limit: int | None,
    most: int,
    timed: Callable[[Sizes], float] | None = None,
) -> Choice | None:
    """Choose the largest forward that fits, among powers of two.

    Args:
        measured: measures the longest example, with layers checkpointed or not. It returns None if memory runs out, or
            if layers cannot be checkpointed.
        cut: makes batches of at most so many tokens from all examples.
        limit: maximum number of bytes.
        most: maximum number of tokens.
        timed: measures the seconds per token at given sizes. If it is given, checkpointing is tried too, because more
            tokens per forward may be faster although layers are computed twice.

    Returns:
        The choice, or None if nothing could be measured. `fits` is False if one example alone exceeds the limit.
    """
    plain = _largest(measured(False), Sizes(most), cut, limit)
    hurried = timed is not None and plain is not None and plain.sizes.tokens < min(_FILLED, most)
    if plain is not None and plain.fits and not hurried:
        return plain
    again = _largest(measured(True), Sizes(most, True), cut, limit)
    if plain is None or again is None:
        return plain if again is None else again
    if plain.fits:  # then the checkpointed one fits too
        assert timed is not None  # else the plain choice would have been returned
        return again if 1.1 * timed(again.sizes) < timed(plain.sizes) else plain
    return again


def _largest(needs: Needs | None, sizes: Sizes, cut: Callable, limit: int | None) -> Choice | None:
    while needs is not None:
        choice = expected(needs, sizes, cut, limit)
        if choice.fits or sizes.tokens == 1:
            return choice
        sizes = sizes._replace(tokens=max(sizes.tokens // 2, 1))
    return None


def halved(sizes: Sizes, batch: Batch, make: Make, can_checkpoint: bool) -> Sizes | None:
    """Return sizes smaller than that of `batch`, or None if it cannot get smaller."""
    tokens = sizes.tokens
    while len(batch.examples) > 1:
        tokens = max(tokens // 2, 1)
        if len(make(batch.examples, tokens)) > 1:
            return sizes._replace(tokens=tokens)
    return sizes._replace(checkpointed=True) if can_checkpoint and not sizes.checkpointed else None


def for_each(
    batches: Sequence[Batch], work: Callable[[Batch], object], less: Callable[[Batch], Callable | None]
) -> None:
    """Call `work(batch)` for every batch. If one runs out of memory, `less(batch)` returns the function that cuts the
    remaining examples into smaller batches, or None: then the error is raised."""
    waiting = list(reversed(batches))
    while waiting:
        failure = None
        try:
            work(waiting[-1])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error
        if failure is None:
            waiting.pop()
            continue
        cut = less(waiting[-1])
        if cut is None:
            failure.add_note("There is not enough memory for a single example: lower max_length of S0Config.")
            raise failure
        traceback.clear_frames(failure.__traceback__)  # they hold the tensors made until memory ran out
        del failure
        release()
        waiting = list(reversed(cut([example for batch in reversed(waiting) for example in batch.examples])))


def in_words(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on a GPU or in torch's CPU allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return any(words in text for words in ("not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))


def release() -> None:
    """Return freed memory to the system."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
