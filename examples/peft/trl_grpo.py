"""S0 learned from rewards alone, by TRL's GRPOTrainer: a line is worth 1 where it is the right one.

python examples/peft/trl_grpo.py OUT
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from functions import SCALE, load, pairs, right
from trl import GRPOConfig, GRPOTrainer

from s0kernels.peft import S0PeftConfig


def reward(completions: list[str], solution: list[str], **_) -> list[float]:
    return [float(made == wanted) for made, wanted in zip(completions, solution, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--examples", type=int, default=84)
    parser.add_argument("--heldout", type=int, default=84, help="problems that are answered before and after")
    options = parser.parse_args()

    model, tokenizer = load()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": prompt, "solution": solution} for prompt, solution in pairs("tune", options.examples)]
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    arguments = GRPOConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=24,
        learning_rate=0.005,
        lr_scheduler_type="constant",
        logging_steps=max(1, options.steps // 6),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = GRPOTrainer(
        model,
        reward,
        arguments,
        train_dataset=Dataset.from_json(str(folder / "data.jsonl"), cache_dir=str(folder / "cache")),
        processing_class=tokenizer,
        peft_config=S0PeftConfig(task_type="CAUSAL_LM", scale=SCALE),
    )
    print("before:", right(trainer.model, tokenizer, options.heldout))
    trainer.train()
    trainer.save_model()
    print("after:", right(trainer.model, tokenizer, options.heldout))


if __name__ == "__main__":
    main()
