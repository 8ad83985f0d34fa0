"""Imports between packages run one way, and no package uses private names of another."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

import s0kernels

PACKAGE = Path(s0kernels.__file__).parent
CSRC = PACKAGE.parent / "csrc"
#: folders of the C++ sources, and the other folders whose files each may include, apart from files beside the folders
FOLDERS = {"token": set(), "cpu": {"token"}, "cuda": {"token"}}
#: layers from bottom to top: a module may import modules of lower layers, and of its own
FLOORS = (
    ("files", "messages", "versions", "hardware", "heads", "progress"),
    ("config", "calls"),
    ("backends",),
    ("ops",),
    ("modules",),
    ("states", "compat"),
    ("tuning", "bench", "peft"),
    ("data", "verify"),
    ("cli",),
    ("__main__",),
)


def room(module: str) -> str:
    """Return the package or file of s0kernels that contains a module."""
    return module.split(".")[1] if "." in module else ""


def imports() -> list[tuple[str, str, list[str]]]:
    """Yield (importing module, imported module, names) for every import within s0kernels, late imports included."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        here = ".".join(("s0kernels", *file.relative_to(PACKAGE).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "s0kernels":
                assert node.level == 0
                if node.module == "s0kernels":
                    found += [(here, f"s0kernels.{name.name}", []) for name in node.names]
                else:
                    found.append((here, node.module, [name.name for name in node.names]))
            elif isinstance(node, ast.Import):
                found += [(here, name.name, []) for name in node.names if name.name.startswith("s0kernels.")]
    return found


def test_imports_run_one_way():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for here, there, _ in imports():
        if here == "s0kernels.__init__" or room(there) not in floor:  # a name that the package itself offers
            continue
        assert room(here) == room(there) or floor[room(there)] < floor[room(here)], f"{here} imports {there}"


def test_nothing_private_is_imported_from_another_package():
    for here, there, names in imports():
        if room(here) != room(there):
            private = [name for name in (*there.split("."), *names) if name.startswith("_") and not name.endswith("__")]
            assert not private, f"{here} imports {', '.join(private)} of {there}"


def test_the_recurrences_of_the_triton_backend_meet_in_what_they_share():
    """`common` imports neither recurrence, they do not import each other, and none uses a private name of another."""
    home = "s0kernels.backends.triton."
    packages = {file.parent.name for file in (PACKAGE / "backends" / "triton").glob("*/__init__.py")}
    assert packages == {"common", "gated_delta_rule", "ssd"}
    for here, there, names in imports():
        if not here.startswith(home):
            continue
        mine = here.removeprefix(home).split(".")[0]
        for path in (f"{there}.{name}" for name in names or [""]):
            theirs, _, rest = path.removeprefix(home).partition(".")
            if path.startswith(home) and theirs != mine:
                assert mine not in packages or theirs == "common", f"{here} imports {path}"
                assert not any(part.startswith("_") for part in (theirs, *rest.split("."))), f"{here} imports {path}"


def test_every_package_is_installed():
    told = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [file.parent.relative_to(PACKAGE.parent) for file in PACKAGE.rglob("__init__.py")]
    assert sorted(told) == sorted(".".join(folder.parts) for folder in folders)


def test_the_package_knows_nothing_of_examples_and_benchmarks():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"benchmarks", "examples", "tests"} & {name.split(".")[0] for name in names}, file


def test_examples_and_benchmarks_use_public_names():
    """They neither import nor access private names of the package."""
    private = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            names += [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []
            private |= {name for name in names if name.startswith("_") and not name.endswith("__")}
    private -= {"_replace", "_asdict", "_fields", "_bench"}  # of NamedTuple; of Triton's autotuner
    root = PACKAGE.parent
    for file in (*root.glob("benchmarks/**/*.py"), *root.glob("examples/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("s0kernels"):
                assert not [x.name for x in node.names if x.name.startswith("_")], f"{file}: {node.module}"
            if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                assert node.attr not in private, f"{file}:{node.lineno} {node.attr}"


@pytest.mark.skipif(not CSRC.is_dir(), reason="the tests run on an installed package")
def test_the_libraries_for_a_cpu_and_for_gpus_include_nothing_of_each_other():
    assert {folder.name for folder in CSRC.iterdir() if folder.is_dir()} == set(FOLDERS)
    for file in filter(Path.is_file, CSRC.rglob("*.*")):
        room = file.relative_to(CSRC).parts[0]
        allowed = FOLDERS.get(room, set()) | {room}
        for name in re.findall(r'#include "(.+)"', file.read_text()):
            assert (CSRC / name).is_file(), f"{file} includes {name}"
            assert "/" not in name or name.partition("/")[0] in allowed, f"{file} includes {name}"
