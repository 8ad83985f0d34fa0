"""Turn texts into tokens."""

from typing import Any


def encode(text: str, where: str, tokenizer: Any, **options: bool) -> list[int]:
    """Return the tokens of a whole text, ignoring the tokenizer's own length limit. An end token that the tokenizer
    appends to texts is left out, because the text continues."""
    check_tokenizer(tokenizer)
    try:
        ids = [int(token) for token in tokenizer(text, verbose=False, **options)["input_ids"]]
        if not ids or ids[-1] not in getattr(tokenizer, "all_special_ids", ()):
            return ids
        return ids[: len(ids) - _suffix_length(tokenizer, **options)]
    except (TypeError, UnicodeError) as error:  # a lone surrogate, which JSON can hold
        raise ValueError(f"{where} has a text that the tokenizer does not accept: {text[:80]!r}") from error


def _suffix_length(tokenizer: Any, **options: bool) -> int:
    """Return the number of tokens that the tokenizer appends to any text, found with a short one."""
    whole, bare = (tokenizer("0", **added)["input_ids"] for added in (options, {"add_special_tokens": False}))
    starts = [i for i in range(len(whole)) if bare and list(whole[i : i + len(bare)]) == list(bare)]
    return len(whole) - starts[0] - len(bare) if starts else 0


def check_tokenizer(tokenizer: Any) -> None:
    if not callable(tokenizer):
        raise TypeError(f"S0Trainer: tokenizer must be the model's tokenizer, got {tokenizer!r}")


def is_special(token: int, tokenizer: Any) -> bool:
    """Whether `token` is a special token, which stands for no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).get(token)
    return token in getattr(tokenizer, "all_special_ids", ()) or getattr(added, "special", False)
