"""Time S0 training on the two tiny models of examples/tiny: the trainer against one example per forward.

    python benchmarks/training.py [--models qwen3_5 falcon_h1] [--ways ...] [--steps 20] [--rounds 3] [--threads 1]

- `batched`: the trainer with its defaults; examples go through the model together, here up to 4096 tokens.
- `one by one`: the trainer with one example per forward.
- `copied`: the original model, with one example per forward and a copy of S0 for each (`expand`, `contiguous`). That is
  the method of s0-tuning, with the PyTorch functions of the transformers installed here.
- `s0-tuning`: that package, 0.1.2, with transformers 5.14.1, the last version it works with, from separate folders
  (`make .deps/s0-tuning/.installed .deps/s0-tuning-transformers/.installed`).

s0-tuning can train Falcon-H1 only on a GPU with mamba_ssm, because it passes S0 to that library's functions and has no
PyTorch equivalent.

The same examples in the same order, the same tokenizer, fp32 weights, S0 from zero, the defaults of `S0Config`. Every
run has its own process, the ways take turns, and results are medians over rounds. Memory is the increase of resident
memory above the loaded model. The losses of all steps are compared with those of `batched`.

Prints a table and writes benchmarks/results/training-<machine>.json: `machine`, `settings`, and a list of `runs`:
`model`, `way`, `versions`; medians over `rounds` of `seconds` (wall) and `processor_seconds` of the whole run and of
`peak_mib`; `losses` by step; or `missing`, the reason why there is none.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TINY = ROOT / "examples" / "tiny"
MODELS = ("qwen3_5", "falcon_h1")
WAYS = ("batched", "one by one", "copied", "s0-tuning")
PACKAGE = ROOT / ".deps" / "s0-tuning"
ITS_TRANSFORMERS = ROOT / ".deps" / "s0-tuning-transformers"
L2, LR, CLIP = 5e-4, 1e-3, 1.0  # the defaults of S0Config and of s0-tuning


def examples(count: int, tokenizer) -> list[tuple[str, int]]:
    """Return (text, number of prompt tokens) for tuning problems of the tiny models, with solutions that pass."""
    sys.path.append(str(TINY))
    from problems import make_problems

    pairs = [(problem.prompt, problem.solution) for problem in make_problems("tune")][:count]
    return [(p + s + tokenizer.eos_token, len(tokenizer(p)["input_ids"])) for p, s in pairs]


# The ways, each in its own process


def run_child(way: str, name: str, steps: int, count: int) -> dict:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY / name)
    data = examples(count, tokenizer)
    train = {"copied": train_copied, "s0-tuning": train_package}.get(way, train_here)
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long))  # imports and pools
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident()
    began, processor = time.perf_counter(), time.process_time()
    losses = train(model, tokenizer, data, steps, 1 if way == "one by one" else None)
    return {
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - processor,
        "peak_mib": (resident() - before) / 1024,
        "losses": losses,
    }


def resident() -> int:
    """Return the peak of resident memory in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def train_here(model, tokenizer, data: list, steps: int, tokens_per_batch: int | None) -> list[float]:
    from s0kernels import S0Config, S0Trainer

    trainer = S0Trainer(model, tokenizer, S0Config(n_steps=steps))
    trainer.train(data, tokens_per_batch=tokens_per_batch, progress=False)
    return [entry["loss"] for entry in trainer.history]


def train_package(model, tokenizer, data: list, steps: int, _) -> list[float]:
    """Train with s0-tuning. Its loop reports only the last loss, so the losses are taken from the model."""
    from s0 import S0Config, S0Trainer

    losses: list[float] = []
    model.register_forward_hook(lambda module, inputs, output: losses.append(float(output.loss.detach())))
    S0Trainer(model, tokenizer, S0Config(n_steps=steps)).train(data)
    return [statistics.fmean(losses[i : i + len(data)]) for i in range(0, len(losses), len(data))]


def train_copied(model, tokenizer, data: list, steps: int, _) -> list[float]:
    """Train with the loop of s0-tuning, on a model whose scans get S0."""
    import torch

    states = hand_over_states(model)
    model.requires_grad_(False)
    optimizer = torch.optim.Adam(states, lr=LR)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for text, prompt_length in data:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            labels = ids.clone()
            labels[0, :prompt_length] = -100
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            (loss / len(data)).backward()
            total += loss.item()
        (L2 * sum(state.pow(2).sum() for state in states)).backward()
        torch.nn.utils.clip_grad_norm_(states, CLIP)
        optimizer.step()
        history.append(total / len(data))
    return history


