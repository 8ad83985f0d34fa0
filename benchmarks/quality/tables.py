"""Make tables and plots of the experiments from their JSON files. The tables of docs/results.md are between markers."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from protocol import compare, deviation

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "results.md"
#: by experiment: the label of a numeric horizontal axis
AXES = {"alpha": "scale that S0 is used at", "count": "verified solutions learned from"}


def load(experiment: str, folder: Path) -> list[dict]:
    """Return the results of an experiment, with models in the order of their names."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(f"{experiment}-*.json"))]


def by_variant(cells: dict, value: str = "pass@1") -> dict[str, list[float]]:
    """Return the values of each variant over seeds, in per cent."""
    found: dict[str, list[float]] = {}
    for key, cell in cells.items():
        if value in cell:
            found.setdefault(key.rsplit("/", 1)[0], []).append(100 * cell[value])
    return found


def table(experiment: str, folder: Path) -> str:
    """Return the table of an experiment in Markdown."""
    results = load(experiment, folder)
    if not results:
        return ""
    maker = {"main": _main, "passk": _passk, "persistence": _persistence, "first": _first_difference}
    return "\n".join(maker.get(experiment, _sweep)(results))


def _main(results: list[dict]) -> Iterator[str]:
    for result in results:
        values = by_variant(result["cells"])
        base = values["no tuning"]
        yield f"| {_name(result)}, {len(base)} seeds | trained | pass@1, % | against no tuning | p | p against S0 |"
        yield "|---|---|---|---|---|---|"
        for label, mine in values.items():
            against, s0 = compare(mine, base), compare(mine, values["S0"])
            cells = [label, _trained(label, result["parameters"]), _spread(mine)]
            cells += ["", "", _p(s0.p)] if label == "no tuning" else [f"{against.delta:+.1f}", _p(against.p), _p(s0.p)]
            if label == "S0":
                cells[-1] = ""
            yield _row(cells)
        yield ""


def _trained(label: str, parameters: dict) -> str:
    if rank := re.match(r"LoRA r(\d+)", label):
        return f"{int(rank[1]) * parameters['LoRA, of a rank']:,}"
    if label == "no tuning":
        return "0"
    return f"{parameters['S0' if label.startswith('S0') else 'prompt']:,}"


def _sweep(results: list[dict]) -> Iterator[str]:
    found = [by_variant(result["cells"]) for result in results]
    labels = list(dict.fromkeys(label for values in found for label in values))
    if all(label.replace(".", "").isdigit() for label in labels):
        labels.sort(key=float)
    yield _row(["pass@1, %", *(f"{_name(r)}, {_seeds(v)} seeds" for r, v in zip(results, found, strict=True))])
    yield "|---" * (len(results) + 1) + "|"
    for label in labels:
        yield _row([label, *(_spread(values[label]) if label in values else "" for values in found)])


def _seeds(values: dict[str, list[float]]) -> int:
    return max(len(row) for row in values.values())


def _passk(results: list[dict]) -> Iterator[str]:
    for result in results:
        measures = [f"pass@{k}" for k in (1, 5, 10)]
        columns = [by_variant(result["cells"], measure) for measure in measures]
        yield _row([f"{_name(result)}, {_seeds(columns[0])} seeds, sampled", *(f"{m}, %" for m in measures)])
        yield "|---" * (len(measures) + 1) + "|"
        for label in columns[0]:
            yield _row([label, *(_spread(column[label]) for column in columns)])
        yield ""


def _persistence(results: list[dict]) -> Iterator[str]:
    yield _row(["mean KL, nats", "first token", *(f"{10 * i} to {10 * i + 10} %" for i in range(10)), "last token"])
    yield "|---" * 13 + "|"
    for result in results:
        cells = list(result["cells"].values())
        columns = zip(*([c["first token"], *c["tenths"], c["last token"]] for c in cells), strict=True)
        yield _row([f"{_name(result)}, {len(cells)} seeds", *(f"{sum(c) / len(c):.3g}" for c in columns)])


