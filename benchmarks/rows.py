"""Rows of a benchmark: one JSON line for each run, appended when it is done, so that a stopped benchmark can continue."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""`setting`, the fields of a dataclass; `found`, what the run says; and its `seconds`."""


def read(path: Path) -> list[Row]:
    """The complete rows of a file; none if there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"a torn row of {path.name} is left out and run again: {line[:60]}…", file=sys.stderr)
    return rows


def missing(wanted: Iterable[Any], rows: Sequence[Row]) -> list[Any]:
    """The settings without a row, each once."""
    recorded, found = [row["setting"] for row in rows], []
    for setting in wanted:
        if asdict(setting) not in recorded:
            recorded.append(asdict(setting))
            found.append(setting)
    return found


def record(setting: Any, run: Callable[[Any], dict[str, Any]], path: Path) -> None:
    """Run a setting and append its row."""
    start = time.perf_counter()
    found = run(setting)
    row = {"setting": asdict(setting), "found": found, "seconds": round(time.perf_counter() - start, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * (before[-1:] not in ("", "\n")) + json.dumps(row) + "\n")
