"""Find a model and its tokenizer, or refuse it with a short message before weights are loaded."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from s0kernels.modules.families import family_of, unsupported_reason
from s0kernels.progress import say, watched

#: arguments of a model that its tokenizer is loaded with as well
_WHERE_FROM = ("revision", "code_revision", "token", "trust_remote_code", "cache_dir", "local_files_only", "subfolder")
#: the directory of a model has one of these files
_MODELS = ("config.json", "adapter_config.json", "params.json")

#: time limit for an answer of the hub, in seconds
_PATIENCE = 10


def find_model(name: str | os.PathLike[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords for `from_pretrained` in addition to `options`. If the hub cannot be reached and the model
    has been downloaded before, they say to use the local copy.

    Raises:
        TypeError: `name` is neither a string nor a path.
        OSError: there is no such directory, the hub has no such model, or the hub cannot be reached.
        ValueError: the directory holds no model, or the model's family is not supported.
    """
    _check_path(name, **options)
    extra = {} if Path(name).is_dir() else _ask_hub(str(name), options)
    _check_family(name, {**options, **extra})
    return extra


def _check_path(
    model_name: str | os.PathLike[str], subfolder: str = "", gguf_file: str | None = None, **_: Any
) -> None:
    """Raise an error if a path holds no model. A name that is not a path here may be the name of a model on the hub.

    Raises:
        ValueError, FileNotFoundError: there is no model; the message has the path.
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
    """Load the tokenizer of a model with `auto` (transformers' AutoTokenizer) and those arguments of the model that say
    where it is.

    Raises:
        ValueError: the model has no tokenizer.
    """
    given = {key: model_kwargs[key] for key in _WHERE_FROM if key in model_kwargs}
    try:
        return auto.from_pretrained(model_name, **given)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{model_name}: cannot load a tokenizer from there ({str(error).strip().partition(chr(10))[0]}); put it "
            "beside the model, or pass it: S0Trainer(model, tokenizer)"
        ) from error


@contextlib.contextmanager
def bars_where_watched(model_name: str | os.PathLike[str]) -> Iterator[None]:
    """While a model is loaded: the bars of transformers and of the hub, or a line where nobody watches them."""
    from transformers.utils import logging

    if watched():
        yield
        return
    say(f"loading {model_name}")
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


def _ask_hub(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(
            f"there is no directory {name}, and it is not a valid name of a model on the hub"
        ) from None
    place = {key: options[key] for key in ("revision", "cache_dir") if options.get(key) is not None}
    cached = isinstance(try_to_load_from_cache(name, "config.json", **place), str)
    if options.get("local_files_only"):
        if not cached:
            raise FileNotFoundError(f"{name} is not a directory and has not been downloaded (local_files_only)")
        return {}
    try:
        HfApi(token=options.get("token")).model_info(name, revision=options.get("revision"), timeout=_PATIENCE)
    except GatedRepoError as error:
        raise PermissionError(f"{name} needs access permission: see huggingface.co/{name}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is not a directory, and the hub has no model of that name (or it is private: hf auth login)"
        ) from error
    except Exception as error:  # errors of the HTTP library in use
        if not cached:
            raise ConnectionError(
                f"{name} is not a directory, it has not been downloaded before, and the hub cannot be reached: {error}"
            ) from error
        return {"local_files_only": True}
    return {}


def _check_family(name: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    """Raise ValueError if the model's family is not supported. The model is built without its weights."""
    if options.get("gguf_file") is not None:
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    shared = {key: options[key] for key in _WHERE_FROM if key in options}
    config = options.get("config") or AutoConfig.from_pretrained(name, **shared)
    if shared.get("trust_remote_code") or not isinstance(config, tuple(AutoModelForCausalLM._model_mapping.keys())):
        return  # loading the model reports the error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if not any(family_of(module) for module in model.modules()):
        raise ValueError(f"{name} is a {type(model).__name__}, which has {unsupported_reason(model)}")
