"""Time single tokens on a GPU: steps, mixers and whole models with random weights. `make gpu` runs this.

    python benchmarks/gpu_decode.py [--kinds steps mixers models]    (from the source tree)
    TRITON_INTERPRET=1 python benchmarks/gpu_decode.py --dry-run

bf16, at the sizes of Qwen3.5-4B and Falcon-H1-7B (hybrids.py). Cases that are compared take turns, round by round;
times are medians in milliseconds. The results of a library are compared with fp64 before it is timed. Bandwidth counts
the states, read and written once. Writes <gpu>-decode.json after each batch.
"""

import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import gpu_scans  # noqa: E402
import hybrids  # noqa: E402

from s0kernels import S0States, restore_modules, swap_modules  # noqa: E402
from s0kernels.bench import measure  # noqa: E402
from s0kernels.bench.inputs import cut, scan_inputs, state_for_each  # noqa: E402
from s0kernels.bench.passes import SCANS, Op, brief, step_case  # noqa: E402
from s0kernels.bench.tables import markdown  # noqa: E402
from s0kernels.calls import Call  # noqa: E402
from s0kernels.modules.families import family_of  # noqa: E402
from s0kernels.modules.mixer import S0Mixer  # noqa: E402
from s0kernels.ops import registry  # noqa: E402

BATCHES = (1, 8, 32, 256)
MODELS = {"gated_delta_rule": "Qwen3.5-4B", "ssd": "Falcon-H1-7B"}
#: our backends with kernels for single tokens
BACKENDS = [name for name in registry.ORDER if name not in ("reference", "torch")]
KINDS = ("steps", "mixers", "models")


# Steps


def steps(op: Op, batch: int, options) -> dict:
    device, dtype, _, heads = gpu_scans.settings(options.dry_run)
    values = scan_inputs(op.name, heads[op.name], (batch, 1), device=device, dtype=dtype)
    state = state_for_each(values, batch)
    rows = torch.arange(batch, device=device, dtype=torch.int32)
    cases: dict[str, measure.Case] = {"copy of the states": partial(state.clone().copy_, state)}
    baselines = [name for name, baseline in op.baselines.items() if baseline.step and not options.no_baselines]
    judge, missing = op.judge(cut(values, 8, 1), step=True), {}
    for name in (*BACKENDS, *baselines):
        call = Call(f"{op.name}_step", values["initial_state"].device, dtype)
        unusable = registry.unusable(name, call) if name in BACKENDS else None
        reason = unusable or op.why_not(name, judge, step=True)
        if reason is None:
            cases[name] = step_case(op, op.step_by(name), values)
            if name in BACKENDS:
                cases[f"{name}, by index"] = op.step(values, state.clone(), name, state_indices=rows)
        elif name in BACKENDS and unusable is None:
            raise RuntimeError(f"{op.name}, one token by {name}: our own results are wrong: {reason}")
        else:
            missing[name] = reason
    with torch.no_grad():
        ms, traffic = measure.medians(cases, rounds=options.rounds, device=device), 2 * state.nbytes
    rates = {name: traffic / took / 1e6 for name, took in ms.items()}
    return {"batch": batch, "ms": ms, "GB/s": rates, "not timed": missing}


# Mixers and models


def model_of(op: Op, dry_run: bool, **changes) -> nn.Module:
    family, settings = hybrids.PUBLISHED[MODELS[op.name]]
    settings = hybrids.SMALL[family] if dry_run else settings
    device, dtype = gpu_scans.settings(dry_run)[:2]
    return hybrids.build(family, settings | changes, device=device, dtype=torch.float32 if dry_run else dtype)


