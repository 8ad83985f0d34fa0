"""Make the tables of the documents, and the plots, from the files of results.

    python benchmarks/report.py

The text between `<!-- bench: NAME -->` and `<!-- end -->` is replaced by the table of benchmarks/results/NAME.json,
which says if the kernels have changed since. For scans (`python -m s0kernels bench --json`) and scaling, a plot
NAME.svg is written beside that file. The text after `<!-- hardware -->` is replaced by the table of
s0kernels/hardware.py. A test fails if a document differs from the output of this script.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = tuple(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "supported", "triton-kernels"))
sys.path.insert(0, str(ROOT))

import gpu_decode  # noqa: E402
import gpu_scans  # noqa: E402
import gpu_tiles  # noqa: E402
import matrix  # noqa: E402

from s0kernels import hardware  # noqa: E402
from s0kernels.bench import measure  # noqa: E402
from s0kernels.bench.passes import OURS, PASSES  # noqa: E402
from s0kernels.bench.tables import interval, markdown  # noqa: E402
from s0kernels.files import replace_file  # noqa: E402

NAMES = {"gated_delta_rule": "delta rule", "ssd": "SSD"}
KINDS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
CHANGED = " **The kernels have changed since these were measured.**"
#: by part of `make gpu`: the function that makes its table, and the backends that it measures
GPU_TABLES = {
    "scans": (gpu_scans.table, ("triton",)),
    "decode": (gpu_decode.table, ("triton", "cuda")),
    "tiles": (gpu_tiles.table, ("triton",)),
}
_MARKED = re.compile(r"(<!-- bench: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_HARDWARE = re.compile(r"(<!-- hardware -->\n).*?(<!-- end -->)", re.DOTALL)
_GREY = "#808080"  # readable on white and on black


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def length(row: dict) -> int:
    return int(row["shape"].rpartition("x")[2])


def series(results: dict) -> dict[tuple[str, str, str], list[dict]]:
    """Return rows by scan, pass and dtype, with short inputs first."""
    found = {}
    for row in sorted(results["rows"], key=length):
        found.setdefault((row["op"], row["pass"], row["dtype"]), []).append(row)
    return {key: found[key] for key in sorted(found, key=lambda key: (key[0], *map([*PASSES, *KINDS].index, key[1:])))}


def changed(machine: dict) -> bool:
    """Whether the kernels have changed since the measurement on `machine`."""
    backend = "triton" if "gpu" in machine else "cpu"
    return machine["kernels"][backend] != measure.kernel_hashes()[backend]


def table(results: dict) -> str:
    """Return a table of milliseconds for each length, and the ratio of each baseline's time to ours. The other columns
    are for the longest input, and are left out if nothing was measured."""
    lengths = sorted({length(row) for row in results["rows"]})
    head = ["", "", *(f"T = {T}, ms" for T in lengths)]
    head += ["of roofline", "peak MiB", "S0 / zero", "S0 / S0"]
    lines = [head]
    for (op, what, dtype), rows in series(results).items():
        by_length = {length(row): row for row in rows}
        cells = [f"{NAMES[op]}, {PASSES[what]}", KINDS[dtype]]
        cells += [_cell(by_length[T]) if T in by_length else "" for T in lengths]
        cells += [f"{100 * rows[-1]['of_roofline']:.0f} %", _memory(rows[-1])]
        cells += [interval(rows[-1][x], 2) if x in rows[-1] else "" for x in ("s0_over_zero", "s0_over_s0")]
        lines.append(cells)
    columns = [column for column in zip(*lines, strict=True) if not column[0] or any(column[1:])]
    head, *lines = zip(*columns, strict=True)
    return _with_notes([head, *lines], origin(results), results["machine"])


def _with_notes(lines: list[list[str]], note: str, machine: dict) -> str:
    note += CHANGED * changed(machine)
    return f"{markdown(lines[0], lines[1:])}\n\n{note}"


def overhead(results: dict) -> str:
    """Return the table of benchmarks/zero_overhead.py: one line for every case that is compared with the base of its
    level."""
    lines = [["what", "", "ms", "ratio (95 %)", "control", "", "work"]]
    for level in ("op", "mixer", "generate", "bank", "untouched"):
        for row in results.get(level, []):
            base = next(iter(row["ms"]))
            for name, ratio in row["ratio"].items():
                same = row["work"][name] == row["work"][base]
                cells = [row["what"], f"{name} / {base}", f"{row['ms'][name]:.3g}", interval(ratio)]
                lines.append([*cells, interval(row["control"]), row["verdict"][name], "equal" if same else "not equal"])
    return _with_notes(lines, _where(results["machine"]), results["machine"])


def training(results: dict) -> str:
    """Return the table of benchmarks/training.py: ways of training one model, compared with the batches of the
    trainer."""
    settings = results["settings"]
    lines = [["model", "way", "processor s", "of batched", "peak MiB", "last loss"]]
    batched = {run["model"]: run for run in results["runs"] if run["way"] == "batched"}
    for run in results["runs"]:
        if "missing" in run:
            lines.append([run["model"], run["way"], run["missing"], "", "", ""])
            continue
        seconds = run["processor_seconds"]
        times = f"{seconds / batched[run['model']]['processor_seconds']:.1f}x"
        cells = [run["model"], run["way"], f"{seconds:.1f}", times, f"{run['peak_mib']:.0f}"]
        lines.append([*cells, f"{run['losses'][-1]:.7f}"])
    note = f"{settings['examples']} examples, {settings['steps']} steps. "
    return _with_notes(lines, note + _where(results["machine"]), results["machine"])


def vocabulary(results: dict) -> str:
    """Return the table of benchmarks/vocabulary.py: a step of the trainer, compared with a step of the plain loop."""
    head = ["model", "way", "s", "processor s", "plain loop takes", "GiB beyond the model", "expected", "loss"]
    lines = [head]
    plain = {run["model"]: run for run in results["runs"] if run["way"] == "plain loop"}
    for run in results["runs"]:
        times = plain[run["model"]]["processor_seconds"] / run["processor_seconds"] if run["model"] in plain else None
        cells = [run["model"], run["way"], f"{run['seconds']:.1f}", f"{run['processor_seconds']:.1f}"]
        cells += ["" if times is None else f"{times:.2f}x", f"{run['peak_gib']:.2f}"]
        lines.append([*cells, f"{run['expected_gib']:.2f}" if "expected_gib" in run else "", f"{run['loss']:.4f}"])
    settings = results["settings"]
    note = f"{settings['examples']} examples, one step, medians of {settings['rounds']} rounds. "
    return _with_notes(lines, note + _where(results["machine"]), results["machine"])


def counted(results: dict) -> str:
    """Return the table of benchmarks/memory.py: bytes of a forward and its backward, counted, and predicted from one
    example."""
    head = ["model", "weights, GiB", "forward", "kept for the backward", "peak, counted", "expected from one example"]
    lines = [head]
    for name, found in results["models"].items():
        for row in found["forwards"]:
            what = f"{row['tokens']} tokens{', layers checkpointed' if row['checkpointed'] else ''}"
            cells = (f"{row[key]:.2f}" for key in ("kept_gib", "counted_gib", "expected_gib"))
            lines.append([name, f"{found['weights_gib']:.2f}", what, *cells])
        for row in found["largest"]:
            what = f"within {row['limit_gib']} GiB: up to {row['tokens']} tokens"
            what += ", layers checkpointed" if row["checkpointed"] else ""
            lines.append([name, f"{found['weights_gib']:.2f}", what, "", "", f"{row['peak_gib']:.2f}"])
    return _with_notes(lines, f"{results['examples']} examples of 300 tokens, bf16.", results["machine"])


def headline(results: dict) -> str:
    """Return the table of benchmarks/headline.py: sizes of whole models, and runs of models that fit on the machine."""
    lines = [["part", "found"]]
    for name, part in results["parts"].items():
        if "states_bytes" in part:
            weights, size = part["parameters"] / 1e9, part["states_bytes"] / 2**20
            found = f"{weights:.2f} G parameters; S0 {size:.3f} MiB in {part['recurrent_layers']} layers"
        elif "seconds" in part:
            peak = part["peak_above_weights_bytes"] / 2**20
            found = f"{part['examples']} examples, {part['tokens']} tokens, {part['steps']} steps: "
            found += f"{part['seconds']:.1f} s, {peak:.0f} MiB above the weights"
        else:
            found = "; ".join(
                f"{row['what'].rpartition(', ')[2]} {row['ms']['S0']:.3g} ms, "
                f"S0 / zero {interval(row['ratio']['S0'])}, control {interval(row['control'])}"
                for row in part["lines"]
            )
        lines.append([name, found])
    return _with_notes(lines, _where(results["machine"]), results["machine"])


def _where(machine: dict) -> str:
    name = machine.get("gpu") or f"{machine['cpu']} ({machine['instructions']}, threads: {machine['threads']})"
    versions = ", ".join(f"{package} {machine['versions'][package]}" for package in ("torch", "transformers"))
    return f"{name}, {machine['clock']} time, {machine['date']}, commit {machine['commit']}, {versions}."


def _cell(row: dict) -> str:
    baselines = [f"{name} {found[0]:.1f}x" for name, found in row["ratio"].items()]
    return f"{row['ms'][OURS]:.3g}" + (f" ({', '.join(baselines)})" if baselines else "")


def _memory(row: dict) -> str:
    peaks = dict(row.get("peak_mib", {}))
    if not peaks:
        return ""
    ours = f"{peaks.pop(OURS):.0f}"
    return ours + (f" ({', '.join(f'{name} {peak:.0f}' for name, peak in peaks.items())})" if peaks else "")


def origin(results: dict) -> str:
    roofline, rounds = results["roofline"], [row["rounds"] for row in results["rows"]]
    rates = ", ".join(f"{KINDS[kind]} {rate:.0f} GFLOP/s" for kind, rate in roofline["matmul_gflops"].items())
    return (
        f"{_where(results['machine'])} {min(rounds)} to {max(rounds)} rounds. Roofline: copy "
        f"{roofline['copy_gbs']:.0f} GB/s, matrix product {rates}."
    )


def filled(text: str) -> str:
    """Return the text with every table updated."""
    makers = {"scans": table, "zero-overhead": overhead, "training": training, "headline": headline, "scaling": scaling}
    makers |= {"vocabulary": vocabulary, "memory": counted, "kernels": matrix.document}

    def fill(found: re.Match) -> str:
        if found[2].startswith("nvidia-"):
            return f"{found[1]}{of_gpu(found[2])}\n{found[3]}"
        make = next(make for kind, make in makers.items() if found[2].startswith(kind))
        return f"{found[1]}{make(load(found[2]))}\n{found[3]}"

    return _HARDWARE.sub(rf"\g<1>{hardware_table()}\n\g<2>", _MARKED.sub(fill, text))


def of_gpu(name: str) -> str:
    """Return the table of a script of `make gpu`, as the script prints it."""
    results, part = load(name), name.rpartition("-")[2]
    machine, now = results["machine"], measure.kernel_hashes()
    note = _where(machine)
    if any(machine["kernels"][backend] != now[backend] for backend in GPU_TABLES[part][1]):
        note += CHANGED
    return f"{GPU_TABLES[part][0](results)}\n\n{note}"


def hardware_table() -> str:
    """Return the table of tried hardware, from s0kernels/hardware.py."""
    lines = [["hardware", "", "compilers", "tried"]]
    for chip in hardware.CHIPS.values():
        compiler = "Triton, nvcc" if chip.target.startswith("sm_") else "Triton"
        lines.append([chip.names, f"`{chip.target}`", compiler, chip.tried])
    for processor in hardware.PROCESSORS:
        lines.append([processor.architecture, processor.instructions, ", ".join(processor.compilers), processor.tried])
    return markdown(lines[0], lines[1:])


def _style() -> dict:
    colours = ["axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color", "grid.color"]
    return dict.fromkeys(colours, _GREY) | {"svg.fonttype": "none", "svg.hashsalt": "s0kernels", "font.size": 9}


def scaling(results: dict) -> str:
    """Return the table of benchmarks/scaling.py: both ends of every axis."""
    lines = [["model", "axis", "pass", "from, ms", "to, ms", "of roofline", "from, MiB", "to, MiB"]]
    groups: dict[tuple, list[dict]] = {}
    for row in results["points"]:
        groups.setdefault((row["point"]["model"], row["axis"], PASSES[row["pass"]]), []).append(row)
    rate = next(iter(results["roofline"]["matmul_gflops"].values()))
    for (model, axis, what), rows in groups.items():
        first, *_, last = sorted(rows, key=lambda row: row["point"][axis])
        ms, memory = [[row[x][OURS] for row in (first, last)] for x in ("ms", "peak_mib")]
        least = 1e3 * max(last["gflop"] / rate, last["gb"] / results["roofline"]["copy_gbs"])
        cells = [model, f"{axis} {first['point'][axis]:g} to {last['point'][axis]:g}", what]
        cells += [*(f"{x:.3g}" for x in ms), f"{100 * least / ms[1]:.0f} %", *(f"{x:.0f}" for x in memory)]
        lines.append(cells)
    return _with_notes(lines, _where(results["machine"]), results["machine"])


def plot(results: dict, file: Path) -> None:
    """Plot time against T, with a panel for each scan, in the first dtype that was measured."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    dtype = results["rows"][0]["dtype"]
    ops = list(dict.fromkeys(row["op"] for row in results["rows"]))
    with pyplot.rc_context(_style()):
        figure, panels = pyplot.subplots(1, len(ops), figsize=(8, 3.2), layout="constrained", squeeze=False)
        for panel, op in zip(panels[0], ops, strict=True):
            rows = {key[1]: found for key, found in series(results).items() if (key[0], key[2]) == (op, dtype)}
            _panel(panel, rows)
            panel.set(title=f"{NAMES[op]}, {rows[next(iter(rows))][0]['shape'].partition(':')[0]}, {KINDS[dtype]}")
        panels[0][0].set(ylabel=f"ms, {results['machine']['clock']} time")
        figure.savefig(file, transparent=True, metadata={"Date": None})
        pyplot.close(figure)


