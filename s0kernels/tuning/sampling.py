"""Sample from a model. The random numbers of a sample do not depend on the batch that it is in."""

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

#: maximum number of rows that is chosen: beyond it no device gets faster per row
_MOST_ROWS = 256
#: bytes per row and entry of the vocabulary: logits, filtered logits, their cumulative sum
_PER_LOGIT = 64


class Row(NamedTuple):
    """One sample to be made."""

    #: the key of the problem, and the index of the sample
    key: str
    sample: int
    prompt: str
    ids: list[int]


class Completion(NamedTuple):
    text: str
    #: whether the model ended it itself. A completion cut by length or by a stop string has not ended
    ended: bool


def cut(text: str, stop: Sequence[str]) -> str:
    """Return `text` up to the first of the stop strings."""
    ends = [place for place in (text.find(mark) for mark in stop) if place >= 0]
    return text[: min(ends)] if ends else text


class Sampler:
    """Samples completions from a model. `model` may wrap the swapped model; `ends` are its end tokens.

    With `padded=False` a batch has prompts of one length only, and their prefill is not shared. This is for models that
    put something before a prompt.
    """

    def __init__(
        self, model: Any, tokenizer: Any, sampling: Sampling, ends: Sequence[int], pad: int, padded: bool = True
    ):
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._ends, self._pad, self._padded = list(ends), pad, padded
        self._most, self._device = _MOST_ROWS, model.get_input_embeddings().weight.device
        # a model that keeps data of a prompt outside the cache cannot use a cache whose rows were repeated
        keeps = any(hasattr(module, "rope_deltas") for module in model.modules())
        self._can_share = padded and not keeps and takes_cache(model)

    def rows(self, longest: int, asked: int | None, device: torch.device) -> int:
        """Return the number of rows in a batch, for prompts of at most `longest` tokens."""
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
        """Estimate the bytes of a row at its maximum length from the cache of a short one."""
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
        """Return completions in the order of `rows`. A batch that runs out of memory is repeated in halves."""
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
                    failure.__traceback__ = None  # it holds the tensors made until memory ran out
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
        """Return the inputs with a cache of all prompt tokens but the last, where each prompt is computed once. Return
        None if that saves nothing, or if the model does not support it."""
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


#: settings that override the generation config of the model
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
    """Return a random number in (0, 1) that depends on the arguments alone. It decides token `place` of a sample."""
    digest = hashlib.blake2b(f"{seed}\n{sample}\n{place}\n{key}".encode(errors="surrogatepass"), digest_size=5).digest()
    return (int.from_bytes(digest, "little") + 0.5) / 2**40


class _Draw:
    """Logits processor that samples one token per row by inverting the cumulative distribution, in vocabulary order, at
    the row's random number. Rounding of the logits only shifts borders between tokens."""

    def __init__(self, seed: int, rows: Sequence[Row], width: int):
        self._seed, self._rows, self._width = seed, rows, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self._width
        found = [noise(self._seed, row.key, row.sample, place) for row in self._rows]
        cumulative = scores.softmax(-1, dtype=torch.float32).cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        if not bool(total.isfinite().all()):
            raise RuntimeError("S0Trainer: the model's logits are not finite, so no token can be sampled")
        at = torch.tensor(found, dtype=torch.float64, device=scores.device)[:, None] * total
        chosen = torch.searchsorted(cumulative, at, right=True)
        return torch.full_like(scores, -math.inf).scatter_(1, chosen, 0.0)


class _Stop:
    """Stopping criterion: stops rows whose last tokens hold a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int):
        self._tokenizer, self._stop, self._width = tokenizer, stop, width
        self._tail = 8 + max(len(mark.encode(errors="surrogatepass")) for mark in stop)  # a token has at least one byte

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        tails = input_ids[:, self._width :][:, -self._tail :].tolist()
        texts = self._tokenizer.batch_decode(tails, skip_special_tokens=True)
        return torch.tensor([any(mark in text for mark in self._stop) for text in texts], device=input_ids.device)


def _tokens_in(cache: Any) -> int | None:
    """Return the number of tokens that a cache has read, or None if it does not count them. A cache without attention
    does not, and `generate` would then read the whole prompt again."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return None


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors in the cache of a forward's output."""
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
    """Return the tokens that end a text of the model: those of its generation config, that of its tokenizer, and
    `others`."""
    told = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    told = [told] if isinstance(told, int) else list(told or ())
    own = getattr(tokenizer, "eos_token_id", None)
    return sorted({*told, *others, *([] if own is None else [own])})
