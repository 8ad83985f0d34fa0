"""Which initial state a forward starts from.

A swapped model has one `Site`, shared by its mixers. Learned states are attached to it for every thread
(`Site.attachment`), or for the calling context alone, which wins. A hook on the decoder binds the choice once per
forward and hands it down as a keyword argument, so that a checkpointed layer computed again later, perhaps in one of
autograd's threads, starts from the same states.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType

import torch
from torch import Tensor, nn

from s0kernels.modules.packing import find_boundaries, own_positions

#: name of the keyword argument that carries the bound states from the decoder to its mixers
KEYWORD = "s0_states"

_NO_OVERRIDES: Mapping["Site", "Attachment"] = MappingProxyType({})
_overrides: ContextVar[Mapping["Site", "Attachment"]] = ContextVar("s0kernels_overrides", default=_NO_OVERRIDES)
#: how many contexts override at all; where none does, torch.compile need not look at the context, which it cannot trace
_open_overrides = 0
_lock = threading.Lock()


class Attachment:
    """Learned states [tasks, ...] by layer index, and which task each row starts from.

    `tasks` is one index for all rows, or an int64 tensor with one per row; -1 is the zero state.
    """

    def __init__(self, owner: nn.Module, states: Mapping[int, Tensor], tasks: int | Tensor):
        self.owner = owner
        self.states = states
        self.tasks = tasks

    def tasks_for(self, sequences: int, prompt: Tensor | None = None) -> int | Tensor:
        """The task of every sequence of a forward, of tokens `prompt` if those start the sequences."""
        if isinstance(self.tasks, int) or self.tasks.shape[0] == sequences:
            return self.tasks
        return _repeat_tasks(self.tasks, sequences, prompt)


class BoundStates:
    """What one forward starts from: per layer a state and, for a task per sequence, the indices into it; and where
    the sequences begin, if they are packed."""

    def __init__(self, states: Mapping[int, Tensor], tasks: int | Tensor, cu_seqlens: Tensor | None):
        self._states = states
        self._tasks = tasks
        #: boundaries over all rows of the batch laid end to end, or None: one sequence per row
        self.cu_seqlens = cu_seqlens

    def for_layer(
        self, layer_index: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """(initial_state, state_indices) as the scans take them."""
        bank = self._states.get(layer_index)
        if bank is None or (isinstance(self._tasks, int) and self._tasks == -1):
            return None, None
        bank = bank.to(device=device, dtype=dtype)  # no copy where they fit, as they do unless a model is sharded
        if isinstance(self._tasks, int):
            return bank[self._tasks], None
        return bank, self._tasks.to(device)


class Site:
    """The one place of a swapped model where learned states are attached."""

    def __init__(self, shapes: Mapping[int, tuple[int, ...]], arch: str):
        self.shapes = dict(shapes)
        self.arch = arch
        self.attachment: Attachment | None = None

    def current(self) -> Attachment | None:
        return _overrides.get().get(self, self.attachment) if _open_overrides else self.attachment

    @contextlib.contextmanager
    def override(self, attachment: Attachment | None) -> Iterator[None]:
        """Use `attachment` in the calling context, for as long as it lasts."""
        global _open_overrides
        token = _overrides.set({**_overrides.get(), self: attachment})
        with _lock:
            _open_overrides += 1
        try:
            yield
        finally:
            with _lock:
                _open_overrides -= 1
            _overrides.reset(token)

    def bind(self, batch: int, length: int, kwargs: Mapping, prompt: Tensor | None = None) -> BoundStates:
        """What a forward of `batch` rows of `length` tokens starts from. `kwargs` are the forward's, and may say that
        the rows hold packed sequences; `prompt` are its tokens, where they start the sequences."""
        cu_seqlens = find_boundaries(batch, length, kwargs)
        attachment = self.current()
        if attachment is None:
            return BoundStates({}, -1, cu_seqlens)
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return BoundStates(attachment.states, attachment.tasks_for(sequences, prompt), cu_seqlens)


class BindStates:
    """Forward pre-hook of the decoder: binds what the forward starts from and passes it to the mixers."""

    def __init__(self, site: Site):
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        input_ids = args[0] if args else kwargs.get("input_ids")
        rows = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        if rows is None or KEYWORD in kwargs:
            return args, kwargs
        cache = kwargs.get("past_key_values")
        prompt = input_ids if cache is None or cache.get_seq_length() == 0 else None
        bound = self.site.bind(*rows.shape[:2], kwargs, prompt)
        kwargs = {**kwargs, KEYWORD: bound}
        return args, kwargs if bound.cu_seqlens is None else _packed(kwargs, bound.cu_seqlens, rows.shape[1])


def _packed(kwargs: dict, cu_seqlens: Tensor, length: int) -> dict:
    """The arguments of a packed forward: attention has to keep the sequences apart as well, which transformers does by
    their positions, and only where there is neither a mask nor a cache."""
    for name in ("past_key_values", "use_cache", "attention_mask"):
        value = kwargs.get(name)
        if value is not None and value is not False:
            raise ValueError(f"packed sequences (cu_seq_lens_q, seq_idx, position_ids) cannot be used with {name}")
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = own_positions(cu_seqlens, length)
    return {**kwargs, "use_cache": False, "position_ids": positions}


def _repeat_tasks(tasks: Tensor, sequences: int, prompt: Tensor | None) -> Tensor:
    """A task per row, where `generate` has multiplied the rows for beams or several returned sequences.

    Rows multiplied so start from equal prompts; a batch that does not is somebody's mistake.
    """
    given = tasks.shape[0]
    copies = sequences // given if given else 0
    matches = copies > 0 and sequences == given * copies
    if matches and prompt is not None and prompt.shape[0] == sequences:
        groups = prompt.view(given, copies, -1)
        matches = torch.equal(groups, groups[:, :1].expand_as(groups))
    if not matches:
        raise ValueError(f"tasks names {given} rows, but the batch has {sequences}")
    return tasks.repeat_interleave(copies)
