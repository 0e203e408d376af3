"""The pictures that a trainer shows: those of its last rollout and of its last evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..pictures.grid import image_grid, save_grid
from ..pictures.pixels import drawable
from ..pictures.samples import SampleImages
from ..pictures.trackers import to_trackers, warn_if_lost

__all__ = ["Shown", "show"]


@dataclass
class Shown:
    """The last pictures of each kind; no number depends on them.

    Args:
        trained: of the last rollout, on the main process, or what makes them when they are looked at.
        evaluated: of the last evaluation; `None` until there is one, and again when a call of `train` begins and after the first
            update of a run, since the earlier ones show another model.
        base: of the last evaluation before the first update.
    """

    trained: SampleImages | Callable[[], SampleImages] | None = None
    evaluated: SampleImages | None = None
    base: SampleImages | None = None

    def of_training(self) -> SampleImages | None:
        """Those of the last rollout, made once."""
        if not isinstance(self.trained, SampleImages | None):
            self.trained = self.trained()
        return self.trained

    def for_card(self) -> SampleImages:
        """Those of the last evaluation rather than of training; without either, no images, shape (0, 3, 1, 1)."""
        return self.evaluated or self.of_training() or SampleImages(torch.zeros(0, 3, 1, 1), [], torch.zeros(0))

    def before(self) -> Tensor | None:
        """The base's samples of the prompts and seeds of those for the card, where both were evaluated."""
        if self.base is None or self.evaluated is None or self.base is self.evaluated:
            return None
        return self.base.images if self.base.prompts == self.evaluated.prompts else None


def show(pictures: SampleImages, name: str, step: int, folder: Path, callbacks: Sequence[TrainerCallback]) -> None:
    """A grid as `folder`/samples/`name`-`step`.png and in the trackers among the callbacks; of sound, or of no image, nothing.

    What cannot be written is a warning.
    """
    if not (len(pictures.images) and drawable(pictures.images)):
        return
    grid = image_grid(pictures)
    with warn_if_lost(f"samples/{name}-{step:06d}.png could not be written"):
        save_grid(grid, folder / "samples", name, step)
    to_trackers(callbacks, grid, f"{name}/samples", step)
