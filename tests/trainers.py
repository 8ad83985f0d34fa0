"""Trainers of small models, and their training data."""

import torch
from models import MODELS, tokenizer

from s0kernels import S0Config, S0States, S0Trainer

PAIRS = [("Q: 2+2?\nA: 4", 10), ("Q: 10-3?\nA: 7, and no more", 11), ("def f(x):\n    return x + 1", 11), ("abc", 1)]
OTHERS = [("once upon a time", 5), ("there was a rule", 3), ("of gated deltas", 9)]


def trainer(name="qwen", model=None, **config) -> S0Trainer:
    return S0Trainer(model or MODELS[name](), tokenizer(), S0Config(**{"n_steps": 4, "lr": 1e-2, **config}))


def same_states(a: S0States, b: S0States) -> bool:
    return all(torch.equal(a[layer], b[layer]) for layer in a)
