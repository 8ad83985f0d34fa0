"""Measure the cost of tuning and using S0 at the true sizes of Qwen3.5-4B and Falcon-H1-7B, with random weights.

    python benchmarks/headline.py [--models Qwen3.5-4B Falcon-H1-7B] [--parts states train use] [--fresh]

On a GPU the models are complete, in bf16, with their published settings (`benchmarks/hybrids.py`). On a CPU there are
two stand-ins for each, in fp32: `layer`, one recurrent layer at full width with a small vocabulary, and `small`, a
smaller model with heads of the same size. There, training `layer` uses fewer examples and steps. `states` is exact
everywhere, because it needs only the settings.

- `states`: number of parameters of the model; bytes of S0, and of its file.
- `train`: seconds for 48 examples x 20 steps, and the peak memory of training beyond the weights.
- `use`: prefill, and each token of `generate` after the first, with S0, without S0, and again without S0 as a control.

Examples are random tokens with lengths like those of HumanEval: prompts of 60 to 220, completions of 20 to 180.

Every finished part is saved to benchmarks/results/headline-<machine>.json, by model and stand-in, with its settings. A
second run measures only parts that are missing or were measured with other settings or kernels; --fresh measures
everything. `machine` is that of `s0kernels.bench.measure.machine`; the keys of `parts` are "model, stand-in, part".
"""

import argparse
import json
import random
import tempfile
import time
from functools import partial
from pathlib import Path

import hybrids
import torch
from compare import Settings, compare, generation, table

