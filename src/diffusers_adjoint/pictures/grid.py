"""Samples side by side: a grid with rewards and prompts, or a strip without."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .pixels import drawable, fitted
from .samples import SampleImages

__all__ = ["FONT_SIZE", "MARGIN", "image_grid", "save_grid", "strip"]

CELL, STRIP_CELL, CAPTION, FONT_SIZE, MARGIN = 256, 160, 34, 13, 4  # pixels
CHARACTERS = 38  # of a prompt that fit into the width of a cell
COLUMNS = 4


def image_grid(samples: SampleImages) -> Image.Image:
    """All samples side by side, each above its reward and prompt.

    Raises:
        ValueError: if they are neither images nor videos.
    """
    if not drawable(samples.images):
        raise ValueError(f"samples of shape {tuple(samples.images.shape)} are not images; pass (N, 3, H, W) or (N, F, 3, H, W).")
    pictures = [fitted(image, CELL) for image in samples.images]
    prompts = [textwrap.shorten(prompt, CHARACTERS, placeholder="…") for prompt in samples.prompts]
    captions = [f"{reward:.4g}\n{prompt}" for reward, prompt in zip(samples.rewards.tolist(), prompts, strict=True)]
    cell = CELL + MARGIN, pictures[0].height + MARGIN + CAPTION
    return _in_cells(pictures, captions, min(COLUMNS, len(pictures)), cell)


def strip(images: Tensor) -> Image.Image | None:
    """Samples side by side: images (N, C, H, W), or the middle frames of videos (N, F, C, H, W), C 1 or 3; `None` for sound."""
    if not drawable(images):
        return None
    pictures = [fitted(image.nan_to_num(0.5, 0.5, 0.5), STRIP_CELL) for image in images]
    cell = pictures[0].width + MARGIN, pictures[0].height
    joined = _in_cells(pictures, [""] * len(pictures), len(pictures), cell)
    return joined.crop((0, 0, joined.width - MARGIN, joined.height))


def _in_cells(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int, cell: tuple[int, int]) -> Image.Image:
    """Images row by row on white, each at the upper left of a cell of (width, height) pixels, with its caption below."""
    width, height = cell
    grid = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(FONT_SIZE)
    for i, (shown, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = i % columns * width, i // columns * height
        grid.paste(shown, (x, y))
        draw.text((x, y + shown.height), caption, fill="black", font=font)
    return grid


def save_grid(grid: Image.Image, folder: Path, name: str, step: int) -> None:
    """Save a grid as `<folder>/<name>-<step>.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / f"{name}-{step:06d}.png")
