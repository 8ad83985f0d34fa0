"""Run lm-evaluation-harness on a model without and with a learned S0.

    python benchmarks/quality/harness.py Qwen/Qwen3.5-4B --states my_s0_states --tasks gsm8k minerva_math500
    python benchmarks/quality/harness.py MODEL --states STATES --tasks my_task --include-path folder/of/yaml

It needs the extra `eval`. The harness refuses tasks that run code of the model (humaneval, mbpp), because it has no
sandbox. `run.py --task humaneval` has one.
"""

import argparse
import sys
from pathlib import Path

from s0kernels import S0Trainer
from s0kernels.bench import measure


def compare(
    trainer: S0Trainer, tasks: list[str], rows: int, limit: int | None, include: Path | None, chat: bool
) -> dict:
    """Return the results of the harness by task and metric: {"no tuning": ..., "S0": ...}. The trainer holds the
    states."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    # pass a model instance, which keeps its swapped modules. The cache of logits would not notice a change of S0
    model = HFLM(
        pretrained=trainer.model,
        tokenizer=trainer.tokenizer,
        batch_size=rows,
        logits_cache=False,
        enable_thinking=False,  # as in the experiments: thoughts would use up the few tokens of most tasks
    )
    found = {}
    for label in ("no tuning", "S0"):
        (trainer.deactivate if label == "no tuning" else trainer.activate)()
        results = lm_eval.simple_evaluate(
            model=model, tasks=tasks, task_manager=manager, limit=limit, apply_chat_template=chat, log_samples=False
        )
        found[label] = {name: _numbers(values) for name, values in results["results"].items()}
    trainer.deactivate()
    return found


def _numbers(values: dict) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, float)}


def table(found: dict) -> str:
    """Return a Markdown table, with the standard errors of the harness in brackets."""
    lines = ["| task | metric | no tuning | S0 | difference |", "|---|---|---|---|---|"]
    for task, before in found["no tuning"].items():
        after = found["S0"][task]
        for metric in before:
            name, _, filtering = metric.partition(",")
            if name.endswith("_stderr"):
                continue
            error = f"{name}_stderr,{filtering}"
            cells = [f"{x[metric]:.4g} ({x[error]:.2g})" if error in x else f"{x[metric]:.4g}" for x in (before, after)]
            lines.append(f"| {task} | {metric} | {cells[0]} | {cells[1]} | {after[metric] - before[metric]:+.4g} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, or name on the hub")
    parser.add_argument("--states", type=Path, required=True, help="folder of one task, written by `save`")
    parser.add_argument("--tasks", nargs="+", required=True, help="of the harness")
    parser.add_argument("--include-path", type=Path, help="folder with more tasks, as YAML")
    parser.add_argument("--chat", action="store_true", help="use the tokenizer's chat template")
    parser.add_argument("--rows", type=int, default=8, help="sequences at a time")
    parser.add_argument("--limit", type=int, help="only the first so many problems of each task")
    parser.add_argument("--output", type=Path, default=Path("harness.json"))
    options = parser.parse_args()
    for name in ("rows", "limit"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    try:
        trainer = S0Trainer.from_pretrained(options.model)
        trainer.load(options.states)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"harness.py: {error}")
    if trainer.states.tasks > 1:
        parser.error(f"--states must hold one task, got {', '.join(trainer.tasks)}: name the folder of one of them")
    found = compare(trainer, options.tasks, options.rows, options.limit, options.include_path, options.chat)
    about = {"model": options.model, "states": str(options.states), "alpha": trainer.alpha, "limit": options.limit}
    measure.write_json(options.output, {**about, "machine": measure.machine(trainer.device.type), "results": found})
    print(table(found))


if __name__ == "__main__":
    main()
