"""Building the package: messages if the compiled kernels are left out."""

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import compilers
import pytest
import torch
from surroundings import ROOT

from s0kernels.hardware import PROCESSORS

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the tests run on an installed package")


def build(folder, **variables) -> tuple[int, str, bool]:
    """Build the package. Return the exit status, the output, and whether kernels were built."""
    command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "build", "--build-base", str(folder)]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr, any(folder.rglob("_cpu.so"))


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"S0KERNELS_BUILD": "0"}, "S0KERNELS_BUILD is 0"),
        ({"CXX": "no-compiler"}, "there is no compiler 'no-compiler'"),
        ({"CXX": "no-compiler --with arguments"}, "there is no compiler 'no-compiler --with arguments'"),
        ({"CXX": "", "PATH": "/nowhere"}, "there is no compiler 'g++' or 'clang++'"),
    ],
)
def test_without_compiled_kernels_the_package_is_built_and_says_why(tmp_path, variables, reason):
    status, said, kernels = build(tmp_path, **variables)
    assert (status, kernels) == (0, False)
    assert f"the compiled kernels are left out: {reason}" in said
    assert list(tmp_path.rglob("s0kernels/ops/ssd.py"))


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-compiler", "there is no compiler 'no-compiler'"), (None, "torch is not built for CUDA")],
)
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is one for CUDA")
def test_without_the_kernels_for_gpus(tmp_path, compiler, reason):
    """The kernels are left out with the reason. With S0KERNELS_BUILD=cuda it is an error."""
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
    assert f"failed. The compilers that build s0kernels: {compilers.known()}" in said


def setup(patch, **variables) -> dict:
    """Return the names of setup.py, run in the environment of the test."""
    for name, value in variables.items():
        patch.setenv(name, value)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("programs", "variables", "chosen"),
    [
        (["g++", "clang++"], {}, ["g++"]),
        (["clang++"], {}, ["clang++"]),
        (["g++", "clang++"], {"CXX": "ccache clang++"}, ["ccache", "clang++"]),
    ],
)
def test_compiler_is_the_one_asked_for_then_gcc_then_clang(tmp_path, monkeypatch, programs, variables, chosen):
    for program in programs:
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    assert setup(monkeypatch, **{"CXX": "", "PATH": str(tmp_path), **variables})["compiler"]() == chosen


def test_build_says_by_which_compiler(tmp_path):
    program = tmp_path / "compiler"
    program.write_text("#!/bin/sh\n[ $1 = --version ] && echo clang version 99.0.0\n")
    program.chmod(0o755)
    _, said, _ = build(tmp_path / "build", CXX=str(program))
    assert "s0kernels._cpu is compiled by clang version 99.0.0" in said


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "aarch64", "arm64"])
def test_instructions_are_switched_on_for_their_own_source_alone(tmp_path, monkeypatch, machine):
    commands = setup(monkeypatch)["compilations"](["g++"], machine, tmp_path)
    instructions = {Path(file).stem: [flag for flag in c if flag.startswith("-m")] for file, c in commands.items()}
    assert {name for name, flags in instructions.items() if not flags} == {"library", "portable"}
    switched = {name for name, flags in instructions.items() if flags}
    assert switched == ({"avx512", "avx2"} if machine in ("x86_64", "AMD64") else set())


#: letters of `nm` for symbols that are defined here and visible to other objects
SHARED = re.compile(r"^[0-9a-f]* ?[ABCDGRSTVWuvwi] (\S+)$", re.M)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only an x86-64 has several instruction sets")
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
@pytest.mark.parametrize("optimised", [pytest.param("-O2", marks=pytest.mark.slow), "-O0"])
@pytest.mark.parametrize(
    "name", [compilers.DEFAULT, *(pytest.param(c, marks=pytest.mark.slow) for c in compilers.here())]
)
def test_nothing_is_shared_between_instruction_sets(tmp_path, monkeypatch, name, optimised):
    """A linker keeps one of several definitions, so AVX-512 code could reach a machine without it. The test compiles
    without optimisation, so that inlining hides nothing."""
    command = [name] if name == compilers.DEFAULT else compilers.command_of(name)
    if command is None or shutil.which(command[0]) is None:
        pytest.skip(f"{name} is not here")
    commands = setup(monkeypatch, CXXFLAGS=optimised)["compilations"](command, "x86_64", tmp_path)
    for output, compilation in commands.items():
        isa = Path(output).stem
        if isa not in ("avx512", "avx2", "portable"):
            continue
        subprocess.run([*compilation, "-o", output], cwd=ROOT, check=True)
        listed = subprocess.run(["nm", "--defined-only", output], capture_output=True, text=True, check=True).stdout
        found = SHARED.findall(listed)
        assert any("forward_bytes" in symbol for symbol in found)
        namespace = f"2s0{len(isa)}{isa}"
        assert [symbol for symbol in found if namespace not in symbol.partition("E")[0]] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["aarch64-linux-gnu", *compilers.MACOS])
