"""Choose the initial states that a forward starts from.

A swapped model has one `Site`, shared by its mixers. Learned states are attached to it for every thread
(`Site.attachment`), or for the calling context alone, which takes precedence. A hook on the decoder binds the choice
once per forward and passes it down as a keyword argument. So a checkpointed layer that is recomputed later, perhaps in
a thread of autograd, starts from the same states.
"""

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from s0kernels.modules.arguments import CACHES, KEYWORD, Arguments, find_cache
from s0kernels.modules.packing import find_boundaries, sequence_positions
from s0kernels.ops.transforms import constant_in_graphs

if TYPE_CHECKING:
    from s0kernels.modules.self_check import SwapReport

_overrides: ContextVar[tuple[tuple["Site", "Attachment"], ...]] = ContextVar("s0kernels_overrides", default=())
#: the attachments of all contexts that override, by number. If it is empty, the context is not read, because
#: torch.compile cannot trace it
_open: dict[int, "Attachment"] = {}
_numbers = itertools.count()
_sites: weakref.WeakSet["Site"] = weakref.WeakSet()
_attachments: weakref.WeakValueDictionary[int, "Attachment"] = weakref.WeakValueDictionary()


@constant_in_graphs  # torch 2.11, if asked directly, says that every graph is being exported
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


@constant_in_graphs
def _constant_override(site: int) -> int | None:
    """Return the number of the attachment that the calling context uses for a site. It is a constant for torch.export,
    which cannot trace the context: a program starts from the states attached at its export."""
    return next((chosen.number for place, chosen in reversed(_overrides.get()) if place.number == site), None)


@constant_in_graphs
def _constant_bank(attachment: int, layer_index: int) -> Tensor:
    """Return the states of a layer at the time of the export of a program."""
    return _attachments[attachment].bank(layer_index).detach()


class Attachment:
    """Learned states [tasks, ...] by layer index, the factor that multiplies them, and the task that each row starts
    from.

    `owner` is the object that attached them; it is not used here. `tasks` is one index for all rows, or an int64 tensor
    with one per row; -1 is the zero state.
    """

    def __init__(self, owner: object, states: Mapping[int, Tensor], scale: float, tasks: int | Tensor):
        self.owner = owner
        self.tasks = tasks
        self._states = dict(states)
        self.scale = scale
        self._scaled: dict[int, tuple[int, Tensor]] = {}
        #: by thread: the prompts whose rows `generate` multiplied, one of each
        self._prompts = threading.local()
        self.number = next(_numbers)
        _attachments[self.number] = self
        self._rescale_all()

    def choose(self) -> Callable[[int], Tensor | None]:
        """Return the function by which a forward that begins now gets its states: from a layer index to the scaled bank
        or None. A bank is computed when its layer runs, and again when the layer is recomputed."""
        return self._find

    def _find(self, layer_index: int) -> Tensor | None:
        return self.state(layer_index) if layer_index in self._states else None

    def bank(self, layer_index: int) -> Tensor:
        """Return the unscaled states of a layer, [tasks, ...]."""
        return self._states[layer_index]

    def state(self, layer_index: int) -> Tensor:
        """Return the scaled states of a layer. The product is computed when the states are attached, kept, and computed
        again after the parameter has changed. It is computed for every forward that needs a gradient, and from then on
        for every forward while the parameter requires grad, because fused optimizers change a parameter without
        changing its version. It is also computed in every compiled forward, because a graph cannot read the version."""
        bank = self._states[layer_index]
        if _is_exporting():  # torch.export has no name for a parameter outside the model
            bank = _constant_bank(self.number, layer_index)
        if self.scale == 1.0:
            return bank
        if torch.compiler.is_compiling():
            return bank * self.scale
        kept = self._scaled.get(layer_index)
        if bank.requires_grad and (torch.is_grad_enabled() or kept is None):
            self._scaled.pop(layer_index, None)
            return bank * self.scale
        if kept is None or kept[0] != bank._version:
            kept = self._rescale(layer_index)
        return kept[1]

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_prompts"} | {"_scaled": {}}

    def __setstate__(self, state: dict) -> None:
        """Drop the kept products: the version counters of a copy's parameters start from zero again."""
        self.__dict__.update(state, _prompts=threading.local(), number=next(_numbers))
        _attachments[self.number] = self
        self._rescale_all()

    def _rescale_all(self) -> None:
        for layer in self._states if self.scale != 1.0 else ():
            self._rescale(layer)

    def _rescale(self, layer_index: int) -> tuple[int, Tensor]:
        bank = self._states[layer_index]
        with torch.inference_mode(False):  # the result may be used outside inference mode
            kept = self._scaled[layer_index] = (bank._version, bank.detach() * self.scale)
        return kept

    def tasks_for(self, sequences: int, prompt: Tensor | None = None) -> int | Tensor:
        """Return the task of every sequence of a forward. `prompt` [rows, T, ...] is given if the forward starts the
        sequences.

        `generate` multiplies the rows for beams or several returned sequences. Then each group of rows has equal
        prompts. Without a cache, the rows of later forwards begin with these prompts. Any other number of rows is an
        error.
        """
        if isinstance(self.tasks, int) or self.tasks.shape[0] == sequences:
            return self.tasks
        given = self.tasks.shape[0]
        copies = sequences // given if given else 0
        matches = copies > 0 and sequences == given * copies
        if matches and prompt is not None and prompt.shape[0] == sequences:
            groups = prompt.unflatten(0, (given, copies))
            if torch.equal(groups, groups[:, :1].expand_as(groups)):
                self._prompts.rows = groups[:, 0].detach().clone()
            else:
                matches = _continue(groups, getattr(self._prompts, "rows", None))
        if not matches:
            raise ValueError(f"tasks names {given} rows, but the batch has {sequences}")
        return self.tasks.repeat_interleave(copies)


