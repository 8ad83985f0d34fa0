"""Names of models: found, or refused at once and in a line, before anything large is loaded."""

import os
from pathlib import Path
from typing import Any

import torch

from s0kernels.modules.families import family_of, supported

#: seconds that the hub has to answer
_PATIENCE = 10


def find_model(name: str | os.PathLike, options: dict[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` is to be told besides `options`, its own keywords: where the hub cannot be reached, and
    the model has been loaded before, to look for nothing newer.

    Raises:
        OSError: there is no such directory, or the hub has no such model, or cannot be reached.
        ValueError: it is no model of a supported family.
    """
    extra = {} if Path(name).is_dir() else _ask_hub(str(name), options)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{name} is no model: there is no config.json in it")
    _check_family(name, {**options, **extra})
    return extra


def _ask_hub(name: str, options: dict[str, Any]) -> dict[str, Any]:
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


def _check_family(name: str | os.PathLike, options: dict[str, Any]) -> None:
    """By the model without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {"revision", "token", "trust_remote_code", "cache_dir", "local_files_only"} & set(options)
    shared = {key: options[key] for key in keys}
    config = options.get("config") or AutoConfig.from_pretrained(name, **shared)
    if shared.get("trust_remote_code") or not isinstance(config, tuple(AutoModelForCausalLM._model_mapping.keys())):
        return  # whoever loads it says what is wrong
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if not any(family_of(module) for module in model.modules()):
        raise ValueError(f"{name} is a {type(model).__name__}, which has no recurrent mixer of {supported()}")
