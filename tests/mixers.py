"""Inputs, shapes and options of the mixers' steps, defined once."""

import pytest
import torch
from cases import MAKERS

from s0kernels.backends import tokens
from s0kernels.bench.inputs import mixer_inputs
from s0kernels.ops.mixer_steps import (
    gated_delta_mixer_step,
    gated_delta_mixer_step_reference,
    ssd_mixer_step,
    ssd_mixer_step_reference,
)

OPS = sorted(MAKERS)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
every_dtype = pytest.mark.parametrize("dtype", ROUNDING, ids=str)

#: (heads per group, groups, sizes): those of models, square and not, odd, and the largest
SHAPES = {
    "Qwen3.5-4B": (2, 2, 128, 128),
    "OLMo-Hybrid": (1, 30, 96, 192),
    "one value head a key": (1, 3, 64, 64),
    "three": (3, 1, 16, 24),
    "odd": (2, 2, 17, 33),
    "largest": (2, 1, 256, 256),
    "smallest": (2, 1, 1, 1),
    "Falcon-H1-7B": (4, 1, 128, 256),
    "Bamba": (6, 2, 64, 128),
}
#: variants of gate and norm, and of beta
FINISHES = {
    "gated_delta_rule": [{}, {"allow_neg_eigval": True}],
    "ssd": [{"norm": None}, {"gate_first": True}, {"gate_first": False}],
}
STEPS = {
    "gated_delta_rule": (gated_delta_mixer_step_reference, tokens.gated_delta_mixer_step, gated_delta_mixer_step),
    "ssd": (ssd_mixer_step_reference, tokens.ssd_mixer_step, ssd_mixer_step),
}
every_finish = pytest.mark.parametrize(
    ("op", "finish"), [(op, finish) for op in OPS for finish in FINISHES[op]], ids=lambda x: x if x in OPS else str(x)
)


def mixer(op, shape, rows=3, width=4, pool=None):
    """Make fp64 arguments of a mixer's step, by name."""
    each, groups, first, second = SHAPES[shape]
    heads = {"H": groups, "HV": each * groups, "K": first, "V": second}
    if op == "ssd":
        heads = {"H": each * groups, "P": first, "G": groups, "N": second}
    return mixer_inputs(op, heads, (rows,), width=width, states=rows if pool is None else pool)


def to(inputs, dtype):
    """Convert activations and windows to `dtype`, per-head parameters and states to fp32."""
    single = ("A_log", "dt_bias", "D", "state")
    return {n: None if x is None else x.to(torch.float32 if n in single else dtype) for n, x in inputs.items()}


def double(inputs):
    return {n: None if x is None else x.double() for n, x in inputs.items()}
