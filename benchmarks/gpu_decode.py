"""One token at a time on a GPU: steps, mixers and whole models with random weights, in one process.

    python benchmarks/gpu_decode.py [--rounds 15] [--parts steps,mixers,models]     (from the source tree)
    python benchmarks/gpu_decode.py --smoke                     (tiny, on a CPU: does the script work?)

bf16, sizes like those of Qwen3.5-4B and Falcon-H1-7B. Everything that is compared runs in turn, round by round; figures
are medians in milliseconds. What a library computes is compared with fp64 before it is timed. Bandwidth counts the
states, read and written once. Writes benchmarks/results/<gpu>-decode.json.
"""

import argparse
import copy
import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from gpu_cases import OPS, Values  # noqa: E402
from gpu_scans import BUDGET, Clock, in_turn, reason, versions  # noqa: E402

from s0kernels import S0States, ops, swap_modules  # noqa: E402
from s0kernels.modules.families import family_of  # noqa: E402
from s0kernels.modules.mixer import S0Mixer  # noqa: E402
from s0kernels.ops import _dispatch  # noqa: E402

BATCHES = (1, 8, 32, 256)
QWEN = {
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
FALCON = {
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 44,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "mamba_d_ssm": 3072,
    "mamba_n_heads": 24,
    "mamba_d_head": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
}
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 32}
SMALL |= {"num_key_value_heads": 1}


# Steps

Step = Callable[[Values, Tensor], Tensor]  # the state is updated in place


def ours(op: str, backend: str, values: Values, state: Tensor) -> Tensor:
    options = {"backend": backend} | ({"use_qk_l2norm": True} if op == "gated_delta_rule" else {})
    step = getattr(ops, f"{op}_step")
    return step(*(x if n == "A" else x[:, 0] for n, x in arguments(op, values)), state, **options)


def arguments(op: str, values: Values) -> list[tuple[str, Tensor]]:
    return [(name, values[name]) for name in OPS[op].inputs]


def fla() -> Step:
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    def run(values: Values, state: Tensor) -> Tensor:  # it gives a new state instead
        inputs = {name: values[name] for name in OPS["gated_delta_rule"].inputs}
        options = {"initial_state": state, "use_qk_l2norm_in_kernel": True, "output_final_state": True}
        return fused_recurrent_gated_delta_rule(**inputs, **options)[0][:, 0]

    return run


def mamba_ssm() -> Step:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    def run(values: Values, state: Tensor) -> Tensor:
        x, dt, A, B, C = (x if name == "A" else x[:, 0] for name, x in arguments("ssd", values))
        P, N = state.shape[2:]
        dt, A = dt[..., None].expand(-1, -1, P), A[:, None, None].expand(-1, P, N)
        return selective_state_update(state, x, dt, A, B, C)

    return run


RIVALS = {"gated_delta_rule": {"FLA": fla}, "ssd": {"mamba_ssm": mamba_ssm}}


