"""Train a tiny hybrid language model that writes small Python functions: tokenizer, weights, and a report.

    python examples/tiny/train.py qwen3_5
    python examples/tiny/train.py falcon_h1 --out /tmp/falcon --steps 200

It trains the original transformers model in fp32 on the CPU and saves it in bf16. The same seed, machine and number of
threads give the same weights.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from problems import DEFAULT_SEED, FAMILIES, corpus, make_problems
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconH1Config,
    FalconH1ForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from s0kernels.progress import Progress
from s0kernels.tuning.verify.sandbox import Job, verify

HERE = Path(__file__).resolve().parent

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
VOCAB_SIZE = 512
MAX_NEW_TOKENS = 40
# A line break and the closing quotes are separate tokens, so a prompt always ends at a token boundary. Blanks are not
# part of words, so a name is the same token in a signature, a docstring and a body.
TOKEN_PATTERN = r'\n| {4}| |"""|[A-Za-z]+|\d|[^A-Za-z\d\s]|\s'


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer: any text can be restored exactly, and the words of the corpus are single
    tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_model(architecture: str, tokenizer: PreTrainedTokenizerFast, width: int = 128) -> PreTrainedModel:
    """Build a model of about a million parameters at width 128, with grouped heads and states that are not square."""
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "initializer_range": 0.08,
        "num_hidden_layers": 4,
        "num_attention_heads": width // 32,
        "num_key_value_heads": 2 if width % 64 == 0 else 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if architecture == "qwen3_5":
        model = Qwen3_5ForCausalLM(
            Qwen3_5TextConfig(
                **shared,
                intermediate_size=width * 5 // 2,
                linear_num_key_heads=2,
                linear_num_value_heads=width // 16,
                linear_key_head_dim=64,
                linear_value_head_dim=32,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": [3, 3, 2],
                },
            )
        )
    else:
        model = FalconH1ForCausalLM(
            FalconH1Config(
                **shared,
                intermediate_size=2 * width,
                mamba_d_ssm=width,
                mamba_n_heads=width // 16,
                mamba_d_head=16,
                mamba_n_groups=2,
                mamba_d_state=64,
                mamba_chunk_size=32,
                # of z, x, B, C and dt: the factors that write a state are small, those that read it are large
                ssm_multipliers=[1.0, 0.2, 0.2, 24.0, 1.0],
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            )
        )
    initialise(model)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


@torch.no_grad()
def initialise(model: PreTrainedModel) -> None:
    """Change those standard initial weights that a short training would not change much.

    Decays start slow, like those of large trained models: with the standard ones an initial state is forgotten
    within a few tokens. Convolutions pass their input on instead of attenuating it. In Qwen3.5 the values are small
    (the norm after the scan compensates), and so is the state; otherwise an S0 learned with the default settings
    would have little effect.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("conv1d.weight"):
            parameter.uniform_(-0.5, 0.5)
        elif name.endswith("A_log"):
            parameter.uniform_(-6.0, -1.0)
        elif name.endswith("dt_bias"):
            parameter.fill_(-1.0)
    if model.config.model_type == "qwen3_5_text":
        for layer in model.model.layers:
            if hasattr(layer, "linear_attn"):
                layer.linear_attn.conv1d.weight[2 * layer.linear_attn.key_dim :] *= 0.04


def encode_corpus(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Return the token ids of prompt + body + eos, with the number of prompt tokens."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    bodies = tokenizer([body for _, body in pairs])["input_ids"]
    return [
        (prompt + body + [tokenizer.eos_token_id], len(prompt)) for prompt, body in zip(prompts, bodies, strict=True)
    ]


def batches(examples: list[tuple[list[int], int]], size: int, steps: int, seed: int):
    """Yield `steps` batches of similar lengths, padded on the right with labels of -100, in a seeded order."""
    rng = random.Random(f"batches {seed}")
    made = 0
    while made < steps:
        order = list(range(len(examples)))
        rng.shuffle(order)
        groups = []
        window = size * 32
        for start in range(0, len(order) - size + 1, window):
            chosen = sorted(order[start : start + window], key=lambda i: len(examples[i][0]))
            groups += [chosen[i : i + size] for i in range(0, len(chosen) - size + 1, size)]
        rng.shuffle(groups)
        for group in groups[: steps - made]:
            yield collate([examples[i] for i in group])
            made += 1


def collate(examples: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and the loss weight of every position: small for prompts, full for bodies, zero for pads."""
    width = max(len(ids) for ids, _ in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    weights = torch.zeros(len(examples), width)
    for row, (tokens, prompt_length) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, 1:prompt_length] = 0.1
        weights[row, prompt_length : len(tokens)] = 1.0
    return ids, weights


