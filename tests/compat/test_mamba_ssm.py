"""mamba_ssm's functions, compared with their definition token by token."""

import pytest
import torch
import torch.nn.functional as F
from cases import error

from s0kernels.compat.mamba_ssm import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    selective_state_update,
)

B, T, H, P, G, N = 2, 12, 4, 6, 2, 5
SEQ_IDX = torch.tensor([[0] * 5 + [1] * 7, [3] * 2 + [4] * 9 + [7]], dtype=torch.int32)
LAST = [[4, 11], [1, 10, 11]]  # the last token of every sequence


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def scan_inputs() -> dict[str, torch.Tensor]:
    return {
        "x": normal(B, T, H, P),
        "dt": normal(B, T, H),
        "A": -torch.rand(H, dtype=torch.float64),
        "B": normal(B, T, G, N),
        "C": normal(B, T, G, N),
        "D": normal(H, P),
        "z": normal(B, T, H, P),
        "dt_bias": normal(H),
        "initial_states": normal(B, H, P, N),
    }


def plain_scan(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx=None, dt_limit=(0.0, float("inf"))):
    """Return (y, states after every token). Where seq_idx changes, the scan starts from the row's initial state
    again."""
    dt = F.softplus(dt + dt_bias).clamp(*dt_limit)
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
    D = D if D.dim() == 2 else D[:, None]
    rows = []
    for b in range(x.shape[0]):
        state, states = initial_states[b], []
        for t in range(x.shape[1]):
            if t and seq_idx is not None and seq_idx[b, t] != seq_idx[b, t - 1]:
                state = initial_states[b]
            state = (dt[b, t] * A).exp()[:, None, None] * state
            state = state + (dt[b, t, :, None] * x[b, t])[..., None] * B[b, t][:, None]
            states.append(state)
        rows.append(torch.stack(states))
    states = torch.stack(rows)
    y = (states * C[:, :, :, None]).sum(-1) + D * x
    return (y if z is None else y * F.silu(z)), states


def assert_same(found, truth, leaves) -> None:
    weights = [torch.randn_like(t) for t in truth]
    grads = [
        torch.autograd.grad(
            sum((t * w).sum() for t, w in zip(results, weights, strict=True)), list(leaves.values()), retain_graph=True
        )
        for results in (found, truth)
    ]
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.shape == theirs.shape
        assert error(ours, theirs) < 1e-12
    for name, ours, theirs in zip(leaves, *grads, strict=True):
        assert error(ours, theirs) < 1e-11, name


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "seq_idx"])
@pytest.mark.parametrize("D", ["per head", "per channel"])
def test_scan(packed, D):
    inputs = scan_inputs()
    if D == "per head":
        inputs["D"] = inputs["D"][:, 0].clone()
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    seq_idx = SEQ_IDX if packed else None
    options = {"dt_softplus": True, "dt_limit": (0.1, 2.0), "seq_idx": seq_idx, "return_final_states": True}
    found = mamba_chunk_scan_combined(**leaves, chunk_size=4, **options)
    y, states = plain_scan(**leaves, seq_idx=seq_idx, dt_limit=(0.1, 2.0))
    assert_same(found, (y, states[:, -1]), leaves)


def test_states_of_all_sequences():
    leaves = {n: (x[:1] if x.dim() > 2 else x).clone().requires_grad_() for n, x in scan_inputs().items()}
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    options = {"dt_softplus": True, "seq_idx": SEQ_IDX[:1], "cu_seqlens": ends, "return_varlen_states": True}
    y, states = plain_scan(**leaves, seq_idx=SEQ_IDX[:1])
    found = mamba_chunk_scan_combined(**leaves, chunk_size=4, return_final_states=True, **options)
    assert_same(found, (y, states[:, -1], states[0, LAST[0]]), leaves)
    found = mamba_chunk_scan_combined(**leaves, chunk_size=4, **options)
    assert_same(found, (y, states[0, LAST[0]]), leaves)
    for missing in ("seq_idx", "cu_seqlens"):
        with pytest.raises(ValueError, match=f"return_varlen_states needs {missing}"):
            mamba_chunk_scan_combined(**leaves, chunk_size=4, **{**options, missing: None})


