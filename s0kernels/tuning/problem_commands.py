"""`python -m s0kernels collect` and `evaluate`: options for the checker and for sampling, and the printed results."""

import argparse
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from s0kernels.messages import some
from s0kernels.tuning.settings import Sampling

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
_PROBLEMS = (
    'a file of JSON lines, each {"prompt": ...} or {"messages": [...]} with "tests": code or "answer": text; "id", '
    '"entry_point" and "prefix" are optional'
)
#: the arguments of sampling that `collect` and `evaluate` take
_NAMES = ("samples", "max_new_tokens", "temperature", "top_p", "top_k", "stop", "chat_template_kwargs", "seed", "rows")
#: those of them that matter for a greedy answer
_GREEDY = ("max_new_tokens", "stop", "chat_template_kwargs", "rows")
#: `tune --collect` holds out one problem in so many
_EVERY = 4


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory with a model, or a model's name on the hub")


def add_collect_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("problems", metavar="PROBLEMS", type=Path, help=_PROBLEMS)
    parser.add_argument(
        "output", metavar="OUTPUT", type=Path, help="file to write the solutions to, as JSON lines that tune takes"
    )
    parser.add_argument(
        "--solutions", type=int, metavar="N", default=48, help="keep so many solutions, one a problem (default: 48)"
    )
    add_server(parser)
    add_checker(parser)
    add_sampling(parser, Sampling().samples)


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("problems", metavar="PROBLEMS", type=Path, help=_PROBLEMS)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write to this file what is decided; the same command goes on from it"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")
    states = parser.add_argument_group("states")
    states.add_argument(
        "--states", type=Path, metavar="DIRECTORY", help="evaluate these learned states, too (default: the base alone)"
    )
    states.add_argument("--task", help="evaluate this task, where the directory holds several")
    states.add_argument(
        "--alpha",
        metavar="X",
        help="use S0 at this scale, or at several, as 0.03,0.07,0.15 (default: the scale of the states)",
    )
    states.add_argument(
        "--development",
        type=Path,
        metavar="PROBLEMS",
        help="choose among several --alpha by these problems, and evaluate the chosen one by the others",
    )
    add_checker(parser)
    add_sampling(parser, 1)


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("problems instead of solutions")
    group.add_argument(
        "--collect",
        action="store_true",
        help="sample and check solutions first: DATA has problems, as for the command collect",
    )
    group.add_argument(
        "--heldout",
        type=Path,
        metavar="DATA",
        help="evaluate by these problems (default: by every fourth of DATA, from which S0 then does not learn)",
    )
    group.add_argument(
        "--solutions", type=int, metavar="N", help="learn from so many solutions, one a problem (default: 48)"
    )
    add_server(parser)
    add_checker(parser)
    add_sampling(parser, Sampling().samples)


def add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling by a server")
    group.add_argument(
        "--server",
        metavar="URL",
        help="sample from a server with OpenAI's API, as http://localhost:8000/v1, and take the tokenizer alone from "
        "MODEL (default: sample from MODEL)",
    )
    group.add_argument(
        "--served-model", metavar="NAME", help="sample from this model of the server (default: the only one it has)"
    )


def add_checker(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checker")
    group.add_argument(
        "--check",
        choices=("tests", "answer"),
        help="run the problems' tests in the sandbox, or compare with their answer (default: whichever a problem has)",
    )
    group.add_argument(
        "--command",
        dest="checker",
        metavar="PROGRAM",
        help="run a program, given with its arguments as one text: it reads the answer from standard input and the "
        "problem as JSON from S0KERNELS_PROBLEM, and exits with 0 if the answer is right. It runs without sandbox and "
        "without shell",
    )


def add_sampling(parser: argparse.ArgumentParser, samples: int) -> None:
    default = Sampling()
    group = parser.add_argument_group("sampling")
    what = "draw so many samples of each problem"
    if samples == 1:
        what = "give so many answers to each problem: one is the likeliest, several are sampled"
    group.add_argument("--samples", type=int, metavar="N", help=f"{what} (default: {samples})")
    for name, kind, text in (
        ("max_new_tokens", int, "end an answer after so many tokens"),
        ("temperature", float, "sample at this temperature"),
        ("top_p", float, "sample from the likeliest tokens that have this probability together"),
        ("top_k", int, "sample from so many likeliest tokens; 0: from all"),
        ("seed", int, "draw the noise from this seed; it belongs to seed, problem, sample and position"),
    ):
        flag, metavar = f"--{name.replace('_', '-')}", "N" if kind is int else "X"
        help_text = f"{text} (default: {getattr(default, name)})"
        group.add_argument(flag, type=kind, metavar=metavar, help=help_text)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end an answer before this text; may be repeated"
    )
    group.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="give this to the tokenizer's chat template, as '{\"enable_thinking\": true}'",
    )
    group.add_argument(
        "--rows", type=int, metavar="N", help="sample so many sequences at a time (default: as many as fit into memory)"
    )


