"""Batches of examples for one forward, padded or packed, and their losses."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from s0kernels.modules.swap import find_site
from s0kernels.tuning.data import Example
from s0kernels.tuning.head import Head, cross_entropy

#: attention implementations for which transformers masks packed sequences from each other
_KEEP_APART = ("eager", "sdpa")


def make_batches(
    examples: Sequence[Example], tokens: int, packed: bool | None, model: nn.Module, pad: int, device: torch.device
) -> list["Batch"]:
    """Make batches of at most `tokens` tokens, pads included, or of one longer example. Batches of short examples come
    first.

    `packed` lays the examples of a batch end to end instead of padding them. None does so if attention then works on
    each sequence separately (flash attention). Other implementations compute all pairs of the row and mask most of
    them.
    """
    packed = _decide(packed, model)
    groups: list[list[Example]] = [[]]
    filled = 0
    for example in sorted(examples, key=lambda example: len(example.ids)):
        length = len(example.ids)
        filled = filled + length if packed else (len(groups[-1]) + 1) * length
        if groups[-1] and filled > tokens:
            groups.append([])
            filled = length
        groups[-1].append(example)
    return [PackedBatch(group, device) if packed else PaddedBatch(group, device, pad) for group in groups]


def _decide(packed: bool | None, model: Any) -> bool:
    if packed is not None and not isinstance(packed, bool):
        raise TypeError(f"S0Trainer: packed must be True, False or None, got {packed!r}")
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None) or "eager"
    flash = "flash" in attention
    if packed and not flash and attention not in _KEEP_APART:
        raise ValueError(
            f"S0Trainer: packed examples need attention that separates them (flash attention or one of "
            f"{', '.join(_KEEP_APART)}), and the model has {attention!r}"
        )
    site = find_site(model)
    cannot = None if site is None else site.cannot_pack
    if packed and cannot is not None:
        raise ValueError(f"S0Trainer: packed examples cannot go through {cannot}")
    return flash and cannot is None if packed is None else packed


class Batch:
    """Examples for one forward. The model sees every token; the loss covers the completions only."""

    #: arguments of the forward; `input_ids` [B, T] and `logits_to_keep` among them
    _inputs: dict
    #: index of the kept positions that come before predicted tokens
    _before: tuple
    #: the tokens that are predicted
    targets: Tensor

    def __init__(self, examples: Sequence[Example], device: torch.device):
        self.examples = list(examples)
        self.tasks = [example.task for example in examples]
        self.device = device
        #: for every predicted token, in order: the task of its example, and its weight in the mean of that example
        counts = [len(example.ids) - max(example.prompt_length, 1) for example in examples]
        owners = [task for task, count in zip(self.tasks, counts, strict=True) for _ in range(count)]
        self._owners = torch.tensor(owners, device=device)
        weights = [1.0 / count for count in counts for _ in range(count)]
        self._weights = torch.tensor(weights, dtype=torch.float32, device=device)

    @property
    def tokens(self) -> int:
        """The number of tokens that the model sees, pads included."""
        return self._inputs["input_ids"].numel()

    def hidden(self, head: Head) -> Tensor:
        """Return the input of the head for each predicted token, [predicted tokens, ...]."""
        return head.read(**self._inputs)[self._before]

    def losses(self, model: nn.Module, tasks: int = 1, head: Head | None = None) -> Tensor:
        """Return, for each task, the sum over its examples of the mean cross-entropy of their completion tokens:
        [tasks] in fp32. `head` is the head of the model, if it has been found already."""
        head = self.head(model) if head is None else head
        losses = cross_entropy(head, self.hidden(head), self.targets).to(self.device)
        chosen = self._owners == torch.arange(tasks, device=self.device)[:, None]
        return (chosen * self._weights * losses).sum(1)  # no matrix product, which autocast would round

    def head(self, model: nn.Module) -> Head:
        return Head(model, self._inputs["input_ids"][:1])


class PaddedBatch(Batch):
    """A row per example, padded on the right."""

    def __init__(self, examples: Sequence[Example], device: torch.device, pad: int):
        super().__init__(examples, device)
        width = max(len(example.ids) for example in examples)
        ids = torch.tensor([e.ids + [pad] * (width - len(e.ids)) for e in examples], device=device)
        lengths, prompts = (
            torch.tensor(values, device=device)[:, None]
            for values in ([len(e.ids) for e in examples], [max(e.prompt_length, 1) for e in examples])
        )
        places = torch.arange(width, device=device)
        predicted = (places >= prompts) & (places < lengths)
        start = int(prompts.min()) - 1
        self._inputs = {"input_ids": ids, "attention_mask": (places < lengths).long(), "logits_to_keep": width - start}
        self._before = predicted[:, start + 1 :].nonzero(as_tuple=True)
        self.targets = ids[predicted]


class PackedBatch(Batch):
    """One row of all examples, end to end."""

    def __init__(self, examples: Sequence[Example], device: torch.device):
        super().__init__(examples, device)
        lengths = [len(example.ids) for example in examples]
        starts = [0, *itertools.accumulate(lengths)]
        ends = torch.tensor(starts, dtype=torch.int32, device=device)
        predicted = [
            start + place
            for start, example in zip(starts, examples, strict=False)
            for place in range(max(example.prompt_length, 1), len(example.ids))
        ]
        before = torch.tensor(predicted, device=device) - 1
        self._before = (0,)
        self._inputs = {
            "input_ids": torch.tensor([[token for example in examples for token in example.ids]], device=device),
            "position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
            "logits_to_keep": before,
        }
        self.targets = self._inputs["input_ids"][0, before + 1]
