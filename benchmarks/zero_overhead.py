"""Measure the cost of an active S0, compared with no S0.

    python benchmarks/zero_overhead.py [--levels op mixer generate untouched bank] [--clock processor] [--threads 1]

- `op`: both scans, forward and training (all inputs require grad), and their steps, on every usable backend.
- `mixer`: a swapped mixer as wide as that of Qwen3.5-0.8B or Falcon-H1-0.5B: prefill with a new cache, one token with a
  live one.
- `generate`: a small random model of every family: time to the first token, and per later token.
- `bank`: a task for each row, out of 1, 16, 256 and 1024; and states copied for every sequence, as in other libraries.
- `untouched`: the swapped model with S0 against the original model, with the installed kernels of transformers.

"No S0" is the swapped module without attached states, which starts from zero. S0 is frozen, at its scale in use. In
`training` of the level `op` there is also an S0 that learns; its gradient is extra work.

All cases of a line take turns round by round in one process, and the base runs twice. The ratio of the base to itself
is the control; the interval of a ratio (bootstrap, 95 %) should lie inside that of the control. Quantities without
noise are counted: kernels (on a CPU, operators that compute or move data, without views), bytes allocated, bytes
copied. S0 and zero must agree in all three, or the script ends with an error. One exception: where the PyTorch scans
fill in zeros, they may copy S0, one state per sequence.

Prints tables and writes benchmarks/results/zero-overhead-<machine>.json: `machine` (of `s0kernels.bench.measure`),
`settings`, and by level a list of lines: `what`; by case `ms`, `ratio` (median, low, high), `verdict` and `work`; and
`control`, the ratio of the base to itself.
"""

import argparse
import itertools
from dataclasses import asdict
from functools import partial
from pathlib import Path

import hybrids
import torch
from compare import Settings, compare, generation, table

from s0kernels import restore_modules, swap_modules
from s0kernels.bench.inputs import cut, scan_inputs, state_for_each
from s0kernels.bench.measure import machine, machine_name, write_json
from s0kernels.bench.passes import SCANS, case, step_case
from s0kernels.calls import Call
from s0kernels.heads import FLAGSHIPS, MODELS
from s0kernels.ops import registry

