"""One token at a time on a GPU: steps, mixers and whole models with random weights, in one process.

    python benchmarks/gpu_decode.py [--rounds 15] [--parts steps,mixers,models]     (from the source tree)
    python benchmarks/gpu_decode.py --smoke                     (tiny, on a CPU: does the script work?)

bf16, at the sizes of Qwen3.5-4B and Falcon-H1-7B (hybrids.py). All that is compared runs in turn, round by round;
figures are medians in milliseconds. What a library computes is compared with fp64 before it is timed. Bandwidth counts
the states, read and written once. Writes benchmarks/results/<gpu>-decode.json.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import hybrids  # noqa: E402
from gpu_scans import HEADS, SMOKE_HEADS, medians  # noqa: E402

from s0kernels import S0States, swap_modules  # noqa: E402
from s0kernels.bench import measure  # noqa: E402
from s0kernels.bench.baselines import OPS, OUR_BUDGET, THEIR_BUDGET, state_for_each  # noqa: E402
from s0kernels.bench.scans import brief  # noqa: E402
from s0kernels.modules.families import family_of  # noqa: E402
from s0kernels.modules.mixer import S0Mixer  # noqa: E402
from s0kernels.ops import _dispatch  # noqa: E402

BATCHES = (1, 8, 32, 256)
MODELS = {"gated_delta_rule": "Qwen3.5-4B", "ssd": "Falcon-H1-7B"}


# Steps


def steps(name: str, heads: dict, batch: int, device: str, dtype: torch.dtype, rounds: int) -> dict:
    op = OPS[name]
    values = op.make((batch, 1), heads, device, dtype)
    state = state_for_each(values, batch).clone()
    cases, missing = {"copy of the states": partial(torch.empty_like(state).copy_, state)}, {}
    backends = [backend for backend in _dispatch.ORDER if backend not in ("reference", "torch")]
    for label in (*backends, *(baseline for baseline in op.baselines if op.baselines[baseline].step)):
        try:
            if label in backends:
                step, budget = partial(op.step, backend=label), OUR_BUDGET
            else:
                if why_not := op.baselines[label].unusable(device):
                    raise RuntimeError(why_not)
                step, budget = op.baselines[label].step(), THEIR_BUDGET
            if wrong := op.step_out_of_budget(step, values, budget):
                raise RuntimeError(wrong)
            cases[label] = step(values, state)
        except Exception as problem:  # whatever a library does here must not end the others' measurement
            missing[label] = brief(problem)
    ms, traffic = medians(cases, rounds, device), 2 * state.nbytes
    return {
        "batch": batch,
        "ms": ms,
        "GB/s": {label: traffic / took / 1e6 for label, took in ms.items()},
        "not timed": missing,
    }


# Mixers and models


def model_of(name: str, device: str, dtype: torch.dtype, smoke: bool, **changes) -> nn.Module:
    family, settings = hybrids.PUBLISHED[MODELS[name]]
    settings = hybrids.SMALL[family] if smoke else settings
    return hybrids.build(family, settings | changes, device=device, dtype=dtype)


def without_fused_steps(run: Callable[[], object]) -> Callable[[], object]:
    def parts():
        fused, S0Mixer._fused_backend = S0Mixer._fused_backend, lambda *arguments: None
        try:
            return run()
        finally:
            S0Mixer._fused_backend = fused

    return parts


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, which shows what the kernels take without Python."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def mixers(name: str, batch: int, device: str, dtype: torch.dtype, rounds: int, smoke: bool) -> dict:
    """A token through one layer's mixer, projections included: untouched, swapped, swapped part by part."""
    from transformers import DynamicCache

    layers = {"num_hidden_layers": 1} | ({"layer_types": ["linear_attention"]} if name == "gated_delta_rule" else {})
    model = model_of(name, device, dtype, smoke, vocab_size=64, **layers)
    original = next(module for module in model.modules() if family_of(module))
    swapped = copy.deepcopy(model)
    replacement = next(module for module in swap_modules(swapped).modules() if isinstance(module, S0Mixer))
    x = torch.randn(batch, 1, model.config.hidden_size, device=device, dtype=dtype)

    def token(mixer):
        cache = DynamicCache(config=model.config)
        mixer(x.expand(-1, 8, -1).contiguous(), cache)
        return lambda: mixer(x, cache)

    cases = {"untouched": token(original), "swapped": token(replacement)}
    cases["part by part"] = without_fused_steps(token(replacement))
    missing = {}
    for label, run in list(cases.items()) if device == "cuda" else ():
        try:
            cases[f"{label}, CUDA graph"] = captured(run)
        except Exception as problem:
            missing[f"{label}, CUDA graph"] = brief(problem)
    return {"batch": batch, "ms": medians(cases, rounds, device), "not timed": missing}


def models(name: str, batch: int, device: str, dtype: torch.dtype, rounds: int, smoke: bool) -> dict:
    """Tokens per second of greedy `generate`: untouched, swapped without S0, swapped with S0."""
    new = 4 if smoke else 128
    untouched = model_of(name, device, dtype, smoke)
    prompt = torch.randint(2, 500, (batch, 16), device=device)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    results = {}
    for round_ in range(rounds + 1):  # the first compiles
        model = untouched
        for label in ("untouched", "without S0", "with S0"):
            if label == "without S0":
                swap_modules(model)
            if label == "with S0":
                states = S0States.for_model(model)
                for state in states.parameters():
                    state.data.normal_(std=0.01)
                states.attach(model)
            begin = time.perf_counter()
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **options).cpu()
            if round_:
                results.setdefault(label, []).append(batch * new / (time.perf_counter() - begin))
        states.detach()
        untouched = restore(model)
    return {"batch": batch, "tokens/s": {label: sorted(x)[len(x) // 2] for label, x in results.items()}}


def restore(model: nn.Module) -> nn.Module:
    from s0kernels import restore_modules

    return restore_modules(model)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", default="steps,mixers,models")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("there is no CUDA device (--smoke tries the script without one)")
    device, dtype, batches, rounds = "cuda", torch.bfloat16, BATCHES, options.rounds
    if options.smoke:
        device, batches, rounds = "cpu", (2,), 1
    results = {
        "machine": measure.machine(device),
        "backends": {
            name: _dispatch.unusable(name, "ssd_step", torch.device(device), dtype) for name in _dispatch.ORDER
        },
    }
    for name in OPS:
        heads, entry = (SMOKE_HEADS if options.smoke else HEADS)[name], {}
        for batch in batches:
            if "steps" in options.parts:
                entry.setdefault("steps", []).append(steps(name, heads, batch, device, dtype, rounds))
            if "mixers" in options.parts:
                found = mixers(name, batch, device, dtype, rounds, options.smoke)
                entry.setdefault("mixers", []).append(found)
        if "models" in options.parts:
            entry["models"] = [models(name, 1, device, dtype, min(rounds, 5), options.smoke)]
        for part, rows in entry.items():
            for row in rows:
                print(name, part, json.dumps(row), flush=True)
        results[name] = entry
    out = options.out or HERE / "results" / f"{measure.machine_name(results['machine'])}-decode.json"
    measure.write_json(out, results)


if __name__ == "__main__":
    main()