def _first_difference(results: list[dict]) -> Iterator[str]:
    yield _row(["problems that S0 fixes, all seeds", "fixed", *(f"token {i + 1}" for i in range(8)), "later"])
    yield "|---" * 11 + "|"
    for result in results:
        places = [place for cell in result["cells"].values() for place in cell["fixed"]]
        shares = [sum(place == i for place in places) for i in range(8)]
        yield _row([_name(result), str(len(places)), *map(str, shares), str(len(places) - sum(shares))])


def _name(result: dict) -> str:
    """Return the name of the model, with whatever else distinguishes results in one folder."""
    settings = result["settings"]
    task = [] if settings["task"] in ("tiny", "boundary") else [settings["task"]]
    limit = [f"{settings['limit']} problems"] if "limit" in settings else []
    return ", ".join([settings["model"], *task, *limit])


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ± {deviation(values):.1f}" if len(values) > 1 else "")


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.1g}" if p < 0.001 else f"{p:.3f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(experiment: str, folder: Path) -> Path | None:
    """Write an SVG of means and standard deviations beside the results, in colours for dark and light backgrounds."""
    results = load(experiment, folder)
    if not results or experiment == "first":
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grey = "#808080"
    style = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), grey)
    style |= {"svg.hashsalt": "s0kernels", "font.size": 9}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(
            1, len(results), figsize=(4.5 * len(results), 3.6), layout="constrained", squeeze=False
        )
        for axis, result in zip(axes[0], results, strict=True):
            _draw(experiment, result, axis)
            axis.set_title(_name(result))
        file = folder / f"{experiment}.svg"
        figure.savefig(file, transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    return file


def _draw(experiment: str, result: dict, axis) -> None:
    if experiment == "persistence":
        for key, cell in result["cells"].items():
            axis.plot([5 + 10 * i for i in range(10)], cell["tenths"], marker=".", label=key.replace("S0/", "seed "))
        axis.set(xlabel="place in the prompt, %", ylabel="KL(S0 || no tuning), nats", yscale="log")
        axis.legend(frameon=False)
        return
    if experiment == "passk":
        for label, first in by_variant(result["cells"], "pass@1").items():
            rest = [by_variant(result["cells"], f"pass@{k}")[label] for k in (5, 10)]
            axis.plot([1, 5, 10], [sum(v) / len(v) for v in (first, *rest)], marker=".", label=label)
        axis.set(xlabel="k", ylabel="pass@k, %")
        axis.legend(frameon=False)
        return
    values = by_variant(result["cells"])
    means, spreads = ([f(v) for v in values.values()] for f in (fmean, deviation))
    if experiment in AXES:
        order = sorted(range(len(values)), key=lambda i: float(list(values)[i]))
        axis.errorbar(
            [float(list(values)[i]) for i in order], [means[i] for i in order], [spreads[i] for i in order], marker="."
        )
        axis.set(xlabel=AXES[experiment], ylabel="pass@1, %")
        return
    colors = ["C1" if label.startswith("S0") else "#808080" if label == "no tuning" else "C0" for label in values]
    bars = axis.barh(range(len(values)), means, xerr=spreads, color=colors, error_kw={"ecolor": "#404040"})
    axis.bar_label(bars, fmt="%.0f", padding=6, color="#808080")
    axis.set_yticks(range(len(values)), list(values))
    axis.invert_yaxis()
    axis.set(xlabel="pass@1, %", xlim=(0, 125), xticks=range(0, 101, 25))


def write(folder: Path, document: Path = DOCUMENT) -> str:
    """Update the tables of the document from the results, and write it if it differs."""
    before = document.read_text(encoding="utf-8")
    after = filled(before, folder)
    if after != before:
        document.write_text(after, encoding="utf-8")
    return after


def filled(text: str, folder: Path) -> str:
    """Return `text` with the tables of experiments between `<!-- quality: NAME -->` and `<!-- end -->`. Without results
    the old text is kept."""

    def replace(match: re.Match) -> str:
        made = table(match[1], folder)
        return f"<!-- quality: {match[1]} -->\n{made.strip()}\n<!-- end -->" if made else match[0]

    return re.sub(r"<!-- quality: (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)
