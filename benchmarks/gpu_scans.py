"""The Triton scans beside the libraries that are installed, on a GPU, in one process.

    python benchmarks/gpu_scans.py [--rounds 15] [--cases 1x8192,8x1024]     (from the source tree, nothing installed)
    TRITON_INTERPRET=1 python benchmarks/gpu_scans.py --smoke                (tiny, on a CPU: does the script work?)

What `python -m s0kernels bench` does not have: packed sequences, both layouts of the inputs, steps by batch. bf16,
heads of Qwen3.5-4B and of Falcon-H1-7B. Everything that is compared runs in turn, round by round; figures are medians
in milliseconds. A library is timed only after its error is within the budget on the same kind of inputs; one that is
missing or out of it is listed with the reason. Writes benchmarks/results/<gpu>-scans.json.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from s0kernels.bench import measure, scans  # noqa: E402
from s0kernels.bench.baselines import MODELS, OPS, OUR_BUDGET, THEIR_BUDGET, Op, Scan, Values, state_for_each  # noqa: E402

RAGGED = [300 + (37 * i) % 160 - 80 for i in range(48)]
CASES = {
    "1x8192": (1, 8192),
    "8x1024": (8, 1024),
    "1x2048": (1, 2048),
    "8x512": (8, 512),
    "48 ragged": RAGGED,
    "1x32768": (1, 32768),
}
HEADS = {"gated_delta_rule": MODELS["qwen3.5-4b"][1], "ssd": MODELS["falcon-h1-7b"][1]}
SMOKE = {"2x20": (2, 20), "3 ragged": [9, 0, 7]}
SMOKE_HEADS = {"gated_delta_rule": {"H": 1, "HV": 2, "K": 16, "V": 16}, "ssd": {"H": 2, "P": 16, "G": 1, "N": 16}}


def load(op: Op, values: Values) -> tuple[dict[str, Scan], dict[str, str]]:
    """(implementations that may be timed, why the others may not)."""
    runs, missing = {}, {}
    device = values["s0"].device
    for name in (scans.OURS, *op.baselines):
        reason = None if name == scans.OURS else op.baselines[name].unusable(str(device))
        try:
            run = None if reason else scans.scan(op, name, "triton")
            budget = OUR_BUDGET if name == scans.OURS else THEIR_BUDGET
            reason = reason or op.out_of_budget(run, values, budget)
        except Exception as error:  # whatever a library does here must not end the others' measurement
            reason = scans.brief(error)
        if reason is None:
            runs[name] = run
        else:
            missing[name] = reason
    return runs, missing


def medians(cases: dict[str, measure.Case], rounds: int, device: str) -> dict[str, float]:
    times = measure.interleaved(cases, rounds=rounds, device=device)
    return {name: 1e3 * statistics.median(samples) for name, samples in times.items()}


def peak(case: measure.Case, device: str) -> float | None:
    """MiB that it needs beyond the inputs."""
    return measure.peak_memory(lambda: case, device=device) / 2**20 if device == "cuda" else None


def measured(op: Op, runs: dict[str, Scan], values: Values, rounds: int, device: str) -> dict:
    forward, backward, memory, refused = {}, {}, {}, {}
    for name, run in runs.items():
        try:
            training = scans.case(op, run, values, "training")
            memory[name] = peak(training, device)
            training()
        except Exception as error:  # a case that a library does not know
            refused[name] = scans.brief(error)
            continue
        forward[f"{name} forward, zero"] = scans.case(op, run, values, "forward", state=False)
        forward[f"{name} forward, S0"] = scans.case(op, run, values, "forward")
        backward[f"{name} backward"] = scans.case(op, run, values, "backward")
    if scans.OURS in runs:
        forward["s0kernels forward, S0 again"] = scans.case(op, runs[scans.OURS], values, "forward")
        backward["s0kernels state-only backward"] = scans.case(op, runs[scans.OURS], values, "state")
    times = medians(forward, rounds, device) | medians(backward, rounds, device)
    return {"ms": times, "peak MiB": memory, "refused": refused}


def steps(op: Op, heads: dict, device: str, dtype: torch.dtype, batches: list[int], rounds: int) -> list:
    found = []
    for batch in batches:
        values = op.make((batch, 1), heads, device, dtype)
        pool = state_for_each(values, batch).clone()
        rows = torch.arange(batch, device=device, dtype=torch.int32)
        cases = {
            "step": op.step(values, pool, backend="triton"),
            "step by index": op.step(values, pool, backend="triton", state_indices=rows),
            "copy of the states": partial(pool.clone().copy_, pool),
        }
        with torch.no_grad():
            found.append({"batch": batch, "ms": medians(cases, rounds, device)})
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
    results = {"machine": measure.machine(device), "dtype": str(dtype)[6:]}
    for name in options.ops.split(","):
        op, heads = OPS[name], (SMOKE_HEADS if options.smoke else HEADS)[name]
        runs, missing = load(op, op.make(lengths, heads, device, dtype))
        for library, why in missing.items():
            print(f"{name}, not timed: {library}: {why}")
        entry = results[name] = {"heads": heads, "not timed": missing, "scans": []}
        for case, sizes in cases.items():
            for channel_first in (False, True):
                values = op.make(sizes, heads, device, dtype, channel_first)
                row = {"case": case, "layout": "channel-first" if channel_first else "token-major"}
                entry["scans"].append(row | measured(op, runs, values, options.rounds, device))
                print(json.dumps(entry["scans"][-1]), flush=True)
        if scans.OURS in runs:
            entry["steps"] = steps(op, heads, device, dtype, batches, options.rounds)
        print(f"\n{name}\n{table(op, entry)}\n", flush=True)
    out = options.out or HERE / "results" / f"{measure.machine_name(results['machine'])}-scans.json"
    measure.write_json(out, results)


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
            others = {name: ms[f"{name} {what}"] / mine for name in op.baselines if f"{name} {what}" in ms}
            best = min(others, key=others.get, default=None)
            return f"{mine:.3f}" + (f" ({best} {others[best]:.2f}x)" if best else "")

        zero, again = (ms["s0kernels forward, S0"] / ms[f"s0kernels forward, {x}"] for x in ("zero", "S0 again"))
        cells = [row["case"], row["layout"], cell("forward, S0"), cell("backward")]
        cells += [f"{ms['s0kernels state-only backward']:.3f}", f"{zero:.3f}", f"{again:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
