"""Shared by the examples: the problems of `examples/tiny`, and the model that solves half of them."""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).resolve().parents[1] / "tiny"
sys.path.append(str(TINY))
from problems import make_problems  # noqa: E402

#: factor that multiplies the states of Qwen3.5 in use, as in `S0Trainer`; here also in training
SCALE = 0.07


def load():
    """Return (model, tokenizer), with the model in fp32."""
    folder = TINY / "qwen3_5"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def pairs(split: str, count: int) -> list[tuple[str, str]]:
    """Return (prompt, right line) for the first `count` problems. `split` is "tune" or "heldout"."""
    return [(problem.prompt, problem.solution) for problem in make_problems(split)[:count]]


@torch.no_grad()
def right(model, tokenizer, count: int = 84) -> str:
    """Return the number of held-out problems that greedy answers solve, as text."""
    model.eval()
    problems = pairs("heldout", count)
    batch = tokenizer([prompt for prompt, _ in problems], padding=True, padding_side="left", return_tensors="pt")
    batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    made = model.generate(**batch, max_new_tokens=24, do_sample=False)[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(made, skip_special_tokens=True)
    solved = sum(answer == solution for answer, (_, solution) in zip(answers, problems, strict=True))
    return f"{solved} of {len(problems)} right"


def options(description: str, steps: int, examples: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all examples share."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--examples", type=int, default=examples)
    parser.add_argument(
        "--heldout", type=int, default=84, help="number of problems to answer before and after training"
    )
    return parser


def settings(output: str, steps: int, lines: int) -> dict:
    """Return the settings of a trainer: so many steps, so many lines of log."""
    return {
        "output_dir": output,
        "max_steps": steps,
        "logging_steps": max(1, steps // lines),
        "lr_scheduler_type": "constant",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }


def dataset(output: str, rows: list[dict]):
    """Return rows as a data set. They go through a file of JSON lines, the usual format of such data."""
    from datasets import Dataset

    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return Dataset.from_json(str(folder / "data.jsonl"), cache_dir=str(folder / "cache"))


def train(trainer, tokenizer, heldout: int, **how) -> None:
    """Train, save, and print the results before and after. If there are several processes, the first one prints."""
    first = trainer.is_world_process_zero()
    model = trainer.model
    if first:
        print("before:", right(model, tokenizer, heldout))
    trainer.train(**how)
    trainer.save_model()
    if first:
        print("after:", right(model, tokenizer, heldout))
