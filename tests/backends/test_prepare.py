"""What `prepare` of the delta rule computes of a chunk, in Triton's interpreter, against its definition in fp64."""

import pytest
import torch
import triton
import triton.language as tl
from cases import delta_problem
from test_triton import pytestmark as of_triton
from torch import Tensor

from s0kernels.backends.triton.gated_delta_rule.call import Call
from s0kernels.backends.triton.gated_delta_rule.prepare import A_Q, E_K, TWO_PARTS, inverse, prepare
from s0kernels.bench.inputs import nearly_equal_keys
from s0kernels.calls import DeltaInputs, DeltaOptions, Start

pytestmark = of_triton
SIZES = {"B": 1, "H": 1, "HV": 1, "K": 32, "V": 16, "state": None}


def prepared(values: dict[str, Tensor], normalise: bool = True):
    """(W with its second part, whether it has one, P, gates) of a chunk."""
    inputs = DeltaInputs(*(values[name] for name in ("q", "k", "v", "g", "beta")))
    w, p, gates = prepare(Call.of(inputs, 16, Start(), DeltaOptions(1.0, normalise)))
    parts = gates[0, 0, TWO_PARTS.value, 0] > 0 and w.shape[2] > 1
    return w[0, 0, : 1 + parts].double().sum(0), bool(parts), p[0, 0].double(), gates[0, 0].double()


def truth(values: dict[str, Tensor], normalise: bool = True):
    """(W, P, A_Q, E_K) in fp64, the decays as sums of those between."""
    q, k, g, beta = (values[name][0, :, 0].double() for name in ("q", "k", "g", "beta"))
    if normalise:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    T = len(g)
    between = [[g[j + 1 : i + 1].sum() if i >= j else -torch.inf for j in range(T)] for i in range(T)]
    decay = torch.tensor(between, dtype=torch.float64).exp()
    a = (k @ k.T * decay * beta).tril(-1)
    w = torch.linalg.inv(torch.eye(T, dtype=torch.float64) + a)
    return w, (q @ k.T * decay * beta).tril(), g.cumsum(0).exp(), decay[-1] * beta


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


def given(T: int, dtype: torch.dtype, **changes) -> dict[str, Tensor]:
    return delta_problem(T, **SIZES).to(dtype, torch.float32).tensors | changes


@pytest.mark.parametrize(
    ("dtype", "beta", "allowed"),
    [(torch.float16, 1.0, 3e-4), (torch.float16, 2.0, 5e-5), (torch.float32, 1.0, 1e-6), (torch.float32, 2.0, 4e-6)],
    ids=str,
)
@pytest.mark.parametrize("noise", [0.03, 0.1, 0.3])
def test_the_inverse_of_nearly_equal_keys(dtype, beta, allowed, noise):
    T = 64 if dtype == torch.float16 else 32
    values = nearly_equal_keys(delta_problem(T, **SIZES).tensors, noise, (beta, beta))
    values = {n: x.to(torch.float32 if n in ("g", "beta") else dtype) for n, x in values.items()}
    w, parts, p, _ = prepared(values)
    exact = truth(values)
    assert relative(w, exact[0]) < allowed
    assert relative(p, exact[1]) < 2 * torch.finfo(dtype).eps
    assert parts == (dtype == torch.float16 and beta == 2.0)


@triton.jit
def inverse_kernel(kk, beta, out, T, BT: tl.constexpr):
    """As for inputs in bf16, which the interpreter does not know."""
    o_t = tl.arange(0, BT)
    o_tile = o_t[:, None] * BT + o_t[None, :]
    b_rk = tl.full([BT], 1.0, tl.float32)
    b_w = inverse(tl.load(kk + o_tile), b_rk, tl.load(beta + o_t), T < 0, tl.bfloat16, BT)
    tl.store(out + o_tile, b_w)


@pytest.mark.parametrize("T", [16, 32, 64])
@pytest.mark.parametrize("noise", [0.03, 0.3])
def test_the_inverse_for_bf16_is_finer_than_bf16(T, noise):
    values = nearly_equal_keys(delta_problem(T, **SIZES).tensors, noise, (0.9, 1.0))
    values["q"] = values["k"]
    k = values["k"][0, :, 0]
    k = k * (k.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    kk, w = (k @ k.T).float(), torch.empty(T, T)
    inverse_kernel[(1,)](kk, values["beta"][0, :, 0].float().contiguous(), w, T, T)
    assert relative(w.double(), truth(values)[0]) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_strong_decays_cost_later_tokens_no_digits(dtype):
    T = 64 if dtype == torch.float16 else 32
    values = given(T, dtype)
    values["g"][:, 4::5] = -3e4
    values["g"][:, 17] = -torch.inf
    w, _, p, gates = prepared(values)
    for found, exact in zip((w, p, gates[A_Q.value], gates[E_K.value]), truth(values), strict=True):
        assert found.isfinite().all()
        if found.dim() == 2:
            assert relative(found, exact) < (2e-3 if dtype == torch.float16 else 1e-6)
    a_q = gates[A_Q.value] * values["q"][0, :, 0].double().square().sum(-1).add(1e-6).sqrt()
    assert relative(a_q, truth(values)[2]) < 1e-6
    assert (w[17:, :17] == 0).all()
    assert (p[17:, :17] == 0).all()
    assert (gates[A_Q.value, 17:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_keys_that_nobody_normalised_and_that_decays_keep_small(dtype):
    """Without the decays the inverse would pass the largest number of fp16, and of fp32."""
    T = 64 if dtype == torch.float16 else 32
    values = given(T, dtype)
    values["k"] = (8 * values["k"]).to(dtype)
    values["g"] = torch.full_like(values["g"], -9.0)
    w, _, _, _ = prepared(values, normalise=False)
    assert relative(w, truth(values, normalise=False)[0]) < (1e-3 if dtype == torch.float16 else 1e-5)


def test_nan_is_not_lost():
    values = given(16, torch.float16)
    values["g"][:, 3] = torch.nan
    w, _, p, _ = prepared(values)
    assert w[3:, :3].isnan().all()
    assert p[3:, :3].isnan().all()
