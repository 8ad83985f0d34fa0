"""The Triton scans beside the libraries that are installed, on a GPU, in one process.

    python benchmarks/gpu_scans.py [--rounds 15] [--cases 1x8192,8x1024]     (from the source tree, nothing installed)
    TRITON_INTERPRET=1 python benchmarks/gpu_scans.py --smoke                (tiny, on a CPU: does the script work?)

Heads of Qwen3.5-4B (16 of keys, 32 of values, 128 x 128), bf16. Everything that is compared runs in turn, round by
round; figures are medians in milliseconds. A library is timed only after its error against fp64 is within the budget
on the same kind of inputs; one that is missing or out of it is listed with the reason. "S0" is one state for all
sequences: the other libraries copy it for each, which is part of their time. Writes benchmarks/results/<gpu>.json.
"""

import argparse
import hashlib
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from s0kernels.ops import gated_delta_rule, gated_delta_rule_reference, gated_delta_rule_step  # noqa: E402

RAGGED = [300 + (37 * i) % 160 - 80 for i in range(48)]
CASES = {
    "1x8192": (1, 8192),
    "8x1024": (8, 1024),
    "1x2048": (1, 2048),
    "8x512": (8, 512),
    "48 ragged": RAGGED,
    "1x32768": (1, 32768),
}
SMOKE = {"2x20": (2, 20), "3 ragged": [9, 0, 7]}
#: relative errors (root mean square) that a library may have in bf16: twice what bf16 operands of products give
BUDGET = 0.016
INPUTS = ("q", "k", "v", "g", "beta")


def make(sizes, heads: dict, device: str, dtype: torch.dtype, channel_first: bool = False) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    packed = isinstance(sizes, list)
    B, T = (1, sum(sizes)) if packed else sizes
    H, HV, K, V = (heads[name] for name in ("H", "HV", "K", "V"))
    shapes = {"q": (H, K), "k": (H, K), "v": (HV, V)}
    values = {name: torch.randn(B, T, *shape, device=device).to(dtype) for name, shape in shapes.items()}
    if channel_first:  # as transformers' convolution leaves them
        values = {name: x.movedim(1, -1).contiguous().movedim(-1, 1) for name, x in values.items()}
    values["g"] = -0.1 * torch.rand(B, T, HV, device=device)
    values["beta"] = torch.rand(B, T, HV, device=device).to(dtype)
    values["s0"] = 0.1 * torch.randn(HV, K, V, device=device)
    ends = torch.tensor([0, *sizes] if packed else [0]).cumsum(0).to(device, torch.int32)
    values["cu_seqlens"] = ends if packed else None
    return values


def sequences(values) -> int:
    return values["q"].shape[0] if values["cu_seqlens"] is None else values["cu_seqlens"].shape[0] - 1


def ours(values, state: bool):
    rest = {"initial_state": values["s0"] if state else None, "cu_seqlens": values["cu_seqlens"]}
    return gated_delta_rule(*(values[n] for n in INPUTS), use_qk_l2norm=True, backend="triton", **rest)


def like_fla(function: Callable) -> Callable:
    def run(values, state: bool):
        h0 = values["s0"].expand(sequences(values), -1, -1, -1).contiguous() if state else None
        options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
        options["cu_seqlens"] = None if values["cu_seqlens"] is None else values["cu_seqlens"].long()
        return function(**{n: values[n] for n in INPUTS}, initial_state=h0, **options)

    return run


def fla() -> Callable:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return like_fla(chunk_gated_delta_rule)


def flash_qla() -> Callable:
    from flash_qla import chunk_gated_delta_rule

    return like_fla(chunk_gated_delta_rule)


RIVALS = {"FLA": fla, "FlashQLA": flash_qla}


