"""Run S0 tuning and its baselines by the protocol of the method's paper, with statistics.

    python benchmarks/quality/run.py main                    on the two tiny models, offline, ten seeds
    python benchmarks/quality/run.py all                     every experiment
    python benchmarks/quality/run.py main --models Qwen/Qwen3.5-4B --task humaneval --rows 64
    python benchmarks/quality/run.py main --models Qwen/Qwen3.5-4B --task spider --task-option databases=spider/database

The options of a task are the fields of its class in tasks/, where they are documented.

Each experiment writes one JSON file per model after every run, and resumes from it. At the end it prints its table and
saves its plot.
"""

import argparse
import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path

import experiments
import tables
import torch
from protocol import SEEDS, Base, Results
from tasks import TASKS, get_task

from s0kernels import S0Config, S0Trainer
from s0kernels.bench import measure
from s0kernels.tuning.verify.sandbox import confinement

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny"
RESULTS = ROOT / "benchmarks" / "results" / "quality"
TINY_MODELS = ("qwen3_5", "falcon_h1")
SIZES = ("qwen3_5-64", "qwen3_5-96", "qwen3_5")
LONGEST = 8192  # maximum number of tokens of an example; prompts with the tables of a database are long
#: default number of seeds; these are the paper's numbers, except for the sweeps, for which it uses one
DEFAULT_SEEDS = {"main": 10, "passk": 3, "size": 5, "variants": 5, "boundary": 5, "persistence": 3}


class Options(argparse.Action):
    """Collects NAME=VALUE."""

    def __call__(self, parser, namespace, value, flag=None) -> None:
        name, sign, text = value.partition("=")
        if not sign or not name:
            parser.error(f"{flag} must be NAME=VALUE, got {value!r}")
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), name: text})


def model_folder(name: str, output: Path) -> str:
    """Return the folder of a tiny model, which is trained first if it has another width; or the name for transformers
    to load."""
    if (TINY / name).is_dir():
        return str(TINY / name)
    if name not in SIZES:
        return name
    architecture, width = name.split("-")
    folder = output / "cache" / "models" / name
    if not folder.is_dir():
        command = [sys.executable, TINY / "train.py", architecture, "--width", width, "--threads", "1", "--out", folder]
        subprocess.run(command, check=True)
    return str(folder)


def prepare(experiment: str, name: str, options: argparse.Namespace) -> experiments.Run:
    given = {} if experiment == "boundary" else options.task_option
    task = get_task("boundary" if experiment == "boundary" else options.task, given)
    tune, heldout = [items[: options.limit] for items in task.load()]
    trainer = S0Trainer.from_pretrained(model_folder(name, options.output), S0Config(max_length=LONGEST))
    trainer.model.requires_grad_(False)
    if task.chat and not getattr(trainer.tokenizer, "chat_template", None):
        raise ValueError(f"the tokenizer of {name} has no chat template; give the task style=complete")
    short = name.rstrip("/").rsplit("/", 1)[-1]
    base = Base(short, trainer, task, tune, heldout, options.rows)
    seeds = SEEDS[: options.seeds or DEFAULT_SEEDS.get(experiment, 3)]
    settings = {"model": name, "task": task.name, "samples": task.samples, "solutions": task.solutions}
    settings |= {"options": given} if given else {}
    settings |= {"limit": options.limit} if options.limit else {}
    versions = {package: importlib.metadata.version(package) for package in ("peft", "scipy")}
    about = {"experiment": experiment, "machine": measure.machine(trainer.device.type), "more versions": versions}
    about["sandbox"] = confinement()
    cache = options.output / "cache"
    results = Results(options.output / f"{experiment}-{short}-{task.name}.json", settings, about)
    return experiments.Run(
        base, seeds, results, Results(cache / f"solutions-{short}-{task.name}.json", settings, {}), cache
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=[*experiments.ALL, "all", "report"])
    parser.add_argument("--models", nargs="+", help="tiny models, or names on the hub (default: the tiny models)")
    parser.add_argument("--task", choices=list(TASKS), default="tiny")
    parser.add_argument("--task-option", action=Options, default={}, metavar="NAME=VALUE", help="may be repeated")
    parser.add_argument("--limit", type=int, help="use only so many problems of each part, for a trial")
    parser.add_argument(
        "--seeds", type=int, help=f"number of seeds among {SEEDS}; the default depends on the experiment"
    )
    parser.add_argument("--rows", type=int, default=256, help="number of sequences in a batch")
    parser.add_argument("--threads", type=int, default=1, help="matrices as small as the tiny models' need no more")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"default: {RESULTS.relative_to(ROOT)}, there a folder for each other task, and in its cache for --limit",
    )
    options = parser.parse_args()
    if options.seeds is not None and not 1 <= options.seeds <= len(SEEDS):
        parser.error(f"--seeds must be from 1 to {len(SEEDS)}, got {options.seeds}")
    for name in ("limit", "rows", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if options.output is None:
        options.output = RESULTS if options.task == "tiny" else RESULTS / options.task
        if options.limit:  # a trial must not change the results and the document
            options.output = options.output / "cache" / f"limit-{options.limit}"
    torch.set_num_threads(options.threads)
    chosen = [options.experiment] if options.experiment in experiments.ALL else list(experiments.ALL)
    for experiment in chosen:
        names = options.models or (SIZES if experiment == "size" else TINY_MODELS)
        for name in names if options.experiment != "report" else ():
            try:
                run = prepare(experiment, name, options)
            except (ImportError, OSError, ValueError) as error:
                sys.exit(f"run.py: {error}")
            began = time.perf_counter()
            try:
                experiments.ALL[experiment](run)
            finally:
                run.results.spent(time.perf_counter() - began)
        print(tables.table(experiment, options.output))
        tables.plot(experiment, options.output)
    if options.output == RESULTS:
        tables.write(RESULTS)


if __name__ == "__main__":
    main()
