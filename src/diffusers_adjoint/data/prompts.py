"""Load prompts from a file, a folder or the Hub; an error in a text file names the line."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Value, load_dataset
from datasets.exceptions import DatasetsError
from datasets.io.csv import CsvDatasetReader
from datasets.io.json import JsonDatasetReader
from datasets.io.parquet import ParquetDatasetReader
from datasets.io.text import TextDatasetReader

__all__ = ["load_prompts", "require_prompt_strings"]

OPTIONS: dict[str, dict[str, Any]] = {
    # Some editors begin a file with a byte order mark, which would become part of the first prompt.
    ".txt": {"encoding": "utf-8-sig"},
    # As bytes, a prompt such as "7" or "null" is not turned into a number or a missing value.
    ".csv": {"converters": {"prompt": str.encode}},
}
READERS = {
    ".txt": TextDatasetReader,
    ".json": JsonDatasetReader,
    ".jsonl": JsonDatasetReader,
    ".csv": CsvDatasetReader,
    ".parquet": ParquetDatasetReader,
}


def load_prompts(name: str | None, split: str, *, config: str | None = None, streaming: bool = False) -> Any:
    """Load one split of a dataset: a file (.txt with one prompt a line, .json, .jsonl, .csv, .parquet), a folder, or a Hub
    dataset.

    Args:
        name: file, folder or Hub id.
        split: split of a folder or Hub dataset; a single file is the split "train".
        config: name of the dataset's configuration.
        streaming: read rows only when they are needed.

    Raises:
        ValueError: if the dataset is missing, cannot be read or has no row, or if a line of a text file is not a valid row.
    """
    if not name:
        raise ValueError("dataset_name is missing; pass a file of prompts, a folder, or the name of a dataset on the Hub.")
    file = Path(name)
    if not file.is_file() and file.suffix in READERS:
        raise ValueError(f"dataset_name={name!r} does not exist; pass a file, a folder, or the name of a dataset on the Hub.")
    if file.is_file():
        _check_file(file)
    try:
        if file.suffix in READERS:
            dataset = _read_file(file, split, streaming)
        else:
            dataset = load_dataset(name, config, split=split, streaming=streaming)
        if file.suffix == ".txt":
            dataset = dataset.filter(lambda row: row["text"].strip()).rename_column("text", "prompt")
        first = next(iter(dataset), None)
        if file.suffix == ".csv" and first and "prompt" in first:
            dataset = _decoded(dataset, streaming)
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ValueError(
            f"split {split!r} of dataset_name={name!r} cannot be read ({reason}); fix this, or pass another split or dataset."
        ) from error
    if first is None:
        raise ValueError(f"split {split!r} of dataset_name={name!r} has no row; pass at least one prompt.")
    return dataset


def _read_file(file: Path, split: str, streaming: bool) -> Any:
    """The rows of one file, by its reader: `load_dataset` with "csv" or "text" would report its use over the network."""
    files = {"train": glob.escape(str(file))}  # else a bracket in the name would be a glob pattern
    return READERS[file.suffix](files, split=split, streaming=streaming, **OPTIONS.get(file.suffix, {})).read()


def require_prompt_strings(prompts: Iterable[Any]) -> None:
    """Raise ValueError, naming the row, if a prompt is not a string. (Files are checked line by line in `_check_file`.)"""
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {number} is of type {type(prompt).__name__}; pass a string in each row.")


def _decoded(dataset: Any, streaming: bool) -> Any:
    """The dataset with its prompts decoded from bytes to text."""
    if streaming:  # the columns are unknown, so none can be cast
        return dataset.map(lambda row: {"prompt": row["prompt"].decode()})
    return dataset.cast_column("prompt", Value("string"))


def _check_file(file: Path) -> None:
    """Check a text file line by line, to name the line on which the dataset's reader would fail or which it would misread."""
    if file.suffix not in READERS:
        raise ValueError(f"dataset_name={str(file)!r} is a file of unknown type; pass one ending in {', '.join(READERS)}.")
    has_prompt = None
    for place, row in LINES[file.suffix](file) if file.suffix in LINES else ():
        has_prompt = "prompt" in row if has_prompt is None else has_prompt
        _check_row(f"{place} of {file.name}", row, has_prompt)
    if not file.stat().st_size or (has_prompt is None and file.suffix in (".txt", ".jsonl")):
        raise ValueError(f"dataset_name={str(file)!r} is empty; write at least one prompt into it.")


def _check_row(place: str, row: Any, has_prompt: bool) -> None:
    if has_prompt and row.get("prompt") is None:
        raise ValueError(f"{place} has no prompt; write one there or remove the row.")
    if "prompt" in row and not has_prompt:
        raise ValueError(f"{place} has a prompt, but the first row has none; write one into each row.")
    prompt = row.get("prompt", "")
    if not isinstance(prompt, str):
        raise ValueError(f"{place} has a prompt of type {type(prompt).__name__}; write a string there.")


def _text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines that are not blank; numbers count from 1, as in editors."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} of {file.name} is not UTF-8 ({error.reason}); save it as UTF-8.") from None
            if text.strip():
                yield number, text


def _plain_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _text_lines(file):
        yield f"line {number}", {"prompt": line}


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _text_lines(file):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {file.name} is not JSON ({error.msg}); write one object per line.") from None
        yield f"line {number}", _object(f"line {number} of {file.name}", row)


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a JSON array; the dataset's reader checks any other content of a .json file."""
    try:
        rows = json.loads(file.read_bytes())
    except ValueError:  # the file may have one object per line
        rows = []
    for number, row in enumerate(rows if isinstance(rows, list) else [], 1):
        yield f"row {number}", _object(f"row {number} of {file.name}", row)


def _object(place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is of type {type(row).__name__}; write an object with a 'prompt' there.")
    return row


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for _ in _text_lines(file):  # checks that the file is UTF-8; rows are read below, since a quoted value may span lines
        continue
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        rows = filter(None, reader)  # skips blank lines
        try:
            header = next(rows, [])
            if twice := [name for name in header if header.count(name) > 1]:
                raise ValueError(f"line {reader.line_num} of {file.name} names the column {twice[0]!r} twice; name it once.")
            for values in rows:
                if len(values) != len(header):
                    raise ValueError(
                        f"line {reader.line_num} of {file.name} has {len(values)} fields for {len(header)} columns; put text "
                        f'with commas into "quotes".'
                    )
                yield f"line {reader.line_num}", {name: value or None for name, value in zip(header, values, strict=True)}
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} of {file.name} is not valid CSV ({error}); fix this line.") from None


LINES = {".txt": _plain_rows, ".json": _json_rows, ".jsonl": _json_lines, ".csv": _csv_rows}
