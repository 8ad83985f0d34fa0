"""python -m s0kernels: what is installed and whether it is right, how fast it is, tuning and generating."""

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import s0kernels
from s0kernels.bench import tables
from s0kernels.hardware import CHIPS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m s0kernels" if sys.argv[0].endswith("__main__.py") else "s0kernels",
        description=(s0kernels.__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("--version", action="version", version=s0kernels.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    env = commands.add_parser("env", help="versions, devices, and which backends can be used or why not")
    env.set_defaults(run=_env)

    check = commands.add_parser("check", help="every usable backend against the recurrence in fp64, on every device")
    check.set_defaults(run=_check)

    collect = commands.add_parser("collect", help="sample solutions of problems, and keep those that pass their tests")
    collect.set_defaults(run=_collect)

    tune = commands.add_parser("tune", help="learn S0 from a file of prompts and completions, or of problems")
    tune.set_defaults(run=_tune)

    evaluate = commands.add_parser("evaluate", help="how many problems the base solves, and how many S0")
    evaluate.set_defaults(run=_evaluate)

    generate = commands.add_parser("generate", help="continue a prompt, with or without learned states")
    generate.add_argument("model", help="a model directory, or its name on the hub")
    generate.add_argument("prompt", nargs="*", help="prompts; none reads a JSON list of them from standard input")
    generate.add_argument("--states", type=Path, help="directory of learned states; without it S0 is zero")
    generate.add_argument("--task", help="which task, where the directory holds several")
    generate.add_argument("--max-new-tokens", type=int, default=512)
    generate.add_argument("--json", action="store_true", help="print a JSON list of the new texts")
    generate.set_defaults(run=_generate)

    aot = commands.add_parser("aot", help="compile the Triton kernels for GPUs, with or without one: registers, spills")
    aot.add_argument("--chip", action="append", choices=CHIPS, help="what it is compiled for (default: all of them)")
    aot.add_argument("--case", action="append", help="name of a case (default: all of them)")
    aot.add_argument("--json", action="store_true", help="print a JSON list of rows")
    aot.set_defaults(run=_aot)

    bench = commands.add_parser("bench", help="times, memory and roofline of the scans, beside the libraries installed")
    bench.set_defaults(run=_bench)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["bench"]:  # its choices come from what needs torch
        from s0kernels.bench.command import add_arguments

        add_arguments(bench)

    if given[:1] == ["tune"]:
        from s0kernels.tuning.command import add_arguments as add_tune_arguments

        add_tune_arguments(tune)

    if given[:1] in (["collect"], ["evaluate"]):
        from s0kernels.tuning import problem_commands

        problem_commands.add_collect_arguments(collect)
        problem_commands.add_evaluate_arguments(evaluate)

    options = parser.parse_args(given)
    try:
        return options.run(options) or 0
    except ImportError as error:
        from s0kernels.messages import advice

        print(f"s0kernels {options.command}: {advice(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\ns0kernels {options.command}: interrupted{_how_to_resume(options)}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"s0kernels {options.command}: {error}", file=sys.stderr)
    return 1


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


def _check(_: argparse.Namespace) -> int:
    from s0kernels.bench import check

    found = []
    for row in check.rows():
        found.append(row)
        print(f"\r{len(found)} checked", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
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
    for row in aot.table(cases, chips):
        rows.append(row)
        print(f"\r{len(rows)} launches compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
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
