"""What is finished, on the disk: one folder a prompt, whole or absent, so that an evaluation goes on where it was interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from ..checkpoint import whole_folder
from .measure import Measured, Setting

__all__ = ["Results", "Store"]

OPTIONS, NUMBERS = "options.json", "measured.json"
Results = dict[Setting, dict[str, Measured]]
"""setting → model's name → what was measured."""


class Store:
    """The folder of an evaluation.

    Args:
        folder: `output_dir`, seen by all processes.
        settings: of the evaluation.
    """

    def __init__(self, folder: Path, settings: list[Setting]) -> None:
        self.folder, self.settings = folder, settings

    def open(self, options: dict[str, Any], overwrite: bool) -> None:
        """Make the folder, or go on in it. To be called by one process.

        Args:
            options: whatever the numbers depend on.
            overwrite: forget what is there.

        Raises:
            ValueError: if it holds an evaluation with other options.
        """
        file = self.folder / OPTIONS
        if overwrite:
            shutil.rmtree(self.folder / "prompts", ignore_errors=True)
            shutil.rmtree(self.folder / "sheets", ignore_errors=True)
        elif file.is_file() and any((self.folder / "prompts").glob("[0-9]*")):
            before = json.loads(file.read_text(encoding="utf-8"))
            if changed := sorted(name for name in {*before, *options} if before.get(name) != options.get(name)):
                raise ValueError(
                    f"{self.folder} holds an evaluation with other {', '.join(changed)}; pass another output_dir, or "
                    f"overwrite_output_dir to forget it."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")

    def path(self, prompt: int) -> Path:
        return self.folder / "prompts" / f"{prompt:06d}"

    def has(self, prompt: int, text: str) -> bool:
        """Whether the prompt of this number is finished.

        Raises:
            ValueError: if it was another one.
        """
        if not self.path(prompt).is_dir():
            return False
        before = self._numbers(prompt)["prompt"]
        if before != text:
            raise ValueError(
                f"{self.folder} holds prompt {prompt + 1} as {before!r}, but it is {text!r} now; pass another output_dir, or "
                f"overwrite_output_dir to forget it."
            )
        return True

    def write(self, prompt: int, text: str, results: Results, strips: dict[tuple[Setting, str], Image.Image]) -> None:
        """Keep a finished prompt: its numbers and, for the contact sheets, its pictures of each setting and model."""
        measured = {str(setting): {name: m.to_json() for name, m in models.items()} for setting, models in results.items()}
        values = {"prompt": text, "measured": measured}
        with whole_folder(self.path(prompt), True, barrier=_alone) as folder:
            (folder / NUMBERS).write_text(json.dumps(values), encoding="utf-8")
            for (setting, name), strip in strips.items():
                strip.save(folder / _strip_name(setting, name))

    def read(self, prompt: int) -> Results:
        values = self._numbers(prompt)["measured"]
        return {setting: {name: Measured.from_json(m) for name, m in values[str(setting)].items()} for setting in self.settings}

    def _numbers(self, prompt: int) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.path(prompt) / NUMBERS).read_text(encoding="utf-8"))
        return values

    def read_strip(self, prompt: int, setting: Setting, model: str) -> Image.Image | None:
        file = self.path(prompt) / _strip_name(setting, model)
        return Image.open(file) if file.is_file() else None


def _strip_name(setting: Setting, model: str) -> str:
    return f"{setting}-{model}.png"


_alone: Callable[[], None] = lambda: None  # noqa: E731
