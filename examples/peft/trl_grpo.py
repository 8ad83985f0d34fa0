"""Learn S0 from rewards alone, by TRL's GRPOTrainer: the reward is 1 for the right line, else 0.

python examples/peft/trl_grpo.py OUT
"""

from functions import SCALE, dataset, load, options, pairs, settings, train
from trl import GRPOConfig, GRPOTrainer

from s0kernels.peft import S0PeftConfig


def reward(completions: list[str], solution: list[str], **_) -> list[float]:
    return [float(made == wanted) for made, wanted in zip(completions, solution, strict=True)]


def main() -> None:
    asked = options(__doc__, steps=30, examples=84).parse_args()
    model, tokenizer = load()
    arguments = GRPOConfig(
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=24,
        learning_rate=0.005,
        bf16=False,
        save_strategy="no",
        **settings(asked.output, asked.steps, 6),
    )
    rows = [{"prompt": prompt, "solution": solution} for prompt, solution in pairs("tune", asked.examples)]
    trainer = GRPOTrainer(
        model,
        reward,
        arguments,
        train_dataset=dataset(asked.output, rows),
        processing_class=tokenizer,
        peft_config=S0PeftConfig(task_type="CAUSAL_LM", scale=SCALE),
    )
    train(trainer, tokenizer, asked.heldout)


if __name__ == "__main__":
    main()
