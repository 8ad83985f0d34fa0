"""Which initial state a forward starts from.

A swapped model has one `Site`, shared by its mixers. Learned states are attached to it for every thread
(`Site.attachment`), or for the calling context alone, which wins. A hook on the decoder binds the choice once per
forward and hands it down as a keyword argument, so that a checkpointed layer computed again later, perhaps in one of
autograd's threads, starts from the same states.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType

import torch
from torch import Tensor, nn

#: name of the keyword argument that carries the bound states from the decoder to its mixers
KEYWORD = "s0_states"

_NO_OVERRIDES: Mapping["Site", "Attachment"] = MappingProxyType({})
_overrides: ContextVar[Mapping["Site", "Attachment"]] = ContextVar("s0kernels_overrides", default=_NO_OVERRIDES)


class Attachment:
    """Learned states [tasks, ...] by layer index, and which task each row starts from.

    `tasks` is one index for all rows, or an int64 tensor with one per row; -1 is the zero state.
    """

    def __init__(self, owner: nn.Module, states: Mapping[int, Tensor], tasks: int | Tensor):
        self.owner = owner
        self.states = states
        self.tasks = tasks

    def bind(self, batch: int, prompt: Tensor | None = None) -> "BoundStates":
        """The states for one forward over `batch` rows, of tokens `prompt` if those start the sequences."""
        tasks = self.tasks
        if not isinstance(tasks, int) and tasks.shape[0] != batch:
            tasks = _repeat_tasks(tasks, batch, prompt)
        return BoundStates(self.states, tasks)


class BoundStates:
    """What one forward starts from: per layer a state and, for a task per row, the rows' indices into it."""

    def __init__(self, states: Mapping[int, Tensor], tasks: int | Tensor):
        self._states = states
        self._tasks = tasks

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


NO_STATES = BoundStates({}, -1)


class Site:
    """The one place of a swapped model where learned states are attached."""

    def __init__(self, shapes: Mapping[int, tuple[int, ...]], arch: str):
        self.shapes = dict(shapes)
        self.arch = arch
        self.attachment: Attachment | None = None

    def current(self) -> Attachment | None:
        override = _overrides.get()
        return override.get(self, self.attachment)

    def override(self, attachment: Attachment | None):
        """Use `attachment` in the calling context; returns the token for `end_override`."""
        return _overrides.set({**_overrides.get(), self: attachment})

    @staticmethod
    def end_override(token) -> None:
        _overrides.reset(token)

    def bind(self, batch: int, prompt: Tensor | None = None) -> BoundStates:
        attachment = self.current()
        return NO_STATES if attachment is None else attachment.bind(batch, prompt)


class BindStates:
    """Forward pre-hook of the decoder: binds the attached states and passes them to the mixers."""

    def __init__(self, site: Site):
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        input_ids = args[0] if args else kwargs.get("input_ids")
        rows = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        if rows is None or KEYWORD in kwargs:
            return args, kwargs
        cache = kwargs.get("past_key_values")
        prompt = input_ids if cache is None or cache.get_seq_length() == 0 else None
        return args, {**kwargs, KEYWORD: self.site.bind(rows.shape[0], prompt)}


def _repeat_tasks(tasks: Tensor, batch: int, prompt: Tensor | None) -> Tensor:
    """A task per row, where `generate` has multiplied the rows for beams or several returned sequences.

    Rows multiplied so start from equal prompts; a batch that does not is somebody's mistake.
    """
    given = tasks.shape[0]
    copies = batch // given if given else 0
    matches = copies > 0 and batch == given * copies
    if matches and prompt is not None:
        groups = prompt.view(given, copies, -1)
        matches = torch.equal(groups, groups[:, :1].expand_as(groups))
    if not matches:
        raise ValueError(f"tasks names {given} rows, but the batch has {batch}")
    return tasks.repeat_interleave(copies)