def plot_scaling(results: dict, file: Path) -> None:
    """Plot time and peak memory along each axis of benchmarks/scaling.py, with a column for each axis and two rows per
    model."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    axes = list(dict.fromkeys(row["axis"] for row in results["points"]))
    models = list(dict.fromkeys(row["point"]["model"] for row in results["points"]))
    with pyplot.rc_context(_style()):
        size = {"figsize": (2.7 * len(axes), 4.6 * len(models)), "layout": "constrained", "squeeze": False}
        figure, panels = pyplot.subplots(2 * len(models), len(axes), **size)
        for place, (model, value) in enumerate((m, x) for m in models for x in ("ms", "peak_mib")):
            for panel, axis in zip(panels[place], axes, strict=True):
                rows = [r for r in results["points"] if (r["axis"], r["point"]["model"]) == (axis, model)]
                _scaling_panel(panel, rows, axis, value, results["roofline"])
                panel.set(title=model if axis == axes[0] else "", xlabel=axis)
            panels[place][0].set(ylabel=f"ms, {results['machine']['clock']} time" if value == "ms" else "peak MiB")
        panels[0][0].legend(framealpha=0, fontsize=6)
        figure.savefig(file, transparent=True, metadata={"Date": None})
        pyplot.close(figure)


def _scaling_panel(panel, rows: list[dict], axis: str, value: str, roofline: dict) -> None:
    for what, dash in (("forward", "-"), ("training", "--")):
        mine = sorted((row for row in rows if row["pass"] == what), key=lambda row: row["point"][axis])
        for i, name in enumerate(dict.fromkeys(name for row in mine for name in row[value])):
            points = [(row["point"][axis], row[value][name]) for row in mine if name in row[value]]
            panel.plot(*zip(*points, strict=True), dash, marker=".", color=f"C{i}", label=f"{name}, {PASSES[what]}")
        if value == "ms":
            rate = next(iter(roofline["matmul_gflops"].values()))
            least = [1e3 * max(row["gflop"] / rate, row["gb"] / roofline["copy_gbs"]) for row in mine]
            label = f"roofline, {PASSES[what]}"
            panel.plot([row["point"][axis] for row in mine], least, dash, color=_GREY, linewidth=0.8, label=label)
    panel.set(xscale="log", yscale="log")
    ticks = sorted({row["point"][axis] for row in rows})
    panel.set_xticks(ticks, [f"{x:g}" for x in ticks], rotation=45)
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def _panel(panel, series: dict[str, list[dict]]) -> None:
    """Draw one panel, with a colour for each implementation and a dash style for each pass."""
    names = list(dict.fromkeys(name for rows in series.values() for row in rows for name in row["ms"]))
    for (what, rows), dash in zip(series.items(), ("-", "--", ":", "-."), strict=False):
        for i, name in enumerate(names):
            points = [(length(row), row["ms"][name]) for row in rows if name in row["ms"]]
            panel.plot(*zip(*points, strict=True), dash, marker=".", color=f"C{i}", label=f"{name}, {PASSES[what]}")
    lengths = sorted({length(row) for rows in series.values() for row in rows})
    panel.set(xscale="log", yscale="log", xlabel="T")
    panel.set_ylim(top=8 * panel.get_ylim()[1])  # room for the legend
    panel.set_xticks(lengths, [str(T) for T in lengths])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(framealpha=0, fontsize=7)


def main() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        replace_file(document, filled(text).encode())
        for name in dict.fromkeys(found[2] for found in _MARKED.finditer(text)):
            draw = {"scans": plot, "scaling": plot_scaling}.get(name.partition("-")[0])
            if draw is not None:
                draw(load(name), RESULTS / f"{name}.svg")


if __name__ == "__main__":
    main()
