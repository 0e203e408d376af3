"""Which objects are accepted as datasets of prompts, and errors for the others."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Collection, Mapping, Sequence, Sized
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Value
from torch.utils.data import Dataset as TorchDataset
from transformers.trainer_utils import has_length

from .prompts import require_prompt_strings

__all__ = ["PROMPTS", "dataset_of", "eval_datasets_of", "first_items", "num_prompts", "require_columns", "require_row"]

PROMPTS = {"prompt", "prompt_embeds"}  # a row needs one of these columns


def num_prompts(dataset: Any) -> int | None:
    """Number of different prompts in a `Dataset`; `None` if it has no prompts or would have to be read first."""
    known = isinstance(dataset, Dataset) and dataset.features.get("prompt") in (Value("string"), Value("large_string"))
    return len(dataset.unique("prompt")) if known else None


def dataset_of(given: Any, name: str) -> Any:
    """Return a dataset as it is, or make one from a list of prompts.

    Args:
        given: the argument of a trainer.
        name: name of the argument, for messages.

    Raises:
        TypeError: if it is not a dataset.
        ValueError: if it has several splits, or is a list whose rows have different columns.
    """
    if isinstance(given, Dataset | IterableDataset | TorchDataset):
        return given
    if isinstance(given, DatasetDict | IterableDatasetDict):
        splits = " or ".join(f"{name}[{split!r}]" for split in given)
        raise ValueError(f"{name} is a {type(given).__name__} of several splits; pass one of them, {splits}.")
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        if not given or isinstance(given[0], str):  # an empty list becomes an empty dataset, which has an error of its own
            _require_items(given, name, str)
            return Dataset.from_dict({"prompt": list(given)})
        if isinstance(given, list | tuple):
            _require_rows(given, name)
            return given
    indexed = isinstance(given, Sized) and hasattr(type(given), "__getitem__")
    if indexed and any(isinstance(row, Mapping) for row in first_items(given, 1)):
        return given  # a user's own class with a length and rows, which torch accepts as a dataset
    raise TypeError(
        f"{name} is of type {type(given).__name__}; pass a datasets.Dataset (its from_dict, from_pandas, from_generator or "
        f"load_dataset make one), a torch Dataset of dicts, or a list of prompts."
    )


def eval_datasets_of(given: Any) -> Any:
    """As `dataset_of`, for `eval_dataset`, which may also be a dict of several datasets."""
    if not isinstance(given, dict):
        return dataset_of(given, "eval_dataset")
    if columns := [name for name in PROMPTS & given.keys() if isinstance(given[name], Sequence)]:
        raise TypeError(f"eval_dataset is a dict with a column {columns[0]!r}; pass datasets.Dataset.from_dict of it.")
    return {key: dataset_of(part, f"eval_dataset[{key!r}]") for key, part in given.items()}


def require_row(row: Any) -> None:
    """Check a row when training reads it. Rows are shuffled, so the message shows the row instead of its number.

    Raises:
        TypeError: if it is not a dict.
        ValueError: if its prompt is not a string.
    """
    if not isinstance(row, Mapping):
        raise TypeError(f"the row {_shown(row)} is of type {type(row).__name__}; pass rows that are dicts, as the first one is.")
    if not isinstance(row.get("prompt", ""), str):
        raise ValueError(
            f"the row {_shown(dict(row))} has a prompt of type {type(row['prompt']).__name__}; pass a string in each row."
        )


def require_columns(row: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise ValueError, naming the prompt, if a row has other columns than the first, as in a streamed dataset."""
    if row.keys() != set(names):
        which = f"with the prompt {row['prompt']!r}" if "prompt" in row else _shown(dict(row))
        raise ValueError(
            f"the row {which} has the columns {sorted(row, key=str)} where the first row has {sorted(names)}; give every row the "
            f"same."
        )


def _shown(value: Any) -> str:
    """A short `repr` of the value, in one line."""
    return " ".join(reprlib.repr(value).split())


def first_items(dataset: Any, most: int) -> list[Any]:
    """The first rows, at most `most`; a streamed dataset starts from its first row again afterwards.

    No row past the end is read: `iter` finds the end by an IndexError, which a class with a length need not raise.
    """
    return list(itertools.islice(iter(dataset), min(most, len(dataset)) if has_length(dataset) else most))


def _require_rows(rows: Sequence[Any], name: str) -> None:
    _require_items(rows, name, Mapping)
    for row in rows:
        require_columns(row, rows[0])
    require_prompt_strings(row["prompt"] for row in rows if "prompt" in row)


def _require_items(items: Sequence[Any], name: str, kind: type) -> None:
    for number, item in enumerate(items):
        if not isinstance(item, kind):
            raise TypeError(
                f"item {number} of {name} is of type {type(item).__name__}; pass a list of prompts alone, or of dicts with a "
                f"'prompt' alone."
            )
