"""Prompts and replies as a tokenizer's chat template writes them."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from s0kernels.tuning.tokens import encode, is_special

#: of a reply whose end is looked for
_REPLY = "s0kernels"


def check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, (list, tuple)) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise TypeError(f"{where}: messages must be a list of mappings with role and content, got {messages!r}")


def chat_options(options: Any, where: str) -> Mapping[str, Any]:
    """`chat_template_kwargs`, checked."""
    if not isinstance(options or {}, Mapping):
        raise TypeError(f"{where}: chat_template_kwargs must be a mapping, got {type(options).__name__}")
    return options or {}


def write(messages: Sequence[Mapping], where: str, tokenizer: Any, **options: Any) -> str:
    """The text of a conversation."""
    try:
        return tokenizer.apply_chat_template(list(messages), **{**options, "tokenize": False})
    except Exception as error:  # a template may raise whatever it likes
        raise ValueError(f"{where}: the tokenizer cannot write it as a conversation: {error}") from error


def template_digest(tokenizer: Any) -> str | None:
    """By which a file knows a template; None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else hashlib.sha256(str(template).encode()).hexdigest()[:16]


def write_prompt(messages: Any, options: Any, where: str, tokenizer: Any) -> str:
    """What a model reads before it replies to `messages`; without thinking, unless `options` ask for it, where the
    template can turn it off."""
    check_messages(messages, where)
    options = {"enable_thinking": False, **chat_options(options, where), "add_generation_prompt": True}
    return write(messages, where, tokenizer, **options)


def end_token(messages: Sequence[Mapping] | None, options: Any, where: str, tokenizer: Any) -> int:
    """What a reply to `messages` ends with: the special token that the template writes behind it, or else the
    tokenizer's end token, which is also what a text ends with (`messages` None)."""
    if messages is not None:
        given = {"enable_thinking": False, **chat_options(options, where)}
        text = write([*messages, {"role": "assistant", "content": _REPLY}], where, tokenizer, **given)
        behind = encode(text.rpartition(_REPLY)[2].lstrip() or " ", where, tokenizer, add_special_tokens=False)
        if behind and is_special(behind[0], tokenizer):
            return behind[0]
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError(f"{where}: it has ended, and the tokenizer has no end token")
    return tokenizer.eos_token_id
