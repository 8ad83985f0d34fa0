"""The CUDA sources, compiled if there is an nvcc: registers, spills, shared memory, and the linked library."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from surroundings import ROOT, environment

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="there is no nvcc"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the tests run on an installed package"),
]

#: maximum registers per thread: with 128, two blocks of 256 threads fit on a multiprocessor
REGISTERS = {
    "s0_gated_delta_rule_step": 128,
    "s0_ssd_step": 128,
    "s0_gated_delta_rule_step_strided": 255,
    "s0_ssd_step_strided": 255,
}
#: maximum bytes of shared memory per block
SHARED = {
    "s0_gated_delta_rule_step": 4104,
    "s0_ssd_step": 3108,
    "s0_gated_delta_rule_step_strided": 4104,
    "s0_ssd_step_strided": 3108,
}


def run(*command: object, **options) -> str:
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def usage(report: str) -> dict[str, dict[str, int]]:
    """Return the resources of each kernel, from the output of ptxas."""
    found = {}
    for name, text in re.findall(r"Function properties for (\w+)(.*?)(?=Compiling entry|\Z)", report, re.S):
        numbers = {"stack": r"(\d+) bytes stack", "stores": r"(\d+) bytes spill stores", "shared": r"(\d+) bytes smem"}
        numbers |= {"loads": r"(\d+) bytes spill loads", "registers": r"Used (\d+) registers"}
        found[name] = {key: int(re.search(pattern, text)[1]) for key, pattern in numbers.items()}
    return found


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
def test_kernels_fit_the_chip(capability, tmp_path):
    options = ["-O3", "-std=c++20", "-Icsrc", f"-arch=sm_{capability}", "-Werror", "all-warnings", "-Xptxas", "-v"]
    found = usage(run(NVCC, *options, "-cubin", "csrc/cuda/kernels.cu", "-o", tmp_path / "kernels.cubin"))
    assert set(found) == set(REGISTERS)
    for name, used in found.items():
        print(capability, name, used)
        assert used["stores"] == used["loads"] == used["stack"] == 0, (name, used)
        assert used["registers"] <= REGISTERS[name], (name, used)
        assert used["shared"] <= SHARED[name], (name, used)


@pytest.mark.parametrize(("kernel", "count"), [("s0_gated_delta_rule_step", 16), ("s0_ssd_step", 8)])
def test_states_are_read_and_written_16_bytes_at_a_time_and_once(kernel, count, tmp_path):
    options = ["-O3", "-std=c++20", "-Icsrc", "-arch=sm_90"]
    run(NVCC, *options, "-ptx", "csrc/cuda/kernels.cu", "-o", tmp_path / "kernels.ptx")
    text = re.search(rf"\.entry {kernel}\(.*?\n}}", (tmp_path / "kernels.ptx").read_text(), re.S)[0]
    assert len(re.findall(r"ld\.global\.v4\.f32", text)) == count
    assert len(re.findall(r"st\.global\S*\.v4\.f32", text)) == count


@pytest.mark.slow
def test_the_library_links_and_has_the_operators_of_the_one_for_a_cpu(tmp_path):
    """It is linked with a replacement for the one function of libtorch_cuda that it calls."""
    folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-fPIC", "-Wall", "-Werror", "-Icsrc", f"-I{folder / 'include'}"]
    flags.append("-DTORCH_TARGET_VERSION=0x020a000000000000")
    (tmp_path / "stub.cpp").write_text(
        'extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { *stream = nullptr; return 0; }'
    )
    run("g++", *flags, "-c", "csrc/cuda/library.cpp", "-o", tmp_path / "library.o")
    run(NVCC, "-std=c++20", "-Icsrc", "-arch=sm_90", "-Xcompiler=-fPIC", "-c", "csrc/cuda/kernels.cu", "-o",
        tmp_path / "kernels.o")  # fmt: skip
    objects = [tmp_path / "library.o", tmp_path / "kernels.o"]
    link = [NVCC, "-shared", "-Xcompiler=-fPIC", *objects, f"-L{folder / 'lib'}", "-ltorch_cpu"]
    run(*link, "-o", tmp_path / "without.so")
    run(*link, tmp_path / "stub.cpp", "-o", tmp_path / "with.so")
    code = """
import torch
from s0kernels.backends import cpu, cuda
from s0kernels.calls import DeltaInputs, DeltaOptions, Pool
print(cuda.missing())
if cuda.missing() is None:
    assert cpu.missing() is None
    for name in ("gated_delta_rule_step", "ssd_step"):
        both = (getattr(library, name).default for library in (torch.ops.s0kernels_cuda, torch.ops.s0kernels_cpu))
        ours, theirs = (str(operator._schema).partition("(")[2] for operator in both)
        assert ours == theirs
    x, state = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4, 4)
    try:
        cuda.gated_delta_rule_step(DeltaInputs(x, x, x, x[..., 0], x[..., 0]), Pool(state), DeltaOptions(1.0, False))
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""

    def load(file):
        return run(sys.executable, "-c", code, env=environment() | {"S0KERNELS_CUDA_LIBRARY": str(tmp_path / file)})

    assert load("none.so").startswith("was not built")
    assert "undefined symbol: aoti_torch_get_current_cuda_stream" in load("without.so")
    usable, refusal = load("with.so").splitlines()
    assert usable == "None"
    assert refusal.endswith("s0kernels: a tensor on another device")