def test_a_shared_state_half_precision_and_no_extras():
    inputs = scan_inputs()
    state = inputs.pop("initial_states")[0]
    y, states = plain_scan(**inputs, initial_states=state.expand(B, -1, -1, -1), seq_idx=SEQ_IDX)
    scalars = ("A", "D", "dt_bias")
    half = {n: x.float() if n in scalars else x.bfloat16() for n, x in inputs.items()}
    options = {"dt_softplus": True, "seq_idx": SEQ_IDX, "return_final_states": True}
    found, final = mamba_chunk_scan_combined(**half, chunk_size=256, initial_states=state.bfloat16(), **options)
    assert (found.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert error(found, y) < 2e-2
    assert error(final, states[:, -1]) < 2e-2
    bare = {n: inputs[n] for n in ("x", "dt", "A", "B", "C")}
    bare["dt"] = bare["dt"].abs()
    found = mamba_chunk_scan_combined(**bare, chunk_size=256)
    raw = {**bare, "dt": bare["dt"].expm1().log()}  # softplus gives dt back
    zeros = {"D": torch.zeros(H).double(), "dt_bias": torch.zeros(H).double(), "z": None}
    truth, _ = plain_scan(**raw, **zeros, initial_states=torch.zeros(B, H, P, N).double())
    assert error(found, truth) < 1e-12


def split_inputs(mlp: int = 0) -> dict[str, torch.Tensor]:
    channels = H * P + 2 * G * N
    return {
        "zxbcdt": normal(B, T, 2 * mlp + H * P + channels + H),
        "conv1d_weight": normal(channels, 4) * 0.5,
        "conv1d_bias": normal(channels),
        "dt_bias": normal(H),
        "A": -torch.rand(H, dtype=torch.float64),
        "D": normal(H),
        "initial_states": normal(B, H, P, N),
    }


def plain_split(tensors, mlp, seq_idx, activation, norm_before_gate) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = tensors["conv1d_weight"], tensors["conv1d_bias"]
    channels, width = weight.shape
    up, z, mixed, dt = tensors["zxbcdt"].split([2 * mlp, H * P, channels, H], dim=-1)
    taps = []
    for t in range(T):
        total = bias.expand(B, -1)
        for j in range(min(width, t + 1)):
            own = torch.ones(B, 1) if seq_idx is None else (seq_idx[:, t] == seq_idx[:, t - j])[:, None]
            total = total + own * weight[:, -1 - j] * mixed[:, t - j]
        taps.append(total)
    mixed = torch.stack(taps, dim=1)
    x, b, c = (F.silu(mixed) if activation else mixed).split([H * P, G * N, G * N], dim=-1)
    scalars = {n: tensors[n] for n in ("A", "D", "dt_bias", "initial_states")}
    norm = tensors.get("rmsnorm_weight")
    gate = z.unflatten(-1, (H, P)) if norm is None else None
    x, b, c = x.unflatten(-1, (H, P)), b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N))
    y, states = plain_scan(x, dt, B=b, C=c, z=gate, seq_idx=seq_idx, **scalars)
    y = y.flatten(2)
    if norm is not None:
        y = y if norm_before_gate else y * F.silu(z)
        groups = y.unflatten(-1, (G, -1))
        y = (groups / (groups.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(2) * norm
        y = y * F.silu(z) if norm_before_gate else y
    if mlp:
        y = torch.cat([F.silu(up[..., :mlp]) * up[..., mlp:], y], dim=-1)
    if "outproj_weight" in tensors:
        y = y @ tensors["outproj_weight"].T + tensors["outproj_bias"]
    return y, states[:, -1]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "seq_idx"])
