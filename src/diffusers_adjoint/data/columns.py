"""Batches: rows of a dataset as columns, name → list of values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .given_datasets import PROMPTS, first_items, require_columns, require_row

__all__ = ["first_row", "parts_of", "collate_columns", "rows_of", "one_row", "prompts_of", "repeat_rows", "without_prompt"]


def first_row(dataset: Any, name: str, needs_prompt: bool) -> dict[str, Any]:
    """The first row of a dataset, checked.

    Args:
        dataset: the dataset, or `None`.
        name: name of the argument, for messages.
        needs_prompt: whether the row needs a "prompt" (or "prompt_embeds") column.

    Raises:
        TypeError: if the row is not a dict.
        ValueError: if there is no row, it lacks a prompt, or it has a column "images" or "prompts".
    """
    if dataset is None:
        raise ValueError(f"{name} is missing; pass a dataset with a row for each prompt.")
    rows = first_items(dataset, 1)
    if not rows:
        raise ValueError(f"the {name} has no row; pass at least one prompt.")
    row = rows[0]
    if not isinstance(row, Mapping):
        raise TypeError(f"the rows of the {name} are of type {type(row).__name__}; pass rows that are dicts, with a 'prompt'.")
    if not row:
        raise ValueError(f"the rows of the {name} have no column; pass rows with at least one, such as a 'prompt'.")
    if needs_prompt and not PROMPTS & row.keys():
        raise ValueError(f"the rows of the {name} have columns {sorted(row, key=str)}; add a 'prompt' column of strings.")
    if not isinstance(row.get("prompt", ""), str):
        raise ValueError(f"the first prompt of the {name} is of type {type(row['prompt']).__name__}; pass a string in each row.")
    taken = {"images", "prompts"} & row.keys()
    if taken:
        raise ValueError(f"column {min(taken)!r} of the {name} is an argument of every reward function; rename the column.")
    return dict(row)


def parts_of(dataset: Any) -> list[Any]:
    """The datasets as a list: those of a dict, or a single one, or none for `None`."""
    return list(dataset.values()) if isinstance(dataset, dict) else [] if dataset is None else [dataset]


def collate_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Collate rows to columns of plain lists; nothing is padded or turned into tensors.

    Raises:
        TypeError: if a row is not a dict.
        ValueError: if a row has other columns than the first, or a prompt that is not a string.
    """
    for row in rows:  # rows of a stream or of a generated dataset were not checked before training
        require_row(row)
        require_columns(row, rows[0])
    return {name: [_plain(row[name]) for row in rows] for name in rows[0]}


def _plain(value: Any) -> Any:
    """Turn a subclass of `str`, such as NumPy's, into a plain string: YAML and `repr` would show the subclass."""
    return str.__str__(value) if isinstance(value, str) else value


def rows_of(columns: dict[str, list[Any]]) -> int:
    """B, the number of rows in a batch."""
    return len(next(iter(columns.values())))


def one_row(columns: dict[str, list[Any]]) -> dict[str, Any]:
    """The first row of a batch."""
    return {name: values[0] for name, values in columns.items()}


def prompts_of(columns: dict[str, list[Any]]) -> list[str]:
    """The prompts for the rewards, (B,); empty strings if the pipeline takes no prompts."""
    return columns.get("prompt") or [""] * rows_of(columns)


def repeat_rows(columns: dict[str, list[Any]], times: int) -> dict[str, list[Any]]:
    """Repeat each row `times` times, next to each other, for several images of one prompt."""
    return {name: [value for value in values for _ in range(times)] for name, values in columns.items()}


def without_prompt(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """All columns but "prompt"."""
    return {name: values for name, values in columns.items() if name != "prompt"}
