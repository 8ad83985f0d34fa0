"""The compiled scans beside transformers' PyTorch functions and the machine's own matrix product, on a CPU.

    python benchmarks/cpu_scans.py [--threads N] [--lengths 128,512,2048,8192] [--rounds 5] [--processor-time]

On a machine that others load too, one thread and processor time give ratios that they hardly touch.

Everything that is compared runs in turn in one process, round by round; figures are medians. Shapes are the heads of
Qwen3.5-4B (16 of keys, 32 of values, 128 x 128) and of Falcon-H1-7B (24, P 128, N 256, one group), batch 1. Extra
memory is how far the resident memory of a process of its own rises above what inputs and a first small run hold.
Writes benchmarks/results/cpu-<instructions>.json and prints its table.
"""

import argparse
import hashlib
import json
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from s0kernels import __version__
from s0kernels.ops import _dispatch, gated_delta_rule, ssd

HERE = Path(__file__).resolve().parent
clock = time.perf_counter
INSTRUCTIONS = {512: "avx512", 256: "avx2", 128: "portable"}
DELTA = {"H": 16, "HV": 32, "K": 128, "V": 128, "C": 32}
MAMBA = {"H": 24, "P": 128, "N": 256, "C": 64}


def inputs(op: str, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    if op == "gated_delta_rule":
        H, HV, K, V = (DELTA[name] for name in ("H", "HV", "K", "V"))
        q, k, v = (torch.randn(1, length, h, d).to(dtype) for h, d in ((H, K), (H, K), (HV, V)))
        g, beta = -0.1 * torch.rand(1, length, HV), torch.rand(1, length, HV)
        return [q, k, v, g, beta, 0.1 * torch.randn(1, HV, K, V)]
    H, P, N = (MAMBA[name] for name in ("H", "P", "N"))
    x, B, C = (torch.randn(1, length, h, d).to(dtype) for h, d in ((H, P), (1, N), (1, N)))
    return [x, 0.1 * torch.rand(1, length, H), -torch.rand(H), B, C, 0.1 * torch.randn(1, H, P, N)]


def call(op: str, implementation: str, values: list[torch.Tensor], state: bool = True):
    """(output, final state)."""
    *rest, initial = values
    initial = initial if state else None
    if implementation == "transformers" and op == "gated_delta_rule":
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule as scan

        q, k, v, g, beta = rest
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        return scan(q, k, v, g=g, beta=beta, initial_state=initial, **options)
    if implementation == "transformers":
        from transformers.models.falcon_h1 import modeling_falcon_h1

        scan = modeling_falcon_h1.mamba2_chunk_scan
        scan = getattr(scan, "__wrapped__", scan)
        return scan(*rest, chunk_size=128, initial_states=initial, return_final_states=True)
    if op == "gated_delta_rule":
        return gated_delta_rule(*rest, initial_state=initial, use_qk_l2norm=True, backend=implementation)
    return ssd(*rest, initial_state=initial, backend=implementation)


def seconds(op, implementation, values, *, backward=False, state=True, wanted=None) -> float:
    leaves = [x.detach().requires_grad_(backward and (wanted is None or i in wanted)) for i, x in enumerate(values)]
    begin = clock()
    output, _ = call(op, implementation, leaves, state)
    if backward:
        middle = clock()
        output.backward(torch.ones_like(output))
        return (clock() - middle) if wanted is not None else (clock() - begin)
    return clock() - begin


def in_turn(rounds: int, **cases) -> dict[str, float]:
    """Medians of cases that run one after the other, again and again; the first round does not count."""
    times = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, case in cases.items():
            times[name].append(case())
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def gflop(op: str, length: int, backward: bool) -> float:
    """Multiplications and additions of the compiled kernels' matrix products, recomputation included.

    What heads share is counted once: by 2 heads of the delta rule, by 4 of SSD.
    """
    if op == "gated_delta_rule":
        K, V, C, heads = DELTA["K"], DELTA["V"], DELTA["C"], DELTA["HV"]
        forward, back = 6 * K * V + C * (K + 2 * V), 16 * K * V + C * (3.5 * K + 5 * V)
    else:
        K, V, C, heads = MAMBA["N"], MAMBA["P"], MAMBA["C"], MAMBA["H"]
        forward, back = 4 * K * V + C * (K / 4 + V), 10 * K * V + C * (3 * K / 4 + 2 * V)
    return length * heads * (forward + back * backward) / 1e9


def sgemm() -> float:
    """GFLOP/s of torch's own product of 2048 x 2048 matrices."""
    a = torch.randn(2048, 2048)
    times = in_turn(5, product=lambda: -clock() + (a @ a, clock())[1])
    return 2 * 2048**3 / times["product"] / 1e9


def extra_memory(op: str, implementation: str, length: int) -> float:
    """MiB that forward and backward need at their peak."""
    command = [sys.executable, __file__, "--memory", op, implementation, str(length)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def report_memory(op: str, implementation: str, length: int) -> None:
    for size in (64, length):  # the first run warms up imports, kernels and pools
        values = [x.requires_grad_() for x in inputs(op, size, torch.float32)]
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident()
        output, _ = call(op, implementation, values)
        output.backward(torch.ones_like(output))
    print((resident() - before) / 1024)


def resident() -> int:
    """Peak of resident memory in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(options: argparse.Namespace) -> dict:
    lengths = [int(length) for length in options.lengths.split(",")]
    results = {"sgemm_gflops": sgemm(), "scans": [], "others": []}
    print("| scan | dtype | T | | cpu, ms | transformers / cpu | torch backend / cpu | GFLOP/s (of sgemm) |")
    print("|---|---|---|---|---|---|---|---|")
    for op in ("gated_delta_rule", "ssd"):
        for dtype in (torch.float32, torch.bfloat16):
            for length in lengths:
                values = inputs(op, length, dtype)
                for backward in (False, True):
                    row = compare(op, values, backward, options.rounds, results["sgemm_gflops"])
                    results["scans"].append(row)
                    print(table_row(row), flush=True)
        others = compare_states(op, inputs(op, 2048, torch.float32), options.rounds)
        results["others"].append(others)
        print(json.dumps(others), flush=True)
    return results


def compare(op: str, values: list[torch.Tensor], backward: bool, rounds: int, rate: float) -> dict:
    length = values[0].shape[1]
    names = ("cpu", "torch", "transformers")
    times = in_turn(rounds, **{name: partial(seconds, op, name, values, backward=backward) for name in names})
    speed = gflop(op, length, backward) / times["cpu"]
    return {
        "op": op,
        "dtype": str(values[0].dtype)[6:],
        "T": length,
        "backward": backward,
        "ms": {name: 1e3 * value for name, value in times.items()},
        "gflops": speed,
        "of_sgemm": speed / rate,
    }


def compare_states(op: str, values: list[torch.Tensor], rounds: int) -> dict:
    """S0 against the zero state, with S0 against itself for control; the state-only backward; memory."""
    found = {"op": op, "T": values[0].shape[1]}
    for backward, name in ((False, "forward"), (True, "forward + backward")):
        run = partial(seconds, op, "cpu", values, backward=backward)
        times = in_turn(4 * rounds, state=run, again=run, zero=partial(run, state=False))
        found[f"S0 / zero, {name}"] = times["state"] / times["zero"]
        found[f"S0 / S0, {name}"] = times["again"] / times["state"]
    everything = range(len(values))
    run = partial(seconds, op, "cpu", values, backward=True)
    times = in_turn(rounds, all=partial(run, wanted=everything), state=partial(run, wanted=[len(values) - 1]))
    found["state-only backward / full backward"] = times["state"] / times["all"]
    found["extra MiB"] = {name: extra_memory(op, name, found["T"]) for name in ("cpu", "torch", "transformers")}
    return found


def table_row(row: dict) -> str:
    ms, what = row["ms"], "forward + backward" if row["backward"] else "forward"
    ratios = [f"{ms[name] / ms['cpu']:.1f}x" for name in ("transformers", "torch")]
    speed = f"{row['gflops']:.0f} ({100 * row['of_sgemm']:.0f} %)"
    cells = (row["op"], row["dtype"], str(row["T"]), what, f"{ms['cpu']:.1f}", *ratios, speed)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lengths", default="128,512,2048,8192")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true", help="of all threads together, instead of wall time")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", nargs=3, metavar=("OP", "IMPLEMENTATION", "T"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        return report_memory(*options.memory[:2], int(options.memory[2]))
    torch.set_num_threads(options.threads)
    if options.processor_time:
        global clock
        clock = time.process_time
    import transformers

    sources = sorted((HERE.parent / "csrc").rglob("*.[hc]*"))
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    _dispatch.choose("ssd", "cpu", torch.device("cpu"), torch.float32)  # or an error that says why not
    bits = torch.ops.s0kernels_cpu.instructions()
    machine = {
        "cpu": models[0].split(":")[1].strip() if models else platform.machine(),
        "vector_bits": bits,
        "threads": options.threads,
        "rounds": options.rounds,
        "time": "processor" if options.processor_time else "wall",
        "versions": {"s0kernels": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "sources": hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16],
    }
    results = {"machine": machine, **measure(options)}
    out = options.out or HERE / "results" / f"cpu-{INSTRUCTIONS[bits]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