def gradients(run: Callable, values, wanted: list[str], weight: Tensor) -> dict[str, Tensor]:
    leaves = {n: x.detach().requires_grad_(n in wanted) if n in (*INPUTS, "s0") else x for n, x in values.items()}
    output, final = run(leaves, True)
    loss = (output.float() * weight).sum() + final.float().square().sum()
    grads = torch.autograd.grad(loss, [leaves[n] for n in wanted])
    return {"output": output.detach(), "final_state": final.detach()} | dict(zip(wanted, grads, strict=True))


def reference(values, state: bool):
    rest = {"initial_state": values["s0"] if state else None, "cu_seqlens": values["cu_seqlens"]}
    return gated_delta_rule_reference(*(values[n] for n in INPUTS), use_qk_l2norm=True, **rest)


def errors(run: Callable, heads: dict, device: str, dtype: torch.dtype, lengths: list[int]) -> dict[str, float]:
    """Relative to fp64, of the output and every gradient."""
    values = make(lengths, heads, device, dtype)
    weight = torch.randn_like(values["v"], dtype=torch.float32)
    exact = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in values.items()}
    names = [*INPUTS, "s0"]
    truth, found = gradients(reference, exact, names, weight), gradients(run, values, names, weight)
    return {
        n: float((found[n].double() - x).square().mean().sqrt() / x.square().mean().sqrt()) for n, x in truth.items()
    }


def load(heads: dict, device: str, dtype: torch.dtype, lengths: list[int]) -> tuple[dict, dict, dict]:
    """(implementations that may be timed, their errors, why the others may not)."""
    runs, found, missing = {}, {}, {}
    for name, loader in {"s0kernels": lambda: ours, **RIVALS}.items():
        try:
            run = loader()
            found[name] = errors(run, heads, device, dtype, lengths)
        except Exception as error:  # whatever a library does here must not end the others' measurement
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        worst = max(found[name], key=found[name].get)
        if found[name][worst] <= BUDGET:
            runs[name] = run
        else:
            missing[name] = f"error of {worst}: {found[name][worst]:.1e}"
    return runs, found, missing


class Clock:
    """Milliseconds of a call, by events on a GPU."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def __call__(self, function: Callable[[], object], repeats: int) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            for _ in range(repeats):
                function()
            return 1e3 * (time.perf_counter() - begin) / repeats
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats


def in_turn(clock: Clock, cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Medians of cases that run one after the other, again and again. The first rounds compile and choose repeats."""
    repeats = {}
    for name, case in cases.items():
        clock(case, 1)
        repeats[name] = max(1, min(100, int(5.0 / max(clock(case, 1), 1e-3)))) if clock.cuda else 1
    times = {name: [clock(case, repeats[name]) for _ in range(1)] for name, case in cases.items()}
    for _ in range(rounds):
        for name, case in cases.items():
            times[name].append(clock(case, repeats[name]))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def backward_of(run: Callable, values, wanted: list[str]) -> Callable[[], object]:
    leaves = {n: x.detach().requires_grad_(n in wanted) if n in (*INPUTS, "s0") else x for n, x in values.items()}
    output, _ = run(leaves, True)
    weight, inputs = torch.randn_like(output), [leaves[n] for n in wanted]
    return lambda: torch.autograd.grad(output, inputs, weight, retain_graph=True)


