"""Make the inputs of every op for measurements, checks and tests."""

import math

import torch
from torch import Tensor

#: Tensors by the names of an op's arguments. A shared state or a bank is `initial_state`; `cu_seqlens` and
#: `state_indices` are present if needed.
Values = dict[str, Tensor]
#: rows and tokens of a dense batch, or the lengths of packed sequences
Sizes = tuple[int, int] | list[int]
Heads = dict[str, int]

#: small heads for fast tests
TINY: dict[str, Heads] = {
    "gated_delta_rule": {"H": 1, "HV": 2, "K": 16, "V": 16},
    "ssd": {"H": 2, "P": 16, "G": 1, "N": 16},
}
#: the inputs of a scan that are weights of a model; all others are activations
WEIGHTS = ("A", "D", "dt_bias")
#: the arguments that describe sequences and their starting states
NOT_INPUTS = ("initial_state", "cu_seqlens", "state_indices")
_CONSTANT = (*WEIGHTS, *NOT_INPUTS)


class Random:
    """Random tensors that depend only on seed and device, in fp32, or in fp64 if `dtype` is fp64."""

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
    """Make inputs like those of a trained model. `rates` are the decay rates of the slowest and the fastest head.

    g, dt, weights and states are fp32, or fp64 if `dtype` is. All sequences share the state. `extras` adds D, z and
    dt_bias of SSD, with a dt for softplus.
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
    """Return the inputs with nearly equal keys (one direction plus `noise` times a random vector), no decay, and beta
    within bounds. With beta near 2 this is where a chunk of the delta rule amplifies rounding most."""
    k, options = values["k"], {"dtype": torch.float64, "device": values["k"].device}
    random = Random(seed, k.device, torch.float64)
    direction = random.normal(*k.shape[2:])
    direction *= k.shape[-1] ** 0.5 / direction.norm(dim=-1, keepdim=True)
    strengths = beta[0] + (beta[1] - beta[0]) * random.uniform(*values["beta"].shape)
    changed = {"k": direction + noise * random.normal(*k.shape), "g": torch.zeros(values["g"].shape, **options)}
    return values | {n: x.to(values[n].dtype) for n, x in (changed | {"beta": strengths}).items()}


def channel_first(values: Values) -> Values:
    """Return the inputs in a layout in which tokens are the fastest axis, as after a causal convolution."""
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
    """Make inputs of a mixer's step. `at` is (rows,) or (tokens, rows); the pools have `states` windows and states."""
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
    """Return the first tokens of the first rows."""
    return {n: x if n in _CONSTANT else x[:rows, :length] for n, x in values.items()}


def token(values: Values, place: int = 0) -> Values:
    """Return the inputs of a step for token `place` of every row, without the state."""
    return {n: x if n in WEIGHTS else x[:, place] for n, x in values.items() if n not in NOT_INPUTS}


def state_for_each(values: Values, rows: int) -> Tensor:
    """Return a copy of the shared state for every sequence, as other libraries need it."""
    ends = values.get("cu_seqlens")
    count = rows if ends is None else ends.shape[0] - 1
    return values["initial_state"].expand(count, -1, -1, -1).contiguous()
