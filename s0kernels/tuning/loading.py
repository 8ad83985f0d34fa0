"""Models and what lies with them: found, or refused at once and in a line, before anything large is loaded."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from s0kernels.modules.families import family_of, what_is_missing
from s0kernels.progress import say, watched

#: arguments of a model that are its tokenizer's as well
_WHERE_FROM = ("revision", "code_revision", "token", "trust_remote_code", "cache_dir", "local_files_only", "subfolder")
#: files of which a model's directory has one
_MODELS = ("config.json", "adapter_config.json", "params.json")

#: seconds that the hub has to answer
_PATIENCE = 10


def find_model(name: str | os.PathLike[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` is to be told besides `options`, its own keywords: where the hub cannot be reached, and
    the model has been loaded before, to look for nothing newer.

    Raises:
        TypeError: the name is no name.
        OSError: there is no such directory, or the hub has no such model, or cannot be reached.
        ValueError: it is no model, or none of a supported family.
    """
    _check_path(name, **options)
    extra = {} if Path(name).is_dir() else _ask_hub(str(name), options)
    _check_family(name, {**options, **extra})
    return extra


def _check_path(
    model_name: str | os.PathLike[str], subfolder: str = "", gguf_file: str | None = None, **_: Any
) -> None:
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
        raise FileNotFoundError(f"there is no directory {name}, and models on the hub have no such names") from None
    place = {key: options[key] for key in ("revision", "cache_dir") if options.get(key) is not None}
    cached = isinstance(try_to_load_from_cache(name, "config.json", **place), str)
    if options.get("local_files_only"):
        if not cached:
            raise FileNotFoundError(f"{name} is neither a directory nor has it been downloaded (local_files_only)")
        return {}
    try:
        HfApi(token=options.get("token")).model_info(name, revision=options.get("revision"), timeout=_PATIENCE)
    except GatedRepoError as error:
        raise PermissionError(f"{name} is for those who were given access to it: see huggingface.co/{name}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is no directory, and the hub has no model of that name (or it is private: hf auth login)"
        ) from error
    except Exception as error:  # of whichever HTTP library
        if not cached:
            raise ConnectionError(
                f"{name} is no directory, it has not been downloaded before, and the hub cannot be reached: {error}"
            ) from error
        return {"local_files_only": True}
    return {}


def _check_family(name: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    """By the model without its weights."""
    if options.get("gguf_file") is not None:
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    shared = {key: options[key] for key in _WHERE_FROM if key in options}
    config = options.get("config") or AutoConfig.from_pretrained(name, **shared)
    if shared.get("trust_remote_code") or not isinstance(config, tuple(AutoModelForCausalLM._model_mapping.keys())):
        return  # whoever loads it says what is wrong
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if not any(family_of(module) for module in model.modules()):
        raise ValueError(f"{name} is a {type(model).__name__}, which has {what_is_missing(model)}")