RESULTS = Path(__file__).resolve().parent / "results"
LEVELS = ("op", "mixer", "generate", "bank", "untouched")
BANKS = (1, 16, 256, 1024)
ROWS = 8  # rows of a batch that picks its tasks from a bank
HEADS = {op: MODELS[model][1] for op, model in FLAGSHIPS.items()}
#: a recurrent layer and attention at the widths of Qwen3.5-0.8B and Falcon-H1-0.5B, and a small vocabulary
WIDE = {
    "Qwen3.5": {
        **hybrids.QWEN3_5_4B,
        **{"vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 2},
        **{"layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 8, "num_key_value_heads": 2},
        "linear_num_value_heads": 16,
    },
    "Falcon-H1": {
        **hybrids.FALCON_H1_7B,
        **{"vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1},
        **{"num_attention_heads": 8, "head_dim": 64, "mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64},
        "mamba_d_state": 128,
    },
}


# The scans


def op_level(settings: Settings, heads: dict = HEADS, length: int | None = None) -> list[dict]:
    rows = []
    length = length or (4096 if settings.on_gpu else 256)
    for op, backend in itertools.product(SCANS.values(), usable(settings)):
        values = scan_inputs(op.name, heads[op.name], (2, length), device=settings.device)
        copied, run = values["initial_state"].nbytes * 2, op.by(backend)
        line = {"op": op.name, "backend": backend, "T": length, "B": 2}

        cases = {"zero": case(op, run, values, "forward", state=False), "S0": case(op, run, values, "forward")}
        rows.append({**line, "what": f"{op.name}, {backend}, forward", **compare(cases, settings)})
        check_equal(rows[-1], backend, copied)

        train = partial(case, op, run, values, "training")
        cases = {"zero": train(state=False), "S0": train(learns=False), "S0, learning": train()}
        rows.append({**line, "what": f"{op.name}, {backend}, training", **compare(cases, settings)})
        check_equal(rows[-1], backend, copied * 2)  # recomputed in the backward

        first = cut(values, 2, 1)
        zero = first | {"initial_state": torch.zeros_like(values["initial_state"])}
        cases = {name: step_case(op, op.step_by(backend), begin) for name, begin in (("zero", zero), ("S0", first))}
        rows.append({**line, "what": f"{op.name}, {backend}, step", "T": 1, **compare(cases, settings)})
        check_equal(rows[-1], backend, 0)
    return rows


def usable(settings: Settings) -> list[str]:
    device = torch.device(settings.device)
    names = ("triton", "torch") if settings.on_gpu else ("cpu", "torch")
    return [name for name in names if registry.unusable(name, Call("ssd", device, torch.float32)) is None]


def check_equal(row: dict, backend: str, state_bytes: int) -> None:
    """Raise AssertionError if S0 and zero do different work. The torch backend may copy S0 where it fills in zeros."""
    zero, found = row["work"]["zero"], dict(row["work"]["S0"])
    if backend == "torch":
        found["copied"] -= state_bytes
    if found != zero:
        raise AssertionError(f"{row['what']}: S0 and zero do not do the same work: {row['work']}")


# Modules and models


def twins(family: str, settings_of_model: dict, device: str) -> tuple:
    """Return two swapped models that share the memory of their weights. One has S0 attached."""
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    plain, tuned = (
        swap_modules(hybrids.build(family, settings_of_model, device=device, dtype=dtype)) for _ in range(2)
    )
    tuned.load_state_dict(plain.state_dict(), assign=True)
    hybrids.random_states(tuned).attach(tuned, scale=0.5)
    return plain, tuned


def mixer_of(model) -> torch.nn.Module:
    from s0kernels.modules.mixer import S0Mixer

    return next(module for module in model.modules() if isinstance(module, S0Mixer))


def mixer_level(settings: Settings, models: dict = WIDE, length: int | None = None) -> list[dict]:
    from transformers import DynamicCache

    rows = []
    length = length or (4096 if settings.on_gpu else 128)
    for family, model_settings in models.items():
        pair = dict(zip(("zero", "S0"), twins(family, model_settings, settings.device), strict=True))
        first = next(pair["zero"].parameters())
        hidden = torch.randn(1, length, model_settings["hidden_size"]).to(first)

        @torch.no_grad()
        def prefill(model, hidden=hidden) -> DynamicCache:
            cache = DynamicCache(config=model.config)
            mixer_of(model)(hidden, cache)
            return cache

        @torch.no_grad()
        def decode(mixer, cache, token=hidden[:, :1]) -> None:
            mixer(token, cache)

        cases = {name: partial(prefill, model) for name, model in pair.items()}
        line = {"family": family, "backend": "default", "B": 1}
        rows.append({**line, "what": f"{family}, prefill of {length}", **compare(cases, settings)})
        cases = {name: partial(decode, mixer_of(model), prefill(model)) for name, model in pair.items()}
        rows.append({**line, "what": f"{family}, one token", **compare(cases, settings)})
    for row in rows:
        check_equal(row, "default", 0)
    return rows


def generate_level(settings: Settings, models: dict = hybrids.SMALL, new: int = 16) -> list[dict]:
    rows = []
    for family, model_settings in models.items():
        pair = dict(zip(("zero", "S0"), twins(family, model_settings, settings.device), strict=True))
        line = {"family": family, "backend": "default", "B": 1}
        for what, found in zip(("first token", "each token after it"), generation(pair, settings, new), strict=True):
            rows.append({**line, "what": f"{family}, {what}", **found})
            check_equal(rows[-1], "default", 0)
    return rows


# A task for each row


def bank_level(settings: Settings, heads: dict = HEADS, models: dict = WIDE, banks: tuple = BANKS) -> list[dict]:
    rows = []
    for op in SCANS.values():
        smaller = heads[op.name] | ({"HV": heads[op.name]["H"]} if "HV" in heads[op.name] else {})
        smaller |= {"P": smaller["P"] // 2} if "P" in smaller else {}
        values = scan_inputs(op.name, smaller, (ROWS, 64), device=settings.device)
        state, backend = values["initial_state"], usable(settings)[0]
        run, whole = partial(op.scan, backend=backend), torch.stack([state] * max(banks))
        cases = {"zero": partial(run, values, False), "one state for all": partial(run, values, True)}
        for size in banks:
            rows_of_bank = spread(size, settings.device)
            of_bank = values | {"initial_state": whole[:size], "state_indices": rows_of_bank}
            cases[f"bank of {size}"] = partial(run, of_bank, True)
        cases["state copied"] = lambda run=run, values=values: run(
            values | {"initial_state": state_for_each(values, ROWS)}, True
        )
        cases["rows gathered"] = lambda run=run, values=values, whole=whole, places=rows_of_bank: run(
            values | {"initial_state": whole[places]}, True
        )
        line = {"op": op.name, "backend": backend, "T": 64, "B": ROWS}
        what = f"{op.name}, {backend}, {state.nbytes / 2**20:.2f} MiB a state"
        rows.append({**line, "what": what, **compare(cases, settings)})
        del whole, cases
    for family, model_settings in models.items():
        rows.append(bank_in_a_model(family, model_settings, settings, banks))
    return rows


def spread(size: int, device: str) -> torch.Tensor:
    """Return the tasks of ROWS rows, as far apart in the bank as possible."""
    return torch.arange(ROWS, device=device) * size // ROWS


def bank_in_a_model(family: str, model_settings: dict, settings: Settings, banks: tuple) -> dict:
    plain, shared = twins(family, model_settings, settings.device)
    ids = torch.arange(ROWS * 32, device=settings.device).view(ROWS, 32) % plain.config.vocab_size
    models = {"zero": plain, "one state for all": shared}
    for size in banks:
        model = models[f"bank of {size}"] = twins(family, model_settings, settings.device)[0]
        model.load_state_dict(plain.state_dict(), assign=True)
        hybrids.random_states(model, size).attach(model, tasks=spread(size, "cpu").to(settings.device))

    @torch.no_grad()
    def prefill(model) -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    cases = {name: partial(prefill, model) for name, model in models.items()}
    what = f"{family}, one layer, prefill of {ROWS} rows of 32"
    return {"family": family, "backend": "default", "B": ROWS, "what": what, **compare(cases, settings)}


# The original model of transformers


def untouched_level(settings: Settings, models: dict = WIDE, length: int | None = None) -> list[dict]:
    rows = []
    length = length or (4096 if settings.on_gpu else 256)
    for family, model_settings in models.items():
        _, tuned = twins(family, model_settings, settings.device)
        untouched = restore_modules(twins(family, model_settings, settings.device)[0])
        untouched.load_state_dict(tuned.state_dict(), assign=True)
        check_same_logits(untouched, tuned, settings.device)
        pair = {"untouched": untouched, "swapped, S0": tuned}
        ids = torch.arange(length, device=settings.device)[None] % tuned.config.vocab_size

        @torch.no_grad()
        def prefill(model, ids=ids) -> None:
            model(ids, use_cache=True, logits_to_keep=1)

        def train(model, ids=ids) -> None:
            embedded = model.get_input_embeddings()(ids).requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=8).logits
            torch.autograd.grad(logits.float().logsumexp(-1).sum(), embedded)

        for what, run in (("prefill", prefill), ("forward and backward", train)):
            cases = {name: partial(run, model) for name, model in pair.items()}
            line = {"family": family, "T": length, "what": f"{family}, one layer, {what} of {length}"}
            rows.append({**line, **compare(cases, settings)})
        for what, found in zip(("first token", "each token after it"), generation(pair, settings), strict=True):
            rows.append({"family": family, "what": f"{family}, one layer, {what}", **found})
    return rows


def check_same_logits(untouched, tuned, device: str) -> None:
    """Check that the swapped model without S0 and the original model agree."""
    ids = torch.arange(64, device=device)[None] % tuned.config.vocab_size
    with torch.no_grad():
        expected = untouched(ids).logits.float()
        model_states = tuned_states(tuned)
        with model_states.attached(tuned, tasks=-1):
            found = tuned(ids).logits.float()
    limit = 1e-4 if expected.dtype == torch.float32 and device == "cpu" else 5e-2
    if float((found - expected).abs().max()) > limit * float(expected.abs().max()):
        raise AssertionError("the swapped model and the untouched one differ")


def tuned_states(model):
    from s0kernels import S0States

    return S0States.attached_to(model)


def installed_kernels(settings: Settings) -> str:
    """Return the names of the kernels that the original model uses."""
    from importlib.util import find_spec

    found = [name for name in ("fla", "mamba_ssm", "causal_conv1d") if settings.on_gpu and find_spec(name)]
    return ", ".join(found) or "the PyTorch functions of transformers"


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--budget", type=float, default=20.0, help="time limit for a line in seconds")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(options.device, options.clock, options.rounds, options.budget)
    where = machine(options.device, options.clock)
    results = {"machine": where, "settings": asdict(settings), "untouched runs on": installed_kernels(settings)}
    run = {"op": op_level, "mixer": mixer_level, "generate": generate_level, "bank": bank_level}
    run["untouched"] = untouched_level
    out = options.out or RESULTS / f"zero-overhead-{machine_name(where)}.json"
    for level in options.levels:
        results[level] = run[level](settings)
        base = "untouched" if level == "untouched" else "zero"
        print(f"\n{level}\n\n{table(results[level], base)}", flush=True)
        write_json(out, results)
    return results


if __name__ == "__main__":
    main()
