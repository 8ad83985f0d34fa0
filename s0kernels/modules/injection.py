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

import torch
from torch import Tensor, nn

from s0kernels.modules.packing import find_boundaries, own_positions

#: the first arguments of a decoder's forward, in the order that all supported families share
_DECODER_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
#: name of the keyword argument that carries the bound states from the decoder to its mixers
KEYWORD = "s0_states"

_overrides: ContextVar[tuple[tuple["Site", "Attachment"], ...]] = ContextVar("s0kernels_overrides", default=())
#: how many contexts override at all; where none does, torch.compile need not look at the context, which it cannot trace
_open_overrides = 0
_lock = threading.Lock()


class Attachment:
    """Learned states [tasks, ...] by layer index, the scale they are used at, and which task each row starts from.

    `tasks` is one index for all rows, or an int64 tensor with one per row; -1 is the zero state.
    """

    def __init__(self, owner: nn.Module, states: Mapping[int, Tensor], scale: float, tasks: int | Tensor):
        self.owner = owner
        self.tasks = tasks
        self._states = dict(states)
        self.scale = scale
        self._scaled: dict[int, tuple[int, Tensor]] = {}
        self._rescale_all()

    def state(self, layer_index: int) -> Tensor | None:
        """The bank of a layer at its scale. The product is kept: it is made when attaching, again after the parameter
        has changed, and anew for every forward that has to be differentiated or that is compiled, for a graph cannot
        ask whether the parameter has changed."""
        bank = self._states.get(layer_index)
        if bank is None or self.scale == 1.0:
            return bank
        if torch.compiler.is_compiling() or (bank.requires_grad and torch.is_grad_enabled()):
            return bank * self.scale
        if self._scaled[layer_index][0] != bank._version:
            self._rescale(layer_index)
        return self._scaled[layer_index][1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_scaled": {}}

    def __setstate__(self, state: dict) -> None:
        """A copy's parameters count their changes from zero again, so its products have to be its own."""
        self.__dict__.update(state)
        self._rescale_all()

    def _rescale_all(self) -> None:
        for layer in self._states if self.scale != 1.0 else ():
            self._rescale(layer)

    def _rescale(self, layer_index: int) -> None:
        bank = self._states[layer_index]
        with torch.inference_mode(False):  # it may be used outside as well
            self._scaled[layer_index] = (bank._version, bank.detach() * self.scale)

    def tasks_for(self, sequences: int, prompt: Tensor | None = None) -> int | Tensor:
        """The task of every sequence of a forward; `prompt` [rows, T, ...] is what starts them, where it does."""
        if isinstance(self.tasks, int) or self.tasks.shape[0] == sequences:
            return self.tasks
        return _repeat_tasks(self.tasks, sequences, prompt)


class BoundStates:
    """What one forward starts from: per layer a state and, for a task per sequence, the indices into it; and where
    the sequences begin, if they are packed."""

    def __init__(self, attachment: Attachment | None, tasks: int | Tensor, cu_seqlens: Tensor | None, mask=None):
        self._states = {} if attachment is None else {layer: attachment.state(layer) for layer in attachment.owner}
        self._tasks = tasks
        #: boundaries over all rows of the batch laid end to end, or None: one sequence per row
        self.cu_seqlens = cu_seqlens
        #: [B, 1] where a single token is a pad in some row: transformers hands mixers no mask for single tokens
        self.mask = mask

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

    def __setstate__(self, state: dict) -> None:
        """A copy of a model starts from a copy of its states, which know where they are attached."""
        self.__dict__.update(state)
        if self.attachment is not None:
            self.attachment.owner.note_attached(self)

    def current(self) -> Attachment | None:
        if not _open_overrides:
            return self.attachment
        return next((chosen for site, chosen in reversed(_overrides.get()) if site is self), self.attachment)

    @contextlib.contextmanager
    def override(self, attachment: Attachment | None) -> Iterator[None]:
        """Use `attachment`, None being no states, in the calling context, for as long as it lasts. The last to begin
        wins; they may end in any order."""
        global _open_overrides
        entry = (self, attachment)
        _overrides.set((*_overrides.get(), entry))
        with _lock:
            _open_overrides += 1
        try:
            yield
        finally:
            with _lock:
                _open_overrides -= 1
            _overrides.set(tuple(other for other in _overrides.get() if other is not entry))

    def bind(self, rows: Tensor, kwargs: Mapping) -> BoundStates:
        """What a forward over `rows` [B, T, ...], tokens or embeddings, starts from. `kwargs` are the forward's; they
        may say that the rows hold packed sequences, or continue those of a cache."""
        cache = kwargs.get("past_key_values")
        # a recurrent layer knows it on the host; the length of a static cache is on the device
        live = cache is not None and cache.has_previous_state(min(self.shapes))
        cu_seqlens = find_boundaries(*rows.shape[:2], kwargs, live)
        mask = _single_token_mask(rows, kwargs.get("attention_mask"), live)
        attachment = self.current()
        if attachment is None:
            return BoundStates(None, -1, cu_seqlens, mask)
        sequences = rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return BoundStates(attachment, attachment.tasks_for(sequences, None if live else rows), cu_seqlens, mask)


class BindStates:
    """Forward pre-hook of the decoder: binds what the forward starts from and passes it to the mixers."""

    def __init__(self, site: Site):
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        named = dict(zip(_DECODER_ARGUMENTS, args, strict=False)) | kwargs
        rows = next((named[n] for n in ("input_ids", "inputs_embeds") if named.get(n) is not None), None)
        if rows is None or KEYWORD in named:
            return args, kwargs
        bound = self.site.bind(rows, named)
        if bound.cu_seqlens is not None:
            return (), {**_packed(named, bound.cu_seqlens, rows.shape[1]), KEYWORD: bound}
        return args, {**kwargs, KEYWORD: bound}


def _single_token_mask(rows: Tensor, mask: Tensor | None, live: bool) -> Tensor | None:
    """The mask of a one-token forward in which some row is padded, else None.

    On a GPU, where looking would hold up every token that is generated, only the first token of a sequence is looked
    at; after that a single token is taken for a real one, as transformers does.
    """
    if rows.shape[1] != 1 or not isinstance(mask, Tensor) or mask.dim() != 2 or torch.compiler.is_compiling():
        return None
    if live and mask.device.type != "cpu":
        return None
    return None if bool(mask[:, -1].all()) else mask[:, -1:]


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
        groups = prompt.reshape(given, copies, -1)
        matches = torch.equal(groups, groups[:, :1].expand_as(groups))
    if not matches:
        raise ValueError(f"tasks names {given} rows, but the batch has {sequences}")
    return tasks.repeat_interleave(copies)