def steps(name: str, heads: dict, batch: int, clock: Clock, device: str, dtype: torch.dtype, rounds: int) -> dict:
    values = OPS[name].make((batch, 1), heads, device, dtype)
    state = values["s0"].expand(batch, -1, -1, -1).contiguous()
    exact = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in values.items()}
    truth = ours(name, "reference", exact, state.double())
    cases, missing = {"copy of the states": partial(torch.empty_like(state).copy_, state)}, {}
    backends = {b: lambda b=b: partial(ours, name, b) for b in _dispatch.ORDER if b not in ("reference", "torch")}
    for label, loader in (backends | RIVALS[name]).items():
        try:
            run = loader()
            found = run(values, state.clone())
            error = float((found.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt())
        except Exception as problem:  # whatever a library does here must not end the others' measurement
            missing[label] = reason(problem)
            continue
        if error <= BUDGET:
            cases[label] = partial(run, values, state)
        else:
            missing[label] = f"error {error:.1e}"
    ms = in_turn(clock, cases, rounds)
    traffic = 2 * state.numel() * state.element_size()
    return {
        "batch": batch,
        "ms": ms,
        "GB/s": {label: traffic / time / 1e6 for label, time in ms.items()},
        "not timed": missing,
    }


# Mixers and models


def classes(name: str) -> tuple[type, type, dict]:
    if name == "gated_delta_rule":
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

        return Qwen3_5TextConfig, Qwen3_5ForCausalLM, QWEN
    from transformers import FalconH1Config, FalconH1ForCausalLM

    return FalconH1Config, FalconH1ForCausalLM, FALCON


def model_of(name: str, device: str, dtype: torch.dtype, smoke: bool, **changes) -> nn.Module:
    config, model, sizes = classes(name)
    if smoke:
        changes = (
            SMALL | changes | ({"mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32} if name == "ssd" else {})
        )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return model(config(**{**sizes, "bos_token_id": None, "eos_token_id": None, **changes})).eval()
    finally:
        torch.set_default_dtype(before)


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


def mixers(name: str, batch: int, clock: Clock, device: str, dtype: torch.dtype, rounds: int, smoke: bool) -> dict:
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
        mixer(x.expand(-1, 8, -1).contiguous(), cache_params=cache)
        return lambda: mixer(x, cache_params=cache)

    cases = {"untouched": token(original), "swapped": token(replacement)}
    cases["part by part"] = without_fused_steps(token(replacement))
    missing = {}
    for label, run in list(cases.items()) if device == "cuda" else ():
        try:
            cases[f"{label}, CUDA graph"] = captured(run)
        except Exception as problem:
            missing[f"{label}, CUDA graph"] = reason(problem)
    return {"batch": batch, "ms": in_turn(clock, cases, rounds), "not timed": missing}


def models(name: str, batch: int, device: str, dtype: torch.dtype, rounds: int, smoke: bool) -> dict:
    """Tokens per second of greedy `generate`: untouched, swapped without S0, swapped with S0."""
    new, clock = 4 if smoke else 128, Clock(device)
    untouched = model_of(name, device, dtype, smoke)
    prompt = torch.randint(2, 1000, (batch, 16), device=device)
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
            ms = clock(partial(model.generate, prompt, attention_mask=torch.ones_like(prompt), **options), 1)
            if round_:
                results.setdefault(label, []).append(batch * new / ms * 1e3)
        states.detach()
        untouched = restore(model)
    return {"batch": batch, "tokens/s": {label: sorted(x)[len(x) // 2] for label, x in results.items()}}


def restore(model: nn.Module) -> nn.Module:
    from s0kernels import restore_modules

    return restore_modules(model)


def sources() -> str:
    folder = HERE.parent
    files = [*(folder / "csrc" / "cuda").glob("*"), *(folder / "s0kernels" / "backends" / "triton").glob("*step.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


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
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": versions(),
        "sources": sources(),
        "backends": {
            name: _dispatch.unusable(name, "ssd_step", torch.device(device), dtype) for name in _dispatch.ORDER
        },
    }
    for name, op in OPS.items():
        heads, entry = op.small if options.smoke else op.heads, {}
        for batch in batches:
            if "steps" in options.parts:
                entry.setdefault("steps", []).append(steps(name, heads, batch, Clock(device), device, dtype, rounds))
            if "mixers" in options.parts:
                found = mixers(name, batch, Clock(device), device, dtype, rounds, options.smoke)
                entry.setdefault("mixers", []).append(found)
        if "models" in options.parts:
            entry["models"] = [models(name, 1, device, dtype, min(rounds, 5), options.smoke)]
        for part, rows in entry.items():
            for row in rows:
                print(name, part, json.dumps(row), flush=True)
        results[name] = entry
    out = options.out or HERE / "results" / f"{results['device'].lower().replace(' ', '-')}-decode.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
