"""`python -m s0kernels tune`: read options and a settings file, check them before the model is loaded, train,
report."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from s0kernels.config import S0Config
from s0kernels.tuning.problem_commands import (
    add_model,
    add_tune_arguments,
    check_tune_options,
    checker,
    find_solutions,
    print_heldout,
    sampling,
    split,
)

#: arguments of S0Trainer.train that are options of the command
_OF_TRAIN = ("scale", "layers", "tokens_per_batch", "max_memory", "packed", "checkpoint", "checkpoint_every")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "data",
        metavar="DATA",
        type=Path,
        help='a file of JSON lines, each {"prompt": ..., "completion": ...} or {"messages": [...]}; or a directory of '
        "such .jsonl files, of which each is a task, and all are learned at once",
    )
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="directory to write the learned states to")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a YAML file of the options below (n_steps: 20); options on the command line take precedence",
    )
    _add_method(parser)
    _add_run(parser)
    add_tune_arguments(parser)


def _add_method(parser: argparse.ArgumentParser) -> None:
    method = parser.add_argument_group("method (the fields of S0Config)")
    defaults = S0Config()
    for names, kind, text in (
        (("--n-steps", "--steps"), int, "optimization steps"),
        (("--lr",), float, "learning rate"),
        (("--l2-lambda",), float, "weight of the sum of squares of the states in the loss"),
        (("--alpha",), float, "factor that multiplies the states in use (default: that of the architecture)"),
        (("--grad-clip",), float, "largest norm of the gradient"),
        (("--max-length",), int, "maximum length of an example in tokens; longer ones are cut"),
    ):
        default = getattr(defaults, names[0].lstrip("-").replace("-", "_"))
        text += "" if default is None else f" (default: {default:g})"
        method.add_argument(*names, type=kind, metavar="N" if kind is int else "X", help=text)
    method.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="divide each state by its norm before it is scaled (default: no)",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run (the arguments of S0Trainer.train)")
    run.add_argument(
        "--scale",
        metavar="X",
        help="scale the states by this while they learn; alpha: as they will be used (default: 1)",
    )
    run.add_argument(
        "--layers", metavar="N,N", help="learn states of these recurrent layers alone, as 0,1,2 (default: of all)"
    )
    run.add_argument(
        "--tokens-per-batch",
        type=int,
        metavar="N",
        help="take at most so many tokens in a forward; 1: one example (default: as many as fit and pay)",
    )
    run.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="take at most this memory beyond the model, as 8GiB (default: most of what is free)",
    )
    run.add_argument(
        "--packed",
        action=argparse.BooleanOptionalAction,
        help="lay examples end to end, or pad them (default: end to end where the model has flash attention)",
    )
    run.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="save the run to this file, and go on from it if it is there"
    )
    run.add_argument("--checkpoint-every", type=int, metavar="N", help="save it every so many steps (default: 1)")


def settings(options: argparse.Namespace) -> tuple[S0Config, dict[str, Any]]:
    """Return the config and the arguments of `train`, from the command line and the settings file."""
    ours = [field.name for field in fields(S0Config)]
    known = [*ours, *_OF_TRAIN]
    given = {} if options.config is None else _read(options.config, known)
    given |= {name: value for name in known if (value := getattr(options, name)) is not None}
    config = S0Config(**{name: _number(value) for name, value in given.items() if name in ours})
    train = {name: value for name, value in given.items() if name not in ours}
    for name, kind in (("scale", _scale), ("layers", _layers), ("max_memory", _bytes)):
        if name in train:
            train[name] = kind(train[name])
    return config, train


def _read(file: Path, known: Sequence[str]) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must be a mapping of options to values, got {type(found).__name__}")
    unknown = sorted(str(name) for name in found if name not in known)
    if unknown:
        raise ValueError(f"{file}: there is no option {unknown[0]!r}; the options are {', '.join(known)}")
    return found


def _number(value: Any) -> Any:
    """Convert a number that YAML reads as a text, such as 1e-3."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _scale(value: Any) -> Any:
    found = value if value == "alpha" else _number(value)
    if isinstance(found, str) and found != "alpha":
        raise ValueError(f"--scale must be a number or alpha, got {value!r}")
    return found


