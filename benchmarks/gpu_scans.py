"""The Triton scans beside the libraries that are installed, on a GPU, in one process.

    python benchmarks/gpu_scans.py [--rounds 15] [--cases 1x8192,8x1024]     (from the source tree, nothing installed)
    TRITON_INTERPRET=1 python benchmarks/gpu_scans.py --smoke                (tiny, on a CPU: does the script work?)

bf16, heads of Qwen3.5-4B (16 of keys, 32 of values, 128 x 128) and of Falcon-H1-7B (24, P 128, N 256, one group).
Everything that is compared runs in turn, round by round; figures are medians in milliseconds. A library is timed only
after its error against fp64 is within the budget on the same kind of inputs; one that is missing or out of it is listed
with the reason. "S0" is one state for all sequences: the other libraries copy it for each, which is part of their time.
Writes benchmarks/results/<gpu>.json.
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
sys.path[:0] = [str(HERE.parent), str(HERE)]

from gpu_cases import OPS, Op, Scan, Values  # noqa: E402

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


def leaves_of(op: Op, values: Values, wanted: list[str]) -> Values:
    return {n: x.detach().requires_grad_(n in wanted) if n in (*op.inputs, "s0") else x for n, x in values.items()}


def gradients(op: Op, run: Scan, values: Values, weight: Tensor) -> dict[str, Tensor]:
    wanted = [*op.inputs, "s0"]
    leaves = leaves_of(op, values, wanted)
    output, final = run(leaves, True)
    loss = (output.float() * weight).sum() + final.float().square().sum()
    grads = torch.autograd.grad(loss, [leaves[n] for n in wanted])
    return {"output": output.detach(), "final_state": final.detach()} | dict(zip(wanted, grads, strict=True))


def errors(op: Op, run: Scan, values: Values) -> dict[str, float]:
    """Relative to fp64, of the output and every gradient."""
    exact = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in values.items()}
    with torch.no_grad():
        weight = torch.randn_like(op.reference(values, True)[0], dtype=torch.float32)
    truth, found = gradients(op, op.reference, exact, weight), gradients(op, run, values, weight)
    return {
        n: float((found[n].double() - x).square().mean().sqrt() / x.square().mean().sqrt()) for n, x in truth.items()
    }


def load(op: Op, values: Values) -> tuple[dict[str, Scan], dict, dict]:
    """(implementations that may be timed, their errors, why the others may not)."""
    runs, found, missing = {}, {}, {}
    for name, loader in {"s0kernels": lambda: op.ours, **op.rivals}.items():
        try:
            run = loader()
            found[name] = errors(op, run, values)
        except Exception as error:  # whatever a library does here must not end the others' measurement
            missing[name] = reason(error)
            continue
        worst = max(found[name], key=found[name].get)
        if found[name][worst] <= BUDGET:
            runs[name] = run
        else:
            missing[name] = f"error of {worst}: {found[name][worst]:.1e}"
    return runs, found, missing


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


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


def backward_of(op: Op, run: Scan, values: Values, wanted: list[str]) -> Callable[[], object]:
    leaves = leaves_of(op, values, wanted)
    output, _ = run(leaves, True)
    weight, inputs = torch.randn_like(output), [leaves[n] for n in wanted]
    return lambda: torch.autograd.grad(output, inputs, weight, retain_graph=True)


def peak(op: Op, run: Scan, values: Values) -> float:
    """MiB that a forward and a backward need beyond the inputs."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward_of(op, run, values, [*op.inputs, "s0"])()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(op: Op, runs: dict[str, Scan], values: Values, clock: Clock, rounds: int) -> dict:
    forward, backward, refused = {}, {}, {}
    for name, run in runs.items():
        try:
            backward[f"{name} backward"] = backward_of(op, run, values, [*op.inputs, "s0"])
        except Exception as error:  # a case that a library does not know
            refused[name] = reason(error)
            continue
        forward[f"{name} forward, zero"] = partial(run, values, False)
        forward[f"{name} forward, S0"] = partial(run, values, True)
    if "s0kernels" in runs:
        forward["s0kernels forward, S0 again"] = partial(op.ours, values, True)
        backward["s0kernels state-only backward"] = backward_of(op, op.ours, values, ["s0"])
    with torch.no_grad():
        times = in_turn(clock, forward, rounds)
    times |= in_turn(clock, backward, rounds)
    memory = {name: peak(op, run, values) for name, run in runs.items() if name not in refused}
    return {"ms": times, "peak MiB": memory, "refused": refused}


