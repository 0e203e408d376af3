"""What `make words` draws: grids of words, and pairs of base and fine-tuned with what each recogniser read."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SCALE, GAP, LINE = 4, 10, 17
RIGHT, WRONG, GREY = "#1a7f37", "#c62828", "#555555"


def to_image(image: Tensor, scale: int = SCALE) -> Image.Image:
    """(3, H, W) in [0, 1], enlarged, pixels as squares."""
    pixels = (255 * image.mean(0).clamp(0, 1)).round().byte().numpy()
    return Image.fromarray(pixels).resize((scale * pixels.shape[1], scale * pixels.shape[0]), Image.Resampling.NEAREST)


def save_grid(images: Tensor, path: Path, columns: int = 8, scale: int = 3) -> None:
    """Images (N, 3, H, W) in [0, 1], row by row, with a thin border."""
    bordered = np.pad(images.mean(1).clamp(0, 1).numpy(), ((0, 0), (1, 1), (1, 1)), constant_values=0.5)
    rows = [np.concatenate(bordered[i : i + columns], axis=1) for i in range(0, len(bordered) - columns + 1, columns)]
    grid = Image.fromarray((255 * np.concatenate(rows)).round().astype(np.uint8))
    grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST).save(path)


def save_pairs(
    path: Path, words: list[str], base: Tensor, tuned: Tensor, readings: dict[str, tuple[list[str], ...]], columns: int = 4
) -> None:
    """Base above fine-tuned, of one seed each; below each image what was read, green where it is the word asked for.

    Args:
        words: the word asked for, above each pair.
        base, tuned: images, (N, 3, H, W) in [0, 1], N = len(words).
        readings: name of a recogniser → what it read in the base's and in the tuned images.
    """
    size = to_image(base[0]).size
    width, part = size[0] + GAP, size[1] + LINE * len(readings) + 4
    height = LINE + 4 + 2 * part + GAP
    rows = -(-len(words) // columns)
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    pen, font, bold = ImageDraw.Draw(sheet), _font("DejaVuSans", 12), _font("DejaVuSans-Bold", 12)
    for i, word in enumerate(words):
        x, y = GAP + i % columns * width, GAP + i // columns * height
        pen.text((x, y), f"“{word}”", fill="black", font=bold)
        for k, images in enumerate((base, tuned)):
            top = y + LINE + 4 + k * part
            sheet.paste(to_image(images[i]), (x, top))
            pen.rectangle((x - 1, top - 1, x + size[0], top + size[1]), outline="#bbbbbb")
            label = ("base", "fine-tuned")[k]
            for line, (name, read) in enumerate(readings.items()):
                seen, place = read[k][i], top + size[1] + 2 + line * LINE
                pen.text((x, place), f"{label}, {name}: ", fill=GREY, font=font)
                start = x + font.getlength(f"{label}, {name}: ")
                pen.text((start, place), seen or "–", fill=RIGHT if seen == word else WRONG, font=bold)
    sheet.save(path)


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)
