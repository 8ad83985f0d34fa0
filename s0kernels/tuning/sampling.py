"""Sampling from a model, with noise that belongs to a sample, whatever it goes through the model with."""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from s0kernels.modules.arguments import cache_argument, cache_of, takes_cache
from s0kernels.tuning.memory import allowed, is_out_of_memory, release
from s0kernels.tuning.settings import Sampling

#: most rows that are chosen: beyond it no device gets faster by the row
_MOST_ROWS = 256
#: bytes a row for each entry of the vocabulary: logits, what is kept of them, their cumulative sum
_PER_LOGIT = 64


class Row(NamedTuple):
    """One sample to be made."""

    #: of the problem, and the number of the sample
    key: str
    sample: int
    prompt: str
    ids: list[int]


class Completion(NamedTuple):
    text: str
    #: the model ended it itself; cut by length or by a stop string it has not ended
    ended: bool


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the stop strings."""
    ends = [place for place in (text.find(mark) for mark in stop) if place >= 0]
    return text[: min(ends)] if ends else text


class Sampler:
    """Makes completions with a model. `model` may wrap the swapped one; `ends` are its end tokens.

    `padded=False` puts only prompts of one length into a batch, and shares no work on them: for models that put
    something before a prompt.
    """

    def __init__(
        self, model: Any, tokenizer: Any, sampling: Sampling, ends: Sequence[int], pad: int, padded: bool = True
    ):
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._ends, self._pad, self._padded = list(ends), pad, padded
        self._most, self._device = _MOST_ROWS, model.get_input_embeddings().weight.device
        # a model that keeps something of a prompt itself, beside the cache, cannot be given a cache that was repeated
        keeps = any(hasattr(module, "rope_deltas") for module in model.modules())
        self._can_share = padded and not keeps and takes_cache(model)

    def rows(self, longest: int, asked: int | None, device: torch.device) -> int:
        """How many rows go through the model at a time, with prompts of at most `longest` tokens."""
        self._device = device
        limit = None if asked is not None else allowed(device, None)
        if asked is not None or limit is None:
            self._most = asked or _MOST_ROWS
        else:
            fitting = max(limit // self._bytes(longest, device), 1)
            self._most = min(1 << int(math.log2(fitting)), _MOST_ROWS)
        return self._most

    @torch.no_grad()
    def _bytes(self, longest: int, device: torch.device) -> int:
        """Of a row at its longest, by what a short one leaves in the cache."""
        width = min(longest, 16)
        ids = torch.full((1, width), self._pad, device=device)
        kept = _tensors(self._model(input_ids=ids, use_cache=True, logits_to_keep=1))
        config = self._model.config.get_text_config()
        growing = sum(t.nbytes for t in kept if width in t.shape[2:3])
        fixed = sum(t.nbytes for t in kept) - growing
        length = longest + self._sampling.max_new_tokens
        prompt = 32 * config.hidden_size * longest * next(self._model.parameters()).element_size()
        return int(2 * (fixed + growing / width * length) + _PER_LOGIT * config.vocab_size + prompt)

    def sample(self, rows: Sequence[Row]) -> list[Completion]:
        """In the order of `rows`. A batch that is out of memory is done again with half."""
        found: dict[int, Completion] = {}
        order = list(range(len(rows))) if self._padded else sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        groups = [list(same) for _, same in itertools.groupby(order, lambda i: 0 if self._padded else len(rows[i].ids))]
        for group in groups:
            while group:
                batch, failure = group[: self._most], None
                try:
                    made = self._batch([rows[i] for i in batch])
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or len(batch) == 1:
                        raise
                    failure = error
                if failure is not None:
                    failure.__traceback__ = None  # it holds what was made until memory ran out
                    self._most = max(len(batch) // 2, 1)
                    release()
                    continue
                found.update(zip(batch, made, strict=True))
                group = group[len(batch) :]
        return [found[i] for i in range(len(rows))]

    def _batch(self, rows: Sequence[Row]) -> list[Completion]:
        from transformers import GenerationConfig

        device = self._device
        width = max(len(row.ids) for row in rows)
        config = GenerationConfig(
            max_new_tokens=self._sampling.max_new_tokens,
            eos_token_id=self._ends or None,
            pad_token_id=self._pad,
            **_PLAIN,
        )
        given: dict[str, Any] = self._shared(rows, width, config, device) or self._inputs(rows, width, device)
        made = self._model.generate(
            **given, generation_config=config, logits_processor=self._draws(rows, width), **self._stops(width)
        )
        return [self._read(tokens) for tokens in made[:, width:].tolist()]

    def _inputs(self, rows: Sequence[Row], width: int, device: torch.device) -> dict[str, Tensor]:
        ids = [[self._pad] * (width - len(row.ids)) + row.ids for row in rows]
        mask = [[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows]
        return {name: torch.tensor(x, device=device) for name, x in (("input_ids", ids), ("attention_mask", mask))}

    def _shared(self, rows: Sequence[Row], width: int, config: Any, device: torch.device) -> dict[str, Any] | None:
        """The inputs with a cache of all prompt tokens but the last, each prompt computed once; None where nothing is
        to be saved, or where the model does not allow it."""
        firsts = [i for i, row in enumerate(rows) if i == 0 or row.ids is not rows[i - 1].ids]
        if not self._can_share or len(firsts) == len(rows) or min(len(row.ids) for row in rows) < 2:
            return None
        once = self._inputs([rows[i] for i in firsts], width, device)
        short = {name: x[:, :-1] for name, x in once.items()}
        to_prompt = {**config.to_dict(), "max_new_tokens": 1, "return_dict_in_generate": True}
        cache = cache_of(self._model.generate(**short, generation_config=type(config)(**to_prompt)))
        self._can_share = hasattr(cache, "reorder_cache") and _tokens_in(cache) == width - 1
        if not self._can_share:
            return None
        index = torch.tensor([sum(first <= i for first in firsts) - 1 for i in range(len(rows))], device=device)
        cache.reorder_cache(index)
        return {**{name: x[index] for name, x in once.items()}, cache_argument(self._model): cache}

    def _draws(self, rows: Sequence[Row], width: int) -> Any:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        sampling, chosen = self._sampling, LogitsProcessorList()
        if sampling.greedy:
            return chosen
        if sampling.temperature != 1.0:
            chosen.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            chosen.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            chosen.append(TopPLogitsWarper(float(sampling.top_p)))
        chosen.append(_Draw(sampling.seed, rows, width))
        return chosen

    def _stops(self, width: int) -> dict[str, Any]:
        from transformers import StoppingCriteriaList

        if not self._sampling.stop:
            return {}
        return {"stopping_criteria": StoppingCriteriaList([_Stop(self._tokenizer, self._sampling.stop, width)])}

    def _read(self, tokens: list[int]) -> Completion:
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        text = self._tokenizer.decode(tokens[:end], skip_special_tokens=True)
        shortened = cut(text, self._sampling.stop)
        return Completion(shortened, end is not None and shortened == text)


#: whatever the model's own generation config says
_PLAIN = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}


def noise(seed: int, key: str, sample: int, place: int) -> float:
    """In (0, 1), the same for the same arguments: what decides token `place` of a sample of a problem."""
    digest = hashlib.blake2b(f"{seed}\n{sample}\n{place}\n{key}".encode(errors="surrogatepass"), digest_size=5).digest()
    return (int.from_bytes(digest, "little") + 0.5) / 2**40


class _Draw:
    """A logits processor that leaves one token a row: where the cumulative distribution, in the vocabulary's order,
    reaches the row's noise. A rounding of the logits moves a border between two tokens and no more."""

    def __init__(self, seed: int, rows: Sequence[Row], width: int):
        self._seed, self._rows, self._width = seed, rows, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self._width
        found = [noise(self._seed, row.key, row.sample, place) for row in self._rows]
        cumulative = scores.softmax(-1, dtype=torch.float32).cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        if not bool(total.isfinite().all()):
            raise RuntimeError("S0Trainer: the model's logits are not finite, so nothing can be sampled from it")
        at = torch.tensor(found, dtype=torch.float64, device=scores.device)[:, None] * total
        chosen = torch.searchsorted(cumulative, at, right=True)
        return torch.full_like(scores, -math.inf).scatter_(1, chosen, 0.0)


