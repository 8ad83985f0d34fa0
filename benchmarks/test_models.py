"""Time mixers and whole models of both families: original, swapped, and swapped with S0. They are small and random."""

import pytest
import torch
from conftest import DEVICE
from models import falcon, qwen, random_states, tokens

from s0kernels import swap_modules

SIZES = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 8192}
WAYS = ("untouched", "swapped", "swapped with S0")
every_family = pytest.mark.parametrize("family", ["qwen", "falcon"])
every_way = pytest.mark.parametrize("way", WAYS)


def build(family: str, way: str):
    """Return (model, its states or None)."""
    if family == "qwen":
        heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
        model = qwen(**SIZES, **heads, linear_key_head_dim=64, linear_value_head_dim=64)
    else:
        heads = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 1}
        model = falcon(**SIZES, **heads, mamba_d_ssm=512, mamba_d_state=64)
    model = model.to(DEVICE).requires_grad_(False)
    if way == "untouched":
        return model, None
    swap_modules(model)
    states = random_states(model, size=0.1).to(DEVICE)
    if way == "swapped with S0":
        states.attach(model)
    return model, states


@every_family
@every_way
def test_mixer(way, family, benchmark, timed):
    benchmark.group = f"{family}, a mixer, 1x512"
    model, _ = build(family, way)
    mixer = model.model.layers[0]
    mixer = mixer.linear_attn if family == "qwen" else mixer.mamba
    x = torch.randn(1, 512, SIZES["hidden_size"], device=DEVICE)
    with torch.no_grad():
        timed(lambda: mixer(x))


@every_family
@every_way
def test_prefill(way, family, benchmark, timed):
    benchmark.group = f"{family}, prefill, 1x512"
    model, _ = build(family, way)
    ids = tokens(1, 512).to(DEVICE)
    with torch.no_grad():
        timed(lambda: model(ids, logits_to_keep=1))


@every_family
@every_way
@pytest.mark.parametrize("rows", [1, 8])
def test_decode(rows, way, family, benchmark, timed):
    benchmark.group = f"{family}, 16 new tokens of {rows}"
    model, _ = build(family, way)
    ids = tokens(rows, 8).to(DEVICE)
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    timed(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options))


@every_family
def test_training_step(family, benchmark, timed):
    """Time a training step of S0 with frozen weights. The original models have no equivalent."""
    benchmark.group = f"{family}, a training step, 4x128"
    model, states = build(family, "swapped")
    ids = tokens(4, 128).to(DEVICE)
    optimizer = torch.optim.Adam(states.parameters(), lr=1e-3)

    def step():
        optimizer.zero_grad()
        with states.attached(model):
            model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    timed(step)
