"""Prompts from a file, a folder or the Hub; a bad row is refused with its line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError

__all__ = ["load_prompts", "require_prompt_strings"]

READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_prompts(
    name: str | None, split: str, *, config: str | None = None, streaming: bool = False, option: str = "dataset_name"
) -> Any:
    """One split of a dataset: a file (.txt with a prompt a line, .json, .jsonl, .csv, .parquet), a folder, or the Hub's.

    Args:
        name: file, folder or Hub id.
        split: of a folder or the Hub's dataset; a single file is the split "train".
        config: name of the dataset's configuration.
        streaming: read rows as they are needed.
        option: what the name was passed as, for error messages.

    Raises:
        ValueError: if it is missing, cannot be read, has no row, or a line of a text file is no row.
    """
    if not name:
        raise ValueError(f"{option} is missing; pass a file of prompts, a folder, or the name of a dataset on the Hub.")
    file, reader = Path(name), READERS.get(Path(name).suffix)
    if not file.is_file() and reader:
        raise ValueError(f"{option}={name!r} does not exist; pass a file, a folder, or the name of a dataset on the Hub.")
    if file.is_file():
        _check_file(file, option)
    source = {"path": reader, "data_files": str(file)} if reader else {"path": name, "name": config}
    if reader == "text":
        source["encoding"] = "utf-8-sig"  # some editors begin a file with a mark, which would become part of the first prompt
    try:
        dataset = load_dataset(**source, split=split, streaming=streaming)
        if reader == "text":
            dataset = dataset.filter(lambda row: row["text"].strip()).rename_column("text", "prompt")
        first = next(iter(dataset), None)
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ValueError(f"split {split!r} of {option}={name!r} cannot be read ({reason}); pass one that can.") from error
    if first is None:
        raise ValueError(f"split {split!r} of {option}={name!r} has no row; pass at least one prompt.")
    return dataset


def require_prompt_strings(prompts: Iterable[Any]) -> None:
    """Raise ValueError, with its number, for a row whose prompt is no text; for what has rows but no lines."""
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {number} is of type {type(prompt).__name__}; pass a string in each row.")


def _check_file(file: Path, option: str) -> None:
    """Read a text file line by line, only to name the line that the dataset's reader would fail on, or misread."""
    if file.suffix not in READERS:
        raise ValueError(f"{option}={str(file)!r} is a file of unknown kind; pass one ending in {', '.join(READERS)}.")
    if not file.read_bytes().strip():
        raise ValueError(f"{option}={str(file)!r} is empty; write at least one prompt into it.")
    if file.suffix in LINES:
        has_prompt = None
        for number, row in LINES[file.suffix](file):
            has_prompt = "prompt" in row if has_prompt is None else has_prompt
            _check_row(f"line {number} of {file.name}", row, has_prompt)


def _check_row(place: str, row: dict[str, Any], has_prompt: bool) -> None:
    if has_prompt and row.get("prompt") is None:
        raise ValueError(f"{place} has no prompt, but the first row has one; write one there or remove the row.")
    if "prompt" in row and not has_prompt:
        raise ValueError(f"{place} has a prompt, but the first row has none; write one into each row.")
    prompt = row.get("prompt", "")
    if not isinstance(prompt, str):
        raise ValueError(f"{place} has a prompt of type {type(prompt).__name__}; write a string there.")


def _text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines that are not blank; numbers count from 1, as editors do."""
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} of {file.name} is not UTF-8 ({error.reason}); save the file as UTF-8.") from None
        if text.strip():
            yield number, text


def _plain_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _text_lines(file):
        yield number, {"prompt": line}


def _json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _text_lines(file):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {file.name} is no JSON ({error.msg}); write one object a line.") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {file.name} is a {type(row).__name__}; write an object with a 'prompt' there.")
        yield number, row


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Blank lines stay in: the reader counts them.
    lines = [text for _, text in _text_lines(file)] and file.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader)
        for values in reader:
            if values and len(values) != len(header):
                raise ValueError(
                    f"line {reader.line_num} of {file.name} has {len(values)} fields under {len(header)} columns; put text "
                    f'with commas into "quotes".'
                )
            if values:
                yield reader.line_num, {name: value or None for name, value in zip(header, values, strict=True)}
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of {file.name} is no CSV ({error}); mend it.") from None


LINES = {".txt": _plain_rows, ".jsonl": _json_rows, ".csv": _csv_rows}
