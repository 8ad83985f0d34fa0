"""The experiments, and the results that they save.

Most are a table of variants by seeds, all run by the protocol; a cell holds the greedy answers to the held-out
problems. The others study the effect of S0: pass@k, and how far its influence reaches along the prompt.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from methods import S0, LoRA, Nothing, Prompt, StateOffset, offset
from protocol import SEEDS, Base, Results, answers, evaluate, solutions
from tqdm import tqdm

from s0kernels.modules.arguments import cache_argument, cache_of
from s0kernels.tuning.evaluation import pass_at_k

LEARNING_RATES = (5e-4, 2e-3, 5e-3, 1e-2, 2e-2)
ALPHAS = {"gated_delta_net": (0.01, 0.03, 0.07, 0.15, 0.3, 0.65, 1.0), "mamba2": (0.07, 0.2, 0.4, 0.65, 1.0, 1.5, 2.0)}


@dataclass(frozen=True)
class Variant:
    """A row of a table: a method, and the number of solutions that it learns from (None: the task's number)."""

    label: str
    method: object
    solutions: int | None = None
    texts: bool = False  # keep the answers themselves


@dataclass
class Run:
    """The data of an experiment: the base, the seeds, the verified solutions of each seed, and the file of results."""

    base: Base
    seeds: Sequence[int]
    results: Results
    found: Results  # the solutions and the chosen settings, shared by all experiments
    folder: Path  # for temporary files

    def solutions(self, seed: int, most: int | None = None) -> list[dict]:
        found = self.found.get(str(seed), lambda: {"solutions": solutions(self.base, seed)})
        return found["solutions"][: most or self.base.task.solutions]

    @property
    def s0(self) -> S0:
        return S0(normalize=self.base.task.normalize, folder=self.folder / "runs")


def grid(run: Run, variants: Sequence[Variant]) -> None:
    """Run every variant with every seed, except those that the results already have."""
    total = len(variants) * len(run.seeds)
    with tqdm(total=total, desc=f"{run.results.file.stem}", unit="run") as bar:
        for variant in variants:
            missing = [seed for seed in run.seeds if f"{variant.label}/{seed}" not in run.results.cells]
            bar.update(len(run.seeds) - len(missing))
            if not missing:
                continue
            data = {seed: run.solutions(seed, variant.solutions) for seed in missing}
            known = None  # greedy answers of the base are the same for every seed
            for seed, model in variant.method.tune(run.base, data):
                label = f"{variant.label}, seed {seed}"
                cell = known or evaluate(run.base, model, run.base.heldout, label, variant.method.padded)
                known = cell if isinstance(variant.method, Nothing) else None
                kept = cell if variant.texts else {name: x for name, x in cell.items() if name != "completions"}
                run.results.put(f"{variant.label}/{seed}", {**kept, "solutions": len(data[seed])})
                bar.update()


def best(run: Run, label: str, method, setting: str, values: Sequence[float]):
    """Return `method` with the value of a setting that gave the most right answers with the first seed, on tuning
    problems that were not learned from (or on all of them, if there are no others).

    The paper's settings are for models a thousand times larger. So here each method also gets the best of several
    settings.
    """
    seed = SEEDS[0]
    found = run.solutions(seed)
    learned = {record["id"] for record in found}
    unused = [item for item in run.base.tune if item.name not in learned] or run.base.tune

    def make() -> dict:
        shares = {}
        for value in tqdm(values, desc=f"{label}: best {setting}", leave=False):
            for _, model in replace(method, **{setting: value}).tune(run.base, {seed: found}):
                shares[str(value)] = evaluate(run.base, model, unused, f"{label}, {value}", method.padded)["pass@1"]
        return {"shares": shares, "problems": len(unused)}

    shares = run.found.get(f"{setting} of {label}", make)["shares"]
    return replace(method, **{setting: float(max(shares, key=shares.get))})


def matched_rank(base: Base) -> int:
    """Return the rank at which LoRA has about as many parameters as S0."""
    return max(1, round(S0().parameters(base) / LoRA(rank=1).parameters(base)))


def main(run: Run) -> None:
    small, matched, prompt = LoRA(), LoRA(rank=matched_rank(run.base), steps=20), Prompt()
    loras = {f"LoRA r{small.rank}, 50 steps": small, f"LoRA r{matched.rank}, 20 steps": matched}
    prompt_label = f"prompt of {prompt.tokens} tokens, 50 steps"
    grid(
        run,
        [
            Variant("no tuning", Nothing(), texts=True),
            Variant("S0", run.s0, texts=True),
            *(Variant(label, method) for label, method in loras.items()),
            Variant("S0, best scale", best(run, "S0", run.s0, "alpha", ALPHAS[run.base.arch])),
            *(Variant(f"{label}, best rate", best(run, label, m, "lr", LEARNING_RATES)) for label, m in loras.items()),
            Variant(f"{prompt_label}, best rate", best(run, prompt_label, prompt, "lr", LEARNING_RATES)),
        ],
    )
    run.results.content["parameters"] = {
        "S0": run.s0.parameters(run.base),
        "LoRA, of a rank": LoRA(rank=1).parameters(run.base),
        "prompt": prompt.parameters(run.base),
    }
    run.results.content["chosen"] = {name: cell["shares"] for name, cell in run.found.cells.items() if " of " in name}
    run.results.save()


def alpha(run: Run) -> None:
    alphas = ALPHAS[run.base.arch]
    grid(run, [Variant("0", Nothing()), *(Variant(f"{a:g}", replace(run.s0, alpha=a)) for a in alphas)])


def count(run: Run) -> None:
    grid(run, [Variant("0", Nothing()), *(Variant(str(n), run.s0, n) for n in (10, 25, 50))])


def layers(run: Run) -> None:
    parts = ("early", "middle", "late", "all")
    grid(run, [Variant("no tuning", Nothing()), *(Variant(part, replace(run.s0, layers=part)) for part in parts)])


def size(run: Run) -> None:
    grid(run, [Variant("no tuning", Nothing()), Variant("S0", run.s0)])
    run.results.content["weights"] = sum(p.numel() for p in run.base.model.parameters())
    run.results.save()


def variants(run: Run) -> None:
    """Compare other ways to learn and use a state, and measure the cost of an offset that is read at every step."""
    grid(
        run,
        [
            Variant("no tuning", Nothing()),
            Variant("S0, learned raw", run.s0),
            Variant("S0, learned at its scale", replace(run.s0, at_alpha=True)),
            Variant("state offset, read at every step", StateOffset()),
        ],
    )
    run.results.get("cost", lambda: offset_cost(run.base))


def offset_cost(base: Base, rounds: int = 300) -> dict:
    """Measure milliseconds per generated token at batch 1, with the state alone and with an offset, in turns."""
    (problem,) = base.read(base.heldout[:1])
    prompt = torch.tensor([problem.ids], device=base.trainer.device)

    def decode() -> Callable[[], float]:
        cache = cache_of(base.model(input_ids=prompt, use_cache=True))
        token = prompt[:, -1:]

        def step() -> float:
            begin = time.perf_counter()
            base.model(input_ids=token, **{cache_argument(base.model): cache}, use_cache=True)
            return 1e3 * (time.perf_counter() - begin)

        return step

    times: dict[str, list[float]] = {"state": [], "state, again": [], "offset": []}
    with torch.no_grad():
        steps = {name: decode() for name in times}
        for _ in range(rounds):
            for name in ("state", "state, again"):
                times[name].append(steps[name]())
            with offset(base.model):
                times["offset"].append(steps["offset"]())
    medians = {name: sorted(values)[rounds // 2] for name, values in times.items()}
    extra = sum(4 * x.numel() for x in _offsets(base))
    return {"ms per token": medians, "rounds": rounds, "bytes read more per token": extra}


def _offsets(base: Base) -> list:
    with offset(base.model) as offsets:
        return list(offsets)


def boundary(run: Run) -> None:
    """Use problems of kinds that the base has never seen. The solutions are written by hand, because the base has no
    right ones."""
    for seed in run.seeds:
        written = [{**run.base.problem(x), "completion": x.reference, "ended": True} for x in run.base.tune]
        run.found.get(str(seed), lambda written=written: {"solutions": written})
    grid(run, [Variant("no tuning", Nothing()), Variant("S0", run.s0)])


def passk(run: Run, samples: int = 20) -> None:
    label = f"LoRA r{LoRA().rank}, 50 steps"
    tuned = best(run, label, LoRA(), "lr", LEARNING_RATES)
    methods = {"no tuning": Nothing(), "S0": run.s0, label: LoRA(), f"{label}, best rate": tuned}
    for name, method in methods.items():
        missing = [seed for seed in run.seeds if f"{name}/{seed}" not in run.results.cells]
        if not missing:
            continue
        for seed, model in method.tune(run.base, {s: run.solutions(s) for s in missing}):
            label, sampled = f"{name}, seed {seed}", {"samples": samples, "greedy": False, "seed": seed}
            found = answers(run.base, model, run.base.heldout, label, method.padded, **sampled)
            right = [sum(entry["right"]) for entry in found]
            shares = {f"pass@{k}": sum(pass_at_k(samples, n, k) for n in right) / len(right) for k in (1, 5, 10)}
            run.results.put(f"{name}/{seed}", {**shares, "samples": samples, "right": right})


def persistence(run: Run) -> None:
    """Measure the divergence KL(with S0 || without) of the next token along the prompts of the held-out problems."""
    missing = [seed for seed in run.seeds if f"S0/{seed}" not in run.results.cells]
    if not missing:
        return
    for seed, _ in run.s0.tune(run.base, {seed: run.solutions(seed) for seed in missing}):
        run.results.put(f"S0/{seed}", _divergence(run.base, f"seed {seed}"))


def _divergence(base: Base, name: str) -> dict:
    """Compute the divergence for the active S0, called `name`. It goes prompt by prompt, because all distributions over
    a large vocabulary would not fit into memory."""
    tenths: list[list[float]] = [[] for _ in range(10)]
    first, last = [], []
    for problem in tqdm(base.read(base.heldout), desc=f"divergence, {name}", leave=False):
        new = _log_probabilities(base, problem.ids)
        base.trainer.deactivate()
        old = _log_probabilities(base, problem.ids)
        base.trainer.activate(name)
        kl = F.kl_div(old, new, log_target=True, reduction="none").sum(-1).clamp(min=0).tolist()
        for place, value in enumerate(kl):
            tenths[10 * place // len(kl)].append(value)
        first.append(kl[0])
        last.append(kl[-1])
    return {"tenths": [fmean(values) for values in tenths], "first token": fmean(first), "last token": fmean(last)}


@torch.no_grad()
def _log_probabilities(base: Base, ids: list[int]) -> torch.Tensor:
    rows = torch.tensor([ids], device=base.trainer.device)
    return base.model(input_ids=rows, use_cache=False).logits[0].float().log_softmax(-1)


def first(run: Run) -> None:
    """For the problems that S0 fixes, find the first token at which its answer differs from the base's. It reads the
    results of `main`."""
    cells = Results(
        run.results.file.with_name(run.results.file.name.replace("first", "main", 1)),
        run.results.content["settings"],
        {},
    ).cells
    if missing := [seed for seed in run.seeds if f"S0/{seed}" not in cells]:
        raise RuntimeError(f"first needs the answers of main: run main with seeds {missing} before it")
    tokens = lambda text: run.base.tokenizer(text)["input_ids"]  # noqa: E731
    for seed in run.seeds:
        old, new = cells[f"no tuning/{SEEDS[0]}"], cells[f"S0/{seed}"]
        fixed = [i for i, (a, b) in enumerate(zip(old["passed"], new["passed"], strict=True)) if (a, b) == ("0", "1")]
        pairs = [(tokens(old["completions"][i]), tokens(new["completions"][i])) for i in fixed]
        places = [
            next((n for n, (a, b) in enumerate(zip(*p, strict=False)) if a != b), min(map(len, p))) for p in pairs
        ]
        lost = sum((a, b) == ("1", "0") for a, b in zip(old["passed"], new["passed"], strict=True))
        run.results.put(f"S0/{seed}", {"fixed": places, "lost": lost})


ALL: dict[str, Callable[[Run], None]] = {
    "main": main,
    "alpha": alpha,
    "count": count,
    "layers": layers,
    "size": size,
    "variants": variants,
    "boundary": boundary,
    "passk": passk,
    "persistence": persistence,
    "first": first,
}