def train(model: PreTrainedModel, examples: list[tuple[list[int], int]], args: argparse.Namespace) -> float:
    """Train with AdamW and a cosine schedule, and return the mean loss of the last 50 steps."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    filters = [p for p in model.parameters() if p.ndim == 3]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": filters, "weight_decay": 0.0, "lr": 0.1 * args.lr},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    warmup = min(100, args.steps // 5 + 1)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    recent: list[float] = []
    progress = Progress(args.architecture, args.steps, "step")
    for step, (ids, weights) in enumerate(batches(examples, args.batch_size, args.steps, args.seed), 1):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = [*recent[-49:], loss.item()]
        progress.reach(step, f"loss {sum(recent) / len(recent):.4f}")
    progress.close()
    return sum(recent) / len(recent)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write to a folder beside `out`, then rename it: a crash leaves the old folder or the new one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        model.to(torch.bfloat16).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        fresh.chmod(0o755)
        for file in fresh.iterdir():
            file.chmod(0o644)
        if out.exists():
            stale = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
            os.replace(out, stale / out.name)
            os.replace(fresh, out)
            shutil.rmtree(stale)
        else:
            os.replace(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@torch.no_grad()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """Return greedy completions, up to the end token. A batch has prompts of one length, so nothing is padded."""
    by_length = defaultdict(list)
    encoded = tokenizer(prompts)["input_ids"]
    for index, ids in enumerate(encoded):
        by_length[len(ids)].append(index)
    completions = [""] * len(prompts)
    for length, indices in by_length.items():
        ids = torch.tensor([encoded[i] for i in indices])
        made = model.generate(ids, attention_mask=torch.ones_like(ids))[:, length:]
        for index, tokens in zip(indices, made, strict=True):
            completions[index] = tokenizer.decode(tokens, skip_special_tokens=True)
    return completions


def report(out: Path) -> None:
    """Reload the saved model and print its results on problems that it has never seen."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    problems = make_problems("heldout")
    completions = complete(model, tokenizer, [problem.prompt for problem in problems])
    known = sum(body in problem.bodies.values() for problem, body in zip(problems, completions, strict=True))
    print(f"folder: {sum(file.stat().st_size for file in out.iterdir()):,} bytes, vocabulary {len(tokenizer)}")
    print(f"completions with the right names and numbers, whatever the habit: {known}/{len(problems)}")
    jobs = [
        Job(problem.prompt + body + "\n", problem.name, list(problem.inputs), list(problem.expected))
        for problem, body in zip(problems, completions, strict=True)
    ]
    passed = defaultdict(list)
    for problem, verdict in zip(problems, verify(jobs), strict=True):
        passed[problem.family].append(verdict.passed)
    for family in FAMILIES:
        print(f"  {family.name:<10} {sum(passed[family.name])}/{len(passed[family.name])}")
    total = sum(map(sum, passed.values()))
    print(f"greedy pass@1 on held-out problems: {total}/{len(problems)} = {100 * total / len(problems):.1f} %")
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            print(f"  {name}: {parameter.min():.2f} .. {parameter.max():.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=("qwen3_5", "falcon_h1"))
    parser.add_argument("--out", type=Path, help="folder of the checkpoint (default: beside this script)")
    parser.add_argument("--width", type=int, choices=(64, 96, 128), default=128, help="hidden size; others need --out")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--examples", type=int, default=60_000, help="size of the corpus")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.width != 128 and args.out is None:
        parser.error("--width other than 128 needs --out, because it would replace the checkpoint beside this script")

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    pairs = list(corpus(args.examples, args.seed))
    tokenizer = build_tokenizer([prompt + body for prompt, body in pairs])
    examples = encode_corpus(tokenizer, pairs)
    longest = max(len(ids) for ids, _ in examples)
    model = build_model(args.architecture, tokenizer, args.width)
    size = sum(parameter.numel() for parameter in model.parameters())
    tokens = sum(len(ids) for ids, _ in examples)
    print(f"{args.architecture}: {size:,} parameters; {len(examples):,} examples, {tokens:,} tokens, longest {longest}")
    loss = train(model, examples, args)
    out = args.out or HERE / args.architecture
    save(model, tokenizer, out)
    print(f"loss {loss:.4f}, {(time.perf_counter() - started) / 60:.1f} minutes, saved {out}")
    report(out)


if __name__ == "__main__":
    main()
