"""The versions that the tests run on: one table, read by the Makefile, the tests, the documents and a warning.

As a script it needs nothing but Python: `pins` prints the versions that the Makefile installs, and `others NAME` prints
    the other tested versions of a package.
"""

import importlib.metadata
import sys
import warnings

#: oldest first
TESTED = {
    "Python": ("3.11", "3.12", "3.13"),
    "torch": ("2.11.0", "2.13.0", "2.14.1"),
    "transformers": ("5.17.0", "5.23.0", "5.24.0"),
    "triton": ("3.6.0", "3.7.0", "3.7.1", "3.8.0", "3.9.0"),
}
#: every test runs on these; tests that depend on a package run on its other versions too
PINNED = {"torch": "2.13.0", "transformers": "5.24.0", "triton": "3.7.1"}


def installed(*packages: str) -> dict[str, str | None]:
    """Return the installed version of each package, or None if it is missing."""
    return {package: _version(package) for package in packages}


def warn_untested() -> None:
    """Warn if the installed transformers is older or newer than all tested versions."""
    version = _version("transformers")
    tested = TESTED["transformers"]
    if version is not None and not _minor(tested[0]) <= _minor(version) <= _minor(tested[-1]):
        warnings.warn(
            f"s0kernels was tested with transformers {', '.join(tested)}, not {version}; swap_modules runs each kind "
            f"of mixer beside its original to find out whether they agree",
            stacklevel=4,
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _minor(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]


if __name__ == "__main__":
    if sys.argv[1:] == ["pins"]:
        print(*(f"{package}=={version}" for package, version in PINNED.items()))
    elif sys.argv[1:2] == ["others"]:
        print(*(version for version in TESTED[sys.argv[2]] if version != PINNED[sys.argv[2]]))
    else:
        sys.exit("usage: versions.py pins | others NAME")
