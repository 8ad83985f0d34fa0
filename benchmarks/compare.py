"""Compare cases that should cost the same: their times, with a control, and their work."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from s0kernels.bench.measure import Case, Work, interleaved, ratio, work
from s0kernels.bench.tables import interval, markdown

Samples = dict[str, list[float]]

#: operators that are not counted: they neither compute nor move data (views, allocations), or another operator does
#: their work, or they do the work of another operator (`fill_` under `zero_`)
_IDLE = """as_strided alias chunk clone contiguous detach empty empty_like empty_strided expand expand_as fill_ flatten
    lift_fresh linear matmul movedim narrow new_empty new_zeros numpy_T ones ones_like permute reshape resize_
    resolve_conj resolve_neg result_type select select_backward set_ slice split split_with_sizes squeeze t to transpose
    unbind unflatten unsafe_split unsqueeze view view_as zeros zeros_like _reshape_alias _to_copy _unsafe_view"""
IDLE = {f"aten::{name}" for name in _IDLE.split()}


@dataclass
class Settings:
    device: str = "cpu"
    clock: str = "wall"
    rounds: int = 40
    #: time limit of a comparison in seconds, after which no new round begins (three always run)
    budget: float = 20.0

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"


def kernels(done: Work) -> int:
    """Return the number of kernels launched on a GPU, or on a CPU the number of operators that compute or move data."""
    if torch.cuda.is_available() and done.launches:
        return done.launches
    return sum(
        count
        for name, count in done.operators.items()
        if name not in IDLE and not name.startswith(("autograd", "torch"))
    )


def counts(cases: Mapping[str, Case]) -> dict:
    """Return for each case the kernels, bytes allocated and bytes copied."""
    found = {}
    for name, case in cases.items():
        done = work(case)
        found[name] = {"kernels": kernels(done), "allocated": done.allocated, "copied": done.copied}
    return found


def take_turns(cases: dict[str, Case], settings: Settings) -> Samples:
    options = {"rounds": settings.rounds, "clock": settings.clock, "device": settings.device, "budget": settings.budget}
    return interleaved(cases, **options)


def compare(cases: dict[str, Case], settings: Settings) -> dict:
    """Compare cases with the first one, the base, which runs twice in every round."""
    base = next(iter(cases))
    return {**timing(take_turns({**cases, "again": cases[base]}, settings), base), "work": counts(cases)}


def generation(models: dict, settings: Settings, new: int = 16, prompt: int = 32) -> tuple[dict, dict]:
    """Compare (time to the first token, time per later token) of the models. The first model is the base."""
    device = next(next(iter(models.values())).parameters()).device
    ids = torch.arange(2, 2 + prompt, device=device)[None]

    def generate(model, tokens: int) -> None:
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    base = next(iter(models))
    lasting = {"again": models[base], **models}
    cases = {(name, n): partial(generate, model, n) for name, model in lasting.items() for n in (1, 1 + new)}
    samples = take_turns(cases, settings)
    found = []
    for tokens in (1, 1 + new):
        if tokens == 1:
            times = {name: samples[name, 1] for name in lasting}
        else:
            pairs = {name: zip(samples[name, tokens], samples[name, 1], strict=True) for name in lasting}
            times = {name: [(long - short) / new for long, short in pairs[name]] for name in lasting}
        work = counts({name: cases[name, tokens] for name in models})
        found.append({**timing(times, base), "work": work})
    return found[0], found[1]


def timing(samples: Samples, base: str) -> dict:
    """Return medians, the ratio of every case to the base, and the control, which is the ratio of the base to
    itself."""
    others = [name for name in samples if name not in (base, "again")]
    control = ratio(samples["again"], samples[base])
    ratios = {name: ratio(samples[name], samples[base]) for name in others}
    return {
        "rounds": len(samples[base]),
        "ms": {name: 1e3 * float(np.median(samples[name])) for name in (base, *others)},
        "control": list(control),
        "ratio": {name: list(found) for name, found in ratios.items()},
        "verdict": {name: verdict(found, control) for name, found in ratios.items()},
    }


def verdict(found: tuple, control: tuple) -> str:
    """Return the verdict on the interval of a ratio, compared with that of the control."""
    (_, low, high), (_, least, most) = found, control
    if least <= low and high <= most:
        return "inside"
    if low > most:
        return "slower"
    return "faster" if high < least else "overlaps"


def table(rows: list[dict], base: str) -> str:
    """Return a Markdown table with one line for every case that is compared with the base."""
    head = ["what", f"against {base}", "ms", "ratio [95 %]", f"{base} / {base}", ""]
    head += ["kernels", "MB allocated", "MB copied"]
    lines = []
    for row in rows:
        for name in row["ratio"]:
            mine, theirs = row["work"][name], row["work"][base]
            both = [_pair(theirs[key], mine[key], key != "kernels") for key in ("kernels", "allocated", "copied")]
            cells = (row["what"], name, f"{row['ms'][name]:.3g}", interval(row["ratio"][name]))
            lines.append((*cells, interval(row["control"]), row["verdict"][name], *both))
    return markdown(head, lines)


def _pair(base: int, mine: int, megabytes: bool) -> str:
    """Format two numbers, or one if they are equal."""
    shown = [f"{value / 1e6:.3f}" if megabytes else str(value) for value in (base, mine)]
    return shown[0] if base == mine else f"{shown[0]} -> {shown[1]}"