def sampling_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of sampling that were given, as arguments of the trainer."""
    found = {name: value for name in _NAMES if (value := getattr(options, name)) is not None}
    if "chat_template_kwargs" in found:
        try:
            found["chat_template_kwargs"] = json.loads(found["chat_template_kwargs"])
        except json.JSONDecodeError as error:
            raise ValueError(f"--chat-template-kwargs must be a JSON object: {error}") from error
    return found


def sampling(options: argparse.Namespace) -> Sampling:
    """Return checked settings of sampling, without the number of rows."""
    return Sampling(**{name: value for name, value in sampling_options(options).items() if name != "rows"})


def checker(options: argparse.Namespace) -> Any:
    from s0kernels.tuning.verify.checkers import Answer, ByProblem, Command, Python

    if options.check is not None and options.checker is not None:
        raise ValueError("--check and --command must not both be given")
    if options.checker is not None:
        return Command(shlex.split(options.checker))
    return {"tests": Python, "answer": Answer, None: ByProblem}[options.check]()


def open_trainer(options: argparse.Namespace, files: Sequence[Path], check: Any, config: Any = None) -> Any:
    """Make the trainer. The problems are read first, which needs only its tokenizer."""
    from transformers import AutoTokenizer

    from s0kernels.tuning.loading import find_model, load_tokenizer
    from s0kernels.tuning.problems import read_problems
    from s0kernels.tuning.trainer import S0Trainer

    kwargs = sampling(options).chat_template_kwargs
    found = find_model(options.model, {})
    tokenizer = load_tokenizer(AutoTokenizer, options.model, found)
    for file in files:
        read_problems(file, tokenizer, kwargs, check)
    return S0Trainer.from_pretrained(options.model, config, **found)


def run_collect(options: argparse.Namespace) -> None:
    from s0kernels.tuning.processes import processes

    check = checker(options)
    began = time.perf_counter()
    if options.server is None:
        if options.served_model is not None:
            raise ValueError("--served-model needs --server")
        trainer = open_trainer(options, [options.problems], check)
        given = {"solutions": options.solutions, "out": options.output, **sampling_options(options)}
        found = trainer.collect(options.problems, check, **given)
    else:
        found = _from_server(options, check)
    if processes().is_main_process:
        print(f"{len(found)} solutions in {options.output}, {time.perf_counter() - began:.0f} s")


def _from_server(options: argparse.Namespace, check: Any) -> list[dict[str, Any]]:
    """Collect solutions from a server, without loading the model."""
    import torch
    from transformers import AutoTokenizer

    from s0kernels.tuning import checks
    from s0kernels.tuning.collect import collect_from
    from s0kernels.tuning.deciding import Work
    from s0kernels.tuning.loading import find_model, load_tokenizer
    from s0kernels.tuning.problems import read_problems

    if options.solutions < 1:
        raise ValueError(f"--solutions must be at least 1, got {options.solutions}")
    tokenizer, how = load_tokenizer(AutoTokenizer, options.model, find_model(options.model, {})), sampling(options)
    problems = read_problems(options.problems, tokenizer, how.chat_template_kwargs, check)
    rows = checks.size("rows", options.rows)
    work = Work(problems, check, how, {}, rows, torch.device("cpu"), options.output, True)
    return collect_from(options.server, options.served_model, tokenizer, work, options.solutions)


def run_evaluate(options: argparse.Namespace, table: Table) -> None:
    from s0kernels.tuning.processes import processes

    alphas = _alphas(options)
    check = checker(options)
    files = [file for file in (options.development, options.problems) if file is not None]
    trainer = open_trainer(options, files, check)
    if options.states is not None:
        trainer.load(options.states)
    given = {"check": check, "task": options.task, **sampling_options(options)}
    main, chosen = processes().is_main_process, None
    if options.development is not None:
        out = None if options.out is None else options.out.with_suffix(".development.jsonl")
        swept = trainer.evaluate(options.development, alpha=alphas, out=out, **given)
        chosen = max(swept, key=lambda alpha: swept[alpha].s0)
        if main and not options.json:
            print(
                f"{options.development}\n{sweep_table(swept, table)}\nalpha {chosen:g} is chosen\n\n{options.problems}"
            )
        alphas = [chosen]
    found = trainer.evaluate(options.problems, alpha=alphas, out=options.out, **given)
    found = found if isinstance(found, dict) else {found.alpha: found}
    if not main:
        return
    if options.json:
        print(json.dumps([one.to_dict() for one in found.values()] if len(found) > 1 else one_of(found).to_dict()))
    elif len(found) > 1:
        print(sweep_table(found, table))
        print("do not judge an alpha on the problems that chose it: give others by --development")
    else:
        print_evaluation(one_of(found), table)


def check_tune_options(options: argparse.Namespace) -> None:
    for name in ("heldout", "solutions", "server", "served_model", "check", "checker", *_NAMES):
        if getattr(options, name) is not None and not options.collect:
            flag = "command" if name == "checker" else name.replace("_", "-")
            raise ValueError(f"--{flag} needs --collect")


def split(
    files: Mapping[str | None, Path],
    others: Mapping[str | None, Path] | None,
    tokenizer: Any,
    options: Mapping[str, Any] | None,
    check: Any,
) -> tuple[dict[str | None, list], dict[str | None, list]]:
    """Return (problems to learn from, held-out problems), each by task. The problems held out are `others`, or every
    fourth. `options` are those of the chat template."""
    from s0kernels.tuning.problems import read_problems

    parts: tuple[dict, dict] = ({}, {})
    if others is not None and list(others) != list(files):
        raise ValueError(f"--heldout must have the tasks of DATA, {some(files)}, got {some(others)}")
    for name, file in files.items():
        rows = [{**p.record, "id": p.id} for p in read_problems(file, tokenizer, options, check)]
        if others is not None:
            kept = [{**p.record, "id": p.id} for p in read_problems(others[name], tokenizer, options, check)]
        elif len(rows) < _EVERY:
            raise ValueError(f"{file} has {len(rows)} problems, too few to hold some out; give --heldout")
        else:
            rows, kept = [row for i, row in enumerate(rows, 1) if i % _EVERY], rows[_EVERY - 1 :: _EVERY]
        parts[0][name], parts[1][name] = rows, kept
    return parts


def find_solutions(
    trainer: Any, problems: Mapping[str | None, list], output: Path, check: Any, options: argparse.Namespace
) -> Any:
    """Collect solutions, write them beside the states, and return them as `train` takes them: the list of one task, or
    a mapping of several."""
    from s0kernels.tuning.processes import processes

    found = {}
    for name, rows in problems.items():
        out = output / (name or "") / "solutions.jsonl"
        began = time.perf_counter()
        named = ("solutions", "server", "served_model")
        wanted = {name: value for name in named if (value := getattr(options, name)) is not None}
        found[name] = trainer.collect(rows, check, out=out, **wanted, **sampling_options(options))
        if processes().is_main_process:
            print(f"{len(found[name])} solutions in {out}, {time.perf_counter() - began:.0f} s")
    return found.get(None, found)


def print_heldout(
    trainer: Any,
    problems: Mapping[str | None, list],
    output: Path,
    check: Any,
    options: argparse.Namespace,
    table: Table,
) -> None:
    """Print a table of the greedy results on the held-out problems, for each task."""
    from s0kernels.tuning.processes import processes

    greedy = {name: x for name, x in sampling_options(options).items() if name in _GREEDY}
    for name, rows in problems.items():
        out = output / (name or "") / "heldout.jsonl"
        found = trainer.evaluate(rows, check=check, task=name, out=out, **greedy)
        if processes().is_main_process:
            print("" if name is None else f"{name}\n", end="")
            print_evaluation(found, table)


def one_of(found: Mapping[Any, Any]) -> Any:
    (one,) = found.values()
    return one


def print_evaluation(found: Any, table: Table) -> None:
    print(table(*found.table()))
    for line in found.notes():
        print(line)


def sweep_table(found: Mapping[float, Any], table: Table) -> str:
    """Return a table of the base, and of S0 at each alpha."""
    head, rows = next(iter(found.values())).table()
    return table(head, [rows[0], *(one.table()[1][1] for one in found.values())])


def _alphas(options: argparse.Namespace) -> list[float] | None:
    for name in ("task", "alpha", "development"):
        if getattr(options, name) is not None and options.states is None:
            raise ValueError(f"--{name} needs --states")
    try:
        found = None if options.alpha is None else [float(alpha) for alpha in options.alpha.split(",")]
    except ValueError:
        raise ValueError(f"--alpha must be numbers such as 0.03,0.07, got {options.alpha!r}") from None
    if options.development is not None and len(found or ()) < 2:
        raise ValueError("--development needs several --alpha to choose from, such as 0.03,0.07,0.15")
    return found
