"""Read training examples from pairs, records, conversations or files."""

import json
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from s0kernels.messages import some
from s0kernels.states import files
from s0kernels.tuning.chat import chat_options, check_messages, end_token, write, write_prompt
from s0kernels.tuning.tokens import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: the input of `read_examples`: the path of a file of JSON lines, or examples
Examples = str | os.PathLike[str] | Iterable[tuple[str, int] | list[str | int] | Mapping[str, Any]]
#: sets of keys that make a mapping an example
_RECORDS = ({"messages"}, {"prompt", "completion"}, {"text", "prompt_length"})


class Example(NamedTuple):
    ids: list[int]
    #: number of tokens that form the prompt, which is not learned
    prompt_length: int
    #: index of the task whose S0 it starts from
    task: int = 0


def read_tasks(
    data: Any, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> tuple[list[str] | None, list[Example]]:
    """Return (names, examples). A mapping holds the data of several tasks by name; anything else is the data of one
    task without a name.

    Raises:
        TypeError, ValueError: `read_examples` does not accept an example, or the name of a task cannot name a
            directory.
    """
    if not isinstance(data, Mapping):
        return None, read_examples(data, tokenizer, max_length)
    if not data:
        raise ValueError("S0Trainer: data is empty")
    if any(keys <= set(data) for keys in _RECORDS):
        raise TypeError("S0Trainer: data is a single example; put it into a list")
    if type(data).__name__ in ("DatasetDict", "IterableDatasetDict"):
        raise TypeError(f"S0Trainer: data must be one split of the data set, of {some(data)}")
    check_names(data)
    return list(data), [
        example
        for task, (name, its_data) in enumerate(data.items())
        for example in read_examples(its_data, tokenizer, max_length, task, f"data[{name!r}]")
    ]


def check_names(names: Iterable) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"S0Trainer: the name of a task must be a string, got {name!r}")
        if not files.can_be_task(name):
            raise ValueError(
                f"S0Trainer: the name of a task must also be valid as the name of a directory, got {name!r}"
            )


def read_examples(
    data: Examples, tokenizer: "PreTrainedTokenizerBase", max_length: int, task: int = 0, name: str = "data"
) -> list[Example]:
    """Tokenize examples, and cut them at `max_length`. `data` is a file of JSON lines, or yields one of these per
    example:

    - `(text, prompt_length)`: a text, and the number of tokens of its prompt; or the mapping `{"text": ...,
      "prompt_length": ...}`,
    - `{"prompt": ..., "completion": ...}`: two strings, or two lists of chat messages,
    - `{"messages": [...]}`: a conversation, whose last message, by the assistant, is the completion,
    - `{"messages": [...], "completion": ...}`: messages, and the text of the reply to them, as `collect` returns them.

    Two more keys are used, all others are ignored. `chat_template_kwargs` are arguments of the tokenizer's chat
    template. With `"ended": True` and a completion that is a text, training learns an end token after it: the end of
    turn of the template, or else the end token of the tokenizer. Without it no end token is added. A `datasets.Dataset`
    with such columns works too. For a text that replies to messages, the template turns thinking off if it can, unless
    `chat_template_kwargs` say otherwise. In a conversation, everything that the template writes after the generation
    prompt is learned. For models that think, `{"enable_thinking": False}` keeps the end of an empty thought out of it.
    """
    found = list(records(data, name))
    if not found:
        raise ValueError(f"S0Trainer: {name if not isinstance(data, (str, os.PathLike)) else data} is empty")
    return [_read(record, where, tokenizer, max_length, task) for where, record in found]


