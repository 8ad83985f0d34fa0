"""Run the tests with the newest transformers and PEFT of the package index, and print the outcome. It never fails.

python tests/newest.py
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from s0kernels.versions import TESTED  # noqa: E402

#: by package, the tests that depend on it
FILES = {
    "transformers": (
        "modules/test_self_check",
        "modules/test_modules",
        "modules/test_injection",
        "states/test_attaching",
    ),
    "peft": ("test_peft", "test_peft_forwards"),
}


def main() -> None:
    for package in FILES:
        attempt(package, TESTED.get(package, (importlib.metadata.version(package),)))


def attempt(package: str, tested: Sequence[str]) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    asked = subprocess.run([*pip, "index", "versions", package], capture_output=True, text=True)
    found = re.search(rf"{package} \((\S+)\)", asked.stdout)
    if found is None:
        print(f"newest {package}: the index did not say ({asked.stderr.strip()[-200:]})")
        return
    newest = found[1]
    if newest in tested:
        print(f"newest {package}: {newest}, which the tests run on")
        return
    with tempfile.TemporaryDirectory() as folder:
        install = [*pip, "install", "--quiet", "--no-deps", "--target", folder, f"{package}=={newest}"]
        if subprocess.run(install).returncode:
            print(f"newest {package}: {newest} cannot be installed")
            return
        files = [str(ROOT / "tests" / f"{name}.py") for name in FILES[package]]
        options = ["-q", "-W", "default", "--no-header", "--tb=line", "--numprocesses", "auto", "--maxprocesses", "8"]
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *files],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        lines = done.stdout.splitlines()
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        print(f"newest {package}: {newest}, not tested before; {lines[-1] if lines else done.stderr[-200:]}")
        print("\n".join(failures[:20]))


if __name__ == "__main__":
    main()
