"""What memory a forward and its backward take, how much of it there is, and which forwards fit."""

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

#: examples and the most tokens of a forward to batches
Make = Callable[[Sequence[Example], int], list[Batch]]

#: of what is free: the rest is for what is not counted, and on a CPU for everything else that runs there
_SHARE = {"cuda": 0.9, "cpu": 0.5}
#: most tokens of a forward that is chosen
_MOST = {"cuda": 2**15, "cpu": 4096}
#: fewer tokens than this leave a GPU idle, so that computing layers twice may pay if more of them fit
_FILLED = 2048
#: on a CPU a forward is large enough when it multiplies this often for each layer: starting a layer's operators is
#: then lost in it, and a larger one takes more memory for nothing
_WORK_PER_LAYER = 2e9
#: resident memory over what is counted on a CPU
UNCOUNTED = 1.4


class Sizes(NamedTuple):
    """How a step is cut into forwards."""

    #: of a forward at most, pads included; an example that is longer goes alone
    tokens: int
    #: layers are recomputed in the backward instead of being kept
    checkpointed: bool = False


class Needs(NamedTuple):
    """What the forward and backward of one batch took: bytes beyond what was there before, and seconds."""

    tokens: int
    #: at the peak up to the last hidden states
    forward: int
    #: of what is kept for the backward
    kept: int
    #: of the head and the loss on top of that, and how many predicted tokens it was for
    head: int
    predicted: int
    #: most predicted tokens that the head looks at together
    chunk: int
    #: at the peak of the backward
    backward: int
    seconds: float
    #: of what stays from step to step, whatever the batch
    beside: int = 0

    def of(self, batch: Batch) -> int:
        """Bytes that a batch is expected to take at its peak."""
        factor = batch.tokens / self.tokens
        head = self.head * min(len(batch.targets), self.chunk) / self.predicted
        return int(self.beside + max(factor * self.forward, factor * self.kept + head, factor * self.backward))


def measure(batch: Batch, head: Head) -> Needs:
    """Of a batch with the states that are attached now. Gradients stay where they accumulate."""
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
    """By torch's allocator, of the GPU where most is added."""

    def __init__(self):
        super().__init__(self)
        self._before = [torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count())]
        self.peak()

    def now(self) -> int:
        return max(torch.cuda.memory_allocated(index) - before for index, before in enumerate(self._before))

    def peak(self) -> int:
        """Since the last call."""
        found = [torch.cuda.max_memory_allocated(index) - before for index, before in enumerate(self._before)]
        for index in range(len(found)):
            torch.cuda.reset_peak_memory_stats(index)
        return max(found)


class _Counted(TorchDispatchMode):
    """Of the tensors that are made in this thread. The same work gives the same figure, which resident memory does not:
    malloc gives back what it likes. What operators use inside does not count."""

    def __init__(self):
        super().__init__()
        self._alive: dict[int, int] = {}
        self._now = self._peak = 0

    def now(self) -> int:
        return int(UNCOUNTED * self._now)

    def peak(self) -> int:
        """Since the last call."""
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
    """Bytes that can still be taken there, by this process of those that share it; None where that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    import psutil

    within = [psutil.virtual_memory().available, *_control_group(Path("/sys/fs/cgroup"))]
    return min(within) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _control_group(folder: Path) -> list[int]:
    """What a container leaves of its memory, if it has a limit; what it caches of files can be taken."""
    try:
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [max(limit - used + int(cached.get("inactive_file", 0)), 0)]
    except (OSError, ValueError):  # no such files, or "max"
        return []


def allowed(device: torch.device, memory: int | None) -> int | None:
    """Bytes that training may take beyond the model: `memory`, or a share of what is free; None: no limit is known."""
    there = free(device) if memory is None else memory
    return int(there * _SHARE[device.type]) if memory is None and there is not None else there


def most_tokens(model: Any, device: torch.device) -> int:
    """Of a forward, beyond which it gets no faster by the token: a power of two."""
    if device.type != "cpu":
        return _MOST["cuda"]
    unused = 0 if model.config.get_text_config().tie_word_embeddings else model.get_input_embeddings().weight.numel()
    weights = max(sum(parameter.numel() for parameter in model.parameters()) - unused, 1)
    enough = _WORK_PER_LAYER * model.config.get_text_config().num_hidden_layers / weights
    return min(1 << max(math.ceil(math.log2(enough)), 0), _MOST["cpu"])


class Choice(NamedTuple):
    sizes: Sizes
    #: bytes at the peak of the largest forward, and seconds for all of them once; None: not known
    peak: int | None
    seconds: float | None
    fits: bool


def expected(needs: Needs, sizes: Sizes, cut: Callable[[int], list[Batch]], limit: int | None = None) -> Choice:
    """Of forwards of these sizes, by what one example took."""
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
    """The largest forward that fits, of powers of two.

    Args:
        measured: what the longest example takes, with layers checkpointed or without; None: more than there is, or
            layers cannot be checkpointed.
        cut: all examples into batches of so many tokens.
        limit: bytes.
        most: tokens.
        timed: seconds a token at sizes, where more tokens than fit may be faster although layers are computed twice.

    Returns:
        None if nothing could be measured. `fits` is False where not even one example keeps to the limit.
    """
    plain = _largest(measured(False), Sizes(most), cut, limit)
    hurried = timed is not None and plain is not None and plain.sizes.tokens < min(_FILLED, most)
    if plain is not None and plain.fits and not hurried:
        return plain
    again = _largest(measured(True), Sizes(most, True), cut, limit)
    if plain is None or again is None:
        return plain if again is None else again
    if plain.fits:  # both do
        assert timed is not None  # else it would be the plain one
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
    """Less than what `batch` took; None if there is no less."""
    tokens = sizes.tokens
    while len(batch.examples) > 1:
        tokens = max(tokens // 2, 1)
        if len(make(batch.examples, tokens)) > 1:
            return sizes._replace(tokens=tokens)
    return sizes._replace(checkpointed=True) if can_checkpoint and not sizes.checkpointed else None


def for_each(
    batches: Sequence[Batch], work: Callable[[Batch], object], less: Callable[[Batch], Callable | None]
) -> None:
    """`work(batch)` for every batch. Where memory runs out in one, `less(batch)` says how what is left is to be cut, or
    None: then the error goes on."""
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
            failure.add_note("A single example is more than there is memory for: lower max_length of S0Config.")
            raise failure
        traceback.clear_frames(failure.__traceback__)  # they hold what was made until memory ran out
        del failure
        release()
        waiting = list(reversed(cut([example for batch in reversed(waiting) for example in batch.examples])))


def in_words(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or, by what torch's allocator says then, of a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return any(words in text for words in ("not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))


def release() -> None:
    """Give back what has just been freed."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