@pytest.mark.parametrize("norm", [None, "before the gate", "after the gate"])
@pytest.mark.parametrize("mlp", [0, 3])
def test_split(packed, norm, mlp):
    tensors = split_inputs(mlp)
    if norm is not None:
        tensors["rmsnorm_weight"] = normal(H * P)
    if mlp:
        tensors |= {"outproj_weight": normal(8, mlp + H * P), "outproj_bias": normal(8)}
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    seq_idx, activation = SEQ_IDX if packed else None, None if norm is None else "silu"
    shape = {"headdim": P, "ngroups": G, "chunk_size": 4, "return_final_states": True}
    options = {"seq_idx": seq_idx, "activation": activation, "norm_before_gate": norm == "before the gate"}
    found = mamba_split_conv1d_scan_combined(**leaves, **shape, **options)
    truth = plain_split(leaves, mlp, seq_idx, activation, norm == "before the gate")
    assert_same(found, truth, leaves)


def test_only_the_gradient_of_the_state():
    tensors = split_inputs()
    state = tensors["initial_states"].requires_grad_()
    found = mamba_split_conv1d_scan_combined(**tensors, headdim=P, ngroups=G, chunk_size=4)
    nodes, seen = [found.grad_fn], set()
    while nodes:
        node = nodes.pop()
        seen.add(type(node).__name__)
        nodes += [child for child, _ in node.next_functions if child is not None]
    assert not any("Convolution" in name or "Mm" in name for name in seen)
    found.sum().backward()
    assert state.grad.abs().max() > 0


