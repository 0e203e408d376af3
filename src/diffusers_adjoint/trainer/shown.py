"""The images that a trainer shows: those of its last rollout and of its last evaluation."""

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
    """The last images of each kind, for grids and the model card; no measurement depends on them.

    Args:
        trained: images of the last rollout on the main process, or a function that makes them when they are first shown.
        evaluated: images of the last evaluation. `None` until there is one, and reset when a call of `train` begins and after the
            first update of a run, because the images before show another model.
        base: images of the last evaluation before the first update.
    """

    trained: SampleImages | Callable[[], SampleImages] | None = None
    evaluated: SampleImages | None = None
    base: SampleImages | None = None

    def of_training(self) -> SampleImages | None:
        """The images of the last rollout, which are made at the first call."""
        if not isinstance(self.trained, SampleImages | None):
            self.trained = self.trained()
        return self.trained

    def for_card(self) -> SampleImages:
        """The images of the last evaluation, else of the last rollout, else none, with shape (0, 3, 1, 1)."""
        return self.evaluated or self.of_training() or SampleImages(torch.zeros(0, 3, 1, 1), [], torch.zeros(0))

    def before(self) -> Tensor | None:
        """The base's images for the same prompts and seeds as the card's, (N, …); `None` unless both were evaluated."""
        if self.base is None or self.evaluated is None or self.base is self.evaluated:
            return None
        return self.base.images if self.base.prompts == self.evaluated.prompts else None


def show(pictures: SampleImages, name: str, step: int, folder: Path, callbacks: Sequence[TrainerCallback]) -> None:
    """Save a grid of the images as `folder`/samples/`name`-`step`.png, and send it to the trackers among the callbacks.

    Does nothing for sound, or without images. A grid that cannot be written only causes a warning.
    """
    if not (len(pictures.images) and drawable(pictures.images)):
        return
    grid = image_grid(pictures)
    with warn_if_lost(f"samples/{name}-{step:06d}.png could not be written"):
        save_grid(grid, folder / "samples", name, step)
    to_trackers(callbacks, grid, f"{name}/samples", step)