@pytest.mark.skipif(not compilers.ZIG.is_file(), reason="no zig in .deps/ziglang; `make test-more` puts it there")
def test_sources_compile_for_other_systems(tmp_path, target):
    machine = compilers.MACOS.get(target, "aarch64")
    before = set(ROOT.iterdir())
    compilers.compiled([str(compilers.ZIG), "c++", "-target", target, "-mcpu=baseline"], machine, tmp_path)
    assert set(ROOT.glob("*.o")) <= before


@pytest.mark.slow
def test_kernels_by_another_compiler(tmp_path):
    """The tests of backend `cpu` pass with the first other compiler that is installed."""
    installed = compilers.version([compilers.DEFAULT])
    others = [(n, c) for n in reversed(compilers.here()) if (c := compilers.command_of(n))]
    others = [(name, command) for name, command in others if compilers.version(command) != installed]
    if not others:
        pytest.skip(f"only {installed} is here, of {compilers.known()}")
    said = compilers.outcome(compilers.build(others[0][1], tmp_path), None)
    print(others[0][0], said)
    assert int(re.match(r"(\d+) passed", said)[1]) > 200


@pytest.mark.slow
@pytest.mark.parametrize("name", compilers.here("aarch64"))
def test_kernels_on_aarch64(tmp_path, name):
    """All tests of backend `cpu` pass in an emulator."""
    if reason := compilers.no_aarch64(name):
        pytest.skip(reason)
    said = compilers.emulated(compilers.FOR_AARCH64[name][0], tmp_path)
    assert int(re.match(r"(\d+) passed", said)[1]) > 200


def test_processes_that_need_the_emulated_blocks_at_once_build_them_once(tmp_path):
    code = """
import sys, pathlib, torch, emulated_blocks
library = emulated_blocks.build(pathlib.Path(sys.argv[1]))
torch.ops.load_library(str(library))
print(library, torch.ops.s0kernels_warps_up.ssd_step, torch.ops.s0kernels_warps_down.ssd_step)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "new" / "folder")]
    environment = os.environ | {"CXXFLAGS": "-O0", "PYTHONPATH": str(ROOT / "tests")}
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(found) == 1
    library = Path(found.pop().split()[0])
    assert {file.name for file in library.parent.iterdir()} == {library.name, "lock"}


def test_table_of_processors_names_what_was_tried():
    tried = {name for row in PROCESSORS if row.tried == "run" for name in row.compilers}
    assert tried == set(compilers.here())
    assert set(compilers.here("aarch64")) == set(compilers.FOR_AARCH64)
    assert {row.tried for row in PROCESSORS} <= {"run", "compiled", "emulated", "never"}


@pytest.mark.parametrize("compiler", ["no-compiler", "false"])
def test_kernels_that_were_asked_for_and_cannot_be_built_are_an_error(tmp_path, compiler):
    status, said, _ = build(tmp_path, S0KERNELS_BUILD="1", CXX=compiler)
    assert status != 0
    assert compiler in said


def test_results_of_the_compilers_hold_what_the_table_says():
    record = json.loads(compilers.RESULTS.read_text())
    assert {(row["compiler"], row["architecture"]) for row in record["results"]} >= {
        (name, row.architecture) for row in PROCESSORS if row.tried in ("run", "emulated") for name in row.compilers
    }
    assert all(re.fullmatch(r"\d+ passed|compiled", row["result"]) for row in record["results"]), record["results"]
    if record["sources"] != compilers.sources_hash():
        pytest.skip(f"{compilers.RESULTS.name} is of other sources than these: `make matrix-csrc` tries them")
