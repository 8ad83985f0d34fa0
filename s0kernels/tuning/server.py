"""Completions from a server with OpenAI's API: vLLM, SGLang, `transformers serve` and others."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from s0kernels.messages import advice, some
from s0kernels.tuning.sampling import Completion, Row, cut
from s0kernels.tuning.settings import Sampling

#: requests at a time, where not said otherwise
_AT_A_TIME = 64
#: more tries of a request that fails in a way that may pass
_RETRIES = 5
_SECONDS = 600.0


class Server:
    """Makes completions with the model that a server has. The promise of a seed does not hold: what a server draws may
    depend on what else it does then. What OpenAI's API has no name for, such as a penalty of repetition, is as the
    server has it.

    Prompts are sent as texts, as the tokenizer's template wrote them, through `/completions`, each sample in a request
    of its own, many at a time. A request that fails in a way that may pass is tried again a few times.

    Args:
        url: where the API begins, as http://localhost:8000/v1. The key, if it wants one, is in OPENAI_API_KEY.
        model: its name there; None: the only one there is.
        tokenizer: the model's.
    """

    def __init__(self, url: str, model: str | None, sampling: Sampling, tokenizer: Any):
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            raise ValueError(f"S0Trainer: server must be a URL, as http://localhost:8000/v1, got {url!r}")
        if model is not None and not isinstance(model, str):
            raise TypeError(f"S0Trainer: served_model must be a name, got {model!r}")
        try:
            import openai
        except ImportError as error:
            raise ImportError(f"a server is asked through openai's client: {advice(error)}", name=error.name) from error
        self._error = openai.OpenAIError
        # a server of one's own wants no key, and the client wants one
        key = os.environ.get("OPENAI_API_KEY", "none")
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=_RETRIES, timeout=_SECONDS)
        self._url, self._sampling, self._begin = url, sampling, _begin(tokenizer)
        self._at_a_time = _AT_A_TIME
        #: the model's name there
        self.model = self._only_model() if model is None else model

    def _only_model(self) -> str:
        try:
            found = [model.id for model in self._client.models.list()]
        except self._error as error:
            self.close()
            raise RuntimeError(f"S0Trainer: the server {self._url} does not answer: {_said(error)}") from error
        if len(found) != 1:
            self.close()
            raise ValueError(f"S0Trainer: served_model must name one of the server's models, {some(found)}")
        return found[0]

    def rows(self, longest: int, asked: int | None, device: torch.device) -> int:
        """How many requests at a time: enough for a problem's samples."""
        self._at_a_time = asked or max(_AT_A_TIME, self._sampling.samples)
        return self._at_a_time

    def sample(self, rows: Sequence[Row]) -> list[Completion]:
        """In the order of `rows`."""
        with ThreadPoolExecutor(self._at_a_time) as pool:
            futures = [pool.submit(self._complete, row) for row in rows]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _complete(self, row: Row) -> Completion:
        sampling = self._sampling
        text = f"{sampling.seed}\n{row.sample}\n{row.key}".encode(errors="surrogatepass")
        asked: dict[str, Any] = {
            "model": self.model,
            "prompt": row.prompt.removeprefix(self._begin),
            "max_tokens": sampling.max_new_tokens,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "seed": int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") >> 1,
        }
        if sampling.stop:
            asked["stop"] = list(sampling.stop)
        if sampling.top_k:  # not OpenAI's, but vLLM's and SGLang's
            asked["extra_body"] = {"top_k": sampling.top_k}
        try:
            made = self._client.completions.create(**asked)
        except self._error as error:
            message = f"S0Trainer: the server {self._url} does not answer problem {row.key!r}: {_said(error)}"
            raise RuntimeError(message) from error
        if not made.choices:
            raise RuntimeError(f"S0Trainer: the server {self._url} sent no choice for problem {row.key!r}")
        choice = made.choices[0]
        whole = choice.text or ""
        shortened = cut(whole, sampling.stop)
        return Completion(shortened, shortened == whole and self._ended(choice))

    def _ended(self, choice: Any) -> bool:
        """Whether the model ended it. Where there are stop strings a server says "stop" for these, too; which of both
        it was vLLM and SGLang tell, and of a server that does not, it counts as cut."""
        if choice.finish_reason != "stop":
            return False
        if not self._sampling.stop:
            return True
        told = [name for name in ("stop_reason", "matched_stop") if hasattr(choice, name)]
        return bool(told) and not any(isinstance(getattr(choice, name), str) for name in told)

    def close(self) -> None:
        self._client.close()


def _begin(tokenizer: Any) -> str:
    """What tokenizing puts in front of a text that may have it already, from the template."""
    bos = getattr(tokenizer, "bos_token", None) or ""
    return bos if bos and tokenizer(bos)["input_ids"].count(tokenizer.bos_token_id) > 1 else ""


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
