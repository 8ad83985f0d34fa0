"""The ops compared with the scans of transformers, an independent implementation."""

import pytest
import torch
from cases import delta_problem, error, ssd_problem

falcon = pytest.importorskip("transformers.models.falcon_h1.modeling_falcon_h1")
qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")


def repeated(tensors: dict, names: str) -> list:
    """Repeat q and k to the heads of v: older versions require that, newer ones allow it."""
    group = tensors["v"].shape[2] // tensors["q"].shape[2]
    return [tensors[n].repeat_interleave(group, dim=2) if n in ("q", "k") else tensors[n] for n in names.split()]


def original(module, name: str):
    """Return the PyTorch function, even if transformers uses a kernel package instead."""
    return getattr(getattr(module, name), "__wrapped__", getattr(module, name))


@pytest.mark.parametrize("T", [1, 65, 200])
def test_gated_delta_rule(T):
    problem = delta_problem(T, B=3, state="each").to(torch.float32)
    tensors = {n: x.clone().requires_grad_() for n, x in problem.tensors.items()}
    weights = problem.weights()
    output, state = original(qwen, "torch_chunk_gated_delta_rule")(
        *repeated(tensors, "q k v g beta"),
        initial_state=tensors["initial_state"],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    loss = (output * weights[0].float()).sum() + (state * weights[1].float()).sum()
    grads = torch.autograd.grad(loss, list(tensors.values()))
    found = problem.gradients(None, weights)
    assert error(found["output"], output) < 3e-6
    assert error(found["final_state"], state) < 3e-6
    for name, grad in zip(tensors, grads, strict=True):
        assert error(found[f"d{name}"], grad) < 1e-5, name


@pytest.mark.parametrize("T", [1, 65, 200])
def test_ssd(T):
    problem = ssd_problem(T, B=3, state="each").to(torch.float32)
    del problem.tensors["z"]  # applied outside the scan there
    tensors = {n: x.clone().requires_grad_() for n, x in problem.tensors.items()}
    weights = problem.weights()
    output, state = original(falcon, "mamba2_chunk_scan")(
        *(tensors[n] for n in ("x", "dt", "A", "B", "C")),
        chunk_size=32,
        D=tensors["D"],
        dt_bias=tensors["dt_bias"],
        initial_states=tensors["initial_state"],
        dt_softplus=True,
        dt_limit=problem.options["dt_limit"],
        return_final_states=True,
    )
    loss = (output * weights[0].float()).sum() + (state * weights[1].float()).sum()
    grads = torch.autograd.grad(loss, list(tensors.values()))
    found = problem.gradients(None, weights)
    assert error(found["output"], output) < 3e-6
    assert error(found["final_state"], state) < 3e-6
    for name, grad in zip(tensors, grads, strict=True):
        assert error(found[f"d{name}"], grad) < 1e-5, name


def test_one_token_steps():
    """Compare with the functions by which transformers decodes."""
    problem = delta_problem(1, state="each").to(torch.float32)
    output, state = original(qwen, "torch_recurrent_gated_delta_rule")(
        *repeated(problem.tensors, "q k v g beta"),
        initial_state=problem.tensors["initial_state"],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    found = problem.run(None)
    assert error(found.output, output) < 1e-6
    assert error(found.final_state, state) < 1e-6
