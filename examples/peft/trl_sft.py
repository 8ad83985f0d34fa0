"""S0 under TRL's SFTTrainer: prompts and completions, padded or packed, or conversations.

python examples/peft/trl_sft.py OUT
python examples/peft/trl_sft.py OUT --packing
python examples/peft/trl_sft.py OUT --assistant-only-loss
"""

from functions import SCALE, dataset, load, options, pairs, settings, train
from trl import SFTConfig, SFTTrainer

from s0kernels.peft import S0PeftConfig

#: the model was not trained on conversations, so a conversation is written as the prompt and the text after it
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% else %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


def rows(tokenizer, count: int, conversations: bool) -> list[dict]:
    if not conversations:
        return [{"prompt": p, "completion": s + tokenizer.eos_token} for p, s in pairs("tune", count)]
    tokenizer.chat_template = TEMPLATE
    turns = [zip(("user", "assistant"), pair, strict=True) for pair in pairs("tune", count)]
    return [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]


def main() -> None:
    parser = options(__doc__, steps=20, examples=48)
    parser.add_argument(
        "--packing", action="store_true", help="pack several examples into a row, each starting from S0"
    )
    parser.add_argument(
        "--assistant-only-loss", action="store_true", help="use conversations, and learn the answers only"
    )
    asked = parser.parse_args()

    model, tokenizer = load()
    arguments = SFTConfig(
        per_device_train_batch_size=1 if asked.packing else 16,
        max_length=512,
        packing=asked.packing,
        assistant_only_loss=asked.assistant_only_loss,
        learning_rate=0.01,
        bf16=False,
        save_strategy="no",
        **settings(asked.output, asked.steps, 5),
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=dataset(asked.output, rows(tokenizer, asked.examples, asked.assistant_only_loss)),
        processing_class=tokenizer,
        peft_config=S0PeftConfig(task_type="CAUSAL_LM", scale=SCALE),
    )
    train(trainer, tokenizer, asked.heldout)


if __name__ == "__main__":
    main()
