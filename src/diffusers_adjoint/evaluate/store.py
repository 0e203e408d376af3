"""Store finished prompts on disk, one folder each, complete or absent, so that an interrupted evaluation can continue."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets.fingerprint import Hasher
from PIL import Image

from ..trainer.checkpoint import whole_files, whole_folder
from ..trainer.checks import require_writable
from .arguments import SAMPLERS
from .measure import Measured, Setting

__all__ = ["Results", "Store"]

OPTIONS, NUMBERS, DIGEST, DIGITS = "evaluation.json", "measured.json", "sha256", 6
Results = dict[Setting, dict[str, Measured]]
"""setting → model's name → measurements."""


class Store:
    """The folder of an evaluation.

    Args:
        folder: `output_dir`, shared by all processes.
        settings: settings of the evaluation.
    """

    def __init__(self, folder: Path, settings: list[Setting]) -> None:
        self.folder, self.settings = folder, settings

    def open(self, options: dict[str, Any], overwrite: bool) -> None:
        """Create the folder, or continue the evaluation in it. Only one process calls this.

        Args:
            options: the options on which the numbers depend.
            overwrite: delete the evaluation that is there; other files stay.

        Raises:
            ValueError: if it holds an evaluation with other options, or cannot be written.
        """
        if os.path.isfile(self.folder):  # unlike Path.is_file, it accepts a name with a zero byte
            raise ValueError(f"output_dir={str(self.folder)!r} is a file; pass a folder.")
        require_writable(str(self.folder))
        before = self._options()
        if before is None and (any(self._finished()) or (self.folder / "results.md").exists()):
            raise ValueError(f"{self.folder} holds results, but no {OPTIONS} with their options; pass another output_dir.")
        if overwrite and before is not None:
            self._forget()
        elif before is not None and before != options and any(self._finished()):
            changed = sorted(name for name in {*before, *options} if before.get(name) != options.get(name))
            raise ValueError(
                f"{self.folder} holds an evaluation with other {', '.join(changed)}; pass another output_dir, or "
                f"overwrite_output_dir to delete it."
            )
        if before != options:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_files(self.folder, True, barrier=_alone) as partial:
                (partial / OPTIONS).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")

    def _options(self) -> dict[str, Any] | None:
        file = self.folder / OPTIONS
        if not file.is_file():
            return None
        options = self._read(file, lambda: json.loads(file.read_text(encoding="utf-8")))
        if not isinstance(options, dict):
            raise self._damaged(file, "it holds no options")
        return options

    def _read(self, file: Path, read: Callable[[], Any]) -> Any:
        """Call `read`.

        Raises:
            ValueError: if it cannot read the file.
        """
        try:
            return read()
        except (OSError, ValueError, SyntaxError, RecursionError) as error:  # SyntaxError from a PNG, RecursionError from JSON
            raise self._damaged(file, " ".join(str(error).split())) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within this context a file that cannot be written raises ValueError."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{error.filename or self.folder} cannot be written ({error.strerror or error}); free some space, and run the "
                f"same command without overwrite_output_dir to continue."
            ) from error

    def _damaged(self, file: Path, reason: str) -> ValueError:
        return ValueError(
            f"{file} is damaged ({reason}); delete its folder to measure the prompt again, or pass another output_dir."
        )

    def _finished(self) -> list[Path]:
        return [file.parent for file in (self.folder / "prompts").glob("[0-9]" * DIGITS + f"/{NUMBERS}")]

    def _forget(self) -> None:
        for folder in self._finished():
            shutil.rmtree(folder)
        for sampler in SAMPLERS:
            for sheet in (self.folder / "sheets").glob(f"{sampler}-steps*-guidance*.png"):
                sheet.unlink()

    def path(self, prompt: int) -> Path:
        return self.folder / "prompts" / f"{prompt:0{DIGITS}d}"

    def has(self, prompt: int, row: dict[str, Any]) -> bool:
        """Whether the prompt of this number is finished.

        Raises:
            ValueError: if the stored prompt has another text or other columns.
        """
        if not (self.path(prompt) / NUMBERS).is_file():
            return False
        before, now = self._numbers(prompt), _description(row)
        if any(before[name] != value for name, value in now.items()):
            found = f"as {before['prompt']!r}" if before["prompt"] != now["prompt"] else "with other columns"
            raise ValueError(
                f"{self.folder} holds prompt {prompt + 1}, {now['prompt']!r}, {found}; pass another output_dir, or "
                f"overwrite_output_dir to delete the earlier evaluation."
            )
        return True

    def write(self, prompt: int, row: dict[str, Any], results: Results, strips: dict[tuple[Setting, str], Image.Image]) -> None:
        """Store a finished prompt: its measurements and, for the contact sheets, images for each setting and model."""
        measured = {str(setting): {name: m.to_json() for name, m in models.items()} for setting, models in results.items()}
        with whole_folder(self.path(prompt), True, barrier=_alone) as folder:
            content = {**_description(row), "measured": measured}
            (folder / NUMBERS).write_text(json.dumps(content | {DIGEST: _digest(content)}), encoding="utf-8")
            for (setting, name), strip in strips.items():
                strip.save(folder / _strip_name(setting, name))

    def read(self, prompt: int) -> Results:
        values = self._numbers(prompt)["measured"]
        return {setting: {name: Measured.from_json(m) for name, m in values[str(setting)].items()} for setting in self.settings}

    def _numbers(self, prompt: int) -> dict[str, Any]:
        file = self.path(prompt) / NUMBERS
        values = self._read(file, lambda: json.loads(file.read_text(encoding="utf-8")))
        if not isinstance(values, dict) or values.pop(DIGEST, None) != _digest(values):
            raise self._damaged(file, "its content does not match its hash")
        return values

    def read_strip(self, prompt: int, setting: Setting, model: str) -> Image.Image | None:
        file = self.path(prompt) / _strip_name(setting, model)
        return self._read(file, lambda: Image.open(file).copy()) if file.is_file() else None


def _strip_name(setting: Setting, model: str) -> str:
    return f"{setting}-{model}.png"


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of the content, to detect changes."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _description(row: dict[str, Any]) -> dict[str, str]:
    """The prompt as text, and a hash of all columns, including images, to compare."""
    return {"prompt": str(row.get("prompt", "")), "columns": Hasher.hash(row)}


def _alone() -> None:
    """A barrier that does nothing, for a folder that only one process writes."""