class _Stop:
    """A stopping criterion: rows whose last tokens hold a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int):
        self._tokenizer, self._stop, self._width = tokenizer, stop, width
        self._tail = 8 + max(len(mark.encode(errors="surrogatepass")) for mark in stop)  # a token is a byte or more

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        tails = input_ids[:, self._width :][:, -self._tail :].tolist()
        texts = self._tokenizer.batch_decode(tails, skip_special_tokens=True)
        return torch.tensor([any(mark in text for mark in self._stop) for text in texts], device=input_ids.device)


def _tokens_in(cache: Any) -> int | None:
    """How many tokens a cache has read. One without attention does not count them, and `generate` would then have all
    of a prompt read once more."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return None


def _tensors(output: Any) -> list[Tensor]:
    """What a forward leaves in its cache."""
    found: list[Tensor] = []
    waiting: list[Any] = list(getattr(cache_of(output), "layers", ()))
    waiting = [value for layer in waiting for value in vars(layer).values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
    return found


def end_tokens(model: nn.Module, tokenizer: Any, others: Sequence[int] = ()) -> list[int]:
    """With which a model ends what it writes: by its generation config, by its tokenizer, and `others`."""
    told = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    told = [told] if isinstance(told, int) else list(told or ())
    own = getattr(tokenizer, "eos_token_id", None)
    return sorted({*told, *others, *([] if own is None else [own])})
