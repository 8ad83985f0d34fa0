"""S0 under Hugging Face's Trainer: train, save checkpoints, resume, in one process or several.

python examples/peft/hf_trainer.py OUT
python examples/peft/hf_trainer.py OUT --resume                             # from the last checkpoint in OUT
torchrun --nproc-per-node 2 examples/peft/hf_trainer.py OUT
"""

import argparse

import torch
from functions import SCALE, load, pairs, right
from peft import get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from s0kernels.peft import S0PeftConfig


def example(tokenizer, prompt: str, solution: str) -> dict[str, torch.Tensor]:
    """Token ids and labels; the prompt is not learned."""
    ids = tokenizer(prompt + solution)["input_ids"] + [tokenizer.eos_token_id]
    known = len(tokenizer(prompt)["input_ids"])
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor([-100] * known + ids[known:])}


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = pad_sequence([each["input_ids"] for each in examples], batch_first=True, padding_value=0)
    labels = pad_sequence([each["labels"] for each in examples], batch_first=True, padding_value=-100)
    lengths = torch.tensor([len(each["input_ids"]) for each in examples])
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--heldout", type=int, default=84, help="problems that are answered before and after")
    parser.add_argument("--batch", type=int, default=16, help="examples in a step, of all processes together")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    model, tokenizer = load()
    model = get_peft_model(model, S0PeftConfig(task_type="CAUSAL_LM", scale=SCALE))
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        options.output,
        max_steps=options.steps,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        save_steps=max(1, options.steps // 2),
        logging_steps=max(1, options.steps // 8),
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    arguments.per_device_train_batch_size = options.batch // arguments.world_size
    data = [example(tokenizer, *pair) for pair in pairs("tune", options.examples)]
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate)
    if trainer.is_world_process_zero():
        print("before:", right(model, tokenizer, options.heldout))
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print("after:", right(model, tokenizer, options.heldout))


if __name__ == "__main__":
    main()