def hand_over_states(model) -> list:
    """Make the scans of an original model start from new parameters, with a copy per sequence. The scan functions are
    replaced in the module of the mixer's class. They do not know their layer, so a hook on the mixer tells them."""
    import torch

    from s0kernels.modules.families import family_of

    found = [(module, family) for module in model.modules() if (family := family_of(module))]
    modeling = sys.modules[type(found[0][0]).__module__]
    name, argument = {
        "gated_delta_net": ("torch_chunk_gated_delta_rule", "initial_state"),
        "mamba2": ("mamba2_chunk_scan", "initial_states"),
    }[found[0][1].arch]
    scan: Callable = getattr(modeling, name)
    current = []

    def from_state(first: torch.Tensor, *rest, **options):
        options[argument] = current[-1].expand(first.shape[0], -1, -1, -1).contiguous()
        return scan(first, *rest, **options)

    setattr(modeling, name, from_state)
    states = []
    for mixer, family in found:
        state = torch.nn.Parameter(torch.zeros(family.state_shape(mixer)))
        mixer.register_forward_pre_hook(lambda module, inputs, state=state: current.append(state))
        states.append(state)
    return states


# The comparison


def missing(way: str, name: str) -> str | None:
    """Return the reason why this way cannot run here, or None."""
    if way != "s0-tuning":
        return None
    if name == "falcon_h1":
        return "s0-tuning passes S0 to mamba_ssm's functions, which need a GPU; it has no PyTorch equivalent"
    absent = [path.name for path in (PACKAGE, ITS_TRANSFORMERS) if not (path / ".installed").is_file()]
    return f"not installed: make {' '.join(f'.deps/{each}/.installed' for each in absent)}" if absent else None


def run(way: str, name: str, options: argparse.Namespace) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    if way == "s0-tuning":
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (ITS_TRANSFORMERS, PACKAGE)))
    command = [sys.executable, __file__, "--child", way, name, str(options.steps), str(options.examples)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{way}, {name}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def versions(way: str) -> dict[str, str]:
    from importlib.metadata import distributions, version

    found = {"torch": version("torch"), "transformers": version("transformers"), "python": platform.python_version()}
    if way == "s0-tuning":
        places = [str(PACKAGE), str(ITS_TRANSFORMERS)]
        found |= {d.name: d.version for d in distributions(path=places) if d.name in ("transformers", "s0-tuning")}
    return found


def measure(options: argparse.Namespace) -> list[dict]:
    todo = [(way, name) for name in options.models for way in options.ways if missing(way, name) is None]
    runs: dict[tuple, list[dict]] = {each: [] for each in todo}
    for number in range(options.rounds):
        for way, name in todo:
            if way != "s0-tuning" or number < options.package_rounds:
                runs[way, name].append(run(way, name, options))
    rows = []
    for name in options.models:
        for way in options.ways:
            row = {"model": name, "way": way, "versions": versions(way)}
            if (reason := missing(way, name)) is not None:
                rows.append({**row, "missing": reason})
                continue
            mine = runs[way, name]
            figures = {
                key: statistics.median(r[key] for r in mine) for key in ("seconds", "processor_seconds", "peak_mib")
            }
            rows.append({**row, "rounds": len(mine), **figures, "losses": mine[0]["losses"]})
    return rows


def table(rows: list[dict]) -> str:
    from s0kernels.bench.tables import markdown

    head = ["model", "way", "s", "processor s", "takes", "peak MiB", "last loss", "farthest from batched"]
    lines = []
    base = {row["model"]: row for row in rows if row["way"] == "batched"}
    for row in rows:
        if "missing" in row:
            lines.append([row["model"], row["way"], row["missing"], *[""] * 5])
            continue
        ours = base.get(row["model"], row)
        apart = max(abs(a - b) for a, b in zip(row["losses"], ours["losses"], strict=True))
        cells = (f"{row['seconds']:.1f}", f"{row['processor_seconds']:.1f}")
        cells += (f"{row['processor_seconds'] / ours['processor_seconds']:.1f}x", f"{row['peak_mib']:.0f}")
        cells += (f"{row['losses'][-1]:.4f}", f"{apart:.1e}")
        lines.append([row["model"], row["way"], *cells])
    return markdown(head, lines)


def main(arguments: list[str] | None = None) -> dict | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--package-rounds", type=int, default=1, help="rounds of s0-tuning, which takes minutes")
    parser.add_argument("--threads", type=int, default=1, help="more threads do not help models this small")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=4, metavar=("WAY", "MODEL", "STEPS", "EXAMPLES"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        way, name, steps, count = options.child
        print(json.dumps(run_child(way, name, int(steps), int(count))))
        return None
    from s0kernels.bench.measure import machine, machine_name, write_json

    where = machine("cpu", "wall and processor")
    settings = {name: getattr(options, name) for name in ("steps", "examples", "threads")}
    results = {"machine": {**where, "threads": options.threads}, "settings": settings, "runs": measure(options)}
    print(table(results["runs"]))
    write_json(options.out or HERE / "results" / f"training-{machine_name(where)}.json", results)
    return results


if __name__ == "__main__":
    main()