def records(data: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(data, (str, os.PathLike)):
        yield from _lines(Path(data))
        return
    try:
        entries = iter(data)
    except TypeError:
        raise TypeError(
            f"S0Trainer: {name} must be examples or the path of a file, got {type(data).__name__}"
        ) from None
    for index, record in enumerate(entries):
        yield f"S0Trainer: {name}[{index}]", record


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{file}:{number}", _parse_line(line, file, number)


def _parse_line(line: str, file: Path, number: int) -> Any:
    start, whole = line.strip()[0], "with one whole example on each line"
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        where, reason = f"{file}:{number}, column {error.colno}", error.msg
        if start in "[{" and error.pos >= len(line.rstrip()):  # it continues on the next line
            kind = "array" if start == "[" else "object"
            raise ValueError(
                f"{where}: a JSON {kind} over several lines; the file must be JSON lines, {whole}"
            ) from error
        raise ValueError(f"{where}: not JSON: {reason}; the file must be JSON lines, {whole}") from error
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond Python's limits
        raise ValueError(f"{file}:{number}: not JSON that can be read: {error}") from error
    if isinstance(value, list) and any(isinstance(entry, (Mapping, list)) for entry in value):
        raise ValueError(
            f"{file}:{number}: a JSON array of {len(value)} examples; the file must be JSON lines, {whole}"
        )
    return value


def _read(record: Any, where: str, tokenizer: Any, max_length: int, task: int) -> Example:
    if isinstance(record, Mapping):
        keys = set(record)
        if "messages" in keys and record.get("completion") is not None:
            ids, length = _reply(record["messages"], record["completion"], record, where, tokenizer)
        elif "messages" in keys:
            ids, length = _conversation(record["messages"], None, record, where, tokenizer)
        elif {"prompt", "completion"} <= keys:
            ids, length = _completion(record["prompt"], record["completion"], record, where, tokenizer)
        elif {"text", "prompt_length"} <= keys:
            ids, length = _pair(record["text"], record["prompt_length"], where, tokenizer)
        else:
            raise ValueError(
                f"{where} must have prompt and completion, or messages, or text and prompt_length; "
                f"it has {sorted(map(str, keys))}"
            )
    elif isinstance(record, (tuple, list)) and len(record) == 2:
        ids, length = _pair(record[0], record[1], where, tokenizer)
    else:
        size = f" of {len(record)}" if isinstance(record, (tuple, list)) else ""
        raise TypeError(f"{where} must be a pair (text, prompt_length) or a mapping, got {type(record).__name__}{size}")
    ids = ids[:max_length]
    if max(length, 1) >= len(ids):
        raise ValueError(
            f"{where} has nothing to predict: prompt_length is {length}, and the text has {len(ids)} tokens "
            f"(max_length {max_length})"
        )
    return Example(ids, length, task)


def _pair(text: Any, length: Any, where: str, tokenizer: Any) -> tuple[list[int], int]:
    if not isinstance(text, str) or isinstance(length, bool) or not isinstance(length, numbers.Integral):
        raise TypeError(f"{where} must be a pair (str, int), got ({type(text).__name__}, {type(length).__name__})")
    if length < 0:
        raise ValueError(f"{where}: prompt_length must not be negative, got {length}")
    return encode(text, where, tokenizer), int(length)


def _completion(prompt: Any, completion: Any, record: Mapping, where: str, tokenizer: Any) -> tuple[list[int], int]:
    if isinstance(prompt, str) and isinstance(completion, str):
        ids, length = _join(prompt, completion, where, tokenizer)
        return ([*ids, end_token(None, None, where, tokenizer)] if _ended(record, where) else ids), length
    if isinstance(prompt, str) or isinstance(completion, str):
        raise TypeError(
            f"{where}: prompt and completion must both be strings or both be messages, got "
            f"{type(prompt).__name__} and {type(completion).__name__}"
        )
    return _conversation(prompt, completion, record, where, tokenizer)


def _reply(messages: Any, completion: Any, record: Mapping, where: str, tokenizer: Any) -> tuple[list[int], int]:
    """Tokenize `messages` and the text that a model wrote in reply to them."""
    if not isinstance(completion, str):
        raise TypeError(f"{where}: the completion of messages must be a text, got {type(completion).__name__}")
    options = record.get("chat_template_kwargs")
    prompt = write_prompt(messages, options, where, tokenizer)
    ids, length = _join(prompt, completion, where, tokenizer, add_special_tokens=False)
    return ([*ids, end_token(messages, options, where, tokenizer)] if _ended(record, where) else ids), length


def _ended(record: Mapping, where: str) -> bool:
    ended = record.get("ended")
    if ended is not None and not isinstance(ended, bool):
        raise TypeError(f"{where}: ended must be true or false, got {ended!r}")
    return bool(ended)


def _conversation(messages: Any, reply: Any, record: Mapping, where: str, tokenizer: Any) -> tuple[list[int], int]:
    """Tokenize a conversation as the template writes it. The prompt is the text that the template writes before a
    reply."""
    for part in (messages,) if reply is None else (messages, reply):
        check_messages(part, where)
    if reply is None:
        messages, reply = messages[:-1], messages[-1:]
    if reply[-1].get("role") != "assistant" or not messages:
        raise ValueError(f"{where}: the last message must be the assistant's, after at least one other")
    options = chat_options(record.get("chat_template_kwargs"), where)
    prompt = write(messages, where, tokenizer, **{**options, "add_generation_prompt": True})
    whole = write([*messages, *reply], where, tokenizer, **options)
    if not whole.startswith(prompt):
        raise ValueError(
            f"{where}: the chat template does not write the prompt in the same way with the reply and without it, "
            f"so they cannot be separated; give messages and the completion as a text"
        )
    return _join(prompt, whole[len(prompt) :], where, tokenizer, add_special_tokens=False)


def _join(prompt: str, completion: str, where: str, tokenizer: Any, **options: bool) -> tuple[list[int], int]:
    """Tokenize prompt and completion together. If a token would reach across their border, tokenize them separately,
    because generation continues from the tokens of the prompt alone."""
    start, ids = (encode(text, where, tokenizer, **options) for text in (prompt, prompt + completion))
    if ids[: len(start)] != start:
        ids = start + encode(completion, where, tokenizer, add_special_tokens=False)
    return ids, len(start)
