"""Format tables: aligned columns for a terminal, Markdown for documents."""

from collections.abc import Iterable, Sequence


def plain(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def interval(ratio: Sequence[float], digits: int = 3) -> str:
    """Format a median with its 95 % interval."""
    median, low, high = (f"{x:.{digits}f}" for x in ratio)
    return f"{median} ({low}-{high})"
