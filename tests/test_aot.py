"""The Triton kernels compiled for chips that are not there: registers, spills, shared memory, tensor cores."""

import json

import pytest
from test_surroundings import python

FLAGSHIP = "delta rule 128/128 bf16"
FALCON = "Falcon-H1-7B bf16"
#: bytes of a thread's registers that may go to memory; where nothing is named, none
SPILLS = {
    (FLAGSHIP, 80): 304,
    ("delta rule 256/256 bf16", 90): 704,
    ("delta rule 128/128 fp32", 90): 488,
    (FALCON, 80): 280,
}
#: bytes of shared memory that one program can have
SHARED = {80: 166912, 90: 232448, 100: 232448}


def _slow(case: str, capability: int):
    return pytest.param(case, capability, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("case", "capability"),
    [
        (FLAGSHIP, 90),
        (FALCON, 90),
        ("Falcon-H1-7B bf16, no optional input", 90),
        _slow(FLAGSHIP, 80),
        _slow(FLAGSHIP, 100),
        _slow("delta rule 128/128 bf16, few heads", 90),
        _slow("delta rule 64/64 fp16", 90),
        _slow("delta rule 256/256 bf16", 90),
        _slow("delta rule 128/128 fp32", 90),
        _slow(FALCON, 80),
        _slow(FALCON, 100),
        _slow("Falcon-H1-7B bf16, one sequence", 90),
        _slow("Falcon-H1-0.5B bf16", 90),
        _slow("Falcon-H1-7B fp32", 90),
    ],
)
def test_kernels_fit_the_chip(case, capability):
    done = python("-m", "s0kernels", "aot", "--json", "--case", case, "--capability", str(capability))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["call"] for row in rows} >= {"forward", "backward", "state-only backward", "step"}
    for row in rows:
        assert row["spills"] <= SPILLS.get((case, capability), 0), row
        assert row["shared"] <= SHARED[capability], row
        assert row["registers"] <= 255, row
        without_products = "state_grad", "gated_delta_rule_step", "ssd_step", "ssd_sums_bwd"
        if row["call"] == "state-only backward":
            without_products += ("ssd_prepare",)
        if row["kernel"] not in without_products and "fp32" not in case:
            assert row["tensor"] > 0, row
