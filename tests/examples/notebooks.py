"""Runs the notebooks of examples/ from top to bottom; as a script, which is `make notebooks`, writes their outputs."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from s0kernels.files import replace_file

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, JUPYTER = ROOT / "examples", ROOT / ".deps" / "jupyter"


def run(file: Path, then: str | None = None) -> Any:
    """The notebook with its outputs, as nbformat has it, run in a new folder that holds the examples' models alone.
    `then` is a cell that comes last. Standard error is left out: progress, and warnings of other libraries."""
    sys.path.append(str(JUPYTER))
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(file, as_version=4)
    if then is not None:
        book.cells.append(nbformat.v4.new_code_cell(then))
    environment = {
        **os.environ,
        "PYTHONPATH": str(JUPYTER),
        "OMP_NUM_THREADS": "1",
    }  # a second thread brings little here
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny").symlink_to(EXAMPLES / "tiny")
        client = NotebookClient(book, timeout=600, record_timing=False, resources={"metadata": {"path": folder}})
        client.execute(env=environment)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    book.metadata.language_info = {"name": "python"}  # not which version of it
    return book


if __name__ == "__main__":
    for file in sorted(EXAMPLES.glob("*.ipynb")):
        book = run(file)
        from nbformat import writes  # which `run` has found

        replace_file(file, f"{writes(book)}\n".encode())
