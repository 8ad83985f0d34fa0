"""Time a training step at a real vocabulary: the trainer against the plain loop, with one example per forward and all
logits.

    python benchmarks/vocabulary.py [--models Qwen3.5-0.8B ...] [--ways ...] [--examples 8] [--rounds 3] [--threads 2]

- `plain loop`: the loop of the method's package with our modules: a forward for each example, logits of all its tokens,
  the loss of transformers, a backward.
- `one example`: the trainer with `tokens_per_batch=1`.
- `default`: the trainer with its defaults.

Random weights in bf16 at the shapes of Qwen3.5-0.8B, and of a Falcon-H1 with 12 layers; examples of 280 to 315 random
tokens, half of them predicted. Every run has its own process, the ways take turns, and results are medians over rounds.
Seconds are those of a step, without the work before the first step. Memory is the increase of resident memory above the
loaded model in the whole run, and `expected_gib` the trainer's prediction. --profile profiles a step of the plain loop
and of the default by operator, on one example.

Writes benchmarks/results/vocabulary-<machine>.json: `machine`, `settings`, and a list of `runs`: `model`, `way`,
`rounds`, medians of `seconds` (wall), `processor_seconds`, `peak_gib`; `loss`, `expected_gib`, `tokens_per_batch`; with
--profile `operators`: the operators with the largest shares of processor time.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import hybrids

HERE = Path(__file__).resolve().parent
WAYS = ("plain loop", "one example", "default")
#: shapes of Qwen3.5-0.8B, from the same secondary source as those of the 4B, and of Falcon-H1 with fewer layers
MODELS = {
    "Qwen3.5-0.8B": (
        "Qwen3.5",
        {
            **hybrids.QWEN3_5_4B,
            **{"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8},
            **{"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6, "num_key_value_heads": 2},
            "linear_num_value_heads": 16,
        },
    ),
    "Falcon-H1, 12 layers": (
        "Falcon-H1",
        {
            **hybrids.FALCON_H1_7B,
            **{"vocab_size": 131072, "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 12},
            **{"num_attention_heads": 8, "mamba_n_heads": 48, "mamba_d_head": 64},
        },
    ),
}


def examples(count: int, vocabulary: int) -> list[tuple[str, int]]:
    numbers = random.Random(0)
    lengths = [280 + 35 * i // max(count - 1, 1) for i in range(count)]
    return [(" ".join(str(numbers.randrange(2, vocabulary)) for _ in range(n)), n // 2) for n in lengths]


# A way, in its own process


def run_child(model_name: str, way: str, count: int, profiled: bool) -> dict:
    import torch
    from headline import Numbers
    from training import resident

    from s0kernels import swap_modules

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    family, settings = MODELS[model_name]
    model = swap_modules(hybrids.build(family, settings, dtype=torch.bfloat16))
    data = examples(count, model.config.vocab_size)
    step = plain_step if way == "plain loop" else trainer_step
    if profiled:
        return profile(step, model, Numbers(), data[:1])
    step(model, Numbers(), [(" ".join(["5"] * 16), 8)], 1)  # imports and pools
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident()
    found = step(model, Numbers(), data, 1 if way == "one example" else None)
    return {**found, "peak_gib": (resident() - before) / 2**20}


def plain_step(model, tokenizer, data: list, _) -> dict:
    import torch

    from s0kernels import S0States

    states = S0States.for_model(model)
    optimizer = torch.optim.Adam(states.parameters(), lr=1e-3)
    began, total = (time.perf_counter(), time.process_time()), 0.0
    for text, prompt in data:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        labels = ids.clone()
        labels[0, :prompt] = -100
        with states.attached(model):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        (loss / len(data)).backward()
        total += loss.item() / len(data)
    torch.nn.utils.clip_grad_norm_(states.parameters(), 1.0)
    optimizer.step()
    return {**since(began), "loss": total}


def since(began: tuple[float, float]) -> dict:
    return {"seconds": time.perf_counter() - began[0], "processor_seconds": time.process_time() - began[1]}


def trainer_step(model, tokenizer, data: list, tokens: int | None) -> dict:
    """Time a step of the trainer, from the start of its first forward."""
    from s0kernels import S0Config, S0Trainer
    from s0kernels.tuning.loop import Learner

    began, step = [], Learner.step
    Learner.step = lambda *rest: (began.append((time.perf_counter(), time.process_time())), step(*rest))[1]
    trainer, ended = S0Trainer(model, tokenizer, S0Config(n_steps=1)), []
    trainer.train(data, tokens_per_batch=tokens, callbacks=[lambda *_: ended.append(since(began[0]))])
    Learner.step = step
    entry = trainer.history[0]
    return {**ended[0], "loss": entry["loss"], "tokens_per_batch": entry.get("tokens_per_batch", tokens)}


def profile(step, model, tokenizer, data: list) -> dict:
    """Return the shares of operators in self time. The trainer's earlier steps are included."""
    import torch

    step(model, tokenizer, data, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step(model, tokenizer, data, 1)
    rows = found.key_averages()
    whole = sum(row.self_cpu_time_total for row in rows)
    rows = sorted(rows, key=lambda row: -row.self_cpu_time_total)[:8]
    return {"operators": {row.key: row.self_cpu_time_total / whole for row in rows}}


# The comparison


def run(model: str, way: str, options: argparse.Namespace, profiled: bool = False) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, __file__, "--child", model, way, str(options.examples), str(int(profiled))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{way}, {model}:\n{done.stderr}")
    said = re.findall(r"expected: ([\d.]+) (GiB|MiB)", done.stderr)
    expected = {"expected_gib": float(said[-1][0]) / (1 if said[-1][1] == "GiB" else 1024)} if said else {}
    return {**json.loads(done.stdout.splitlines()[-1]), **(expected if not profiled else {})}


def measure(options: argparse.Namespace) -> list[dict]:
    todo = [(model, way) for model in options.models for way in options.ways]
    runs: dict[tuple, list[dict]] = {each: [] for each in todo}
    for _ in range(options.rounds):
        for each in todo:
            runs[each].append(run(*each, options))
            print(*each, runs[each][-1], file=sys.stderr, flush=True)
    rows = []
    for (model, way), found in runs.items():
        keys = ("seconds", "processor_seconds", "peak_gib")
        figures = {key: statistics.median(each[key] for each in found) for key in keys}
        row = {"model": model, "way": way, "rounds": len(found), **found[-1], **figures}
        rows.append(row | (run(model, way, options, True) if options.profile and way != "one example" else {}))
    return rows


def main(arguments: list[str] | None = None) -> dict | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=4, metavar=("MODEL", "WAY", "EXAMPLES", "PROFILED"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        model, way, count, profiled = options.child
        print(json.dumps(run_child(model, way, int(count), profiled == "1")))
        return None
    from report import vocabulary

    from s0kernels.bench.measure import machine, machine_name, write_json

    where = {**machine("cpu", "wall and processor"), "threads": options.threads}
    settings = {name: getattr(options, name) for name in ("examples", "threads", "rounds")}
    results = {"machine": where, "settings": settings, "runs": measure(options)}
    print(vocabulary(results))
    write_json(options.out or HERE / "results" / f"vocabulary-{machine_name(where)}.json", results)
    return results


if __name__ == "__main__":
    main()
