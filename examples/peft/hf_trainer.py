"""S0 under Hugging Face's Trainer: train, save checkpoints, resume, in one process or several.

python examples/peft/hf_trainer.py OUT
python examples/peft/hf_trainer.py OUT --resume                             # from the last checkpoint in OUT
torchrun --nproc-per-node 2 examples/peft/hf_trainer.py OUT
"""

import torch
from functions import SCALE, load, options, pairs, settings, train
from peft import get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from s0kernels.peft import S0PeftConfig


def example(tokenizer, prompt: str, solution: str) -> dict[str, torch.Tensor]:
    """Return token ids and labels. The prompt is not learned."""
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
    parser = options(__doc__, steps=20, examples=48)
    parser.add_argument("--batch", type=int, default=16, help="number of examples in a step, over all processes")
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args()

    model, tokenizer = load()
    model = get_peft_model(model, S0PeftConfig(task_type="CAUSAL_LM", scale=SCALE))
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        learning_rate=0.01, save_steps=max(1, asked.steps // 2), **settings(asked.output, asked.steps, 5)
    )
    arguments.per_device_train_batch_size = asked.batch // arguments.world_size
    data = [example(tokenizer, *pair) for pair in pairs("tune", asked.examples)]
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate)
    train(trainer, tokenizer, asked.heldout, resume_from_checkpoint=asked.resume)


if __name__ == "__main__":
    main()
