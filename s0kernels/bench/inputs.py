"""Inputs of every op, made in one place: what is measured, checked and tested begins here."""

import math

import torch
from torch import Tensor

#: By the names of an op's arguments. A shared state or a bank is `initial_state`; where they are
#: needed, `cu_seqlens` and `state_indices` go along.
Values = dict[str, Tensor]
#: rows and tokens of a dense batch, or the lengths of packed sequences
Sizes = tuple[int, int] | list[int]
Heads = dict[str, int]

#: heads that take no time
TINY: dict[str, Heads] = {
    "gated_delta_rule": {"H": 1, "HV": 2, "K": 16, "V": 16},
    "ssd": {"H": 2, "P": 16, "G": 1, "N": 16},
}
#: inputs of a scan that are weights of a model; all others are activations
WEIGHTS = ("A", "D", "dt_bias")
#: where sequences start
NOT_INPUTS = ("initial_state", "cu_seqlens", "state_indices")
_CONSTANT = (*WEIGHTS, *NOT_INPUTS)


class Random:
    """Tensors that depend on the seed and the device alone, in fp32, or in fp64 for fp64."""

    def __init__(self, seed: int, device: str | torch.device, dtype: torch.dtype):
        self.options = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        self._random = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random, **self.options)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._random, **self.options)


def scan_inputs(
    op: str,
    heads: Heads,
    sizes: Sizes,
    *,
    extras: bool = False,
    rates: tuple[float, float] = (0.01, 0.1),
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Values:
    """Inputs like a trained model's, with the decays of the slowest and the fastest head at `rates`.

    g, dt, weights and states are fp32, or fp64 with the rest. All sequences share the state. `extras`: D, z and dt_bias
    of SSD, for a dt that goes through a softplus.
    """
    rows, length, ends = _laid_out(sizes, device)
    random = Random(seed, device, dtype)

    def tokens(*shape: int) -> Tensor:
        return random.normal(rows, length, *shape).to(dtype)

    low, high = (math.log10(rate) for rate in rates)
    if op == "gated_delta_rule":
        H, HV, K, V = (heads[name] for name in ("H", "HV", "K", "V"))
        state = (HV, K, V)
        decays = torch.logspace(low, high, HV, **random.options)
        values = {"q": tokens(H, K), "k": tokens(H, K), "v": tokens(HV, V)}
        values |= {"g": -decays * random.uniform(rows, length, HV), "beta": random.uniform(rows, length, HV).to(dtype)}
    else:
        H, P, G, N = (heads[name] for name in ("H", "P", "G", "N"))
        state = (H, P, N)
        decays = torch.logspace(low, high, H, **random.options)
        values = {"x": tokens(H, P), "dt": (random.normal if extras else random.uniform)(rows, length, H)}
        values |= {"A": -decays, "B": tokens(G, N), "C": tokens(G, N)}
        if extras:
            values |= {"D": random.normal(H), "z": tokens(H, P), "dt_bias": random.normal(H)}
    values["initial_state"] = random.normal(*state)
    return values if ends is None else values | {"cu_seqlens": ends}


def nearly_equal_keys(values: Values, noise: float, beta: tuple[float, float], seed: int = 0) -> Values:
    """The same with keys of one direction and `noise` times as much of any other, no decay, and beta within bounds:
    where beta is near 2, a chunk of the delta rule amplifies what is rounded by more than anywhere else."""
    k, options = values["k"], {"dtype": torch.float64, "device": values["k"].device}
    random = Random(seed, k.device, torch.float64)
    direction = random.normal(*k.shape[2:])
    direction *= k.shape[-1] ** 0.5 / direction.norm(dim=-1, keepdim=True)
    strengths = beta[0] + (beta[1] - beta[0]) * random.uniform(*values["beta"].shape)
    changed = {"k": direction + noise * random.normal(*k.shape), "g": torch.zeros(values["g"].shape, **options)}
    return values | {n: x.to(values[n].dtype) for n, x in (changed | {"beta": strengths}).items()}


def channel_first(values: Values) -> Values:
    """The same, with heads and channels laid out so that tokens are the fastest axis: behind a causal convolution."""
    return {
        n: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() == 4 and n not in NOT_INPUTS else x
        for n, x in values.items()
    }


def mixer_inputs(
    op: str,
    heads: Heads,
    at: tuple[int, ...],
    *,
    width: int = 4,
    states: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Values:
    """Of a mixer's step, for tokens at `at` (rows, or tokens and rows), with pools of `states` windows and states."""
    random = Random(seed, device, dtype)
    normal = random.normal
    if op == "gated_delta_rule":
        H, HV, K, V = (heads[name] for name in ("H", "HV", "K", "V"))
        channels, state = 2 * H * K + HV * V, (HV, K, V)
        values = {"mixed": normal(*at, channels), "z": normal(*at, HV, V), "b": normal(*at, HV), "a": normal(*at, HV)}
        values |= {"A_log": normal(HV), "dt_bias": normal(HV), "norm": normal(V)}
    else:
        H, P, G, N = (heads[name] for name in ("H", "P", "G", "N"))
        channels, state = H * P + 2 * G * N, (H, P, N)
        values = {"gate": normal(*at, H * P), "mixed": normal(*at, channels), "dt": normal(*at, H)}
        values |= {"A_log": normal(H), "dt_bias": normal(H), "D": normal(H), "norm": normal(H * P)}
    values |= {"conv_weight": normal(channels, width), "conv_bias": normal(channels)}
    return {n: x.to(dtype) for n, x in values.items()} | {
        "window": normal(states, channels, width).to(dtype),
        "state": normal(states, *state),
    }


def _laid_out(sizes: Sizes, device: str | torch.device) -> tuple[int, int, Tensor | None]:
    if isinstance(sizes, tuple):
        return *sizes, None
    return 1, sum(sizes), torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32)


def cut(values: Values, rows: int, length: int) -> Values:
    """The first tokens of the first rows."""
    return {n: x if n in _CONSTANT else x[:rows, :length] for n, x in values.items()}


def token(values: Values, place: int = 0) -> Values:
    """What a step is given of token `place` of every row: all but its state."""
    return {n: x if n in WEIGHTS else x[:, place] for n, x in values.items() if n not in NOT_INPUTS}


def state_for_each(values: Values, rows: int) -> Tensor:
    """The state that all sequences share, copied for every one of them, as other libraries want it."""
    ends = values.get("cu_seqlens")
    count = rows if ends is None else ends.shape[0] - 1
    return values["initial_state"].expand(count, -1, -1, -1).contiguous()
