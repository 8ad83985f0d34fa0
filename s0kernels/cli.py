"""python -m s0kernels: what is installed and whether it is right, how fast it is, tuning and generating."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import s0kernels
from s0kernels.bench import tables
from s0kernels.hardware import CHIPS
from s0kernels.progress import Progress, silent


class Command(NamedTuple):
    """`examples` can be copied, behind the program's name. `add` gives a parser its arguments. `run` gives the exit
    status, and None is 0. A `long` command says how far it is, and can be told not to."""

    about: str
    examples: tuple[str, ...]
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    long: bool = True


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(given: list[str]) -> int:
    if not given:
        print(greeting(), flush=True)
        return 0
    options = _parse(given)
    try:
        with silent(options.quiet):
            return COMMANDS[options.command].run(options) or 0
    except ImportError as error:
        from s0kernels.messages import advice

        print(f"s0kernels {options.command}: {advice(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\ns0kernels {options.command}: interrupted{_how_to_resume(options)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"s0kernels {options.command}: {error}", file=sys.stderr)
    return 1


def greeting() -> str:
    """What this is, and the commands that one needs."""
    lines = [f"s0kernels {s0kernels.__version__}: {_about()[0].lower()}{_about()[1:]}", ""]
    for name, about in _FIRST.items():
        lines += [f"{about}:", f"    {_program()} {COMMANDS[name].examples[0]}"]
    return "\n".join([*lines, "", f"All commands: {_program()} --help. One in full: {_program()} tune --help."])


def make_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Of all commands, with the arguments of one: those of several take their choices from what needs torch."""
    parser = argparse.ArgumentParser(prog=_program(), description=_about())
    parser.add_argument("--version", action="version", version=s0kernels.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (about, examples, add, _, long) in COMMANDS.items():
        shown = "\n".join(f"  {_program()} {example}" for example in examples)
        known = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=f"{'example' if len(examples) == 1 else 'examples'}:\n{shown}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        known.set_defaults(quiet=False)
        if name == command:
            add(known)
        if long:
            known.add_argument("--quiet", action="store_true", help="do not say on standard error how far the work is")
    return parser


def _parse(given: list[str]) -> argparse.Namespace:
    """argparse takes no prompts behind an option, since it has found none before: here they may stand there."""
    parser = make_parser(given[0])
    options, rest = parser.parse_known_args(given)
    if rest and (options.command != "generate" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.prompt += rest
    return options


def _program() -> str:
    return "python -m s0kernels" if sys.argv[0].endswith("__main__.py") else "s0kernels"


def _about() -> str:
    return (s0kernels.__doc__ or "").partition("\n")[0]


def _how_to_resume(options: argparse.Namespace) -> str:
    if options.command == "collect":
        return f"; the same command goes on from {options.output}"
    if options.command == "evaluate" and options.out is not None:
        return f"; the same command goes on from {options.out}"
    if options.command != "tune":
        return ""
    if options.collect:
        return f"; what is decided about problems is in {options.output}, and the same command goes on from there"
    if options.checkpoint is None:
        return "; nothing was kept: with --checkpoint FILE the same command goes on from the last step"
    if options.checkpoint.exists():
        return f"; the same command goes on from {options.checkpoint}"
    return f" before the first step was saved to {options.checkpoint}"


def _add_nothing(_: argparse.ArgumentParser) -> None:
    pass


def _add_collect(parser: argparse.ArgumentParser) -> None:
    from s0kernels.tuning.problem_commands import add_collect_arguments

    add_collect_arguments(parser)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    from s0kernels.tuning.command import add_arguments

    add_arguments(parser)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    from s0kernels.tuning.problem_commands import add_evaluate_arguments

    add_evaluate_arguments(parser)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    from s0kernels.tuning.problem_commands import add_model

    add_model(parser)
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="*", help="text to continue (default: a JSON list of them on standard input)"
    )
    parser.add_argument(
        "--states", type=Path, metavar="DIRECTORY", help="start from these learned states (default: from zero)"
    )
    parser.add_argument("--task", help="start from this task, where the directory holds several")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", default=512, help="end an answer after so many tokens (default: 512)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of the new texts")


def _add_aot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chip", action="append", choices=CHIPS, help="compile for this GPU; may be repeated (default: for all)"
    )
    parser.add_argument(
        "--case", action="append", help="compile the kernels of this case; may be repeated (default: of all)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from s0kernels.bench.command import add_arguments

    add_arguments(parser)


def _check(_: argparse.Namespace) -> int:
    from s0kernels.bench import check

    found = []
    with Progress("checking", check.count(), "result") as bar:
        for row in check.rows():
            found.append(row)
            bar.reach(len(found))
    table = [
        (*row[:4], row.worst, f"{row.error:.1e}", f"{row.budget:.1e}", "passed" if row.passed else "FAILED")
        for row in found
    ]
    for index, gpu in enumerate(_gpus()):
        print(f"cuda:{index} is a {gpu}")
    print(tables.plain(("device", "op", "backend", "dtype", "worst result", "error", "allowed", ""), table))
    return int(not all(row.passed for row in found))


def _bench(options: argparse.Namespace) -> None:
    from s0kernels.bench.command import run

    run(options)


def _aot(options: argparse.Namespace) -> None:
    from s0kernels.backends.triton import aot

    cases, chips = options.case or list(aot.CASES), options.chip or list(CHIPS)
    if unknown := [case for case in cases if case not in aot.CASES]:
        raise ValueError(f"--case must be among {', '.join(aot.CASES)}, got {unknown[0]!r}")
    rows = []
    with Progress("compiling", None, "kernel") as bar:
        for row in aot.table(cases, chips):
            rows.append(row)
            bar.reach(len(rows))
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(tables.plain(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))


def _env(_: argparse.Namespace) -> None:
    import torch

    from s0kernels.calls import Call
    from s0kernels.ops import registry

    rows = [("s0kernels", s0kernels.__version__), ("python", platform.python_version())]
    for package in ("torch", "numpy", "safetensors", "transformers", "accelerate", "triton", "causal-conv1d"):
        rows.append((package, _version(package)))
    rows.append(("platform", platform.platform()))
    rows.append(("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"))
    devices = [torch.device("cpu")]
    for index, found in enumerate(_gpus()):
        rows.append((f"cuda:{index}", found))
        devices.append(torch.device("cuda", index))
    if not torch.cuda.is_available():
        rows.append(("cuda", "no device"))
    print(tables.plain(("what", "found"), rows))
    print()
    backends = []
    for device in devices:
        for op in registry.OPS:
            reasons = registry.explain(Call(op, device, torch.float32))
            default = next(name for name, reason in reasons.items() if reason is None)
            for name, reason in reasons.items():
                verdict = reason or ("usable, the default here" if name == default else "usable")
                backends.append((str(device), op, name, verdict))
    print(tables.plain(("device", "op", "backend", "for fp32"), backends))


def _gpus() -> list[str]:
    """Each one's name, what is compiled for it, and what is known of that."""
    import torch

    from s0kernels.hardware import experience, target_name

    found = []
    for index in range(torch.cuda.device_count()):
        target = target_name(torch.cuda.get_device_properties(index), torch.version.hip)
        found.append(f"{torch.cuda.get_device_name(index)}, {target}: {experience(target)}")
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _tune(options: argparse.Namespace) -> None:
    from s0kernels.tuning.command import run

    run(options, tables.plain)


def _collect(options: argparse.Namespace) -> None:
    from s0kernels.tuning.problem_commands import run_collect

    run_collect(options)


def _evaluate(options: argparse.Namespace) -> None:
    from s0kernels.tuning.problem_commands import run_evaluate

    run_evaluate(options, tables.plain)


def _generate(options: argparse.Namespace) -> None:
    from s0kernels import S0Trainer

    if options.task is not None and options.states is None:
        raise ValueError("--task names one of the tasks in --states, which is missing")
    prompts = options.prompt or _read_prompts(sys.stdin.read())
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("the prompts must be a JSON list of strings")
    trainer = S0Trainer.from_pretrained(options.model)
    if options.states is not None:
        trainer.load(options.states)
        trainer.activate(options.task)
    texts = trainer.generate(prompts, max_new_tokens=options.max_new_tokens, do_sample=False)
    if options.json:
        print(json.dumps(texts))
    else:
        for text in texts:
            print(text)


def _read_prompts(text: str) -> list[str]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"standard input must hold a JSON list of prompts: {error}") from error


