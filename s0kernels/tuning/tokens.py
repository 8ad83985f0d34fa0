"""Texts to tokens."""

from typing import Any


def encode(text: str, where: str, tokenizer: Any, **options: bool) -> list[int]:
    """Tokens of a text, whole, whatever the tokenizer's own limit is; what it puts behind texts (an end token) not,
    because they go on."""
    check_tokenizer(tokenizer)
    try:
        ids = [int(token) for token in tokenizer(text, verbose=False, **options)["input_ids"]]
        if not ids or ids[-1] not in getattr(tokenizer, "all_special_ids", ()):
            return ids
        return ids[: len(ids) - _suffix_length(tokenizer, **options)]
    except (TypeError, UnicodeError) as error:  # of a text with half a surrogate pair, as JSON can hold
        raise ValueError(f"{where} has a text that the tokenizer does not take: {text[:80]!r}") from error


def _suffix_length(tokenizer: Any, **options: bool) -> int:
    """How many tokens it puts behind any text, found with a short one."""
    whole, bare = (tokenizer("0", **added)["input_ids"] for added in (options, {"add_special_tokens": False}))
    starts = [i for i in range(len(whole)) if bare and list(whole[i : i + len(bare)]) == list(bare)]
    return len(whole) - starts[0] - len(bare) if starts else 0


def check_tokenizer(tokenizer: Any) -> None:
    if not callable(tokenizer):
        raise TypeError(f"S0Trainer: tokenizer must be the model's tokenizer, got {tokenizer!r}")


def is_special(token: int, tokenizer: Any) -> bool:
    """Whether it is one of those that stand for no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).get(token)
    return token in getattr(tokenizer, "all_special_ids", ()) or getattr(added, "special", False)