def steps(op: Op, heads: dict, clock: Clock, device: str, dtype: torch.dtype, batches: list[int], rounds: int) -> list:
    found = []
    for batch in batches:
        values = op.make((batch, 1), heads, device, dtype)
        pool = values["s0"].expand(batch, -1, -1, -1).contiguous()
        rows = torch.arange(batch, device=device, dtype=torch.int32)
        cases = {
            "step": op.step(values, pool),
            "step by index": op.step(values, pool, state_indices=rows),
            "copy of the states": partial(pool.clone().copy_, pool),
        }
        with torch.no_grad():
            found.append({"batch": batch, "ms": in_turn(clock, cases, rounds)})
    return found


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "triton", "flash-linear-attention", "fla-core", "flash-qla", "tilelang", "mamba-ssm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--smoke", action="store_true", help="tiny inputs on a CPU, in Triton's interpreter")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.smoke:
        device, dtype, cases, batches, lengths, options.rounds = "cpu", torch.float16, SMOKE, [2], [30, 5], 1
    else:
        if not torch.cuda.is_available():
            sys.exit("there is no CUDA device (--smoke tries the script without one)")
        device, dtype, batches, lengths = "cuda", torch.bfloat16, [1, 8, 32, 256], (2, 200)
        cases = {name: CASES[name] for name in options.cases.split(",")}
    sources = sorted((HERE.parent / "s0kernels" / "backends" / "triton").glob("*.py"))
    results = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "interpreter",
        "versions": versions(),
        "sources": hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16],
        "dtype": str(dtype)[6:],
    }
    clock = Clock(device)
    for name in options.ops.split(","):
        op = OPS[name]
        heads = op.small if options.smoke else op.heads
        runs, found, missing = load(op, op.make(lengths, heads, device, dtype))
        for library, why in missing.items():
            print(f"{name}, not timed: {library}: {why}")
        entry = results[name] = {"heads": heads, "errors": found, "not timed": missing, "scans": []}
        for case, sizes in cases.items():
            for channel_first in (False, True):
                values = op.make(sizes, heads, device, dtype, channel_first)
                row = {"case": case, "layout": "channel-first" if channel_first else "token-major"}
                entry["scans"].append(row | measure(op, runs, values, clock, options.rounds))
                print(json.dumps(entry["scans"][-1]), flush=True)
        if "s0kernels" in runs:
            entry["steps"] = steps(op, heads, clock, device, dtype, batches, options.rounds)
        print(f"\n{name}\n{table(op, entry)}\n", flush=True)
    out = options.out or HERE / "results" / f"{results['device'].lower().replace(' ', '-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


def table(op: Op, results: dict) -> str:
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
            others = {name: ms[f"{name} {what}"] / mine for name in op.rivals if f"{name} {what}" in ms}
            best = min(others, key=others.get, default=None)
            return f"{mine:.3f}" + (f" ({best} {others[best]:.2f}x)" if best else "")

        zero, again = (ms["s0kernels forward, S0"] / ms[f"s0kernels forward, {x}"] for x in ("zero", "S0 again"))
        cells = [row["case"], row["layout"], cell("forward, S0"), cell("backward")]
        cells += [f"{ms['s0kernels state-only backward']:.3f}", f"{zero:.3f}", f"{again:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