def _layers(value: Any) -> list[int]:
    try:
        return [int(layer) for layer in (value.split(",") if isinstance(value, str) else value)]
    except (TypeError, ValueError):
        raise ValueError(f"--layers must be indices of layers, such as 0,1,2, got {value!r}") from None


def _bytes(value: Any) -> int:
    units = {
        "": 1,
        "B": 1,
        "K": 2**10,
        "M": 2**20,
        "G": 2**30,
        "KIB": 2**10,
        "MIB": 2**20,
        "GIB": 2**30,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
    }
    text = str(value).replace(" ", "")
    number = text.rstrip("BGKMibgkm")
    try:
        return int(float(number) * units[text[len(number) :].upper()])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"--max-memory must be a number of bytes or a size such as 8GiB, got {value!r}") from None


def run(options: argparse.Namespace, table: Callable[[Sequence[str], Sequence[Sequence[str]]], str]) -> None:
    """Run the command. `table` formats a head and rows as a text."""
    config, train = settings(options)
    check_tune_options(options)
    data = _files(options.data)

    from transformers import AutoTokenizer

    from s0kernels import S0Trainer
    from s0kernels.files import check_output
    from s0kernels.states import states_size
    from s0kernels.tuning.data import read_tasks
    from s0kernels.tuning.loading import find_model, load_tokenizer
    from s0kernels.tuning.processes import processes

    found = find_model(options.model, {})
    tokenizer = load_tokenizer(AutoTokenizer, options.model, found)
    check, heldout = None, {}
    if options.collect:
        check = checker(options)
        others = None if options.heldout is None else _by_task(_files(options.heldout))
        problems, heldout = split(_by_task(data), others, tokenizer, sampling(options).chat_template_kwargs, check)
    else:
        problems = {}
        read_tasks(data, tokenizer, config.max_length)
    check_output(options.output, states_size(options.model, len(data) if isinstance(data, dict) else 1))
    trainer = S0Trainer.from_pretrained(options.model, config, **found)
    if train.get("scale") == "alpha":
        train["scale"] = trainer.alpha
    if options.collect:
        data = find_solutions(trainer, problems, options.output, check, options)
    result = trainer.train(data, **train)
    trainer.save(options.output)
    if processes().is_main_process:
        _report(trainer, data, result["final_loss"], train.get("scale", 1.0), table)
    if options.collect:
        print_heldout(trainer, heldout, options.output, check, options, table)
    if processes().is_main_process:
        print(f"states in {options.output}")


def _by_task(files: Path | dict[str, Path]) -> dict[Any, Path]:
    return files if isinstance(files, dict) else {None: files}


def _report(trainer: Any, data: Any, last: float, scale: float, table: Callable) -> None:
    """Print the losses without S0 and with the states at alpha, for each task if there are several."""
    names, first = trainer.tasks, trainer.history[0] if trainer.history else {}
    trainer.activate(None if names is None else names[0])
    found = trainer.evaluate(data)  # with a mapping, each task uses its own states
    trainer.deactivate()
    after = {None: found} if names is None else found
    before = first.get("loss", last)
    print(f"loss {before:.4f} -> {sum(after.values()) / len(after):.4f} with the states at alpha")
    print(f"S0 is multiplied by {scale:g} in training (last step: {last:.4f}) and by {trainer.alpha:g} (alpha) in use")
    if names is not None and len(names) > 1:
        befores, lasts = (trainer.history[i].get("losses", {}) if trainer.history else {} for i in (0, -1))
        rows = [[f"{found[name]:.4f}" if name in found else "" for found in (befores, after, lasts)] for name in names]
        head = ("task", "before", "in use", f"at scale {scale:g}")
        print(table(head, [(name, *row) for name, row in zip(names, rows, strict=True)]))


def _files(path: Path) -> Path | dict[str, Path]:
    if not path.exists():
        raise FileNotFoundError(f"no {path}")
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{path} holds no .jsonl files")
    return {file.stem: file for file in files}
