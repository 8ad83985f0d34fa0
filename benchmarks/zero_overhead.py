"""S0 active against no S0: does it cost anything?

    python benchmarks/zero_overhead.py [--levels op mixer generate untouched bank] [--clock processor] [--threads 1]

- `op`: both scans, forward and training (all inputs require grad), and their steps, on every usable backend.
- `mixer`: a swapped mixer as wide as that of Qwen3.5-0.8B or Falcon-H1-0.5B: prefill with a new cache, one token with a
  live one.
- `generate`: a small random model of every family: time to the first token, and per token after it.
- `bank`: a task for each row, of 1, 16, 256 and 1024; and states copied for every sequence, as others do.
- `untouched`: the swapped model with S0 against the model as transformers has it, with the kernels installed there.

"No S0" is the swapped module with nothing attached, which starts from zero. S0 is frozen and at the scale that it is
used at; in `training` of the level `op` there is also one that learns, and whose gradient is extra work.

All cases of a line take turns round by round in one process, the base twice: the ratio of the base to itself is the
control, and a ratio's interval (bootstrap, 95 %) should lie inside the control's. What cannot be noisy is counted:
kernels (operators on a CPU that compute or move something, views excepted), bytes allocated, bytes copied. S0 and zero
must agree in all three, or the script ends with an error: the PyTorch scans are allowed to copy S0 where they fill
zeros in, one state per sequence.

Prints tables and writes benchmarks/results/zero-overhead-<machine>.json: `machine` (of `s0kernels.bench.measure`),
`settings`, and by level a list of lines: `what`; by case `ms`, `ratio` (median, low, high), `verdict` and `work`; and
`control`, the ratio of the base to itself.
"""

import argparse
import itertools
from dataclasses import asdict
from functools import partial
from pathlib import Path

import hybrids
import torch
from pairs import Settings, compare, generation, table

from s0kernels import restore_modules, swap_modules
from s0kernels.bench.measure import machine, machine_name, write_json
from s0kernels.ops import _dispatch, gated_delta_rule, gated_delta_rule_step, ssd, ssd_step