def peak(run: Callable, values) -> float:
    """MiB that a forward and a backward need beyond the inputs."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward_of(run, values, [*INPUTS, "s0"])()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(runs: dict, values, clock: Clock, rounds: int) -> dict:
    cases: dict[str, Callable[[], object]] = {}
    for name, run in runs.items():
        cases[f"{name} forward, zero"] = lambda run=run: run(values, False)
        cases[f"{name} forward, S0"] = lambda run=run: run(values, True)
        cases[f"{name} backward"] = backward_of(run, values, [*INPUTS, "s0"])
    if "s0kernels" in runs:
        cases["s0kernels forward, S0 again"] = lambda: ours(values, True)
        cases["s0kernels state-only backward"] = backward_of(ours, values, ["s0"])
    with torch.no_grad():
        forward = in_turn(clock, {n: c for n, c in cases.items() if "backward" not in n}, rounds)
    times = forward | in_turn(clock, {n: c for n, c in cases.items() if "backward" in n}, rounds)
    return {"ms": times, "peak MiB": {name: peak(run, values) for name, run in runs.items()}}


def steps(heads: dict, clock: Clock, device: str, dtype: torch.dtype, batches: list[int], rounds: int) -> list[dict]:
    found = []
    for batch in batches:
        values = make((batch, 1), heads, device, dtype)
        first = [values[n][:, 0] for n in INPUTS]
        pool = values["s0"].expand(batch, -1, -1, -1).contiguous()
        rows = torch.arange(batch, device=device, dtype=torch.int32)
        step = partial(gated_delta_rule_step, *first, pool, use_qk_l2norm=True, backend="triton")
        cases = {
            "step": step,
            "step by index": partial(step, state_indices=rows),
            "copy of the states": partial(pool.clone().copy_, pool),
        }
        with torch.no_grad():
            found.append({"batch": batch, "ms": in_turn(clock, cases, rounds)})
    return found


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "triton", "flash-linear-attention", "fla-core", "flash-qla", "tilelang"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--smoke", action="store_true", help="tiny inputs on a CPU, in Triton's interpreter")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.smoke:
        device, dtype, cases, batches = "cpu", torch.float16, SMOKE, [2]
        heads, lengths, options.rounds = {"H": 1, "HV": 2, "K": 16, "V": 16}, [30, 5], 1
    else:
        if not torch.cuda.is_available():
            sys.exit("there is no CUDA device (--smoke tries the script without one)")
        device, dtype, batches = "cuda", torch.bfloat16, [1, 8, 32, 256]
        cases = {name: CASES[name] for name in options.cases.split(",")}
        heads, lengths = {"H": 16, "HV": 32, "K": 128, "V": 128}, [200, 64, 1, 130]
    clock = Clock(device)
    runs, found, missing = load(heads, device, dtype, lengths)
    for name, reason in missing.items():
        print(f"not timed: {name}: {reason}")
    sources = sorted((HERE.parent / "s0kernels" / "backends" / "triton").glob("*.py"))
    results = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "interpreter",
        "versions": versions(),
        "sources": hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16],
        "heads": heads,
        "dtype": str(dtype)[6:],
        "errors": found,
        "not timed": missing,
        "scans": [],
    }
    for name, sizes in cases.items():
        for channel_first in (False, True):
            values = make(sizes, heads, device, dtype, channel_first)
            row = {"case": name, "layout": "channel-first" if channel_first else "token-major"}
            results["scans"].append(row | measure(runs, values, clock, options.rounds))
            print(json.dumps(results["scans"][-1]), flush=True)
    results["steps"] = steps(heads, clock, device, dtype, batches, options.rounds)
    label = results["device"].lower().replace(" ", "-")
    out = options.out or HERE / "results" / f"{label}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def table(results: dict) -> str:
    """Markdown: milliseconds, and in brackets what the fastest other library takes for each of ours."""
    lines = [
        "| case | layout | forward, S0 | backward | state-only | S0 / zero | S0 / S0 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["scans"]:
        ms = row["ms"]
        if "s0kernels forward, S0" not in ms:
            continue

        def cell(what: str, ms: dict = ms) -> str:
            mine = ms[f"s0kernels {what}"]
            others = {name: ms[f"{name} {what}"] / mine for name in RIVALS if f"{name} {what}" in ms}
            best = min(others, key=others.get, default=None)
            return f"{mine:.3f}" + (f" ({best} {others[best]:.2f}x)" if best else "")

        zero, again = (ms["s0kernels forward, S0"] / ms[f"s0kernels forward, {x}"] for x in ("zero", "S0 again"))
        cells = [row["case"], row["layout"], cell("forward, S0"), cell("backward")]
        cells += [f"{ms['s0kernels state-only backward']:.3f}", f"{zero:.3f}", f"{again:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
