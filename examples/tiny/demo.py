"""S0 tuning from end to end on two tiny models, in a minute or two on a CPU.

For each model: sample functions from the frozen base, run them, keep at most one verified solution per problem, learn
S0 from those, and compare greedy pass@1 on problems that neither the model nor the tuning has seen. The states are
then saved and loaded in a new process, which must generate the same text.

    python examples/tiny/demo.py [--output DIR]
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from s0kernels import S0Config, S0Trainer
from s0kernels.files import replace_file
from s0kernels.tuning.verify.sandbox import confinement

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "benchmarks" / "quality"))
from protocol import Base  # noqa: E402
from tasks import get_task  # noqa: E402

MODELS = {"Qwen3.5": HERE / "qwen3_5", "Falcon-H1": HERE / "falcon_h1"}


def step_seconds(trainer: S0Trainer, data: list[dict[str, str]], tokens_per_batch: int) -> float:
    """Return the seconds of one training step, with batches of so many tokens."""
    config, trainer.config = trainer.config, S0Config(n_steps=1)
    began = time.perf_counter()
    trainer.train(data, tokens_per_batch=tokens_per_batch, progress=False)
    trainer.config = config
    return time.perf_counter() - began


def in_a_new_process(model: Path, states: Path, prompts: list[str], new_tokens: int) -> list[str]:
    command = [sys.executable, "-m", "s0kernels", "generate", str(model), "--states", str(states), "--json"]
    command += ["--max-new-tokens", str(new_tokens)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"generating in a new process failed:\n{done.stderr}")
    return json.loads(done.stdout)


def run(name: str, model: Path, output: Path, options: argparse.Namespace) -> dict:
    trainer = S0Trainer.from_pretrained(str(model))
    trainer.model.requires_grad_(False)
    task = get_task("tiny")
    base = Base(name, trainer, task, *task.load())
    answering = {"max_new_tokens": task.max_new_tokens, "rows": base.rows}
    data = trainer.collect(
        [base.problem(item) for item in base.tune],
        base.check,
        samples=options.samples,
        solutions=options.solutions,
        seed=options.seed,
        **answering,
    )
    one_by_one, batched = step_seconds(trainer, data, 1), step_seconds(trainer, data, 4096)
    began = time.perf_counter()
    trainer.train(data)
    seconds = time.perf_counter() - began
    found = trainer.evaluate([base.problem(item) for item in base.heldout], check=base.check, **answering)

    folder = output / model.name
    trainer.save(folder)
    again = in_a_new_process(model, folder, [item.prompt for item in base.heldout], task.max_new_tokens)
    return {
        "model": name,
        "base": found.base,
        "s0": found.s0,
        "problems": len(base.heldout),
        "solutions": len(data),
        "train_seconds": seconds,
        "bytes": (folder / "states.safetensors").stat().st_size,
        "step_batched_seconds": batched,
        "step_one_by_one_seconds": one_by_one,
        "reloaded_identical": again == [row["s0"][0] for row in found.answers],
        "losses": [entry["loss"] for entry in trainer.history],
        "alpha": trainer.alpha,
        "seed": options.seed,
    }


def table(results: list[dict]) -> str:
    head = ("model", "base pass@1", "S0 pass@1", "verified", "training", "batched step", "file", "reloaded")
    rows = [
        (
            r["model"],
            percent(r["base"], r["problems"]),
            percent(r["s0"], r["problems"]),
            f"{r['solutions']} solutions",
            f"{r['train_seconds']:.1f} s",
            f"{r['step_one_by_one_seconds'] / r['step_batched_seconds']:.1f}x faster",
            f"{r['bytes'] / 1024:.0f} KiB",
            "identical" if r["reloaded_identical"] else "DIFFERENT",
        )
        for r in results
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, tuple("-" * width for width in widths), *rows]
    return "\n".join(" | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def percent(share: float, count: int) -> str:
    """Format a share of `count` problems with its standard error."""
    return f"{100 * share:.1f} % +- {100 * math.sqrt(share * (1 - share) / count):.1f}"


def plot(results: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for result in results:
        left.plot(range(1, len(result["losses"]) + 1), result["losses"], marker=".", label=result["model"])
    left.set(xlabel="step", ylabel="loss on the verified solutions", title="Training S0")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    for offset, key, label in ((-0.2, "base", "base"), (0.2, "s0", "S0")):
        bars = right.bar([i + offset for i in range(len(results))], [100 * r[key] for r in results], 0.4, label=label)
        right.bar_label(bars, fmt="%.0f")
    right.set(ylim=(0, 105), ylabel="greedy pass@1 on held-out problems, %", title="Before and after")
    right.set_xticks(range(len(results)), [r["model"] for r in results])
    right.legend(loc="upper left")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for states, plot and results")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--samples", type=int, default=16, help="samples per tuning problem")
    parser.add_argument("--solutions", type=int, default=48, help="maximum number of verified solutions to learn from")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    for name in ("samples", "solutions"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # a second thread helps little with matrices this small, and hurts on busy cores

    print(f"code of the models runs under: {confinement()}")
    began = time.perf_counter()
    results = [run(name, MODELS[name], options.output, options) for name in options.models]
    replace_file(options.output / "results.json", json.dumps(results, indent=2).encode())
    plot(results, options.output / "demo.png")
    print(f"\n{table(results)}\n")
    print(f"{time.perf_counter() - began:.0f} s; states, results.json and demo.png are in {options.output}/")
    if not all(result["reloaded_identical"] for result in results):
        sys.exit("the reloaded states did not generate the same text")


if __name__ == "__main__":
    main()
