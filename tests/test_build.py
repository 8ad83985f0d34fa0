"""Building the package: what is said where the compiled kernels are left out."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from test_surroundings import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the tests run on an installed package")


def build(folder, **variables) -> tuple[int, str, bool]:
    """Exit status, what was said, and whether kernels came out."""
    command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "build", "--build-base", str(folder)]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr, any(folder.rglob("_cpu.so"))


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"S0KERNELS_BUILD": "0"}, "S0KERNELS_BUILD is 0"),
        ({"CXX": "no-compiler"}, "there is no compiler 'no-compiler'"),
    ],
)
def test_without_compiled_kernels_the_package_is_built_and_says_why(tmp_path, variables, reason):
    status, said, kernels = build(tmp_path, **variables)
    assert (status, kernels) == (0, False)
    assert f"the compiled kernels are left out: {reason}" in said
    assert list(tmp_path.rglob("s0kernels/ops/ssd.py"))


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-compiler", "there is no compiler 'no-compiler'"), (None, "torch is not one for CUDA")]
)
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is one for CUDA")
def test_without_the_kernels_for_gpus(tmp_path, compiler, reason):
    """They are left out, with the reason, or with S0KERNELS_BUILD=cuda an error."""
    if compiler is None:
        compiler = shutil.which("true")
    status, said, _ = build(tmp_path, S0KERNELS_BUILD="cuda", NVCC=compiler)
    assert status != 0
    assert f"the kernels for GPUs are left out: {reason}" in said
    status, said, kernels = build(tmp_path, NVCC=compiler, CXX="false")
    assert (status, kernels) == (0, False)
    assert f"the kernels for GPUs are left out: {reason}" in said


def test_a_compiler_that_fails_leaves_a_package_without_kernels(tmp_path):
    status, said, kernels = build(tmp_path, CXX="false")
    assert (status, kernels) == (0, False)
    assert "failed" in said


@pytest.mark.parametrize("compiler", ["no-compiler", "false"])
def test_kernels_that_were_asked_for_and_cannot_be_built_are_an_error(tmp_path, compiler):
    status, said, _ = build(tmp_path, S0KERNELS_BUILD="1", CXX=compiler)
    assert status != 0
    assert compiler in said