from s0kernels import S0Config, S0States, S0Trainer, swap_modules
from s0kernels.bench.measure import CLOCKS, machine, machine_name, memory_status, write_json
from s0kernels.bench.tables import markdown

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = ("states", "train", "use")
#: by part: the options that its results depend on
ASKED = {
    "states": (),
    "train": ("device", "clock", "threads", "steps", "tokens_per_batch", "layer_examples", "layer_steps"),
    "use": ("device", "clock", "threads", "rounds", "budget"),
}
SIZES = ("states_bytes", "file_bytes")
_LAYER = {"vocab_size": 4096, "num_hidden_layers": 1}
_SMALL = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 2}
#: by stand-in: changes to the published settings
STAND_INS = {
    ("Qwen3.5-4B", "layer"): {**_LAYER, "layer_types": ["linear_attention"]},
    ("Qwen3.5-4B", "small"): {
        **_SMALL,
        **{"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
        **{"num_key_value_heads": 1, "head_dim": 64, "linear_num_key_heads": 1, "linear_num_value_heads": 2},
    },
    ("Falcon-H1-7B", "layer"): _LAYER,
    ("Falcon-H1-7B", "small"): {
        **_SMALL,
        **{"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 64, "mamba_d_ssm": 256, "mamba_n_heads": 2},
    },
}


class Numbers:
    """A tokenizer for texts that consist of token numbers."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, text: str, **_) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def examples(count: int, vocabulary: int) -> list[tuple[str, int]]:
    generator = random.Random(0)
    found = []
    for _ in range(count):
        prompt, completion = generator.randint(60, 220), generator.randint(20, 180)
        tokens = (generator.randrange(2, vocabulary) for _ in range(prompt + completion))
        found.append((" ".join(map(str, tokens)), prompt))
    return found


def settings_of(model: str, stand_in: str) -> tuple[str, dict]:
    """Return (family, settings of the config)."""
    family, published = hybrids.PUBLISHED[model]
    return family, {**published, **STAND_INS.get((model, stand_in), {})}


def load(model: str, stand_in: str, device: str) -> torch.nn.Module:
    family, settings = settings_of(model, stand_in)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return swap_modules(hybrids.build(family, settings, device=device, dtype=dtype))


def measure_states(model: str, stand_in: str, options: argparse.Namespace) -> dict:
    """Count the model on the meta device, where weights take no memory. S0 is real."""
    family, settings = settings_of(model, stand_in)
    built = swap_modules(hybrids.build(family, settings, device="meta"))
    states = S0States.for_model(built)
    with tempfile.TemporaryDirectory() as folder:
        states.save(folder)
        size = (Path(folder) / "states.safetensors").stat().st_size
    return {
        "parameters": sum(parameter.numel() for parameter in built.parameters()),
        "recurrent_layers": len(states),
        "state_shape": list(states[states.layers[0]].shape[1:]),
        "states_bytes": sum(parameter.nbytes for parameter in states.parameters()),
        "file_bytes": size,
    }


def measure_training(model: str, stand_in: str, options: argparse.Namespace) -> dict:
    built = load(model, stand_in, options.device)
    count, steps = (options.layer_examples, options.layer_steps) if stand_in == "layer" else (48, options.steps)
    data = examples(count, built.config.vocab_size)
    trainer = S0Trainer(built, Numbers(), S0Config(n_steps=steps))
    weights = sum(parameter.nbytes for parameter in built.parameters())
    clock, marks = CLOCKS[options.clock], []
    before = reset_peak(options.device)
    began = clock()

    def mark(*_) -> None:
        synchronize(options.device)
        marks.append(clock() - began)

    trainer.train(data, tokens_per_batch=options.tokens_per_batch, progress=False, callbacks=[mark])
    return {
        "examples": count,
        "tokens": sum(len(text.split()) for text, _ in data),
        "steps": steps,
        "tokens_per_batch": options.tokens_per_batch,
        "seconds": marks[-1],
        "seconds_per_step": marks[-1] / steps,
        "weights_bytes": weights,
        "peak_above_weights_bytes": peak(options.device) - before,
        "losses": [entry["loss"] for entry in trainer.history],
    }


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: str) -> int:
    """Return the memory in use, and reset the peak that `peak` returns. On a CPU this is resident memory."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return memory_status("VmHWM")


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else memory_status("VmHWM")


def measure_use(model: str, stand_in: str, options: argparse.Namespace) -> dict:
    plain, tuned = (load(model, stand_in, options.device) for _ in range(2))
    tuned.load_state_dict(plain.state_dict(), assign=True)
    hybrids.random_states(tuned).attach(tuned, scale=0.5)
    pair = {"zero": plain, "S0": tuned}
    settings = Settings(options.device, options.clock, options.rounds, options.budget)
    length = 4096 if settings.on_gpu else 128
    ids = torch.randint(2, plain.config.vocab_size, (1, length), device=options.device)

    @torch.no_grad()
    def prefill(built) -> None:
        built(ids, use_cache=False, logits_to_keep=1)

    what = f"{model}, {stand_in}"
    line = compare({name: partial(prefill, built) for name, built in pair.items()}, settings)
    lines = [{"what": f"{what}, prefill of {length}", **line}]
    if has_attention(plain.config):  # generate of transformers reads the length from the cache of attention
        _, later = generation(pair, settings)
        lines.append({"what": f"{what}, each token after the first", **later})
    return {"lines": lines}


def has_attention(config) -> bool:
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return any(kind != "linear_attention" for kind in kinds)


# One part after the other


def run_part(part: str, model: str, stand_in: str, options: argparse.Namespace, kernels: dict, done: dict) -> bool:
    """Measure a part, unless `done` has it with the same settings. Return whether it was measured."""
    key = f"{model}, {stand_in}, {part}"
    asked = {name: getattr(options, name) for name in ASKED[part]}
    measured_with = {
        "settings": settings_of(model, stand_in)[1],
        **asked,
        "kernels": {} if part == "states" else kernels,
    }
    measured_with = json.loads(json.dumps(measured_with))  # in the form that the file gives back
    if not options.fresh and done.get(key, {}).get("measured_with") == measured_with:
        print(f"{key}: done before")
        return False
    print(f"{key} ...", flush=True)
    began = time.perf_counter()
    run = {"states": measure_states, "train": measure_training, "use": measure_use}[part]
    found = run(model, stand_in, options)
    done[key] = {"measured_with": measured_with, **found, "took_seconds": time.perf_counter() - began}
    return True


def summary(done: dict) -> str:
    sizes, runs = [], []
    for key, found in done.items():
        cells = key.split(", ")[:2]
        if key.endswith("states"):
            sizes.append(
                (*cells, f"{found['parameters'] / 1e9:.3f} G", *(f"{found[n] / 2**20:.3f} MiB" for n in SIZES))
            )
        if key.endswith("train"):
            run = f"{found['examples']} examples ({found['tokens']} tokens) x {found['steps']} steps"
            memory = [f"{found[n] / 2**30:.2f} GiB" for n in ("peak_above_weights_bytes", "weights_bytes")]
            runs.append((*cells, run, f"{found['seconds']:.1f}", f"{found['seconds_per_step']:.2f}", *memory))
    training = ("model", "what", "training", "s", "s per step", "peak above the weights", "weights")
    parts = [markdown(("model", "what", "parameters", "S0", "file"), sizes), markdown(training, runs)]
    return "\n\n".join([*parts, table([line for part in done.values() for line in part.get("lines", [])], "zero")])


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(hybrids.PUBLISHED), default=list(hybrids.PUBLISHED))
    parser.add_argument("--stand-ins", nargs="+", choices=("whole", "layer", "small"), help="default: by the device")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--fresh", action="store_true", help="measure all parts again")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--layer-examples", type=int, default=4, help="for training `layer`")
    parser.add_argument("--layer-steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget", type=float, default=10.0, help="time limit for a comparison in seconds")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    where = machine(options.device, options.clock)
    out = options.out or RESULTS / f"headline-{machine_name(where)}.json"
    done = json.loads(out.read_text())["parts"] if out.is_file() else {}
    whole = torch.device(options.device).type == "cuda"
    stand_ins = options.stand_ins or (["whole"] if whole else ["layer", "small"])
    for model in options.models:
        for part in [part for part in PARTS if part in options.parts]:
            for stand_in in ["whole"] if part == "states" else stand_ins:
                if run_part(part, model, stand_in, options, where["kernels"], done):
                    write_json(out, {"machine": where, "parts": done})
    print(summary(done))
    return done


if __name__ == "__main__":
    main()
