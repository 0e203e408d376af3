"""Pictures of what is sampled: a grid with prompts and rewards, in `output_dir/samples/` and in the trackers."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from ..data.columns import prompts_of

__all__ = ["SampleImages", "image_grid", "picture", "save_grid", "spare_training", "to_trackers", "warn_if_lost"]

logger = logging.get_logger(__name__)

CELL, CAPTION, FONT_SIZE, MARGIN = 256, 34, 13, 4  # pixels
CHARACTERS = 38  # of a prompt; as many as a cell is wide
COLUMNS = 4


@dataclass(frozen=True)
class SampleImages:
    """Some samples, to be looked at.

    Args:
        images: (N, 3, H, W) in [0, 1], or videos (N, F, 3, H, W), of which the middle frame is shown; float32 on the CPU.
        prompts: N, empty strings where there are none.
        rewards: (N,).
        row: dataset columns of the first sample, with one entry each.
    """

    images: Tensor
    prompts: list[str]
    rewards: Tensor
    row: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def first(cls, count: int, images: Tensor, columns: dict[str, list[Any]], rewards: Tensor) -> SampleImages:
        """The first `count` of a batch."""
        row = {name: values[:1] for name, values in columns.items()}
        shown, scores = (values[:count].detach().cpu().float() for values in (images, rewards))
        return cls(shown, prompts_of(columns)[:count], scores, row)

    @property
    def drawable(self) -> bool:
        """Whether these are pictures; sound is not."""
        return self.images.ndim in (4, 5) and self.images.shape[-3] in (1, 3)


def image_grid(samples: SampleImages) -> Image.Image:
    """All samples side by side, each above its reward and prompt.

    Raises:
        ValueError: if they are no images or videos.
    """
    if not samples.drawable:
        raise ValueError(f"samples of shape {tuple(samples.images.shape)} are no pictures; pass (N, 3, H, W) or (N, F, 3, H, W).")
    pictures = [picture(image) for image in samples.images]
    width, height = CELL + MARGIN, pictures[0].height + MARGIN + CAPTION
    columns = min(COLUMNS, len(pictures))
    grid = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(FONT_SIZE)
    for i, (shown, prompt, reward) in enumerate(zip(pictures, samples.prompts, samples.rewards.tolist(), strict=True)):
        x, y = i % columns * width, i // columns * height
        grid.paste(shown, (x, y))
        caption = f"{reward:.4g}\n{textwrap.shorten(prompt, CHARACTERS, placeholder='…')}"
        draw.text((x, y + shown.height), caption, fill="black", font=font)
    return grid


def picture(image: Tensor, side: int = CELL) -> Image.Image:
    """One sample, its longer side brought to `side` pixels; a small one by repeating pixels, which are what one wants to see."""
    frame = image[len(image) // 2] if image.ndim == 4 else image
    values = (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).expand(-1, -1, 3).numpy()
    shown = Image.fromarray(values)
    scale = side / max(shown.size)
    size = (max(round(shown.width * scale), 1), max(round(shown.height * scale), 1))
    return shown.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def save_grid(grid: Image.Image, folder: Path, name: str, step: int) -> None:
    """As `<name>-<step>.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / f"{name}-{step:06d}.png")


def to_trackers(callbacks: Sequence[TrainerCallback], grid: Image.Image, name: str, step: int) -> None:
    """Hand a grid to the trackers that `report_to` names; one that fails gets a warning, and the others still get theirs."""
    for callback in callbacks:
        with warn_if_lost(f"{name} could not be written to {type(callback).__name__}"):
            _to_tracker(callback, grid, name, step)


def _to_tracker(callback: TrainerCallback, grid: Image.Image, name: str, step: int) -> None:
    # The trackers' modules are those that the host has imported and started.
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        callback.tb_writer.add_image(name, np.asarray(grid), step, dataformats="HWC")
    elif isinstance(callback, WandbCallback):
        _log_image(callback._wandb, name, grid, step)
    elif isinstance(callback, TrackioCallback):
        _log_image(callback._trackio, name, grid, step)


def _log_image(tracker: Any, name: str, grid: Image.Image, step: int) -> None:
    tracker.log({name: tracker.Image(grid), "train/global_step": step})


def spare_training(callbacks: Sequence[TrainerCallback]) -> None:
    """From here on what a tracker cannot write is a warning; one that cannot be started is an error still, before training."""
    for callback in callbacks:
        if isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values())):
            for event in ("on_log", "on_evaluate", "on_save", "on_train_end"):
                if event not in vars(callback):
                    setattr(callback, event, _warning(getattr(callback, event), f"{type(callback).__name__}.{event} has failed"))


def _warning(method: Callable[..., Any], what: str) -> Callable[..., Any]:
    def inner(*args: Any, **kwargs: Any) -> Any:
        with warn_if_lost(what):
            return method(*args, **kwargs)

    return inner


@contextmanager
def warn_if_lost(what: str) -> Iterator[None]:
    """Any error within is a warning that begins with `what`: training does not end for a picture or a card."""
    try:
        yield
    except Exception as error:  # trackers raise whatever their networks and disks do
        logger.warning(f"{what} ({type(error).__name__}: {error}).")
