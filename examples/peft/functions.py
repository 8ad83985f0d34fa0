"""What the examples learn from: the functions of `examples/tiny`, and the model that writes half of them right."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).resolve().parents[1] / "tiny"
sys.path.append(str(TINY))
from problems import make_problems  # noqa: E402

#: what the states of Qwen3.5 are used at, as `S0Trainer` does; here they learn at it, too
SCALE = 0.07


def load():
    """(model, tokenizer) in fp32."""
    folder = TINY / "qwen3_5"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def pairs(split: str, count: int) -> list[tuple[str, str]]:
    """(prompt, the right line) of so many problems; `split` is "tune" or "heldout"."""
    return [(problem.prompt, problem.solution) for problem in make_problems(split)[:count]]


@torch.no_grad()
def right(model, tokenizer, count: int = 84) -> str:
    """How many of the held-out problems are answered by the right line, greedily."""
    model.eval()
    problems = pairs("heldout", count)
    batch = tokenizer([prompt for prompt, _ in problems], padding=True, padding_side="left", return_tensors="pt")
    batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    made = model.generate(**batch, max_new_tokens=24, do_sample=False)[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(made, skip_special_tokens=True)
    solved = sum(answer == solution for answer, (_, solution) in zip(answers, problems, strict=True))
    return f"{solved} of {len(problems)} right"
