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
    """Base above fine-tuned, of one noise each; beside each image what was read, green where it is the word asked for.

    Args:
        path: of the picture; its last line counts the right readings.
        words: the word asked for, above each pair.
        base, tuned: images, (N, 3, H, W) in [0, 1], N = len(words).
        readings: name of a recogniser → what it read in the base's and in the tuned images.
    """
    size, font, bold = to_image(base[0]).size, _font("DejaVuSans", 12), _font("DejaVuSans-Bold", 12)
    part = size[1] + LINE + 4
    width, height, margin = size[0] + GAP, LINE + 4 + 2 * part + GAP, GAP + round(font.getlength("fine-tuned")) + GAP
    rows = -(-len(words) // columns)
    sheet = Image.new("RGB", (margin + columns * width, rows * height + 2 * GAP + 2 * LINE), "white")
    pen = ImageDraw.Draw(sheet)
    for i, word in enumerate(words):
        x, y = margin + i % columns * width, GAP + i // columns * height
        pen.text((x, y), f"“{word}”", fill="black", font=bold)
        for k, images in enumerate((base, tuned)):
            top = y + LINE + 4 + k * part
            if x == margin:
                pen.text((GAP, top + size[1] // 2 - 7), ("base", "fine-tuned")[k], fill="black", font=font)
            sheet.paste(to_image(images[i]), (x, top))
            pen.rectangle((x - 1, top - 1, x + size[0], top + size[1]), outline="#bbbbbb")
            seen = {name: (read[k][i], read[k][i] == word) for name, read in readings.items()}
            _write_readings(pen, (x, top + size[1] + 2), size[0], seen)
    for k, line in enumerate(_counts(words, readings)):
        pen.text((GAP, GAP + rows * height + k * LINE), line, fill="black", font=font)
    sheet.save(path)


def _write_readings(pen: ImageDraw.ImageDraw, place: tuple[int, int], width: int, seen: dict[str, tuple[str, bool]]) -> None:
    """`v4: one  v6: ome`, a word that is right in green; each has its share of the width, or more where a word is long."""
    font, bold, start = _font("DejaVuSans", 12), _font("DejaVuSans-Bold", 12), float(place[0])
    for name, (word, right) in seen.items():
        pen.text((start, place[1]), f"{name}: ", fill=GREY, font=font)
        label = font.getlength(f"{name}: ")
        pen.text((start + label, place[1]), word or "–", fill=RIGHT if right else WRONG, font=bold)
        start += max(label + bold.getlength(word) + GAP, width / len(seen))


def _counts(words: list[str], readings: dict[str, tuple[list[str], ...]]) -> list[str]:
    """A sentence about each recogniser."""
    lines = []
    for name, read in readings.items():
        base, tuned = (sum(a == b for a, b in zip(side, words, strict=True)) for side in read)
        lines.append(f"{name} reads {base} of these {len(words)} images right before fine-tuning, and {tuned} after it.")
    return lines


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)
