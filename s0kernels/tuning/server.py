"""Sample completions from a server with OpenAI's API: vLLM, SGLang, `transformers serve` and others."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from s0kernels.messages import advice, some
from s0kernels.tuning.sampling import Completion, Row, cut
from s0kernels.tuning.settings import Sampling

#: default number of concurrent requests
_AT_A_TIME = 64
#: number of retries of a request after a temporary failure
_RETRIES = 5
_SECONDS = 600.0


class Server:
    """Samples completions from the model of a server. The same seed does not guarantee the same samples: they may
    depend on the server's other work. Settings that OpenAI's API does not have, such as a repetition penalty, are those
    of the server.

    Prompts are sent as texts, formatted by the tokenizer's chat template, to `/completions`. Each sample is one
    request, and many run concurrently. A request is retried a few times after a temporary failure.

    Args:
        url: base URL of the API, such as http://localhost:8000/v1. If the server needs a key, set OPENAI_API_KEY.
        model: name of the model on the server; None: its only model.
        tokenizer: the tokenizer of the model.
    """

    def __init__(self, url: str, model: str | None, sampling: Sampling, tokenizer: Any):
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            raise ValueError(f"S0Trainer: server must be a URL such as http://localhost:8000/v1, got {url!r}")
        if model is not None and not isinstance(model, str):
            raise TypeError(f"S0Trainer: served_model must be a name, got {model!r}")
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                f"sampling from a server needs the openai client: {advice(error)}", name=error.name
            ) from error
        self._error = openai.OpenAIError
        # a local server needs no key, but the client requires one
        key = os.environ.get("OPENAI_API_KEY", "none")
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=_RETRIES, timeout=_SECONDS)
        self._url, self._sampling, self._begin = url, sampling, _begin(tokenizer)
        self._at_a_time = _AT_A_TIME
        #: the name of the model on the server
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
        """Return the number of concurrent requests: at least enough for the samples of one problem."""
        self._at_a_time = asked or max(_AT_A_TIME, self._sampling.samples)
        return self._at_a_time

    def sample(self, rows: Sequence[Row]) -> list[Completion]:
        """Return completions in the order of `rows`."""
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
        if sampling.top_k:  # vLLM and SGLang support it, OpenAI's API does not
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
        """Whether the model ended the completion itself. With stop strings, a server says "stop" for these too. vLLM
        and SGLang say which of both it was. With other servers the completion counts as cut."""
        if choice.finish_reason != "stop":
            return False
        if not self._sampling.stop:
            return True
        told = [name for name in ("stop_reason", "matched_stop") if hasattr(choice, name)]
        return bool(told) and not any(isinstance(getattr(choice, name), str) for name in told)

    def close(self) -> None:
        self._client.close()


def _begin(tokenizer: Any) -> str:
    """Return the text that tokenizing puts in front of a text, and that the template may have written already."""
    bos = getattr(tokenizer, "bos_token", None) or ""
    return bos if bos and tokenizer(bos)["input_ids"].count(tokenizer.bos_token_id) > 1 else ""


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