def without_fused_steps(run: Callable[[], object]) -> Callable[[], object]:
    def parts():
        fused, S0Mixer.fused_backend = S0Mixer.fused_backend, lambda *arguments: None
        try:
            return run()
        finally:
            S0Mixer.fused_backend = fused

    return parts


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """Return the call as a CUDA graph, which shows the time of the kernels without Python."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def mixers(op: Op, batch: int, options) -> dict:
    """Time a token through the mixer of one layer, projections included: original, swapped, swapped without fused
    steps."""
    from transformers import DynamicCache

    layers = {"num_hidden_layers": 1} | ({"layer_types": ["linear_attention"]} if op.name == "gated_delta_rule" else {})
    model = model_of(op, options.dry_run, vocab_size=64, **layers)
    original = next(module for module in model.modules() if family_of(module))
    swapped = copy.deepcopy(model)
    replacement = next(module for module in swap_modules(swapped).modules() if isinstance(module, S0Mixer))
    first = next(model.parameters())
    x = torch.randn(batch, 1, model.config.hidden_size).to(first)

    def token(mixer):
        cache = DynamicCache(config=model.config)
        mixer(x.expand(-1, 8, -1).contiguous(), cache)
        return lambda: mixer(x, cache)

    cases = {"untouched": token(original), "swapped": token(replacement)}
    cases["part by part"] = without_fused_steps(token(replacement))
    missing = {}
    for label, run in list(cases.items()) if first.is_cuda else ():
        try:
            cases[f"{label}, CUDA graph"] = captured(run)
        except Exception as problem:
            missing[f"{label}, CUDA graph"] = brief(problem)
    ms = measure.medians(cases, rounds=options.rounds, device=first.device)
    return {"batch": batch, "ms": ms, "not timed": missing}


def models(op: Op, options, late: Callable[[str], bool]) -> dict:
    """Measure the tokens per second of greedy `generate`: original, swapped without S0, swapped with S0."""
    new, batch = 4 if options.dry_run else 128, 1
    model = model_of(op, options.dry_run)
    prompt = torch.randint(2, 500, (batch, 16), device=next(model.parameters()).device)
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    results: dict[str, list[float]] = {}
    for round_ in range(min(options.rounds, 5) + 1):  # the first round compiles
        if round_ > 1 and late(f"models, {op.name}, rounds from {round_}"):
            break
        states = None
        for label in ("untouched", "without S0", "with S0"):
            if label == "without S0":
                swap_modules(model)
            if label == "with S0":
                states = S0States.for_model(model)
                for state in states.parameters():
                    state.data.normal_(std=0.01)
                states.attach(model)
            begin = time.perf_counter()
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings).cpu()
            if round_:
                results.setdefault(label, []).append(batch * new / (time.perf_counter() - begin))
        states.detach()
        restore_modules(model)
    return {"batch": batch, "tokens/s": {label: sorted(x)[len(x) // 2] for label, x in results.items()}}


@torch.no_grad()
def main() -> None:
    parser = gpu_scans.parser_of(__doc__, "decode")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    options.rounds = 1 if options.dry_run else options.rounds
    results = gpu_scans.Results(options, "decode")
    device, dtype = gpu_scans.settings(options.dry_run)[:2]
    call = Call("ssd_step", torch.device(device), dtype)
    results.found["backends"] = {name: registry.unusable(name, call) for name in registry.ORDER}
    found = [name for name in ("fla", "mamba_ssm", "causal_conv1d") if find_spec(name)]
    results.found["untouched runs on"] = found or "the PyTorch functions of transformers"
    results.found["rows"] = []
    plan = [
        (kind, op, batch)
        for kind in options.kinds
        for batch in ((2,) if options.dry_run else BATCHES if kind != "models" else (1,))
        for op in SCANS.values()
    ]
    for kind, op, batch in plan:
        if results.late(f"{kind}, {op.name}, batch {batch}"):
            continue
        make = partial(models, op, options, results.late)
        row = make() if kind == "models" else {"steps": steps, "mixers": mixers}[kind](op, batch, options)
        results.found["rows"].append({"kind": kind, "op": op.name, **row})
        results.write()
    results.write()
    print(table(results.found))


def table(results: dict) -> str:
    """Return all times as a table, with one line for each way."""
    lines, notes = [], set()
    for row in results["rows"]:
        place = [row["kind"], row["op"], str(row["batch"])]
        for name, ms in row.get("ms", {}).items():
            rate = row.get("GB/s", {}).get(name)
            lines.append([*place, name, f"{ms:.4f} ms", "" if rate is None else f"{rate:.0f} GB/s"])
        lines += [[*place, name, f"{rate:.0f} tokens/s", ""] for name, rate in row.get("tokens/s", {}).items()]
        notes |= {f"not timed, {row['kind']}, {row['op']}: {n}: {why}" for n, why in row.get("not timed", {}).items()}
    head = ["", "op", "batch", "way", "takes", "states"]
    return "\n".join([markdown(head, lines), "", *sorted(notes), *results["left out"]])


if __name__ == "__main__":
    main()
