"""What lies with a model on disk, looked at before transformers does, whose errors say less."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: arguments of a model that are its tokenizer's as well
_WHERE_FROM = ("revision", "code_revision", "token", "trust_remote_code", "cache_dir", "local_files_only", "subfolder")
#: files of which a model's directory has one
_MODELS = ("config.json", "adapter_config.json", "params.json")


def check_model(model_name: str | os.PathLike, subfolder: str = "", gguf_file: str | None = None, **_: Any) -> None:
    """Refuse a path that holds no model. A name that is no path here may be one on the hub.

    Raises:
        ValueError, FileNotFoundError: with the path.
    """
    if not isinstance(model_name, (str, os.PathLike)):
        raise TypeError(f"S0Trainer: model_name must be a name or a directory, got {model_name!r}")
    path = Path(model_name)
    if not path.exists():
        if path.is_absolute() or str(model_name).startswith((".", "~")):
            raise FileNotFoundError(f"there is no model in {model_name}: no such directory")
        return
    folder = path / subfolder
    if gguf_file is None and not any((folder / name).is_file() for name in _MODELS):
        what = "a file" if folder.is_file() else "a directory without config.json"
        raise ValueError(f"{folder} is not a model: it is {what}")


def load_tokenizer(auto: Any, model_name: str, model_kwargs: Mapping[str, Any]) -> Any:
    """The tokenizer that lies with a model, by `auto` (transformers' AutoTokenizer) and those of the model's arguments
    that say where that is.

    Raises:
        ValueError: there is a model but no tokenizer.
    """
    given = {key: model_kwargs[key] for key in _WHERE_FROM if key in model_kwargs}
    try:
        return auto.from_pretrained(model_name, **given)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{model_name}: no tokenizer can be loaded from there ({str(error).strip().partition(chr(10))[0]}); it has "
            "to lie with the model, or be given: S0Trainer(model, tokenizer)"
        ) from error