_MODEL = "Qwen/Qwen3.5-4B"
COMMANDS = {
    "env": Command(
        "list versions, devices, and which backends can be used or why not", ("env",), _add_nothing, _env, long=False
    ),
    "check": Command(
        "check every usable backend on every device against the recurrence in fp64", ("check",), _add_nothing, _check
    ),
    "collect": Command(
        "sample solutions of problems, and keep those that pass their tests",
        (f"collect {_MODEL} problems.jsonl solutions.jsonl",),
        _add_collect,
        _collect,
    ),
    "tune": Command(
        "learn S0 from a file of prompts and completions, or of problems",
        (f"tune {_MODEL} problems.jsonl states --collect", f"tune {_MODEL} solutions.jsonl states --n-steps 20"),
        _add_tune,
        _tune,
    ),
    "generate": Command(
        "continue prompts, with or without learned states",
        (f'generate {_MODEL} "def add(a, b):" --states states --max-new-tokens 64',),
        _add_generate,
        _generate,
    ),
    "evaluate": Command(
        "count how many problems the base solves, and how many it solves from S0",
        (f"evaluate {_MODEL} heldout.jsonl --states states",),
        _add_evaluate,
        _evaluate,
    ),
    "bench": Command(
        "measure times, memory and roofline of the scans, beside the libraries that are installed",
        ("bench", "bench --shape qwen3.5-4b:1x2048 --pass forward --dtype float32"),
        _add_bench,
        _bench,
    ),
    "aot": Command(
        "compile the Triton kernels for GPUs, with or without one, and list registers and spills",
        ("aot --chip sm_90",),
        _add_aot,
        _aot,
    ),
}
#: those that one needs first, with what they are for
_FIRST = {
    "env": "What is installed, and which backends run here",
    "check": "Whether they compute the right thing",
    "tune": "Learn S0 from problems that have tests or answers",
    "generate": "Continue a prompt from it",
    "evaluate": "How many other problems the model solves without S0 and with it",
}
