"""Tables that read well in Markdown and in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["escaped", "markdown_table"]


def escaped(text: str) -> str:
    """Escape a name, such as that of a reward or a folder, as plain text for one line of Markdown or a cell of a table."""
    for mark in ("\\", "`", "|", "[", "*"):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.replace("<", "&lt;").split())


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded columns; the first row is the header. Names in it must be `escaped`."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
