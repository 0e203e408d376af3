"""Prompts from a file, a folder or the Hub; a bad row is refused with its line."""

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
    # Some editors begin a file with a mark, which would become part of the first prompt.
    ".txt": {"encoding": "utf-8-sig"},
    # A prompt "7" or "null" is a text, too: bytes are made neither a number nor nothing.
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
    """One split of a dataset: a file (.txt with a prompt a line, .json, .jsonl, .csv, .parquet), a folder, or the Hub's.

    Args:
        name: file, folder or Hub id.
        split: of a folder or the Hub's dataset; a single file is the split "train".
        config: name of the dataset's configuration.
        streaming: read rows as they are needed.

    Raises:
        ValueError: if it is missing, cannot be read, has no row, or a line of a text file is no row.
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
        raise ValueError(f"split {split!r} of dataset_name={name!r} cannot be read ({reason}); pass one that can.") from error
    if first is None:
        raise ValueError(f"split {split!r} of dataset_name={name!r} has no row; pass at least one prompt.")
    return dataset


def _read_file(file: Path, split: str, streaming: bool) -> Any:
    """The rows of one file. `load_dataset` would report a use of its "csv" or "text" reader to a counter on the network."""
    files = {"train": glob.escape(str(file))}  # a bracket in the name would be a pattern
    return READERS[file.suffix](files, split=split, streaming=streaming, **OPTIONS.get(file.suffix, {})).read()


def require_prompt_strings(prompts: Iterable[Any]) -> None:
    """Raise ValueError, with its number, for a row whose prompt is no text; for what has rows but no lines."""
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {number} is of type {type(prompt).__name__}; pass a string in each row.")


def _decoded(dataset: Any, streaming: bool) -> Any:
    """With prompts of text in place of bytes."""
    if streaming:  # of unknown columns, in which none can be cast
        return dataset.map(lambda row: {"prompt": row["prompt"].decode()})
    return dataset.cast_column("prompt", Value("string"))


def _check_file(file: Path) -> None:
    """Read a text file line by line, only to name the line that the dataset's reader would fail on, or misread."""
    if file.suffix not in READERS:
        raise ValueError(f"dataset_name={str(file)!r} is a file of unknown kind; pass one ending in {', '.join(READERS)}.")
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
    """(number, line) of the lines that are not blank; numbers count from 1, as editors do."""
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
            raise ValueError(f"line {number} of {file.name} is no JSON ({error.msg}); write one object a line.") from None
        yield f"line {number}", _object(f"line {number} of {file.name}", row)


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of an array; what else a .json file may hold is left to the dataset's reader."""
    try:
        rows = json.loads(file.read_bytes())
    except ValueError:  # perhaps an object a line
        rows = []
    for number, row in enumerate(rows if isinstance(rows, list) else [], 1):
        yield f"row {number}", _object(f"row {number} of {file.name}", row)


def _object(place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is of type {type(row).__name__}; write an object with a 'prompt' there.")
    return row


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for _ in _text_lines(file):  # all of it is UTF-8; the lines of a CSV itself may break within quotes
        continue
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        rows = filter(None, reader)  # blank lines are no rows
        try:
            header = next(rows, [])
            if twice := [name for name in header if header.count(name) > 1]:
                raise ValueError(f"line {reader.line_num} of {file.name} names the column {twice[0]!r} twice; name each once.")
            for values in rows:
                if len(values) != len(header):
                    raise ValueError(
                        f"line {reader.line_num} of {file.name} has {len(values)} fields under {len(header)} columns; put text "
                        f'with commas into "quotes".'
                    )
                yield f"line {reader.line_num}", {name: value or None for name, value in zip(header, values, strict=True)}
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} of {file.name} is no CSV ({error}); mend it.") from None


LINES = {".txt": _plain_rows, ".json": _json_rows, ".jsonl": _json_lines, ".csv": _csv_rows}