class BoundStates:
    """The starting point of one forward: for each layer a state and, with a task per sequence, the indices into it; and
    the boundaries of packed sequences."""

    def __init__(
        self, attachment: Attachment | None, tasks: int | Tensor, cu_seqlens: Tensor | None, mask: Tensor | None = None
    ):
        self._choice = None if attachment is None else attachment.choose()
        self._tasks = tasks
        #: boundaries over all rows of the batch laid end to end, or None: one sequence per row
        self.cu_seqlens = cu_seqlens
        #: [B, 1] if a single token is a pad in some row: transformers passes no mask for single tokens to mixers
        self.mask = mask

    def for_layer(
        self, layer_index: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (initial_state, state_indices) for the scans."""
        if self._choice is None or (isinstance(self._tasks, int) and self._tasks == -1):
            return None, None
        bank = self._choice(layer_index)
        if bank is None:
            return None, None
        bank = bank.to(device=device, dtype=dtype)  # a copy only if the model is sharded
        if isinstance(self._tasks, int):
            return bank[self._tasks], None
        return bank, self._tasks.to(device)


class Site:
    """The place in a swapped model where learned states are attached. A model has one."""

    #: the report of `swap_modules`, set when it ends
    report: "SwapReport"

    def __init__(
        self, shapes: Mapping[int, tuple[int, ...]], arch: str, arguments: Arguments, cannot_pack: str | None = None
    ):
        self.shapes = dict(shapes)
        self.arch = arch
        self.arguments = arguments
        #: the module that packed sequences cannot go through, and the reason; None if they can go through the model
        self.cannot_pack = cannot_pack
        self.number = next(_numbers)
        self.attachment: Attachment | None = None
        _sites.add(self)

    def __setstate__(self, state: dict) -> None:
        """Let a copy of a model start from a copy of its states."""
        self.__dict__.update(state, number=next(_numbers))
        _sites.add(self)

    def current(self) -> Attachment | None:
        if not _open:
            return self.attachment
        if _is_exporting():
            number = _constant_override(self.number)
            return self.attachment if number is None else _open[number]
        return next((chosen for site, chosen in reversed(_overrides.get()) if site is self), self.attachment)

    @contextlib.contextmanager
    def override(self, attachment: Attachment | None) -> Iterator[None]:
        """Use `attachment` (None: no states) in the calling context for the body of a with statement. The one that
        began last takes precedence; they may end in any order."""
        attachment = Attachment(None, {}, 1.0, -1) if attachment is None else attachment
        entry = (self, attachment)
        _overrides.set((*_overrides.get(), entry))
        _open[attachment.number] = attachment
        try:
            yield
        finally:
            _open.pop(attachment.number, None)
            _overrides.set(tuple(other for other in _overrides.get() if other is not entry))

    def live(self, kwargs: Mapping) -> bool:
        """Whether a forward continues a cache that holds states."""
        cache = find_cache(kwargs, "s0kernels")
        # a recurrent layer stores this on the host; the length of a static cache is on the device
        return cache is not None and cache.has_previous_state(min(self.shapes))

    def bind(self, rows: Tensor, kwargs: Mapping) -> BoundStates:
        """Bind the states for a forward over `rows` [B, T, ...], tokens or embeddings. The forward's `kwargs` may say
        that the rows hold packed sequences, or that they continue the sequences of a cache."""
        live = self.live(kwargs)
        cu_seqlens = find_boundaries(rows.shape[0], rows.shape[1], kwargs, live)
        mask = _single_token_mask(rows, kwargs.get("attention_mask"), live)
        attachment = self.current()
        if attachment is None:
            return BoundStates(None, -1, cu_seqlens, mask)
        sequences = rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return BoundStates(attachment, attachment.tasks_for(sequences, None if live else rows), cu_seqlens, mask)


def all_sites() -> list[Site]:
    """Return the sites of all swapped models, copies included."""
    return list(_sites)


class BindStates:
    """Forward pre-hook of the decoder: binds the states of the forward and passes them to the mixers."""

    def __init__(self, site: Site):
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        named = dict(zip(self.site.arguments.decoder, args, strict=False)) | kwargs
        self.site.arguments.check(type(module).__name__, named)
        rows = _rows(named)
        if rows is None or KEYWORD in named:
            return args, kwargs
        bound = self.site.bind(rows, named)
        if bound.cu_seqlens is not None:
            return (), {**_packed(named, bound.cu_seqlens, rows.shape[1]), KEYWORD: bound}
        return args, {**kwargs, KEYWORD: bound}


class RefusePacked:
    """Forward pre-hook of a module that packed sequences cannot go through, because it would mix them."""

    def __init__(self, site: Site, names: tuple[str, ...]):
        self.site = site
        self.names = names

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        named = dict(zip(self.names, args, strict=False)) | kwargs
        rows = _rows(named)
        if rows is None or find_boundaries(rows.shape[0], rows.shape[1], named, self.site.live(named)) is None:
            return
        how = "cu_seq_lens_q, seq_idx, position_ids"
        raise ValueError(f"packed sequences ({how}) cannot go through {self.site.cannot_pack}; pad them")


def _rows(named: Mapping) -> Tensor | None:
    """Return the tokens or embeddings among the arguments of a model."""
    return next((named[name] for name in ("input_ids", "inputs_embeds") if named.get(name) is not None), None)


def _single_token_mask(rows: Tensor, mask: Tensor | None, live: bool) -> Tensor | None:
    """Return the mask of a one-token forward in which some row is a pad, else None.

    Reading the mask on a GPU would synchronise at every generated token. So a GPU reads it for the first token of a
    sequence only, and later single tokens count as real tokens, as in transformers.
    """
    if rows.shape[1] != 1 or not isinstance(mask, Tensor) or mask.dim() != 2 or torch.compiler.is_compiling():
        return None
    if live and mask.device.type != "cpu":
        return None
    return None if bool(mask[:, -1].all()) else mask[:, -1:]


def _packed(kwargs: dict, cu_seqlens: Tensor, length: int) -> dict:
    """Return the arguments of a packed forward. Attention must not mix the sequences either: transformers separates
    them by their positions, but only without a mask and without a cache."""
    for name in (*CACHES, "use_cache", "attention_mask"):
        value = kwargs.get(name)
        if value is not None and value is not False:
            raise ValueError(f"packed sequences (cu_seq_lens_q, seq_idx, position_ids) cannot be used with {name}")
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = sequence_positions(cu_seqlens, length)
    return {**kwargs, "use_cache": False, "position_ids": positions}


def _continue(groups: Tensor, prompts: Tensor | None) -> bool:
    """Whether each group of rows [given, copies, T, ...] begins with its own prompt in `prompts` [given, t, ...]."""
    if prompts is None or prompts.shape[1] > groups.shape[2]:
        return False
    begun = groups[:, :, : prompts.shape[1]]
    same = begun.shape[3:] == prompts.shape[2:] and len(prompts) == len(groups) and prompts.dtype == groups.dtype
    return same and torch.equal(begun, prompts[:, None].to(begun.device).expand_as(begun))
