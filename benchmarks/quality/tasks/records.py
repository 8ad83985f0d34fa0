"""Read the rows of a data set, from the Hugging Face hub or from a file."""

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path


def read_records(source: str, fields: Sequence[str], *, split: str, subset: str | None = None) -> list[dict]:
    """Return all rows, in order.

    source: the path of a .json file (a list) or of a .jsonl file (one row per line), either also as .gz. Anything else
        is the name of a data set for `datasets.load_dataset`; `split` and `subset` are used only then. Raise ValueError
        for an invalid file, or for a row without one of the `fields`; the message names source and row. Raise
        FileNotFoundError if there is no such file, and ImportError if a data set is named and `datasets` is not
        installed.
    """
    if re.search(r"\.jsonl?(\.gz)?$", source):
        rows = _from_file(Path(source).expanduser())
    else:
        rows = _from_hub(source, subset, split)
    if not rows:
        raise ValueError(f"{source} is empty")
    for number, row in enumerate(rows, 1):
        missing = [field for field in fields if not isinstance(row, dict) or not isinstance(row.get(field), str)]
        if missing:
            raise ValueError(f"{source}: row {number} lacks {', '.join(missing)} as text")
    return rows


def _from_file(path: Path) -> list:
    if not path.is_file():
        raise FileNotFoundError(f"no data at {path}")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
        if ".jsonl" in path.name:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        rows = json.loads(text)
    except (gzip.BadGzipFile, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of rows, got {type(rows).__name__}")
    return rows


def _from_hub(name: str, subset: str | None, split: str) -> list:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(f"reading {name} needs the package datasets: pip install 's0kernels[eval]'") from None
    return [dict(row) for row in load_dataset(name, subset, split=split)]