def step_inputs(rows: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    rates, bias = -torch.rand(H, dtype=torch.float64), normal(H)
    return {
        "x": normal(rows, H, P).to(dtype),
        "dt": normal(rows, H).to(dtype)[..., None].expand(-1, -1, P),
        "A": rates.to(dtype)[:, None, None].expand(H, P, N),
        "B": normal(rows, G, N).to(dtype),
        "C": normal(rows, G, N).to(dtype),
        "D": normal(H, P).to(dtype),
        "z": normal(rows, H, P).to(dtype),
        "dt_bias": bias.to(dtype)[:, None].expand(H, P),
    }


def plain_step(state, x, dt, A, B, C, D, z, dt_bias):
    dt = F.softplus(dt + dt_bias)
    B, C = (t.repeat_interleave(H // G, dim=1)[:, :, None] for t in (B, C))
    state = (dt[..., None] * A).exp() * state + (dt * x)[..., None] * B
    y = (state * C).sum(-1) + D * x
    return (y if z is None else y * F.silu(z)), state


@pytest.mark.parametrize("D", ["per head", "one number each", "per channel", "as Mamba2 has it per channel"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_step(D, dtype):
    inputs, moved = step_inputs(3, dtype), normal(3, H, P, N).to(dtype)
    if "per channel" not in D:
        inputs["D"] = normal(H).to(dtype)[:, None].expand(H, P)
    truth, expected = plain_step(moved.double(), **{n: x.double() for n, x in inputs.items()})
    if D == "one number each":
        inputs["D"] = inputs["D"][:, 0]
    if D == "as Mamba2 has it per channel":
        inputs["D"] = inputs["D"].reshape(H * P, 1).expand(H * P, P)
    found = selective_state_update(moved, **inputs, dt_softplus=True)
    assert found.dtype == moved.dtype == dtype
    assert error(found, truth) < (1e-12 if dtype == torch.float64 else 2e-2)
    assert error(moved, expected) < (1e-12 if dtype == torch.float64 else 1e-2)


def test_tensors_of_several_dtypes():
    """B, C and z in fp32 are not rounded to bf16 if x is bf16."""
    inputs, moved = step_inputs(3, torch.float32), normal(3, H, P, N).float()
    inputs["x"] = inputs["x"].bfloat16()
    truth, expected = plain_step(moved.double(), **{n: x.double() for n, x in inputs.items()})
    found = selective_state_update(moved, **inputs, dt_softplus=True)
    assert found.dtype == torch.bfloat16
    assert error(found, truth) < 4e-3
    assert error(moved, expected) < 1e-6
    tensors = {n: x.to(torch.bfloat16 if n == "x" else torch.float32) for n, x in scan_inputs().items()}
    truth, states = plain_scan(**{n: x.double() for n, x in tensors.items()})
    options = {"chunk_size": 4, "dt_softplus": True, "return_final_states": True}
    found, final = mamba_chunk_scan_combined(**tensors, **options)
    assert found.dtype == torch.bfloat16
    assert error(found, truth) < 4e-3
    assert error(final, states[:, -1]) < 1e-6


def test_errors_have_the_name_that_was_called():
    step = {**step_inputs(2), "state": normal(2, H, P, N)}
    chunks = {**scan_inputs(), "chunk_size": 4}
    for function, inputs, name, bad, message in (
        (selective_state_update, step, "B", normal(1, G, N), "selective_state_update: B must have shape"),
        (selective_state_update, step, "D", normal(H, P + 1), r"selective_state_update: D must have shape \[H\] or"),
        (selective_state_update, step, "D", normal(H + 1), "selective_state_update: D must have shape"),
        (mamba_chunk_scan_combined, chunks, "D", normal(H, 1), r"mamba_chunk_scan_combined: D must have shape"),
        (mamba_chunk_scan_combined, chunks, "initial_states", normal(3, H, P, N), "combined: initial_states must have"),
    ):
        with pytest.raises(ValueError, match=message):
            function(**{**inputs, name: bad})


def test_step_of_a_pool_and_without_heads():
    inputs, pool = step_inputs(2), normal(4, H, P, N)
    before = pool.clone()
    truth, expected = plain_step(pool[[3, 1]], **inputs)
    rows = torch.tensor([3, 1], dtype=torch.int32)
    found = selective_state_update(pool, **inputs, dt_softplus=True, state_batch_indices=rows)
    assert error(found, truth) < 1e-12
    assert error(pool[[3, 1]], expected) < 1e-12
    assert torch.equal(pool[[0, 2]], before[[0, 2]])
    one = {n: x[:, 0] if n in ("x", "dt", "B", "C", "z") else x[0] for n, x in inputs.items()}
    state = before[:2, 0].clone()
    found = selective_state_update(state, **one, dt_softplus=True)
    again = before[:2, :1].clone()
    single = {n: x[:, :1] if n in ("x", "dt", "B", "C", "z") else x[:1] for n, x in inputs.items()}
    assert torch.equal(found, selective_state_update(again, **single, dt_softplus=True)[:, 0])
    assert torch.equal(state, again[:, 0])


def test_refused():
    inputs = {n: x for n, x in scan_inputs().items() if n not in ("D", "z")}
    with pytest.raises(ValueError, match="chunk_size"):
        mamba_chunk_scan_combined(**inputs, chunk_size=0)
    with pytest.raises(ValueError, match="state_dtype"):
        mamba_chunk_scan_combined(**inputs, chunk_size=4, state_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="seq_idx must be integers"):
        mamba_chunk_scan_combined(**inputs, chunk_size=4, seq_idx=SEQ_IDX[:, :3])
    split = split_inputs()
    for message, change in (
        ("headdim", {}),
        ("activation", {"activation": "gelu", "headdim": P}),
        ("outproj_weight", {"outproj_bias": normal(3), "headdim": P}),
        ("do not fit", {"headdim": P + 1, "ngroups": G}),
    ):
        with pytest.raises(ValueError, match=message):
            mamba_split_conv1d_scan_combined(**split, chunk_size=4, **change)
    step = step_inputs(2)
    for name in ("A", "dt", "dt_bias"):
        with pytest.raises(ValueError, match=f"{name} must be one number per head"):
            selective_state_update(normal(2, H, P, N), **{**step, name: step[name].clone()})
