"""What a user hands to the trainer: pipeline, rows, output folder; checked before anything is computed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

__all__ = ["collate_columns", "first_row", "load_pipeline", "repeat_rows", "require_prompts", "require_writable"]
__all__ += ["without_prompt"]


def load_pipeline(model: str | Path | DiffusionPipeline, init_kwargs: dict[str, Any] | None) -> DiffusionPipeline:
    """The pipeline itself, or the one of that name or in that folder."""
    if isinstance(model, DiffusionPipeline):
        return model
    if not isinstance(model, str | Path):
        raise TypeError(f"model is a {type(model).__name__}; pass a DiffusionPipeline, or the name or folder of one.")
    return DiffusionPipeline.from_pretrained(model, **(init_kwargs or {}))


def require_prompts(dataset: Any) -> None:
    """Raise ValueError unless the dataset has a "prompt" column, or does not know its columns yet."""
    names = getattr(dataset, "column_names", None)  # streamed datasets may not know theirs before the first row
    if names is not None and "prompt" not in names:
        raise ValueError(f"the dataset has columns {sorted(names)}; add a 'prompt' column of strings.")


def require_writable(folder: str) -> None:
    """Create `folder` and write into it once; raise ValueError if that cannot be done."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output_dir={folder!r} cannot be written ({error.strerror}); pass a folder you may write to.") from None


def first_row(dataset: Any) -> dict[str, Any]:
    """The first row of the training data, or a ValueError that says what it lacks."""
    if dataset is None:
        raise ValueError("train_dataset is missing; pass a dataset with a 'prompt' column.")
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError("the train_dataset has no row; pass at least one prompt.")
    if "prompt" not in row:
        raise ValueError(f"the rows of the dataset have columns {sorted(row)}; add a 'prompt' column of strings.")
    if not isinstance(row["prompt"], str):
        raise ValueError(f"the first prompt is of type {type(row['prompt']).__name__}; pass a string in each row.")
    taken = {"images", "prompts"} & row.keys()
    if taken:
        raise ValueError(f"the dataset's column {min(taken)!r} is an argument of every reward function; rename the column.")
    return row


def collate_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Collate rows to columns of plain lists; nothing is padded or turned into tensors."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def repeat_rows(columns: dict[str, list[Any]], times: int) -> dict[str, list[Any]]:
    """Each row `times` in a row: several images of one prompt."""
    return {name: [value for value in values for _ in range(times)] for name, values in columns.items()}


def without_prompt(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns that only the rewards see."""
    return {name: values for name, values in columns.items() if name != "prompt"}
