"""S0 under TRL's SFTTrainer: prompts and completions, padded or packed, or conversations.

python examples/peft/trl_sft.py OUT
python examples/peft/trl_sft.py OUT --packing
python examples/peft/trl_sft.py OUT --assistant-only-loss
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from functions import SCALE, load, pairs, right
from trl import SFTConfig, SFTTrainer

from s0kernels.peft import S0PeftConfig

#: what the model was trained on is no conversation, so a conversation is the prompt and what follows it
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% else %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


def dataset(folder: Path, tokenizer, count: int, conversations: bool) -> Dataset:
    """Written as JSON lines, the way such data usually comes."""
    if conversations:
        tokenizer.chat_template = TEMPLATE
        roles = ("user", "assistant")
        turns = [zip(roles, pair, strict=True) for pair in pairs("tune", count)]
        rows = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    else:
        rows = [{"prompt": p, "completion": s + tokenizer.eos_token} for p, s in pairs("tune", count)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return Dataset.from_json(str(folder / "data.jsonl"), cache_dir=str(folder / "cache"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output")
    parser.add_argument("--packing", action="store_true", help="several examples in a row, each from its own S0")
    parser.add_argument(
        "--assistant-only-loss", action="store_true", help="conversations, of which the answers are learned"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--heldout", type=int, default=84, help="problems that are answered before and after")
    options = parser.parse_args()

    model, tokenizer = load()
    arguments = SFTConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=1 if options.packing else 16,
        max_length=512,
        packing=options.packing,
        assistant_only_loss=options.assistant_only_loss,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_steps=max(1, options.steps // 5),
        save_steps=options.steps,
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=dataset(Path(options.output), tokenizer, options.examples, options.assistant_only_loss),
        processing_class=tokenizer,
        peft_config=S0PeftConfig(task_type="CAUSAL_LM", scale=SCALE),
    )
    print("before:", right(trainer.model, tokenizer, options.heldout))
    trainer.train()
    trainer.save_model()
    print("after:", right(trainer.model, tokenizer, options.heldout))


if __name__ == "__main__":
    main()