RESULTS = Path(__file__).resolve().parent / "results"
LEVELS = ("op", "mixer", "generate", "bank", "untouched")
BANKS = (1, 16, 256, 1024)
ROWS = 8  # of a batch that picks its tasks from a bank
#: heads of Qwen3.5-4B and of Falcon-H1-7B
HEADS = {"gated_delta_rule": {"H": 16, "HV": 32, "K": 128, "V": 128}, "ssd": {"H": 24, "G": 1, "P": 128, "N": 256}}
#: a recurrent layer and attention at the widths of Qwen3.5-0.8B and Falcon-H1-0.5B, and a small vocabulary
WIDE = {
    "Qwen3.5": {
        **hybrids.QWEN3_5_4B,
        **{"vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 2},
        **{"layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 8, "num_key_value_heads": 2},
        "linear_num_value_heads": 16,
    },
    "Falcon-H1": {
        **hybrids.FALCON_H1_7B,
        **{"vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1},
        **{"num_attention_heads": 8, "head_dim": 64, "mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64},
        "mamba_d_state": 128,
    },
}
SCANS = {"gated_delta_rule": (gated_delta_rule, gated_delta_rule_step), "ssd": (ssd, ssd_step)}


# The scans


def scan_inputs(
    op: str, batch: int, length: int, heads: dict, device: str = "cpu"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(tensors of the call, one state that is not zero)."""
    torch.manual_seed(0)
    if op == "gated_delta_rule":
        H, HV, K, V = (heads[name] for name in ("H", "HV", "K", "V"))
        q, k, v = (torch.randn(batch, length, h, d) for h, d in ((H, K), (H, K), (HV, V)))
        tensors = [q, k, v, -0.1 * torch.rand(batch, length, HV), torch.rand(batch, length, HV)]
        state = 0.1 * torch.randn(HV, K, V)
    else:
        H, G, P, N = (heads[name] for name in ("H", "G", "P", "N"))
        x, B, C = (torch.randn(batch, length, h, d) for h, d in ((H, P), (G, N), (G, N)))
        tensors = [x, 0.1 * torch.rand(batch, length, H), -torch.rand(H), B, C]
        state = 0.1 * torch.randn(H, P, N)
    return [tensor.to(device) for tensor in tensors], state.to(device)


def forward(op: str, backend: str, tensors: list, **start):
    options = {"use_qk_l2norm": True} if op == "gated_delta_rule" else {}
    return SCANS[op][0](*tensors, backend=backend, **options, **start)


def training(op: str, backend: str, tensors: list, state: torch.Tensor | None) -> None:
    output, _ = forward(op, backend, tensors, initial_state=state)
    leaves = [*tensors, state] if state is not None and state.requires_grad else tensors
    torch.autograd.grad(output, leaves, torch.ones_like(output))


def op_level(settings: Settings, heads: dict = HEADS, length: int | None = None) -> list[dict]:
    rows = []
    length = length or (4096 if settings.on_gpu else 256)
    for op, backend in itertools.product(SCANS, usable(settings)):
        tensors, state = scan_inputs(op, 2, length, heads[op], settings.device)
        line = {"op": op, "backend": backend, "T": length, "B": 2}
        run = partial(forward, op, backend, tensors)
        cases = {"zero": run, "S0": partial(run, initial_state=state)}
        rows.append({**line, "what": f"{op}, {backend}, forward", **compare(cases, settings)})
        check_equal(rows[-1], op, backend, state.nbytes * 2)

        leaves = [tensor.requires_grad_() for tensor in tensors]
        run = partial(training, op, backend, leaves)
        cases = {"zero": partial(run, None), "S0": partial(run, state)}
        cases["S0, learning"] = partial(run, state.clone().requires_grad_())
        rows.append({**line, "what": f"{op}, {backend}, training", **compare(cases, settings)})
        check_equal(rows[-1], op, backend, state.nbytes * 2 * 2)  # recomputed in the backward

        rows.append(
            {**line, "what": f"{op}, {backend}, step", "T": 1, **compare(steps(op, backend, tensors, state), settings)}
        )
        check_equal(rows[-1], op, backend, 0)
    return rows


def steps(op: str, backend: str, tensors: list, state: torch.Tensor) -> dict:
    """One token after another, from a state that began as zero and from one that began as S0."""
    with torch.no_grad():
        token = [tensor if tensor.dim() == 1 else tensor[:, 0].clone() for tensor in tensors]
        states = {"zero": torch.zeros_like(state), "S0": state}
        states = {name: torch.stack([start] * len(token[0])) for name, start in states.items()}
    step = SCANS[op][1]
    options = {"use_qk_l2norm": True} if op == "gated_delta_rule" else {}

    @torch.no_grad()
    def advance(own: torch.Tensor) -> None:
        step(*token, own, backend=backend, **options)

    return {name: partial(advance, own) for name, own in states.items()}


def usable(settings: Settings) -> list[str]:
    device = torch.device(settings.device)
    names = ("triton", "torch") if settings.on_gpu else ("cpu", "torch")
    return [name for name in names if _dispatch.unusable(name, "ssd", device, torch.float32) is None]


def check_equal(row: dict, op: str, backend: str, state_bytes: int) -> None:
    """The torch backend copies S0 where it fills in zeros; nothing else may differ."""
    zero, found = row["work"]["zero"], dict(row["work"]["S0"])
    if backend == "torch":
        found["copied"] -= state_bytes
    if found != zero:
        raise AssertionError(f"{row['what']}: S0 and zero do not do the same work: {row['work']}")


# Modules and models


def twins(family: str, settings_of_model: dict, device: str) -> tuple:
    """Two swapped models with the same weights in the same memory: to one S0 is attached."""
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    plain, tuned = (
        swap_modules(hybrids.build(family, settings_of_model, device=device, dtype=dtype)) for _ in range(2)
    )
    tuned.load_state_dict(plain.state_dict(), assign=True)
    hybrids.random_states(tuned).attach(tuned, scale=0.5)
    return plain, tuned


def mixer_of(model) -> torch.nn.Module:
    from s0kernels.modules.mixer import S0Mixer

    return next(module for module in model.modules() if isinstance(module, S0Mixer))


def mixer_level(settings: Settings, models: dict = WIDE, length: int | None = None) -> list[dict]:
    from transformers import DynamicCache

    rows = []
    length = length or (4096 if settings.on_gpu else 128)
    for family, model_settings in models.items():
        pair = dict(zip(("zero", "S0"), twins(family, model_settings, settings.device), strict=True))
        first = next(pair["zero"].parameters())
        hidden = torch.randn(1, length, model_settings["hidden_size"]).to(first)

        @torch.no_grad()
        def prefill(model, hidden=hidden) -> DynamicCache:
            cache = DynamicCache(config=model.config)
            mixer_of(model)(hidden, cache)
            return cache

        @torch.no_grad()
        def decode(mixer, cache, token=hidden[:, :1]) -> None:
            mixer(token, cache)

        cases = {name: partial(prefill, model) for name, model in pair.items()}
        line = {"family": family, "backend": "default", "B": 1}
        rows.append({**line, "what": f"{family}, prefill of {length}", **compare(cases, settings)})
        cases = {name: partial(decode, mixer_of(model), prefill(model)) for name, model in pair.items()}
        rows.append({**line, "what": f"{family}, one token", **compare(cases, settings)})
    for row in rows:
        check_equal(row, "", "default", 0)
    return rows


def generate_level(settings: Settings, models: dict = hybrids.SMALL, new: int = 16) -> list[dict]:
    rows = []
    for family, model_settings in models.items():
        pair = dict(zip(("zero", "S0"), twins(family, model_settings, settings.device), strict=True))
        line = {"family": family, "backend": "default", "B": 1}
        for what, found in zip(("first token", "each token after it"), generation(pair, settings, new), strict=True):
            rows.append({**line, "what": f"{family}, {what}", **found})
            check_equal(rows[-1], "", "default", 0)
    return rows


# A task for each row


def bank_level(settings: Settings, heads: dict = HEADS, models: dict = WIDE, banks: tuple = BANKS) -> list[dict]:
    rows = []
    for op in SCANS:
        smaller = {**heads[op], **({"HV": heads[op]["H"]} if op == "gated_delta_rule" else {"P": heads[op]["P"] // 2})}
        tensors, state = scan_inputs(op, ROWS, 64, smaller, settings.device)
        whole = torch.stack([state] * max(banks))
        backend = usable(settings)[0]
        run = partial(forward, op, backend, tensors)
        cases = {"zero": run, "one state for all": partial(run, initial_state=state)}
        for size in banks:
            rows_of_bank = spread(size, settings.device)
            cases[f"bank of {size}"] = partial(run, initial_state=whole[:size], state_indices=rows_of_bank)
        cases["state copied"] = lambda run=run, state=state: run(
            initial_state=state.expand(ROWS, -1, -1, -1).contiguous()
        )
        cases["rows gathered"] = lambda run=run, whole=whole, places=rows_of_bank: run(initial_state=whole[places])
        line = {"op": op, "backend": backend, "T": 64, "B": ROWS}
        rows.append(
            {**line, "what": f"{op}, {backend}, {state.nbytes / 2**20:.2f} MiB a state", **compare(cases, settings)}
        )
        del whole, cases
    for family, model_settings in models.items():
        rows.append(bank_in_a_model(family, model_settings, settings, banks))
    return rows


def spread(size: int, device: str) -> torch.Tensor:
    """Tasks of ROWS rows, as far apart in the bank as they can be."""
    return torch.arange(ROWS, device=device) * size // ROWS


def bank_in_a_model(family: str, model_settings: dict, settings: Settings, banks: tuple) -> dict:
    plain, shared = twins(family, model_settings, settings.device)
    ids = torch.arange(ROWS * 32, device=settings.device).view(ROWS, 32) % plain.config.vocab_size
    models = {"zero": plain, "one state for all": shared}
    for size in banks:
        model = models[f"bank of {size}"] = twins(family, model_settings, settings.device)[0]
        model.load_state_dict(plain.state_dict(), assign=True)
        hybrids.random_states(model, size).attach(model, tasks=spread(size, "cpu").to(settings.device))

    @torch.no_grad()
    def prefill(model) -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    cases = {name: partial(prefill, model) for name, model in models.items()}
    what = f"{family}, one layer, prefill of {ROWS} rows of 32"
    return {"family": family, "backend": "default", "B": ROWS, "what": what, **compare(cases, settings)}


# The model as transformers has it


def untouched_level(settings: Settings, models: dict = WIDE, length: int | None = None) -> list[dict]:
    rows = []
    length = length or (4096 if settings.on_gpu else 256)
    for family, model_settings in models.items():
        _, tuned = twins(family, model_settings, settings.device)
        untouched = restore_modules(twins(family, model_settings, settings.device)[0])
        untouched.load_state_dict(tuned.state_dict(), assign=True)
        check_same_logits(untouched, tuned, settings.device)
        pair = {"untouched": untouched, "swapped, S0": tuned}
        ids = torch.arange(length, device=settings.device)[None] % tuned.config.vocab_size

        @torch.no_grad()
        def prefill(model, ids=ids) -> None:
            model(ids, use_cache=True, logits_to_keep=1)

        def train(model, ids=ids) -> None:
            embedded = model.get_input_embeddings()(ids).requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=8).logits
            torch.autograd.grad(logits.float().logsumexp(-1).sum(), embedded)

        for what, case in (("prefill", prefill), ("forward and backward", train)):
            cases = {name: partial(case, model) for name, model in pair.items()}
            line = {"family": family, "T": length, "what": f"{family}, one layer, {what} of {length}"}
            rows.append({**line, **compare(cases, settings)})
        for what, found in zip(("first token", "each token after it"), generation(pair, settings), strict=True):
            rows.append({"family": family, "what": f"{family}, one layer, {what}", **found})
    return rows


def check_same_logits(untouched, tuned, device: str) -> None:
    """No speed without the same result: with nothing attached the two models agree."""
    ids = torch.arange(64, device=device)[None] % tuned.config.vocab_size
    with torch.no_grad():
        expected = untouched(ids).logits.float()
        model_states = tuned_states(tuned)
        with model_states.attached(tuned, tasks=-1):
            found = tuned(ids).logits.float()
    limit = 1e-4 if expected.dtype == torch.float32 and device == "cpu" else 5e-2
    if float((found - expected).abs().max()) > limit * float(expected.abs().max()):
        raise AssertionError("the swapped model does not compute what the untouched one does")


def tuned_states(model):
    from s0kernels import S0States

    return S0States.attached_to(model)


def installed_kernels(settings: Settings) -> str:
    """What the untouched model runs on."""
    from importlib.util import find_spec

    found = [name for name in ("fla", "mamba_ssm", "causal_conv1d") if settings.on_gpu and find_spec(name)]
    return ", ".join(found) or "the PyTorch functions of transformers"


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for the rounds of a line, at most")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(options.device, options.clock, options.rounds, options.budget)
    where = machine(options.device, options.clock)
    results = {"machine": where, "settings": asdict(settings), "untouched runs on": installed_kernels(settings)}
    run = {"op": op_level, "mixer": mixer_level, "generate": generate_level, "bank": bank_level}
    run["untouched"] = untouched_level
    out = options.out or RESULTS / f"zero-overhead-{machine_name(where)}.json"
    for level in options.levels:
        results[level] = run[level](settings)
        base = "untouched" if level == "untouched" else "zero"
        print(f"\n{level}\n\n{table(results[level], base)}", flush=True)
        write_json(out, results)
    return results


if __name__ == "__main__":
    main()
