"""Which initial state a forward starts from.

A swapped model has one `Site`, shared by its mixers. Learned states are attached to it for every thread
(`Site.attachment`), or for the calling context alone, which wins. A hook on the decoder binds the choice once per
forward and hands it down as a keyword argument, so that a checkpointed layer recomputed later, perhaps in one of
autograd's threads, starts from the same states.
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
from s0kernels.modules.packing import find_boundaries, own_positions
from s0kernels.ops.transforms import constant_in_graphs

if TYPE_CHECKING:
    from s0kernels.modules.self_check import SwapReport

_overrides: ContextVar[tuple[tuple["Site", "Attachment"], ...]] = ContextVar("s0kernels_overrides", default=())
#: what any context overrides with, by number; where none does, torch.compile need not look at the context, which it
#: cannot trace
_open: dict[int, "Attachment"] = {}
_numbers = itertools.count()
_sites: weakref.WeakSet["Site"] = weakref.WeakSet()
_attachments: weakref.WeakValueDictionary[int, "Attachment"] = weakref.WeakValueDictionary()


@constant_in_graphs  # torch 2.11 takes every graph for one that is exported, if it is asked directly
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


@constant_in_graphs
def _constant_override(site: int) -> int | None:
    """Number of the attachment that the calling context uses for a site. For torch.export, which cannot trace the
    context: a program starts from what is attached when it is exported."""
    return next((chosen.number for place, chosen in reversed(_overrides.get()) if place.number == site), None)


@constant_in_graphs
def _constant_bank(attachment: int, layer_index: int) -> Tensor:
    """The states of a layer as they are when a program is exported."""
    return _attachments[attachment].bank(layer_index).detach()


class Attachment:
    """Learned states [tasks, ...] by layer index, the scale they are used at, and which task each row starts from.

    `owner` is what they were attached by, which nothing here looks into. `tasks` is one index for all rows, or an int64
    tensor with one per row; -1 is the zero state.
    """

    def __init__(self, owner: object, states: Mapping[int, Tensor], scale: float, tasks: int | Tensor):
        self.owner = owner
        self.tasks = tasks
        self._states = dict(states)
        self.scale = scale
        self._scaled: dict[int, tuple[int, Tensor]] = {}
        #: by thread: the rows that `generate` multiplied, one of each kind
        self._prompts = threading.local()
        self.number = next(_numbers)
        _attachments[self.number] = self
        self._rescale_all()

    def choose(self) -> Callable[[int], Tensor | None]:
        """What a forward that begins now starts from: by layer index the bank at its scale, or None. A bank is made
        when its layer runs, and again when the layer is recomputed."""
        return self._find

    def _find(self, layer_index: int) -> Tensor | None:
        return self.state(layer_index) if layer_index in self._states else None

    def bank(self, layer_index: int) -> Tensor:
        """[tasks, ...] of a layer, unscaled."""
        return self._states[layer_index]

    def state(self, layer_index: int) -> Tensor:
        """The bank of a layer at its scale. The product is kept: it is made when attaching and again after the
        parameter has changed. It is made anew for every forward that has to be differentiated, and from then on while
        the parameter learns, for fused optimizers change it and leave its version as it was; and for every forward that
        is compiled, for a graph cannot ask."""
        bank = self._states[layer_index]
        if _is_exporting():  # a parameter outside the model is nothing that torch.export could name
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
        """A copy's parameters count their changes from zero again, so its products have to be its own."""
        self.__dict__.update(state, _prompts=threading.local(), number=next(_numbers))
        _attachments[self.number] = self
        self._rescale_all()

    def _rescale_all(self) -> None:
        for layer in self._states if self.scale != 1.0 else ():
            self._rescale(layer)

    def _rescale(self, layer_index: int) -> tuple[int, Tensor]:
        bank = self._states[layer_index]
        with torch.inference_mode(False):  # it may be used outside as well
            kept = self._scaled[layer_index] = (bank._version, bank.detach() * self.scale)
        return kept

    def tasks_for(self, sequences: int, prompt: Tensor | None = None) -> int | Tensor:
        """The task of every sequence of a forward; `prompt` [rows, T, ...] is what starts them, where it does.

        `generate` multiplies the rows for beams or several returned sequences. Rows multiplied so start from equal
        prompts; without a cache, later forwards hold these prompts with what was generated behind them. Any other
        batch is somebody's mistake.
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
    """What one forward starts from: per layer a state and, for a task per sequence, the indices into it; and where
    the sequences begin, if they are packed."""

    def __init__(
        self, attachment: Attachment | None, tasks: int | Tensor, cu_seqlens: Tensor | None, mask: Tensor | None = None
    ):
        self._choice = None if attachment is None else attachment.choose()
        self._tasks = tasks
        #: boundaries over all rows of the batch laid end to end, or None: one sequence per row
        self.cu_seqlens = cu_seqlens
        #: [B, 1] where a single token is a pad in some row: transformers hands mixers no mask for single tokens
        self.mask = mask

    def for_layer(
        self, layer_index: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """(initial_state, state_indices) as the scans take them."""
        if self._choice is None or (isinstance(self._tasks, int) and self._tasks == -1):
            return None, None
        bank = self._choice(layer_index)
        if bank is None:
            return None, None
        bank = bank.to(device=device, dtype=dtype)  # no copy where they fit, as they do unless a model is sharded
        if isinstance(self._tasks, int):
            return bank[self._tasks], None
        return bank, self._tasks.to(device)


class Site:
    """The one place of a swapped model where learned states are attached."""

    #: what `swap_modules` found out about the swap, there as soon as that has ended
    report: "SwapReport"

    def __init__(
        self, shapes: Mapping[int, tuple[int, ...]], arch: str, arguments: Arguments, cannot_pack: str | None = None
    ):
        self.shapes = dict(shapes)
        self.arch = arch
        self.arguments = arguments
        #: what packed sequences cannot go through, and why; None: they can go through the model
        self.cannot_pack = cannot_pack
        self.number = next(_numbers)
        self.attachment: Attachment | None = None
        _sites.add(self)

    def __setstate__(self, state: dict) -> None:
        """A copy of a model starts from a copy of its states."""
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
        """Use `attachment`, None being no states, in the calling context, for as long as it lasts. The last to begin
        wins; they may end in any order."""
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
        # a recurrent layer knows it on the host; the length of a static cache is on the device
        return cache is not None and cache.has_previous_state(min(self.shapes))

    def bind(self, rows: Tensor, kwargs: Mapping) -> BoundStates:
        """What a forward over `rows` [B, T, ...], tokens or embeddings, starts from. `kwargs` are the forward's; they
        may say that the rows hold packed sequences, or continue those of a cache."""
        live = self.live(kwargs)
        cu_seqlens = find_boundaries(rows.shape[0], rows.shape[1], kwargs, live)
        mask = _single_token_mask(rows, kwargs.get("attention_mask"), live)
        attachment = self.current()
        if attachment is None:
            return BoundStates(None, -1, cu_seqlens, mask)
        sequences = rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return BoundStates(attachment, attachment.tasks_for(sequences, None if live else rows), cu_seqlens, mask)


def all_sites() -> list[Site]:
    """Those of every swapped model there is, copies included."""
    return list(_sites)


class BindStates:
    """Forward pre-hook of the decoder: binds what the forward starts from and passes it to the mixers."""

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
    """Forward pre-hook of a module that packed sequences cannot go through: its tokens would see those of others."""

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
    """The tokens or embeddings among the arguments of a model."""
    return next((named[name] for name in ("input_ids", "inputs_embeds") if named.get(name) is not None), None)


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
    for name in (*CACHES, "use_cache", "attention_mask"):
        value = kwargs.get(name)
        if value is not None and value is not False:
            raise ValueError(f"packed sequences (cu_seq_lens_q, seq_idx, position_ids) cannot be used with {name}")
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = own_positions(cu_seqlens, length)
    return {**kwargs, "use_cache": False, "position_ids": positions}


def _continue(groups: Tensor, prompts: Tensor | None) -> bool:
    """Whether the rows [given, copies, T, ...] begin with `prompts` [given, t, ...], each group with its own."""
    if prompts is None or prompts.shape[1] > groups.shape[2]:
        return False
    begun = groups[:, :, : prompts.shape[1]]
    same = begun.shape[3:] == prompts.shape[2:] and len(prompts) == len(groups) and prompts.dtype == groups.dtype
    return same and torch.equal(begun, prompts[:, None].to(begun.device).expand_as(begun))
