"""Write prompts and replies with the chat template of a tokenizer."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from s0kernels.tuning.tokens import encode, is_special

#: text of a sample reply, after which the template writes its end token
_REPLY = "s0kernels"


def check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, (list, tuple)) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise TypeError(f"{where}: messages must be a list of mappings with role and content, got {messages!r}")


def chat_options(options: Any, where: str) -> Mapping[str, Any]:
    """Check `chat_template_kwargs`, and return them."""
    if not isinstance(options or {}, Mapping):
        raise TypeError(f"{where}: chat_template_kwargs must be a mapping, got {type(options).__name__}")
    return options or {}


def write(messages: Sequence[Mapping], where: str, tokenizer: Any, **options: Any) -> str:
    """Return the text of a conversation."""
    try:
        return tokenizer.apply_chat_template(list(messages), **{**options, "tokenize": False})
    except Exception as error:  # a template may raise any exception
        raise ValueError(f"{where}: the tokenizer cannot write the messages as a conversation: {error}") from error


def template_digest(tokenizer: Any) -> str | None:
    """Return a hash of the template, by which a file identifies it; None if the tokenizer has no template."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else hashlib.sha256(str(template).encode()).hexdigest()[:16]


def write_prompt(messages: Any, options: Any, where: str, tokenizer: Any) -> str:
    """Return the text that a model reads before it replies to `messages`. Thinking is turned off if the template can,
    unless `options` ask for it."""
    check_messages(messages, where)
    options = {"enable_thinking": False, **chat_options(options, where), "add_generation_prompt": True}
    return write(messages, where, tokenizer, **options)


def end_token(messages: Sequence[Mapping] | None, options: Any, where: str, tokenizer: Any) -> int:
    """Return the token that ends a reply to `messages`: the special token that the template writes after it, or else
    the tokenizer's end token. A text without messages (`messages` None) ends with the tokenizer's end token."""
    if messages is not None:
        given = {"enable_thinking": False, **chat_options(options, where)}
        text = write([*messages, {"role": "assistant", "content": _REPLY}], where, tokenizer, **given)
        behind = encode(text.rpartition(_REPLY)[2].lstrip() or " ", where, tokenizer, add_special_tokens=False)
        if behind and is_special(behind[0], tokenizer):
            return behind[0]
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError(f"{where}: ended is true, but the tokenizer has no end token")
    return tokenizer.eos_token_id
